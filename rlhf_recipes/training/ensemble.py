"""The reward stage around its trainer: comparisons, the members of an ensemble and their folders, and how they are finished.

A single model is an ensemble of one whose folder is that of the stage. The members `member-0`, `member-1`, ... of a larger one
have a folder each in that of the stage, whose own `reward.json` lists them.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.reward import RewardArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import PENDING, RECIPE, REWARD, REWARD_EVALUATION, write_json
from rlhf_recipes.data import Data, drop_overlong_mode, load_data
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.reward_json import write_ensemble_record
from rlhf_recipes.rewards.reward_models import RewardModel
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter
from rlhf_recipes.training.record import finish_record
from rlhf_recipes.training.result import remove_results
from rlhf_recipes.training.resume import checkpoint_to_resume, refuse_unfinished

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import ModelConfig, RewardConfig, RewardTrainer


def load_comparisons(
    arguments: RewardArguments, data_args: DataArguments, training: RewardConfig, model_args: ModelConfig
) -> tuple[Data, PreTrainedTokenizerBase]:
    """The comparisons that the stage trains on and is measured on, as rankings or pairs, and the tokenizer.

    Rows with an answer beyond `max_length` are left out, as TRL's trainer does: half an answer cannot be judged.

    Raises:
        RecipeError: as `load_data`, `load_tokenizer` and `check_lengths`.
    """
    kind = "ranking" if arguments.train_on == "rankings" else "preference"
    data = load_data(data_args, kind, evaluate=training.eval_strategy != "no", seed=training.seed)
    tokenizer = load_tokenizer(model_args, training, start_from=arguments.start_from)
    return data.filter_by_length(tokenizer, training.max_length, drop_overlong_mode(data_args.long_rows)), tokenizer


def ensemble_members(training: RewardConfig, size: int, rows: int, shards: bool) -> list[RewardConfig]:
    """The arguments of each member of an ensemble: seeds `seed`, `seed + 1`, ..., and folders of their own.

    Args:
        training: the arguments of the run; those of a single model are these.
        size: of the ensemble.
        rows: to train on.
        shards: whether each member trains on a part of them.

    Raises:
        RecipeError: for more shards than rows, or a checkpoint that is named: it would be that of one member.
    """
    if shards and size > rows:
        raise RecipeError(f"ensemble_shards: {rows} rows cannot be shared out among {size} members")
    if size == 1:
        return [training]
    if str(training.resume_from_checkpoint) not in ("None", "True", "true", "False", "false"):
        raise RecipeError("resume_from_checkpoint: an ensemble goes on from the newest checkpoint of each member: set `true`")
    members = []
    for number in range(size):
        member = copy.copy(training)
        member.seed, member.output_dir = training.seed + number, str(Path(training.output_dir) / f"member-{number}")
        member.run_name = f"{training.run_name}-member-{number}" if training.run_name else None
        members.append(member)
    return members


def checkpoints_to_resume(training: RewardConfig, members: Sequence[RewardConfig], *arguments: Any) -> list[str | None]:
    """The checkpoint of each member to go on from, as `checkpoint_to_resume` has it.

    Args:
        training: the arguments of the run.
        members: from `ensemble_members`.
        arguments: the other dataclasses of the recipe.

    Raises:
        RecipeError: as in `checkpoint_to_resume`; also where the folder holds an unfinished run of another size, or another one
            than that of the checkpoint that is named, or what the run begins with: earlier results there are removed.
    """
    checkpoints = [checkpoint_to_resume(member, *arguments) for member in members]
    output, own = Path(training.output_dir), {Path(member.output_dir) for member in members}
    if not _go_on_in(output, checkpoints):
        for folder in (output, *_member_folders(output)):
            if folder not in own or any(checkpoints):
                refuse_unfinished(folder)
        for key in ("start_from", "model_name_or_path"):
            for begun_with in filter(None, (getattr(group, key, None) for group in arguments)):
                if output.resolve() in (Path(begun_with).resolve(), *Path(begun_with).resolve().parents):
                    raise RecipeError(
                        f"{key}: {begun_with} is in `output_dir`, whose earlier results are removed: name another"
                    )
    return checkpoints


def remove_earlier_results(output: str | Path, checkpoints: Sequence[str | None]) -> None:
    """Removes what an earlier run of this stage left, of whatever sort and size: none of it is to be taken for this run's.

    Args:
        output: folder of the stage.
        checkpoints: from `checkpoints_to_resume`; a run that goes on there keeps everything.
    """
    output = Path(output)
    if _go_on_in(output, checkpoints):
        if len(checkpoints) > 1:
            (output / RECIPE).unlink(missing_ok=True)  # until its members are finished again
        return
    (output / RECIPE).unlink(missing_ok=True)  # first of all, since without its members it is none
    for folder in _member_folders(output):
        remove_results(folder)
        shutil.rmtree(folder)
    remove_results(output, REWARD, *REWARD_EVALUATION)


def _go_on_in(output: Path, checkpoints: Sequence[str | None]) -> bool:
    return any(checkpoint and output.resolve() in Path(checkpoint).resolve().parents for checkpoint in checkpoints)


def _member_folders(output: Path) -> list[Path]:
    """Folders of members that this stage has written."""
    names = [path for path in output.glob("member-*") if path.name.removeprefix("member-").isdigit()]
    marks = (RECIPE, PENDING, REWARD, "adapter_config.json", "checkpoint-*")
    return sorted(path for path in names if any(found for mark in marks for found in path.glob(mark)))


def load_members(
    trainer: RewardTrainer, members: Sequence[RewardConfig], tokenizer: PreTrainedTokenizerBase, arguments: ModelConfig
) -> list[RewardModel]:
    """The saved members as they will be used: adapters on one base, that of the last member's trainer, or whole models.

    Args:
        trainer: of the last member; its adapter is taken off.
        members: from `ensemble_members`; they are scored by `per_device_eval_batch_size`.
        tokenizer: of the run.
        arguments: of the base, which is loaded again where FSDP or DeepSpeed left this process parts of it.

    Raises:
        RecipeError: as `load_reward_adapter` and `load_full_reward`.
    """
    folders = [Path(member.output_dir) for member in members]
    names = [folder.name for folder in folders] if len(members) > 1 else ["reward"]
    size = trainer.args.per_device_eval_batch_size
    if isinstance(trainer.model, PeftModel):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            unset_hf_deepspeed_config()  # from now on there is one process, which loads all
            base = load_model(arguments, trainer.args)
        else:
            base = trainer.model.unload()
        return [load_reward_adapter(base, folder, name, tokenizer, size) for name, folder in zip(names, folders, strict=True)]
    place = {"device_map": {"": trainer.args.device}}
    return [load_full_reward(folder, name, tokenizer, size, **place) for name, folder in zip(names, folders, strict=True)]


def finish(training: RewardConfig, members: Sequence[RewardConfig], arguments: RewardArguments) -> None:
    """Writes the records by which the stage is done, when its models are trained and have their scale: nothing comes after.

    Of an ensemble they are `reward.json`, which lists its members and how they are combined, and a `recipe.json` of the whole;
    how each member was trained stands in its own.
    """
    output = Path(training.output_dir)
    records = [finish_record(member) for member in members]
    if len(members) == 1:
        return
    names = [Path(member.output_dir).name for member in members]
    write_ensemble_record(output, names, arguments.ensemble_combine, arguments.uncertainty_coef)
    shared = {key: records[0][key] for key in ("recipe", "base_model", "parents", "seed", "versions")}
    runs = [record["run"] for record in records]
    cost = {key: round(sum(run[key] for run in runs), 2) for key in ("wall_time_s", "steps")}
    groups = records[0]["arguments"]
    groups = groups | {"RewardConfig": groups["RewardConfig"] | {"output_dir": str(output)}}
    write_json(output / RECIPE, {**shared, "members": names, "run": cost, "arguments": groups})
