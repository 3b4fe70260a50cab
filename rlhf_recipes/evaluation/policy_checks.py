"""What is known of policies before they answer, and warnings about them."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.files import RECIPE, read_json
from rlhf_recipes.evaluation.measurement import PolicySamples
from rlhf_recipes.evaluation.named_rewards import NamedReward
from rlhf_recipes.evaluation.types import UNSET, Training, Unset
from rlhf_recipes.export.model_card import recorded_argument
from rlhf_recipes.generation.eos import NO_EOS, warn_of_endless
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.inputs import is_reward_folder
from rlhf_recipes.models.fingerprint import adapter_fingerprint

import numpy as np

logger = logging.getLogger(__name__)
UNCHANGED = 0.01  # largest change of an answer's log-probability, in nats, of a policy that hardly changed


def read_training(folder: str | Path | None) -> Training | Unset:
    """Return how the adapter in a folder was trained; UNSET without a record."""
    if folder is None:
        return UNSET
    record = read_json(Path(folder) / RECIPE) or read_json(Path(folder).parent / RECIPE)  # of a checkpoint: its run's
    if "recipe" not in record:
        return UNSET
    is_checkpoint, number = Path(folder).name.startswith("checkpoint-"), Path(folder).name.partition("-")[2]
    checkpoint = int(number) if is_checkpoint and number.isdecimal() else None
    train, run = (record.get("data") or {}).get("train") or {}, record.get("run") or {}
    rewards = recorded_argument(record, "reward_funcs") or []
    return Training(
        recipe=record["recipe"],
        base=(record.get("base_model") or {}).get("name"),
        start_from=recorded_argument(record, "start_from"),
        sources=[source["source"] for source in train.get("sources") or ()],
        rows=train.get("rows"),
        steps=run.get("steps") if checkpoint is None else checkpoint,
        seconds=run.get("wall_time_s") if checkpoint is None else None,
        rewards=[str(reward.get("path")) if isinstance(reward, dict) else str(reward) for reward in rewards],
        max_completion_length=recorded_argument(record, "max_completion_length") if rewards else None,
    )


def add_recorded_training(rewards: Mapping[str, NamedReward], policies: Mapping[str, Policy]) -> dict[str, NamedReward]:
    """Return rewards whose `trained` also names the policies that they paid.

    The records of the policies' trainings know these; a key is easily forgotten.
    """
    records = {name: read_training(policy.folder) for name, policy in policies.items()}
    paid = {name: {_absolute(path) for path in record.rewards} for name, record in records.items() if record}
    found = {}
    for name, reward in rewards.items():
        names = [policy for policy, paths in paid.items() if reward.path and _absolute(reward.path) in paths]
        trained = reward.trained if reward.trained is True else [*dict.fromkeys([*(reward.trained or ()), *names])]
        found[name] = replace(reward, trained=trained or False)
    return found


def _absolute(path: str) -> str:
    """Return a folder as absolute; a dotted path stays."""
    return str(Path(path).resolve()) if is_reward_folder(path) else path


def check_policies(policies: Mapping[str, Policy], arguments: EvaluateArguments) -> dict[str, str]:
    """Warn of policies with equal weights, and of another length than PPO's.

    Returns:
        Policy -> another one of exactly its weights, the baseline if it has them.
    """
    for name, policy in policies.items():
        training, longest = read_training(policy.folder), arguments.max_completion_length
        if training and training.max_completion_length not in (None, longest):
            logger.warning(
                "max_completion_length: %d: %s was trained on answers of up to %d tokens. Fix: set it to %d, or train with %d",
                *(longest, name, training.max_completion_length, training.max_completion_length, longest),
            )
    same: dict[str, str] = {}
    owners: dict[str | None, str] = {}
    for name in sorted(policies, key=lambda name: name != arguments.compare_with):  # the baseline first
        policy = policies[name]
        if policy.best_of is not None:
            continue
        owner = owners.setdefault(policy.folder and adapter_fingerprint(policy.folder), name)
        if owner != name:
            same[name] = owner
            logger.warning(
                "policies: %s has exactly the weights of %s, so every difference between them is chance. "
                "Fix: check its folder, and whether its training changed anything",
                *(name, owner),
            )
    return same


def check_answers(samples: Mapping[str, PolicySamples], policies: Mapping[str, Policy], arguments: EvaluateArguments) -> None:
    """Warn of answers without EOS."""
    longest = arguments.max_completion_length
    ended = {name: sum(answer.ended for answer in one.answers) for name, one in samples.items()}
    if not any(ended.values()):
        logger.warning(
            "policies: no answer of any policy ended with EOS: all were cut off at `max_completion_length: %d`. Fix: %s",
            *(longest, NO_EOS),
        )
        return
    for name, one in samples.items():
        if policies[name].folder:  # a base was not taught to end
            warn_of_endless(f"policies: {name}", ended[name], len(one.answers), longest)


def check_changes(samples: Mapping[str, PolicySamples], reference: str, same: Mapping[str, str]) -> None:
    """Warn of other weights that answer as the KL reference does."""
    for name, one in samples.items():
        if name == reference or one.logps is None or same.get(name) == reference or same.get(reference) == name:
            continue
        if np.abs(one.logps - one.ref_logps).max() < UNCHANGED:
            logger.warning(
                "policies: %s hardly differs from %s: no answer became 1%% more or less likely. "
                "Fix: train it longer, or with a higher `learning_rate`",
                *(name, reference),
            )
