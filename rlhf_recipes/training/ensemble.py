"""The run of a reward stage, with one run for each member of an ensemble.

A single model is an ensemble of one, in the folder of the stage. The members `member-0`, `member-1`, ... of a larger one have
folders in it, and its own `reward.json` lists them.
"""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.config.current import set_trainer
from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.reward import RewardArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import PENDING, RECIPE, REWARD, REWARD_EVALUATION, write_json
from rlhf_recipes.data import Data, drop_overlong_mode, load_data
from rlhf_recipes.export.upload import publish
from rlhf_recipes.models.loading import load_model, release_memory
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.reward_json import write_ensemble_record
from rlhf_recipes.rewards.reward_models import RewardModel
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter
from rlhf_recipes.training.dependencies import run_dependencies
from rlhf_recipes.training.result import finish_record, remove_results
from rlhf_recipes.training.resume import checkpoint_to_resume, refuse_unfinished
from rlhf_recipes.training.run import Run, shutdown_distributed

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, RewardConfig


def load_comparisons(
    arguments: RewardArguments, data_args: DataArguments, training: RewardConfig, model_args: ModelConfig
) -> tuple[Data, PreTrainedTokenizerBase]:
    """Load the rankings or pairs to train and evaluate on, and the tokenizer.

    Rows with an answer beyond `max_length` are left out, as by TRL's trainer: half an answer cannot be judged.

    Raises:
        RecipeError: as `load_data`, `load_tokenizer` and `check_rendered`.
    """
    kind = "ranking" if arguments.train_on == "rankings" else "preference"
    data = load_data(data_args, kind, evaluate=training.eval_strategy != "no", seed=training.seed)
    tokenizer = load_tokenizer(model_args, training, start_from=arguments.start_from)
    data = data.check_rendered(tokenizer, training.max_length, drop_overlong_mode(data_args.long_rows))
    data.check_positions(tokenizer, training.max_length, position_limit(model_args))
    return data, tokenizer


class EnsembleRun(Run):
    """A `Run` of several members: `for member in run.members(rows): ...`.

    Raises:
        RecipeError: beside what `Run` refuses, for a checkpoint that is named, which would be that of one member; for an
            unfinished run in the folder that is not resumed; for a base or an adapter in the folder, which is cleared.
    """

    def __enter__(self) -> "EnsembleRun":
        self.reward_args = next(group for group in self.arguments if isinstance(group, RewardArguments))
        self.member_runs = [_MemberRun(self, number) for number in range(self.reward_args.ensemble_size)]
        for member in self.member_runs:
            member.checkpoint = checkpoint_to_resume(*member.arguments)
        self.resumes_here = any(
            member.checkpoint and self.output.resolve() in Path(member.checkpoint).resolve().parents
            for member in self.member_runs
        )
        if not self.resumes_here:
            self._check_replaceable()
        run_dependencies(self.recipe, self.arguments)
        return self

    def _check_replaceable(self) -> None:
        starting = {member.output for member in self.member_runs if member.checkpoint is None}
        for folder in sorted({self.output, *_member_folders(self.output)} - starting):
            refuse_unfinished(folder)
        for key in ("start_from", "model_name_or_path"):
            for path in filter(None, (getattr(group, key, None) for group in self.arguments)):
                if self.output.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                    raise RecipeError(
                        f"{key}: {path} is in `output_dir`, whose earlier results are removed. Fix: name another `output_dir`"
                    )

    def members(self, rows: Dataset) -> Iterator["_MemberRun"]:
        """Yield a run for each member, with its rows: all, or its shard.

        Raises:
            RecipeError: for more shards than rows.
        """
        size, shards = len(self.member_runs), self.reward_args.ensemble_shards
        if shards and size > len(rows):
            raise RecipeError(f"ensemble_shards: {len(rows)} rows are fewer than the {size} members of the ensemble")
        for number, member in enumerate(self.member_runs):
            member.rows = rows.shard(size, number, contiguous=False) if shards else rows
            yield member
            last = member is self.member_runs[-1]
            shutdown_distributed(member.trainer, last)
            if not last:
                self.trainer = member.trainer = None
                set_trainer(None)
                release_memory()

    def clear(self) -> None:
        """Remove the results of an earlier run, of any ensemble size."""
        if self.resumes_here:
            if len(self.member_runs) > 1:
                (self.output / RECIPE).unlink(missing_ok=True)  # until its members are finished again
            return
        (self.output / RECIPE).unlink(missing_ok=True)  # first: without its members it is no result
        for folder in _member_folders(self.output):
            remove_results(folder)
            shutil.rmtree(folder)
        remove_results(self.output, REWARD, *REWARD_EVALUATION)

    def load_members(self, tokenizer: PreTrainedTokenizerBase) -> list[RewardModel]:
        """Load the saved members: adapters on one base, or full models.

        The base is that of the last trainer, which loses its adapter. FSDP and DeepSpeed leave a process parts of it: there
        it is loaded again.
        """
        folders, trainer = [member.output for member in self.member_runs], self.trainer
        names = [folder.name for folder in folders] if len(folders) > 1 else ["reward"]
        size = trainer.args.per_device_eval_batch_size
        if not isinstance(trainer.model, PeftModel):
            place = {"device_map": {"": trainer.args.device}}
            return [load_full_reward(*of, tokenizer, size, **place) for of in zip(folders, names, strict=True)]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            unset_hf_deepspeed_config()  # one process is left, which loads all
            base = load_model(next(group for group in self.arguments if isinstance(group, ModelConfig)), trainer.args)
        else:
            base = trainer.model.unload()
        return [load_reward_adapter(base, *of, tokenizer, size) for of in zip(folders, names, strict=True)]

    def _finish(self) -> None:
        """Mark the members as done, then the stage, with the ensemble's records."""
        if not PartialState().is_main_process:
            return
        records = [finish_record(member.training_args) for member in self.member_runs]
        if len(records) > 1:
            names, args = [member.output.name for member in self.member_runs], self.reward_args
            write_ensemble_record(self.output, names, args.ensemble_combine, args.uncertainty_coef)
            shared = {key: records[0][key] for key in ("recipe", "base_model", "parents", "seed", "versions")}
            cost = {key: round(sum(record["run"][key] for record in records), 2) for key in ("wall_time_s", "steps")}
            groups = records[0]["arguments"]
            groups = groups | {"RewardConfig": groups["RewardConfig"] | {"output_dir": str(self.output)}}
            write_json(self.output / RECIPE, {**shared, "members": names, "run": cost, "arguments": groups})
        self._announce()
        publish(self.training_args)


