"""Model cards: what a result is, how to load it and how it was made."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.files import RECIPE, read_json, write_text
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.stages import STAGES, Stage

from huggingface_hub import ModelCardData

CARD = "README.md"
"""File name of the model card, as on the Hub."""

_ARGUMENTS = ("start_from", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "learning_rate", "num_train_epochs")
_ARGUMENTS += ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed")
_UNKNOWN = Stage(arguments=())  # not in the registry
_UNSET = (None, [], "", -1)  # besides False; 0 is a value
_NOT_RESULTS = ("runtime", "per_second", "num_tokens", "epoch", "clip_ratio", "step_time", "/min_", "/max_")
_NOT_RESULTS += ("learning_rate", "grad_norm", "total_flos", "step")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_USE = {
    ("policy", "adapter"): """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")""",
    ("policy", "full model"): """from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
print(generator([{{"role": "user", "content": "..."}}], max_new_tokens=128, return_full_text=False)[0]["generated_text"])""",
    ("reward model", "adapter"): """from rlhf_recipes.rewards.saved import load_reward_adapter

reward = load_reward_adapter(model, "{name}", "reward", tokenizer)  # on a base in memory, beside other adapters
print(reward([[{{"role": "user", "content": "..."}}]], [[{{"role": "assistant", "content": "..."}}]]))""",
    ("reward model", "full model"): """from transformers import AutoTokenizer
from rlhf_recipes.rewards.saved import load_full_reward

reward = load_full_reward("{name}", "reward", AutoTokenizer.from_pretrained("{name}"))
print(reward([[{{"role": "user", "content": "..."}}]], [[{{"role": "assistant", "content": "..."}}]]))""",
}


def write_card(folder: str | Path, location: str | Path | None = None) -> None:
    """Write the model card of a result from its `recipe.json`, over the trainer's.

    Earlier stages are read from their folders, where these exist. An ensemble has no card; its members have. `location` is
    where the result will be loaded from, if not from this folder: another one, or a Hub name.
    """
    folder = Path(folder)
    record = read_json(folder / RECIPE)
    if "members" not in record:
        stages = record.get("stages") or lineage(folder)  # a merged model records those of its adapter
        write_text(folder / CARD, _card(record, stages, display_name(location or folder)))


def lineage(folder: str | Path) -> list[dict[str, Any]]:
    """Return the records of all stages that led to a result, the earliest first.

    A stage without a record has only its folder's name.
    """
    records: dict[str, dict[str, Any]] = {}
    _collect(Path(folder), records)
    return list(records.values())


def _collect(folder: Path, records: dict[str, dict[str, Any]], descendants: tuple[str, ...] = ()) -> None:
    key = str(folder.resolve())
    if key in records or key in descendants:
        return
    is_checkpoint = folder.name.startswith("checkpoint-")  # has the record of its run
    record = read_json(folder / RECIPE) or (read_json(folder.parent / RECIPE) if is_checkpoint else {})
    for stage in record.get("stages", ()):
        records.setdefault(stage.get("folder"), stage)
    for parent in () if "stages" in record else record.get("parents", ()):
        _collect(Path(parent), records, (*descendants, key))
    kept = {name: value for name, value in record.items() if name not in ("log", "stages")}
    records[key] = {"folder": display_name(folder), **kept}


def display_name(path: str | Path) -> str:
    """Return the last part of an absolute path, and other names unchanged."""
    return Path(path).name if Path(path).is_absolute() else str(path)


