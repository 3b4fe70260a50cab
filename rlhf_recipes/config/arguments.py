"""The dataclasses that a YAML file and the command line fill, and the strict parser that fills them."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from rlhf_recipes.config.launcher import check_launcher_support, current_launcher
from rlhf_recipes.config.trackers import settle_trackers
from rlhf_recipes.core.errors import RecipeError, did_you_mean, one_line
from rlhf_recipes.core.yaml import read_yaml

import torch
import yaml
from jinja2 import TemplateError
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from trl import TrlParser
from trl.scripts.utils import DatasetConfig

COMMAND_LINE = "the command line"


class Launched(NamedTuple):
    """The recipe that this process runs.

    Parameters:
        recipe: its file.
        config: its YAML file.
        values: the fields of all its dataclasses.
    """

    recipe: Path
    config: Path
    values: dict[str, Any]


ORIGIN: ContextVar[str] = ContextVar("origin", default="")  # of the arguments that this process runs with
LAUNCHED: ContextVar[Launched | None] = ContextVar("launched", default=None)
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_OF_ONE_DATASET = ("dataset_config", "column_mapping", "dataset_arguments")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass
class DatasetSource(DatasetConfig):
    """One entry of `datasets` or `eval_datasets`: TRL's `DatasetConfig` and what this project adds to it.

    Parameters:
        path: a Hub name, a local `.json`, `.jsonl`, `.csv` or `.parquet` file (also `.gz`), a directory of such files, a
            dataset saved with `save_to_disk`, or the dotted path of a Python function that returns a dataset.
        column_mapping: column of the file -> the name that it should have (`{"question": "prompt"}`).
        arguments: keyword arguments for the function, where `path` names one.
    """

    column_mapping: dict[str, str] | None = None
    arguments: dict[str, Any] | None = None


@dataclass
class DataArguments:
    """Which data a stage reads. Names that TRL has keep TRL's meaning."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub name, a local file or directory, or the dotted path of a function that returns a dataset. "
            "Excludes `datasets`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    datasets: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "A mixture to train on, each entry with `path` and its options."}
    )
    eval_datasets: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "A mixture to evaluate on, with the same options as `datasets`."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Share (or number) of the training rows to set aside for evaluation, with the run's seed; of pairs and "
            "rankings, of the prompts."
        },
    )
    column_mapping: dict[str, str] | None = field(
        default=None, metadata={"help": "Column of `dataset_name` -> the name that it should have."}
    )
    dataset_arguments: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments for the function that `dataset_name` names."}
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that cannot be used (empty answers, chosen equal to rejected, ...): stop, or "
            "drop and count them.",
            "choices": ["error", "drop"],
        },
    )
    long_rows: str = field(
        default="truncate",
        metadata={
            "help": "What to do with rows longer than `max_length`: cut off their end, drop them, or stop. Each is counted.",
            "choices": ["truncate", "drop", "error"],
        },
    )

    def __post_init__(self):
        if self.dataset_name and self.datasets:
            raise ValueError("Set either `dataset_name` or `datasets`: both are set.")
        if self.eval_datasets and self.test_split_size is not None:
            raise ValueError("`eval_datasets` and `test_split_size` both say what to evaluate on: remove one of them.")
        for key in _OF_ONE_DATASET if self.datasets else ():
            if getattr(self, key):
                raise ValueError(f"`{key}` belongs to `dataset_name`. With `datasets`, set it in each entry that needs it.")


_NEEDS = {
    "help": "YAML files of earlier stages; each is run first if this stage reads its `output_dir` and there is no result there."
}


