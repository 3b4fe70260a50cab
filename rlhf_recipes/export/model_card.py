"""Model cards: what a result is, how it is loaded, and how it came about, from the records of its stages."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import RECIPE, read_json, write_text
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.stages import STAGES, Stage

from huggingface_hub import ModelCardData

CARD = "README.md"
"""The model card's file, as on the Hub."""

_ARGUMENTS = ("start_from", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "learning_rate", "num_train_epochs")
_ARGUMENTS += ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed")
_UNKNOWN = Stage(arguments=())  # a stage of others
_UNSET = (None, [], "", -1)  # 0 is a value, and False is not
_OF_TRAINING = ("runtime", "per_second", "num_tokens", "epoch", "clip_ratio", "step_time", "/min_", "/max_")
_OF_TRAINING += ("learning_rate", "grad_norm", "total_flos", "step")

_ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")

_LOADING = {
    ("policy", False): """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")""",
    ("policy", True): """from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
print(generator([{{"role": "user", "content": "..."}}], max_new_tokens=128, return_full_text=False)[0]["generated_text"])""",
    (
        "reward model",
        False,
    ): """from rlhf_recipes.rewards.saved import load_reward_adapter  # on a base in memory, beside other adapters

reward = load_reward_adapter(model, "{name}", "reward", tokenizer)
print(reward([[{{"role": "user", "content": "..."}}]], [[{{"role": "assistant", "content": "..."}}]]))""",
    ("reward model", True): """from transformers import AutoTokenizer
from rlhf_recipes.rewards.saved import load_full_reward

reward = load_full_reward("{name}", "reward", AutoTokenizer.from_pretrained("{name}"))
print(reward([[{{"role": "user", "content": "..."}}]], [[{{"role": "assistant", "content": "..."}}]]))""",
}


def write_card(folder: str | Path, location: str | Path | None = None) -> None:
    """Writes the model card of the result in a folder over the one that is there, from its `recipe.json`.

    Of an ensemble nothing is written: its members have cards.

    Args:
        folder: with `recipe.json`; the stages that it began with are found by their folders, as far as they are there.
        location: where it will be read from, if not from this folder: another one, or a name on the Hub.
    """
    folder = Path(folder)
    record = read_json(folder / RECIPE)
    if "members" in record:
        return
    stages = record.get("stages") or lineage(folder)  # of a merged model those of its adapter
    write_text(folder / CARD, _card(record, stages, display_name(location or folder)))


def lineage(folder: str | Path) -> list[dict[str, Any]]:
    """The records of the stages that led to a result, the earliest first and itself last, without their logs.

    Args:
        folder: of the result. Of a stage whose folder is gone, there is the name of it alone.
    """
    found: dict[str, dict[str, Any]] = {}
    _collect(Path(folder), found)
    return list(found.values())


def _collect(folder: Path, found: dict[str, dict[str, Any]], above: tuple[str, ...] = ()) -> None:
    key = str(folder.resolve())
    if key in found or key in above:
        return
    # of a checkpoint, its run's
    record = read_json(folder / RECIPE) or (read_json(folder.parent / RECIPE) if folder.name.startswith("checkpoint-") else {})
    for stage in record.get("stages", ()):  # which may be gone by now
        found.setdefault(stage.get("folder"), stage)
    for parent in () if "stages" in record else record.get("parents", ()):
        _collect(Path(parent), found, (*above, key))
    found[key] = {
        "folder": display_name(folder),
        **{key: value for key, value in record.items() if key not in ("log", "stages")},
    }


