"""The text of a pipeline's YAML file, and what it lacks."""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import write_text
from rlhf_recipes.core.yaml import parse_yaml
from rlhf_recipes.pipeline.init.data import DataFile, inspect_data
from rlhf_recipes.pipeline.init.model import Model, inspect_model
from rlhf_recipes.pipeline.init.sizes import Lengths, Training, choose_lengths, plan_ppo, plan_training, too_long
from rlhf_recipes.rewards.matching import accepted_answers

import datasets
import torch

Keys = list[tuple[str, Any, str]]
"""Keys, values and comments."""
_PLAIN = re.compile(r"[\w./-]+")  # texts without quotes, where YAML reads them as texts
_SMALL = 50  # held-out prompts: of fewer, one answer says little
_SHORT = 5  # words of an answer that a function can compare


def init_pipeline(path: Path, model: str, data: Sequence[str], gpu_memory: float | None) -> Iterator[str]:
    """Write a pipeline for a model and data; yield what was found, line by line.

    Args:
        path: the file to write, which must not exist.
        model: on the Hub, or a folder.
        data: files.
        gpu_memory: GB of the card; None for that of this machine, if it has one.

    Raises:
        RecipeError: if the file exists, or the model or the data cannot be read.
    """
    if path.exists():
        raise RecipeError(f"--init: {path}: exists. Fix: name another file, or delete it first")
    datasets.disable_progress_bars()
    if gpu_memory is None and torch.cuda.is_available():
        gpu_memory = torch.cuda.get_device_properties(0).total_memory // 2**29 / 2
    found = inspect_model(model)
    yield f"{model}: {'; '.join(found.findings)}"
    files = []
    for name in dict.fromkeys(data):
        files.append(inspect_data(name, found))
        yield f"{name}: {files[-1].finding()}"
    draft = _Draft(path, found, files, gpu_memory)
    text = draft.text()
    yield f"stages: {', '.join(draft.names)}"
    yield from draft.left_out()
    yield from draft.missing()
    write_text(path, text)
    yield f"{path}: written. Look at what it does, then run it:"
    if found.has_plan:
        yield f"  python recipes/plan.py --config {shlex.quote(str(path))}"
    yield f"  python recipes/pipeline.py --config {shlex.quote(str(path))} --dry-run"
    yield f"  python recipes/pipeline.py --config {shlex.quote(str(path))}"