@dataclass
class RewardArguments:
    """How a reward model is trained and measured, beyond TRL's `RewardConfig`."""

    start_from: str | None = field(
        default=None,
        metadata={"help": "Folder of the SFT adapter whose weights the reward adapter begins with; without it, a fresh one."},
    )
    needs: list[str] = field(default_factory=list, metadata=_NEEDS)
    train_on: str = field(
        default="rankings",
        metadata={
            "help": "`rankings`: each ranking is one element of the batch, pairs being rankings of two. `pairs`: rankings are "
            "expanded, and the column `margin` is read.",
            "choices": ["rankings", "pairs"],
        },
    )
    ensemble_size: int = field(
        default=1, metadata={"help": "Number of reward adapters to train, each with a seed of its own: seed, seed + 1, ..."}
    )
    ensemble_shards: bool = field(
        default=False, metadata={"help": "Whether each adapter of the ensemble trains on a part of the rows instead of all."}
    )
    ensemble_combine: str = field(
        default="mean",
        metadata={
            "help": "The ensemble's score: the mean, the minimum, or the mean less `uncertainty_coef` standard deviations.",
            "choices": ["mean", "min", "uncertainty"],
        },
    )
    uncertainty_coef: float = field(default=1.0, metadata={"help": "For `ensemble_combine: uncertainty`."})
    demonstrations: list[DatasetSource] = field(
        default_factory=list,
        metadata={
            "help": "Demonstrations on which scores are made to have mean 0 and standard deviation 1; without any, the best "
            "answers of the training rows."
        },
    )

    def __post_init__(self):
        if self.ensemble_size < 1:
            raise ValueError(f"ensemble_size: {self.ensemble_size}: must be 1 or more")
        if self.uncertainty_coef < 0:
            raise ValueError(f"uncertainty_coef: {self.uncertainty_coef}: must not be negative")


@dataclass
class PolicyArguments:
    """Where a policy begins, by DPO or PPO."""

    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the SFT adapter that the policy starts as a copy of, and that is the reference. Without it the "
            "policy is the base with a fresh adapter, and the base is the reference."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "What ends an answer; by default what `start_from` was taught, or what the base has."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A .jinja file or a tokenizer with a chat template; by default that of `start_from`, or the base's."},
    )
    needs: list[str] = field(default_factory=list, metadata=_NEEDS)


