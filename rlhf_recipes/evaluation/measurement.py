"""What every policy is measured with: base, prompts, rewards and judge.

`P` is the number of prompts, `K` the number of answers of a policy to each.
"""

import functools
import importlib.util
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.evaluation.metrics.intervals import Floats
from rlhf_recipes.evaluation.named_rewards import NamedReward
from rlhf_recipes.generation.answers import Answer, log_probs, sample
from rlhf_recipes.generation.judges import ChatJudge, read_chat_judge
from rlhf_recipes.generation.policies import Policy, PolicyBank
from rlhf_recipes.inputs import require_adapter
from rlhf_recipes.rewards.matching import accepted_answers
from rlhf_recipes.rewards.protocol import checked_reward, score_completions

import numpy as np
from datasets import Dataset

MAX_REFERENCE_WORDS = 8  # a longer answer may be worded in many ways


@dataclass
class PolicySamples:
    """The answers of a policy, prompt by prompt, K to each."""

    answers: list[Answer]  # (P * K,)
    scores: dict[str, Floats] = field(default_factory=dict)  # reward -> (P, K); NaN where it does not apply
    logps: Floats | None = None  # (P, K) under the policy, in nats; None for best-of-n
    ref_logps: Floats | None = None  # (P, K) under the KL reference

    @property
    def texts(self) -> list[str]:
        """(P * K,) texts without surrounding space."""
        return [answer.text.strip() for answer in self.answers]