def _card(record: dict[str, Any], stages: list[dict[str, Any]], location: str) -> str:
    kind = STAGES.get(stages[-1].get("recipe") if stages else None, _UNKNOWN).output
    name = (record.get("base_model") or {}).get("name") or "its base"
    form, origin = "full model", f"{display_name(name)}, with all weights trained"
    if record.get("recipe") == "merge":
        origin = f"{display_name(name)} with a LoRA adapter merged into it"
    elif recorded_argument(record, "use_peft"):
        form, origin = "adapter", f"an adapter on {display_name(name)}"
    sections = [
        f"# {Path(location).name}",
        f"A {kind}: {origin}, by rlhf-recipes on [TRL](https://github.com/huggingface/trl).",
        "## Use",
        f"```python\n{_USE[kind, form].format(name=location, base=display_name(name))}\n```",
        "## How it was made",
        *(_stage(number, stage) for number, stage in enumerate(stages, start=1)),
        *_metrics(stages),
        *_merge_check(record, stages),
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in (record.get("versions") or {}).items()),
    ]
    metadata = ModelCardData(
        base_model=name if _HUB_NAME.fullmatch(name) and not Path(resolve_path(name)).exists() else None,
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="text-generation" if kind == "policy" else "text-classification",
        tags=["rlhf-recipes", "trl"] + ["reward-model"] * (kind == "reward model") + ["lora"] * (form == "adapter"),
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def recorded_argument(record: dict[str, Any], name: str) -> Any:
    """Return an argument of a run from its record; None if it has none."""
    groups = (record.get("arguments") or {}).values()
    return next((group[name] for group in groups if isinstance(group, dict) and name in group), None)


def _stage(number: int, record: dict[str, Any]) -> str:
    """Return the list item of one stage: cost, data, and the arguments that matter."""
    if "recipe" not in record:
        return f"{number}. `{record['folder']}`, which has no recipe.json."
    run, stage = record.get("run") or {}, STAGES.get(record["recipe"], _UNKNOWN)
    cost = f", {run['steps']} steps in {run['wall_time_s']:.0f} s" if run.get("steps") else ""
    paper = f" ([arXiv](https://arxiv.org/abs/{stage.paper}))" if stage.paper else ""
    lines = [f"{number}. **{record['recipe']}**{paper}, `{record['folder']}`{cost}", *_data(record)]
    inherited = ("lora_",) if recorded_argument(record, "start_from") else ()  # the parent adapter decides these
    names = [name for name in (*_ARGUMENTS, *stage.card_arguments) if not name.startswith(inherited)]
    values = {name: recorded_argument(record, name) for name in names}
    values = [f"`{name}: {_format(value)}`" for name, value in values.items() if value is not False and value not in _UNSET]
    if values:
        lines.append(f"   - {', '.join(values)}")
    return "\n".join(lines)


def _format(value: Any) -> str:
    """Return a YAML value as one text, without absolute paths."""
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    if isinstance(value, dict):
        return f"{_format(value.get('path'))}" + (f" x {value['weight']}" if "weight" in value else "")
    return display_name(value) if isinstance(value, str) else str(value)


def _data(record: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each split: its rows and sources."""
    for split, report in (record.get("data") or {}).items():
        if isinstance(report, dict) and report.get("sources"):
            use = {"train": "trained on", "eval": "evaluated on"}.get(split, split)
            sources = ", ".join(display_name(source["source"]) for source in report["sources"])
            yield f"   - {use}: {report.get('rows', '?')} rows of {sources}"


def _metrics(stages: list[dict[str, Any]]) -> list[str]:
    """Return a table of the metrics of the last stage that trained."""
    last = next((stage for stage in reversed(stages) if stage.get("metrics")), {})
    numbers = {name: value for name, value in (last.get("metrics") or {}).items() if isinstance(value, int | float)}
    numbers = {name: value for name, value in numbers.items() if not any(word in name for word in _NOT_RESULTS)}
    held_out = {name: value for name, value in numbers.items() if name.startswith("eval_")} or numbers
    if not held_out:
        return []
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in held_out.items())
    return [f"## Metrics of the last {last['recipe']}", f"| | |\n|---|---|\n{rows}"]


def _merge_check(record: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    """Return the section on how far a merged model differs from its adapter."""
    check = record.get("check")
    if not check:
        return []
    bits = next((bits for stage in stages for bits in (4, 8) if recorded_argument(stage, f"load_in_{bits}bit")), None)
    text = (
        f"The {check['what']} of the saved model were compared with those of the adapter on its base, in {check['dtype']}. "
        f"They differ by {check['difference']:.1e} of their deviation (at most {check['tolerance']:.0e} is allowed)."
    )
    if bits:
        text += f" The adapter was trained on the base in {bits} bits. Here the base has full precision, so answers may differ."
    return ["## Merging", text]