@dataclass
class _Draft:
    """A pipeline's file in the making."""

    path: Path
    model: Model
    files: list[DataFile]
    gpu_memory: float | None
    names: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.lengths: Lengths = choose_lengths(self.files, self.model, self.gpu_memory is not None)
        self.compared = self._of("pairs", "rankings")
        self.demonstrations = self._of("demonstrations") or self.compared or self._of("plain text")
        self.prompts = self._of("prompts") or self.compared or self._of("demonstrations")
        references = [file for file in self._of("prompts") if file.references]
        self.function = not self.compared and bool(references) and all(map(_has_short_answers, references))
        self.prompts = references if self.function else self.prompts
        # With nothing but prompts, people rank the model's own answers
        self.people = not self.demonstrations and not self.compared and not self.function
        self.by_rankings = self.compared or (self.prompts if self.people else [])

    def _of(self, *roles: str) -> list[DataFile]:
        return [file for file in self.files if file.role in roles]

    def text(self) -> str:
        """Return the file."""
        stages = ""
        if self.demonstrations:
            stages += self._trained("sft", self.demonstrations, 2e-4 if self._is_large() else 5e-4)
        start: Keys = [("start_from", "{sft}", "the policy of SFT")] if self.demonstrations else []
        if self.people:
            stages += self._sample("base") + self._rank()
        if self.by_rankings:
            stages += self._trained("reward", self.by_rankings, 1e-4, start)
        if (self.by_rankings or self.function) and self.prompts:
            stages += self._ppo(start)
        if self.by_rankings:
            stages += self._trained(
                "dpo",
                self.by_rankings,
                1e-5 if self._is_large() else 1e-4,
                [*start, ("beta", 0.1, "price of leaving that policy")],
            )
        if not self.by_rankings and not self.function and self.prompts:
            stages += self._sample("sft")
        if self.prompts:
            stages += self._evaluate()
        return self._head() + stages

    def left_out(self) -> Iterator[str]:
        """Yield how many rows are too long for the model or the machine.

        Raises:
            RecipeError: if all rows of a file are.
        """
        for file in self.files:
            count, sample = too_long(file, self.lengths)
            longest = f"{self.lengths.whole} tokens ({self.lengths.prompt} of a prompt)"
            if count == sample:
                raise RecipeError(f"{file.path}: all rows are longer than {longest}. Fix: shorten them, or use another model")
            if count > 0.06 * sample:
                yield (
                    f"warning: {file.path}: {count} of {sample} rows are longer than {longest}, and will be left out; raise "
                    "`max_length` and `max_prompt_length` if memory and context allow"
                )

    def missing(self) -> Iterator[str]:
        """Yield what the data do not serve, and how to get there."""
        if not self.demonstrations:
            yield "missing for sft: demonstrations. PPO starts from the model as it is; add them with another --data"
        if not self.prompts:
            yield "missing for evaluate: prompts. Add a file with a column `prompt`"
        if self.people:
            yield f"  `rank` waits for you: `python recipes/label.py --store {self._store}` is a page to rank the answers on"
        elif not self.compared:
            what = "reward and dpo" if self.function else "reward, ppo and dpo"
            yield f"missing for {what}: pairs or rankings of answers"
        if not self.by_rankings and not self.function and self.prompts:
            groups = f"{self._folder}/sample/groups.jsonl"
            yield f"  `sample` writes answers to rank: `python recipes/label.py --data {groups}`, export them with"
            store = groups.replace(".jsonl", ".labels.sqlite")
            yield f"  `python recipes/label.py --store {store} --export my-labels`, and run --init again with"
            data = " ".join(f"--data {file.path}" for file in self.files)
            yield f"  `{data} --data my-labels/rankings.jsonl`"
        if len({file.conversational for file in {id(f): f for f in self.demonstrations + self.prompts}.values()}) > 1:
            yield "warning: some files have messages, others plain texts: a policy that learnt one answers the other badly"

    def _is_large(self) -> bool:
        """Return whether there are rows for the small learning rates of long runs."""
        return sum(file.usable for file in self.files) >= 3000

    @property
    def _folder(self) -> str:
        return f"runs/{self.path.stem}"

    @property
    def _store(self) -> str:
        return f"{self._folder}.labels.sqlite"

    def _head(self) -> str:
        """Return the keys of the file, and of all stages."""
        on_gpu = self.gpu_memory is not None
        found = [f"# {file.path}: {file.finding()}" for file in self.files]
        header = [
            f"# {', '.join(self.names)} of {self.model.name}, written by `recipes/pipeline.py --init`. Change what you like.",
            *found,
            f"# Launch: python recipes/pipeline.py --config {shlex.quote(str(self.path))}",
        ]
        shared: Keys = [
            ("model_name_or_path", self.model.name, ""),
            ("dtype", "bfloat16" if on_gpu else "float32", "" if on_gpu else "for a CPU; on a GPU bfloat16"),
        ]
        if self.model.eos_token:
            shared.append(("eos_token", self.model.eos_token, "ends an answer"))
        if on_gpu:
            shared += [("load_in_4bit", True, "the base; what is trained is LoRA"), ("use_bnb_nested_quant", True, "")]
        shared += [
            ("use_peft", True, "LoRA: a few per mille of the weights"),
            ("lora_r", 16, ""),
            ("lora_alpha", 32, ""),
            ("lora_dropout", 0.0, ""),
            ("lora_target_modules", "all-linear", ""),
            ("max_length", self.lengths.whole, "tokens of a prompt with its answer"),
            ("max_prompt_length", self.lengths.prompt, "tokens"),
            ("max_completion_length", self.lengths.answer, "tokens of a sampled answer"),
            ("long_rows", "drop", "longer rows are counted, and left out"),
            ("bad_rows", "drop" if any(file.bad for file in self.files) else "error", "rows that cannot be used"),
            ("seed", 0, ""),
        ]
        used = {"max_length": {"sft", "reward", "dpo"}, "max_prompt_length": {"ppo", "sample", "evaluate"}}
        used["max_completion_length"] = used["max_prompt_length"]
        used["eos_token"] = {"sft"} if "sft" in self.names else {"ppo"}
        shared = [key for key in shared if used.get(key[0], {*self.names}) & {*self.names}]
        card = (
            f"gpu_memory: {self.gpu_memory:g} # GB of your card: batch sizes are made to fit\n"
            if on_gpu and self.model.has_plan
            else ""
        )
        arguments = "\n# For every stage that has the key, where its own `config` has not\narguments:\n" + _lines(shared, 2)
        return "\n".join(header) + f"\n\noutput_dir: {_scalar(self._folder)}\n{card}{arguments}\nstages:\n"

    def _trained(self, name: str, files: list[DataFile], rate: float, first: Sequence[tuple[str, Any, str]] = ()) -> str:
        rows = sum(file.usable - file.held_out for file in files)
        prompts = sum(min(file.prompts or file.usable, file.usable) - file.held_out for file in files)
        training = plan_training(rows, rows if name == "sft" else max(2, prompts))
        keys: Keys = [
            *first,
            ("datasets", [{"path": "{rank}/rankings.jsonl"}], "")
            if name != "sft" and self.people
            else ("datasets", [file.source() for file in files], "the last rows are for `evaluate`"),
            ("test_split_size", training.held_out, "held out for the loss during training"),
            ("num_train_epochs", training.epochs, ""),
            ("learning_rate", rate, ""),
            ("lr_scheduler_type", "cosine", ""),
            ("warmup_steps", training.warmup, f"of about {training.steps}"),
            *self._batches(training),
        ]
        compared = "rankings" if self.people else _what(files, compared=True)
        titles = {
            "sft": f"Supervised fine-tuning on {_what(files)}",
            "reward": f"A reward model of {compared}",
            "dpo": f"DPO: the alternative to PPO, on the same {compared}",
        }
        return self._stage(name, titles[name], keys)

    def _ppo(self, start: Keys) -> str:
        prompts = sum(max(1, min(file.prompts, file.usable) - file.held_out) for file in self.prompts)
        training = plan_ppo(prompts)
        path = "{reward}" if self.by_rankings else "rlhf_recipes.rewards.normalised_match"
        keys: Keys = [
            *start,
            ("reward_funcs", [path], "" if self.by_rankings else "1 for the reference, up to case and punctuation; else 0"),
        ]
        if self.by_rankings:
            keys.append(("missing_eos_penalty", 1.0, "for an answer that does not end in max_completion_length"))
        keys += [
            ("datasets", [file.source() for file in self.prompts], ""),
            ("test_split_size", training.held_out, "prompts held out for the score during training"),
            ("num_iterations", 2, f"passes over each {training.batch} answers, a step each"),
            ("max_steps", training.steps, ""),
            ("value_warmup_steps", training.warmup, "of them, in which only the critic learns"),
            ("kl_coef", 0.05, "price of leaving the policy that it starts from"),
            ("critic", "shared", ""),
            ("learning_rate", 1e-5 if self.gpu_memory else 1e-4, ""),
            ("lr_scheduler_type", "constant_with_warmup", ""),
            ("warmup_steps", training.warmup, ""),
            *self._batches(training),
        ]
        return self._stage("ppo", "PPO: sampled answers, paid by the reward", keys)

    def _batches(self, training: Training) -> Keys:
        on_gpu = self.gpu_memory is not None
        micro = 1 if on_gpu else min(4, training.batch)
        keys: Keys = [
            (
                "per_device_train_batch_size",
                micro,
                "`gpu_memory` changes both, and keeps their product" if on_gpu and self.model.has_plan else "",
            ),
            ("gradient_accumulation_steps", training.batch // micro, ""),
            ("gradient_checkpointing", on_gpu, ""),
        ]
        if on_gpu:
            keys.append(("optim", "paged_adamw_8bit", ""))
        return [
            *keys,
            ("per_device_eval_batch_size", 1 if on_gpu else 4, ""),
            ("eval_strategy", "steps", ""),
            ("eval_steps", training.evaluate, ""),
            ("logging_steps", training.log, ""),
            ("save_strategy", "steps", "a stopped run resumes from the last"),
            ("save_steps", training.evaluate, ""),
            ("save_total_limit", 2, ""),
            ("report_to", "none", ""),
        ]

    def _sample(self, policy: str) -> str:
        keys: Keys = [
            ("policies", {policy: None if policy == "base" else f"{{{policy}}}"}, ""),
            ("datasets", [file.source() for file in self.prompts], ""),
            ("num_completions", 4, "different answers to each prompt"),
            ("batch_size", 8, ""),
        ]
        return self._stage("sample", "Answers for people to rank with recipes/label.py: then there can be PPO and DPO", keys)

    def _rank(self) -> str:
        keys: Keys = [
            ("groups", "{sample}", ""),
            ("labeller", {"store": self._store}, f"python recipes/label.py --store {self._store}"),
        ]
        return self._stage("rank", "Your rankings of them: until they are complete, the pipeline stops here", keys)

    def _evaluate(self) -> str:
        trained = [name for name in ("sft", "dpo", "ppo") if name in self.names]
        rewards: list[dict[str, Any]] = []
        if self.by_rankings:
            rewards = [{"path": "{reward}", "name": "reward model", "trained": ["ppo", "dpo"]}]
        elif self.function:
            rewards = [{"path": "rlhf_recipes.rewards.normalised_match", "name": "right", "trained": ["ppo"]}]
        keys: Keys = [
            ("policies", {"base": None} | {name: f"{{{name}}}" for name in trained}, ""),
            ("compare_with", "sft" if "sft" in trained else "base", ""),
            ("eval_datasets", [file.source(held_out=True) for file in self.prompts], self._about_held_out()),
            ("num_answers", 1 if sum(file.held_out for file in self.prompts) > _SMALL else 4, "sampled to each prompt"),
            ("batch_size", 8, ""),
        ]
        if rewards:
            keys.append(("rewards", rewards, ""))
        return self._stage("evaluate", "All policies on the same held-out prompts, and the report", keys)

    def _about_held_out(self) -> str:
        leaked = sum(file.leaked for file in self.prompts)
        return f"of their prompts {leaked} are trained on too" if leaked else "no stage was trained on these"

    def _stage(self, name: str, title: str, keys: Keys) -> str:
        self.names.append(name)
        return f"\n  # {title}\n  - name: {name}\n    config:\n" + _lines(keys, 6)


def _what(files: list[DataFile], compared: bool = False) -> str:
    roles = " and ".join(dict.fromkeys(file.role for file in files))
    return roles if compared else {"pairs": "the chosen answers", "rankings": "the best answers"}.get(roles, roles)


def _has_short_answers(file: DataFile) -> bool:
    """Return whether most references are short enough to be compared as text."""
    words = sorted(len(max(accepted_answers(one), key=len, default="").split()) for one in file.references)
    return words[len(words) // 2] <= _SHORT


def _lines(keys: Keys, indent: int) -> str:
    """Return keys as lines of YAML."""
    text = ""
    for key, value, comment in keys:
        before = " " * indent
        written = _scalar(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text += f"{before}{key}:{f' # {comment}' if comment else ''}\n"
            text += "".join(f"{before}  - {_scalar(item)}\n" for item in value)
            continue
        text += f"{before}{key}: {written}{f' # {comment}' if comment else ''}\n"
    return text


def _scalar(value: Any) -> str:
    """Return a value in YAML's flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and parse_yaml(value) == value:
        return value
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.1e}"
    return json.dumps(value, ensure_ascii=False)