@dataclass
class PPOArguments(PolicyArguments):
    """Where the policy begins and what PPO rewards, beyond `PPOConfig`."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What scores completions: folders that recipes/reward.py saved and dotted paths of functions, each alone "
            "or as a mapping of `path`, `weight` and `arguments`; their weighted sum is the score."
        },
    )
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Prompts of more tokens are left out and counted, or stop the run (`long_rows: error`)."}
    )
    ptx_dataset: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "Pretraining text, for `ptx_coef`: a mixture of data with the column `text`."}
    )


@dataclass
class SampleArguments:
    """What is sampled, for people or judges to rank."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "name -> the folder of an adapter, or null for the base; several write the completions in turns."},
    )
    num_completions: int = field(default=4, metadata={"help": "Different completions of each prompt."})
    max_attempts: int = field(
        default=4, metadata={"help": "How often a prompt is asked for what it lacks, where completions are alike."}
    )
    temperature: float = field(default=1.0, metadata={"help": "At which completions are sampled."})
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Prompts of more tokens are left out and counted, or stop the run (`long_rows: error`)."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens after which a completion is cut off."})
    batch_size: int = field(default=32, metadata={"help": "Completions that are sampled at once."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(default="runs/sample", metadata={"help": "Where groups.jsonl is written, and gone on with."})

    def __post_init__(self):
        for key, least in (("num_completions", 2), ("max_attempts", 1), ("max_completion_length", 1), ("batch_size", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}: {getattr(self, key)}: must be {least} or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy completions are all alike")


@dataclass
class RankArguments:
    """Which sampled groups are ranked, and by whom."""

    groups: str = field(
        default="runs/sample", metadata={"help": "What recipes/sample.py wrote: its folder, or a file of groups."}
    )
    labeller: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Who ranks: `{store: FILE}` people, by recipes/label.py; `{url: ..., model: ...}` a chat model, as judge "
            "in recipes/evaluate.py; `{path: ..., arguments: ..., noise: 0.4}` a simulated labeller, who likes what a reward "
            "function scores high, with Gumbel noise of this scale."
        },
    )
    num_groups: int | None = field(default=None, metadata={"help": "How many are ranked; by default all."})
    choose: str = field(
        default="random",
        metadata={"help": "Which: at `random`, or by `disagreement` of the ensemble of reward models in `reward`."},
    )
    reward: str | None = field(
        default=None,
        metadata={
            "help": "The folder of an ensemble, for `choose: disagreement`; an empty text: there is none yet, as in a first "
            "round, and they are drawn at random."
        },
    )
    seed: int = field(default=0, metadata={"help": "Of the choice and of the noise."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(default="runs/rank", metadata={"help": "Where rankings.jsonl and rank.json are written."})

    def __post_init__(self):
        if self.choose not in ("random", "disagreement"):
            raise ValueError(f"choose: {self.choose!r}: must be random or disagreement")
        if (self.choose == "disagreement") != (self.reward is not None):
            raise ValueError("reward: names the ensemble for `choose: disagreement`, and goes with that alone")
        if self.num_groups is not None and self.num_groups < 1:
            raise ValueError(f"num_groups: {self.num_groups}: must be 1 or more")


@dataclass
class EvaluateArguments:
    """Which policies are compared, on what, and by which measures."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name -> what it is: the folder of an adapter; null for the base; `{best_of: {policy: sft, n: 4}}` for the "
            "best of n answers of another policy, by the reward named in `reward` (default: the first one trained against). "
            "`{path: FOLDER, optional: true}` is left out, and said so, where there is no such folder."
        },
    )
    compare_with: str = field(
        default="sft", metadata={"help": "The policy against which win rates and differences of the others are measured."}
    )
    kl_reference: str | None = field(
        default=None, metadata={"help": "The policy from which KL is measured; by default that of `compare_with`."}
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What scores the answers, as in `reward_funcs` of recipes/ppo.py: a path, or a mapping of `path` and "
            "`arguments`, and besides `name`, `trained` (true, or the list of the policies that were trained against it), and "
            "`optional: true` for one that is left out where there is no such folder."
        },
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "What decides who wins: the name of one of `rewards` (default: the first that is not `trained`), or a "
            "mapping for a chat model at an OpenAI-compatible address: `url`, `model`, and the other fields of ChatJudge."
        },
    )
    group_by: str | None = field(
        default=None,
        metadata={
            "help": "A column of the data by whose values truthfulness and calibration are split too. If it holds true and "
            "false, true is what the model could know, and abstaining there is over-abstention."
        },
    )
    truthfulness: bool | None = field(
        default=None,
        metadata={
            "help": "Whether answers are compared with the column `reference`, word for word; by default, where half of the "
            "references or more have at most eight words. Of free text no wording is the right one."
        },
    )
    abstentions: list[str] = field(
        default_factory=lambda: ["I do not know"], metadata={"help": "How an answer begins that abstains."}
    )
    num_answers: int = field(default=1, metadata={"help": "Answers that each policy gives to each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "At which answers are sampled, and probabilities are taken."})
    max_prompt_length: int | None = field(
        default=512, metadata={"help": "Prompts of more tokens are left out and counted, or stop the run (`long_rows: error`)."}
    )
    max_completion_length: int = field(default=256, metadata={"help": "Tokens after which an answer is cut off."})
    batch_size: int = field(default=32, metadata={"help": "Answers that are sampled or read at once."})
    frontier: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of runs whose checkpoints (`checkpoint-*`) are drawn by reward and KL."},
    )
    frontier_best_of: list[int] = field(
        default_factory=list,
        metadata={"help": "The n for which best-of-n of the KL reference is drawn beside them; as many answers are sampled."},
    )
    ptx_dataset: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "Pretraining text to measure perplexity on: data with the column `text`."}
    )
    ptx_max_length: int = field(default=512, metadata={"help": "Tokens at which pretraining text is cut off."})
    lm_eval_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-eval to run for each policy; needs `pip install lm-eval`."}
    )
    num_examples: int = field(default=8, metadata={"help": "Prompts that the report shows with all answers."})
    seed: int = field(default=0, metadata={"help": "Of sampling and of resampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where metrics.json and index.html are written."})

    def __post_init__(self):
        for key in ("num_answers", "max_completion_length", "batch_size", "ptx_max_length"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)}: must be 1 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature}: must be above 0: greedy answers have no probability")
        if any(n < 1 for n in self.frontier_best_of):
            raise ValueError(f"frontier_best_of: {self.frontier_best_of}: each must be 1 or more")


@dataclass
class ChatArguments:
    """Who is talked to, how answers are sampled, and what scores them."""

    policies: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "name -> the folder of an adapter, or null for the base; `{path: FOLDER, optional: true}` is left out, and "
            "said so, where there is no such folder. The first one is talked to first."
        },
    )
    kl_reference: str | None = field(
        default=None,
        metadata={"help": "The policy from which /score measures KL; by default `sft` where there is one, else the base."},
    )
    rewards: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What /score shows, as in recipes/evaluate.py: a path, or a mapping of `path`, `arguments`, `name`, and "
            "`optional: true` for one that is left out where there is no such folder."
        },
    )
    system_prompt: str | None = field(default=None, metadata={"help": "What every conversation begins with."})
    temperature: float = field(default=1.0, metadata={"help": "At which answers are sampled; 0 takes the likeliest token."})
    top_p: float = field(
        default=1.0, metadata={"help": "The likeliest tokens that have this much of the probability are sampled from."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens after which an answer is cut off."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}: must be 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}: must be above 0, and at most 1")


@dataclass
class MergeArguments:
    """Which adapter is merged into its base, and where the result goes. The names are those of TRL's trainers."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the adapter: a policy, or a reward model. Without `model_name_or_path` the base is the one that "
            "it was trained on."
        },
    )
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "How much the merged model's logits, or scores, may differ from the adapter's, as a share of their "
            "deviation; by default 1e-3 in float32, 2e-2 in float16 and 1e-1 in bfloat16."
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Size at which weights go on in another file."})
    push_to_hub: bool = field(default=False, metadata={"help": "Whether the merged model is uploaded to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Its name on the Hub; by default that of `output_dir`, under your account."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; by default as your account has it."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(
        default="runs/merge", metadata={"help": "Where the merged model is written: a new folder, or an empty one."}
    )

    def __post_init__(self):
        if self.adapter is None:
            raise ValueError("adapter: name the folder of the adapter that is to be merged")
        if self.tolerance is not None and self.tolerance <= 0:
            raise ValueError(f"tolerance: {self.tolerance}: must be above 0")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError("hub_model_id: goes with `push_to_hub: true`")


# Pairs of options of which one makes the other meaningless: (one, other, what to do about it).
EXCLUSIVE = (
    ("load_in_4bit", "load_in_8bit", "weights are stored in 4 bits or in 8"),
    ("bf16", "fp16", "compute in one of the two; bf16 wherever the GPU has it"),
    ("reward_funcs", "reward_weights", "weights stand in the entries of `reward_funcs`: `- path: ...`, `weight: 0.5`"),
)

# Annotated more narrowly than what people write and the libraries read: `true` is the newest checkpoint of output_dir, and
# "all-linear" is PEFT's word for every linear layer.
# A reward is a path, or a mapping with its weight, which no command line could write.
_WIDER_TYPES = {
    "resume_from_checkpoint": bool | str | None,
    "lora_target_modules": list[str] | str | None,
    "reward_funcs": list[str | dict[str, Any]],
    "rewards": list[str | dict[str, Any]],
    "judge": str | dict[str, Any] | None,
}


def parse_arguments(
    recipe: str | Path, *dataclass_types: type, argv: Sequence[str] | None = None, here: bool = True
) -> tuple[Any, ...]:
    """The dataclasses of a recipe, filled from its YAML file and, over it, from the command line.

    Args:
        recipe: the recipe's `__file__`; without `--config`, `configs/tiny/<its name>.yaml` beside `recipes/` is read.
        dataclass_types: what to fill. A key may belong to any of them.
        argv: the command line without the program's name; `sys.argv` by default.
        here: whether the recipe is to run on this machine, and is refused what the machine lacks.

    Returns:
        One instance for each of `dataclass_types`.

    Raises:
        RecipeError: a missing or malformed file, an unknown key, a value of the wrong type, or options that exclude each other.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # dotted paths, like all others, are looked for where the recipe is launched
    recipe = Path(recipe).resolve()
    parser = _RecipeParser(dataclass_types, allow_abbrev=False, usage=f"{recipe.name} [--config FILE] [--key value ...]")
    parser.add_argument("--config", help=f"YAML file with the arguments (default: configs/tiny/{recipe.stem}.yaml)")
    given = parser.parse_given(sys.argv[1:] if argv is None else argv)
    config = Path(given.pop("config", None) or recipe.parent.parent / "configs" / "tiny" / f"{recipe.stem}.yaml")

    types = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    fields = {item.name: item for cls in dataclass_types for item in dataclasses.fields(cls) if item.init}
    types = {name: _WIDER_TYPES.get(name, types[name]) for name in fields}
    if types.get("loss_type") == list[str]:  # of DPO, where one loss need not be written as a list
        types["loss_type"] = list[str] | str
    from_file = read_yaml(config)
    for where, values in ((str(config), from_file), (COMMAND_LINE, given)):
        for key, value in values.items():
            if key not in fields:
                raise RecipeError(f"{where}: unknown key '{key}'{did_you_mean(key, fields)}")
            value = _unpacked(value) if where == COMMAND_LINE else value
            values[key] = _checked(key, value, types[key], fields[key].metadata.get("choices"), where)
    merged = merge_overrides(from_file, given)
    where = f"{config} and {COMMAND_LINE}" if given else str(config)
    ORIGIN.set(where)
    _refuse_exclusive(merged, where, trains="learning_rate" in fields)
    _refuse_unusable(merged, where)
    if "bf16" in fields:
        _suit_the_machine(merged, where)
        if here:
            _refuse_bf16_without_support(merged, where)
            settle_trackers(merged, where)
    try:
        with warnings.catch_warnings():
            # TRL sets it itself, under the name that TRL and everybody's YAML files have
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
            groups = parser.parse_dict(merged)
    except (ValueError, TypeError, ImportError) as error:  # the dataclasses' own checks
        raise RecipeError(f"{where}: {one_line(error)}") from error
    values = {key: value for group in groups for key, value in vars(group).items()}
    if here:
        _refuse_each_alone(groups, where)
        try:
            check_launcher_support(recipe.stem, values, current_launcher())
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
    LAUNCHED.set(Launched(recipe, config, values))
    return groups


def merge_overrides(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` over `under`, as the command line goes over a file: the data that it names replace those of the file.

    What only the old dataset reads goes with it; a `column_mapping` stays, since another one may well have the same columns.
    """
    another = over.get("dataset_name") not in (None, under.get("dataset_name"))
    gone = {"dataset_arguments", "dataset_config"} if another else set()
    for one, others in (
        ("datasets", ("dataset_name", *_OF_ONE_DATASET)),
        ("dataset_name", ("datasets",)),
        ("eval_datasets", ("test_split_size",)),
        ("test_split_size", ("eval_datasets",)),
    ):
        gone.update(others if over.get(one) else ())
    return {key: value for key, value in under.items() if key not in gone} | dict(over)


def parse_values(recipe: str | Path, *types: type, values: Mapping[str, Any], here: bool = True) -> tuple[Any, ...]:
    """As `parse_arguments` with a YAML file of these values; messages name no file, neither now nor later.

    Args:
        recipe: the recipe's file.
        types: its dataclasses.
        values: what its YAML file would hold.
        here: as in `parse_arguments`.

    Raises:
        RecipeError: what the recipe would say.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "stage.yaml"
        written.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        try:
            # In a context of its own: what goes wrong later does not come from this file
            return copy_context().run(parse_arguments, recipe, *types, argv=["--config", str(written)], here=here)
        except RecipeError as error:
            raise RecipeError(str(error).removeprefix(f"{written}: ")) from error


@contextlib.contextmanager
def as_recipe_error(stage: str) -> Iterator[None]:
    """Turns the errors by which a trainer refuses its arguments or data, when it is made, into a `RecipeError`."""
    try:
        yield
    except (ValueError, TemplateError, ImportError) as error:
        raise RecipeError(f"{stage}: {one_line(error)}") from error
    except (RuntimeError, OSError) as error:
        # TRL's ways to refuse a row and to say that vLLM is not there, and that of Transformers to refuse a tracker
        known = ("assistant_only_loss", "The vLLM server", "to be installed")
        if not any(words in str(error) for words in known):
            raise
        raise RecipeError(f"{stage}: {one_line(error)}") from error


class _RecipeParser(TrlParser):
    """TRL's parser, which says in one line what is wrong instead of printing three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{COMMAND_LINE}: {message.removeprefix('argument ')}")

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options that are on the command line, and no defaults."""
        hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}
        mappings = {name for name, hint in hints.items() if _is_mapping(hint)}
        optional_texts = {name for name, hint in hints.items() if set(get_args(hint)) == {str, type(None)}}
        for action in self._actions:
            action.default = argparse.SUPPRESS
            action.choices = None  # `_checked` looks, in the words that it has for the file
            if action.dest in mappings:
                action.type = _json_mapping
            elif action.dest in optional_texts:  # "none" unsets, as it does for numbers
                action.type = lambda text: None if text.lower() in ("none", "null") else text
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            word = unknown[0]
            if not word.startswith("--"):
                raise RecipeError(f"{COMMAND_LINE}: '{word}' belongs to no option; write `--key value`")
            key = word.removeprefix("--").split("=")[0].replace("-", "_")
            known = [action.dest for action in self._actions]
            raise RecipeError(f"{COMMAND_LINE}: unknown option '{word}'{did_you_mean(key, known)}")
        return vars(namespace)


def _unpacked(value: Any) -> Any:
    """A list of the command line with what is written as JSON in it, alone or as a list, in place of the text."""
    if not isinstance(value, list):
        return value
    entries = []
    for entry in value:
        text = entry.path if isinstance(entry, DatasetSource) else entry
        try:
            found = json.loads(text) if isinstance(text, str) and text.startswith(("{", "[")) else entry
        except (ValueError, RecursionError):
            found = entry
        entries += found if isinstance(found, list) else [found]
    return entries


def _checked(key: str, value: Any, hint: Any, choices: Sequence[Any] | None, where: str) -> Any:
    """`value` in the type that `hint` asks for, or a `RecipeError` that names `key` and `where`."""
    if isinstance(value, list) and DatasetSource in get_args(hint):
        return [_dataset_source(key, number, entry, where) for number, entry in enumerate(value, start=1)]
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:
        choices = [member.value for member in enums[0]]
    if choices and value is not None and value not in choices:
        quoted = " (YAML reads a bare yes or no as true or false: write it in quotes)" if isinstance(value, bool) else ""
        known = ", ".join(str(choice) for choice in choices)
        raise RecipeError(f"{where}: {key}: {value!r} is none of {known}{did_you_mean(str(value), map(str, choices))}{quoted}")
    # PyYAML reads 1e-4 as text, since it has no dot
    number = float(value) if isinstance(value, str) and str not in members and _NUMBER.fullmatch(value) else value
    try:
        return TypeAdapter(hint, config=_STRICT).validate_python(number)
    except ValidationError:
        expected = " or ".join(_type_name(member) for member in members)
        raise RecipeError(f"{where}: {key}: expected {expected}, found {value!r} ({type(value).__name__})") from None


def _dataset_source(key: str, number: int, entry: Any, where: str) -> DatasetSource:
    place = f"{where}: {key}, entry {number}"
    if isinstance(entry, DatasetSource):  # from the command line
        return entry
    if not isinstance(entry, dict) or "path" not in entry:
        raise RecipeError(f"{place}: must be a mapping with `path`, found {entry!r}")
    types = get_type_hints(DatasetSource)
    for name, value in entry.items():
        if name not in types:
            raise RecipeError(f"{place}: unknown key '{name}'{did_you_mean(str(name), types)}")
        entry[name] = _checked(name, value, types[name], None, place)
    return DatasetSource(**entry)


def _refuse_exclusive(values: dict[str, Any], where: str, trains: bool) -> None:
    for one, other, remedy in EXCLUSIVE:
        if values.get(one) and values.get(other):
            raise RecipeError(f"{where}: `{one}` and `{other}` exclude each other: {remedy}")
    if trains and (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        raise RecipeError(
            f"{where}: quantised weights cannot be trained: set `use_peft: true`, or `load_in_4bit` and `load_in_8bit` to false"
        )


def _refuse_unusable(values: dict[str, Any], where: str) -> None:
    """Values of the right type that TRL would choke on later, or that would break a promise of ours."""
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(key, 1) < 1:
            raise RecipeError(f"{where}: {key}: {values[key]}: must be 1 or more")
    for key in ("learning_rate", "num_train_epochs", "weight_decay"):
        if values.get(key, 0) < 0:
            raise RecipeError(f"{where}: {key}: {values[key]}: must not be negative")
    for key in [key for key, value in values.items() if key.endswith("_kwargs") and isinstance(value, str)]:
        try:  # as Transformers reads it, which leaves a text that is no JSON for others to trip over
            values[key] = _json_mapping(values[key])
        except argparse.ArgumentTypeError as error:
            raise RecipeError(f"{where}: {key}: {error}") from error
    if values.get("eval_on_start") and values.get("eval_strategy", "no") == "no":
        raise RecipeError(f"{where}: eval_on_start: there is nothing to evaluate on under `eval_strategy: no`: set `steps`")
    if values.get("hub_strategy") in ("checkpoint", "all_checkpoints"):
        raise RecipeError(f"{where}: hub_strategy: a result is uploaded when it is whole, and no checkpoint is: leave it out")
    if values.get("truncation_mode") == "keep_end":
        raise RecipeError(
            f"{where}: truncation_mode: keep_end cuts off where prompts begin: raise `max_length`, or drop long rows"
        )
    if values.get("dataset_text_field", "text") != "text":
        remedy = f"column_mapping: {{{values['dataset_text_field']}: text}}"
        raise RecipeError(f"{where}: dataset_text_field: the text is always in `text`: set `{remedy}`")


def _suit_the_machine(values: dict[str, Any], where: str) -> None:
    """Where no GPU is used, the defaults that need one are off; where there is none, asking for bf16 or fp16 is refused."""
    if torch.accelerator.is_available() and not values.get("use_cpu"):
        return
    for key in ("bf16", "fp16"):
        if values.get(key) and not values.get("use_cpu"):
            raise RecipeError(f"{where}: {key}: this machine has no GPU: set `{key}: false`")
    values.setdefault("bf16", False)
    values.setdefault("dataloader_pin_memory", False)


def _refuse_each_alone(groups: Sequence[Any], where: str) -> None:
    """Refuses several processes of which each would train by itself on everything, and write over the others."""
    launched = os.environ.get("WORLD_SIZE", "") if "LOCAL_RANK" in os.environ else ""  # by torchrun, which accelerate calls
    alone = any(group.world_size == 1 for group in groups if isinstance(group, TrainingArguments))
    if alone and launched.isdecimal() and int(launched) > 1:
        lacking = "this one knows of no other" if torch.cuda.is_available() else "there is no GPU that they could share out"
        raise RecipeError(
            f"{where}: {launched} processes were launched, and {lacking}: set `use_cpu: true` to share out CPUs, or launch one"
        )


def _refuse_bf16_without_support(values: dict[str, Any], where: str) -> None:
    """A GPU without it would emulate it, slowly, and Transformers does not say so. Where nobody asks for it, it is off."""
    if values.get("use_cpu") or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    for key in ("bf16", "dtype"):
        if values.get(key) in (True, "bfloat16"):
            raise RecipeError(
                f"{where}: {key}: {str(values[key]).lower()}: this GPU ({torch.cuda.get_device_name()}) has no bf16: set "
                "`bf16: false`, and with LoRA `dtype: float16` and `fp16: true`; without LoRA, and for PPO, `dtype: float32`"
            )
    values.setdefault("bf16", False)


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"\w+\.", "", str(hint))


def _is_mapping(hint: Any) -> bool:
    return any(member is dict or get_origin(member) is dict for member in (hint, *get_args(hint)))


def _json_mapping(text: str) -> Any:
    """The type of a mapping on the command line, where argparse would know no better than `dict(text)`."""
    if text.lower() in ("none", "null"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON mapping such as '{{\"key\": 1}}', found {text!r}")
    return value