class _MemberRun(Run):
    """The run of one member, with a seed and a folder of its own."""

    rows: Dataset

    def __init__(self, ensemble: EnsembleRun, number: int):
        member = member_arguments(ensemble.training_args, number, ensemble.reward_args.ensemble_size)
        arguments = [member if group is ensemble.training_args else group for group in ensemble.arguments]
        super().__init__(str(ensemble.recipe), *arguments, inputs=ensemble.inputs)
        self.ensemble, self.number = ensemble, number

    def fit(self, trainer: Trainer, report: dict[str, Any]) -> None:
        """Train, evaluate and save, as `Run.fit`."""
        self.ensemble.trainer = trainer
        super().fit(trainer, report | {"train": report["train"] | {"rows": len(self.rows)}})

    def _remove_earlier(self) -> None:
        if self.number == 0 and self.trainer.is_world_process_zero():
            self.ensemble.clear()
        super()._remove_earlier()


def member_arguments(training: RewardConfig, number: int, size: int) -> RewardConfig:
    """Return the trainer's arguments of a member, whose seed is `seed` + its number.

    Raises:
        RecipeError: if a checkpoint is named for an ensemble.
    """
    if size == 1:
        return training
    if str(training.resume_from_checkpoint) not in ("None", "True", "true", "False", "false"):
        raise RecipeError(
            "resume_from_checkpoint: an ensemble resumes from the newest checkpoint of each member. Fix: set it to `true`"
        )
    member = copy.copy(training)
    member.seed, member.output_dir = training.seed + number, str(Path(training.output_dir) / f"member-{number}")
    member.run_name = f"{training.run_name}-member-{number}" if training.run_name else None
    return member


def _member_folders(output: Path) -> list[Path]:
    """Return the folders of members that an earlier run has left."""
    written = (RECIPE, PENDING, REWARD, "adapter_config.json", "checkpoint-*")
    folders = sorted(path for path in output.glob("member-*") if path.name.removeprefix("member-").isdigit())
    return [folder for folder in folders if any(path for name in written for path in folder.glob(name))]