def display_name(path: str | Path) -> str:
    """A Hub name or relative path as it is, and of an absolute one its last part: cards are read elsewhere."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _card(record: dict[str, Any], stages: list[dict[str, Any]], location: str) -> str:
    merged = record.get("recipe") == "merge"
    kind = model_kind(stages)
    base = (record.get("base_model") or {}).get("name") or "its base"
    made = f"{display_name(base)} with a LoRA adapter merged into it" if merged else f"an adapter on {display_name(base)}"
    if not merged and not _is_adapter(record):
        made = f"{display_name(base)}, all of whose weights were trained"
    sections = [
        f"# {Path(location).name}",
        f"A {kind}: {made}, by rlhf-recipes on [TRL](https://github.com/huggingface/trl).",
        "## Use",
        f"```python\n{_LOADING[kind, merged or not _is_adapter(record)].format(name=location, base=display_name(base))}\n```",
        "## How it came about",
        *(_stage(number, stage) for number, stage in enumerate(stages, start=1)),
        *_metrics(stages),
        *_check(record, stages),
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in (record.get("versions") or {}).items()),
    ]
    return f"---\n{_metadata(record, kind, base, merged).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def model_kind(stages: list[dict[str, Any]]) -> str:
    """What the last stage made: a "policy" or a "reward model"."""
    return STAGES.get(stages[-1].get("recipe") if stages else None, _UNKNOWN).output


def _metadata(record: dict[str, Any], kind: str, base: str, merged: bool) -> ModelCardData:
    adapter = not merged and _is_adapter(record)
    return ModelCardData(
        base_model=base if _ON_THE_HUB.fullmatch(base) and not Path(resolve_path(base)).exists() else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation" if kind == "policy" else "text-classification",
        tags=["rlhf-recipes", "trl", *(["reward-model"] if kind == "reward model" else []), *(["lora"] if adapter else [])],
    )


def _is_adapter(record: dict[str, Any]) -> bool:
    return bool(_argument(record, "use_peft"))


def _argument(record: dict[str, Any], name: str) -> Any:
    groups = (record.get("arguments") or {}).values()
    return next((group[name] for group in groups if isinstance(group, dict) and name in group), None)


def _stage(number: int, stage: dict[str, Any]) -> str:
    if "recipe" not in stage:
        return f"{number}. `{stage['folder']}`, of which no recipe.json was found."
    run = stage.get("run") or {}
    cost = f", {run['steps']} steps in {run['wall_time_s']:.0f} s" if run.get("steps") else ""
    recipe = stage["recipe"]
    registered = STAGES.get(recipe, _UNKNOWN)
    paper = f" ([arXiv](https://arxiv.org/abs/{registered.paper}))" if registered.paper else ""
    lines = [f"{number}. **{recipe}**{paper}, `{stage['folder']}`{cost}"]
    lines += [f"   - {split}: {text}" for split, text in _data(stage)]
    unread = ("lora_",) if _argument(stage, "start_from") else ()  # the adapter has its parent's
    names = [name for name in (*_ARGUMENTS, *registered.card_arguments) if not name.startswith(unread)]
    values = {name: _argument(stage, name) for name in names}
    set_ones = [f"`{name}: {_brief(value)}`" for name, value in values.items() if value is not False and value not in _UNSET]
    if set_ones:
        lines.append(f"   - {', '.join(set_ones)}")
    return "\n".join(lines)


def _brief(value: Any) -> str:
    """A value of a YAML file, with of absolute paths the last part."""
    if isinstance(value, list):
        return ", ".join(map(_brief, value))
    if isinstance(value, dict):
        return f"{_brief(value.get('path'))}" + (f" x {value['weight']}" if "weight" in value else "")
    return display_name(value) if isinstance(value, str) else str(value)


def _data(stage: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each split, what it was read from and how many rows were left."""
    for split, report in (stage.get("data") or {}).items():
        if isinstance(report, dict) and report.get("sources"):
            sources = ", ".join(display_name(source["source"]) for source in report["sources"])
            yield (
                {"train": "trained on", "eval": "evaluated on"}.get(split, split),
                f"{report.get('rows', '?')} rows of {sources}",
            )


def _metrics(stages: list[dict[str, Any]]) -> list[str]:
    """A table of what the last stage that trained measured at its end."""
    last = next((stage for stage in reversed(stages) if stage.get("metrics")), {})
    numbers = {name: value for name, value in (last.get("metrics") or {}).items() if isinstance(value, int | float)}
    numbers = {name: value for name, value in numbers.items() if not any(word in name for word in _OF_TRAINING)}
    held_out = {name: value for name, value in numbers.items() if name.startswith("eval_")} or numbers
    if not held_out:
        return []
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in held_out.items())
    return [f"## Metrics of the last {last['recipe']}", f"| | |\n|---|---|\n{rows}"]


def _check(record: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    check = record.get("check")
    if not check:
        return []
    bits = next((bits for stage in stages for bits in (4, 8) if _argument(stage, f"load_in_{bits}bit")), None)
    text = (
        f"The {check['what']} of the saved model were compared with those of the adapter on its base, in {check['dtype']}; "
        f"they differ by {check['difference']:.1e} of their deviation (at most {check['tolerance']:.0e} was allowed)."
    )
    if bits:
        text += f" The adapter was trained on the base in {bits} bits; here the base is whole, so answers may differ from then."
    return ["## Merging", text]