@dataclass(frozen=True)
class Measurement:
    """What all policies share.

    A model's score of one text differs between batches by rounding. `cache` has each scored once, so that equal answers of two
    policies tie.
    """

    bank: PolicyBank
    rows: Dataset
    rewards: dict[str, NamedReward]
    arguments: EvaluateArguments
    cache: dict[str, dict[Hashable, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def reference(self) -> str:
        """The policy that KL is measured from."""
        return self.arguments.kl_reference or self.arguments.compare_with

    @property
    def chooser(self) -> str | None:
        """The reward that best-of-n chooses by, unless a policy names another."""
        return next((name for name, reward in self.rewards.items() if reward.trained), next(iter(self.rewards), None))

    @functools.cached_property
    def compares_references(self) -> bool:
        """Whether answers are compared with references."""
        if "reference" not in self.rows.column_names:
            return False
        lengths = [len(text.split()) for one in self.rows["reference"] for text in accepted_answers(one)]
        wanted = self.arguments.truthfulness
        return bool(lengths) and (np.median(lengths) <= MAX_REFERENCE_WORDS if wanted is None else wanted)

    def sample(self, policy: str, count: int, seed: int) -> list[Answer]:
        """Sample `count` answers to each prompt."""
        options = {"temperature": self.arguments.temperature, "batch_size": self.arguments.batch_size, "seed": seed}
        prompts, longest = self.repeated("prompt", count), self.arguments.max_completion_length
        with self.bank.use_policy(policy) as model:
            return sample(model, self.bank.tokenizer, prompts, max_new_tokens=longest, **options)

    def repeated(self, column: str, count: int) -> list[Any]:
        """Return a column with each row `count` times."""
        return [value for value in self.rows[column] for _ in range(count)]

    def log_probs(self, policy: str, answers: list[Answer]) -> Floats:
        """Return (P, K) log-probabilities of any answers under a policy."""
        count, arguments = len(answers) // len(self.rows), self.arguments
        options = {"temperature": arguments.temperature, "batch_size": arguments.batch_size}
        with self.bank.use_policy(policy) as model:
            logps = log_probs(model, self.bank.tokenizer, self.repeated("prompt", count), answers, **options)
        return logps.reshape(-1, count)

    def score(self, reward: str, answers: list[Answer]) -> Floats:
        """Return (P, K) scores of the answers; NaN where the reward does not apply.

        Raises:
            RecipeError: If the reward fails, or does not return one finite number or None for each answer.
        """
        count, cache, by_text = len(answers) // len(self.rows), self.cache.setdefault(reward, {}), self.rewards[reward].folder
        # a model reads the text, a function may read the token ids too
        keys = [(place // count, answer.text if by_text else answer) for place, answer in enumerate(answers)]
        new = {key: place for place, key in enumerate(keys) if key not in cache}
        if new:
            places = list(new.values())
            scores = self._ask(self.rewards[reward], [place // count for place in places], [answers[place] for place in places])
            cache |= zip(new, scores, strict=True)
        return np.array([cache[key] for key in keys]).reshape(-1, count)

    def _ask(self, reward: NamedReward, places: list[int], answers: list[Answer]) -> list[float]:
        rows = self.rows.select(places)
        scores = score_completions(
            checked_reward(reward.function, reward.name),
            list(rows["prompt"]),
            [
                answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}]
                for prompt, answer in zip(rows["prompt"], answers, strict=True)
            ],
            completion_ids=[list(answer.ids) for answer in answers],
            **{column: list(rows[column]) for column in self.rows.column_names if column != "prompt"},
        )
        return [math.nan if score is None else score for score in scores]


def sample_policy(measurement: Measurement, policy: Policy, seed: int) -> PolicySamples:
    """Sample a policy's answers, with scores and log-probabilities.

    Best-of-n samples n times as many answers of its policy, and keeps the best of each n.
    """
    count = measurement.arguments.num_answers
    if policy.best_of is None:
        samples = PolicySamples(measurement.sample(policy.name, count, seed))
        samples.logps = measurement.log_probs(policy.name, samples.answers)
        same = policy.name == measurement.reference
        samples.ref_logps = samples.logps if same else measurement.log_probs(measurement.reference, samples.answers)
    else:
        answers = measurement.sample(policy.best_of, count * policy.n, seed)
        scores = measurement.score(policy.reward or measurement.chooser, answers)
        best = np.nan_to_num(scores, nan=-np.inf).reshape(-1, policy.n).argmax(1)
        samples = PolicySamples([answers[row * policy.n + place] for row, place in enumerate(best)])
    samples.scores = {name: measurement.score(name, samples.answers) for name in measurement.rewards}
    return samples


# --- Checks before anything is sampled --------------------------------------------------------------------


def check_names(arguments: EvaluateArguments, policies: dict[str, Policy]) -> None:
    """Reject a `compare_with`, `kl_reference` or `frontier` that does not exist.

    Raises:
        RecipeError: With the key.
    """
    for key, name in (("compare_with", arguments.compare_with), ("kl_reference", arguments.kl_reference)):
        if name is not None and (name not in policies or (key == "kl_reference" and policies[name].best_of)):
            known = ", ".join(name for name, policy in policies.items() if key == "compare_with" or not policy.best_of)
            raise RecipeError(f"{key}: {name!r} is none of the policies ({known})")
    if policies[arguments.compare_with].best_of and arguments.kl_reference is None:
        raise RecipeError("kl_reference: `compare_with` is a best-of-n, which has no probabilities. Fix: name another policy.")
    for number, folder in enumerate(arguments.frontier, start=1):
        with error_context(f"frontier, entry {number}"):
            require_adapter(folder)
    if arguments.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("lm_eval_tasks: lm-eval is not installed. Fix: `pip install lm-eval`, or remove the key.")


def check_choosers(policies: dict[str, Policy], measurement: Measurement) -> None:
    """Reject a best-of-n without a reward to choose by.

    Raises:
        RecipeError: With the policy.
    """
    for policy in policies.values():
        chooser = policy.reward or measurement.chooser
        if policy.best_of and chooser not in measurement.rewards:
            known = ", ".join(measurement.rewards) or "there is none"
            raise RecipeError(f"policies: {policy.name}: best_of: reward: {chooser!r} is none of the rewards ({known})")


def check_judge(judge: str | None, rewards: Sequence[str | None]) -> None:
    """Reject a judge that is none of the rewards; None is one of an unknown name.

    Raises:
        RecipeError: With the key.
    """
    if judge is not None and judge not in rewards and None not in rewards:
        raise RecipeError(f"judge: {judge!r} is none of the rewards ({', '.join(rewards)}){did_you_mean(judge, rewards)}")


def choose_judge(arguments: EvaluateArguments, rewards: dict[str, NamedReward]) -> str | ChatJudge | None:
    """Return who decides wins: a reward's name, a chat model, or None.

    Raises:
        RecipeError: If no reward has the name, or the chat model is malformed or does not answer.
    """
    if isinstance(arguments.judge, dict):
        judge = read_chat_judge(arguments.judge)
        judge.check_replies()
        return judge
    check_judge(arguments.judge, [*rewards])
    held_out = (name for name, reward in rewards.items() if not reward.trained)
    return arguments.judge or next(held_out, next(iter(rewards), None))
