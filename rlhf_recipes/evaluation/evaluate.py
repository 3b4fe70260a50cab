"""Policies on held-out prompts: what each says, how that scores, and in what it differs from the others.

`P` is the number of prompts and `K` that of the answers of a policy to each. A *figure* is a mapping of `mean`, `interval`
(95%, of prompts resampled; None where resampling says nothing), `n` (the prompts that count) and, beside the policy that all
are compared with, `difference`: the same of the difference between the two policies, prompt by prompt.
"""

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import holds_result
from rlhf_recipes.data import load_data
from rlhf_recipes.data.sources import has_splits
from rlhf_recipes.evaluation.metrics.comparison import best_of_n, best_of_n_kl, divergence, share_won, win_rate
from rlhf_recipes.evaluation.metrics.diversity import diversity
from rlhf_recipes.evaluation.metrics.intervals import Floats, mean_interval, wilson_interval
from rlhf_recipes.evaluation.metrics.perplexity import perplexity
from rlhf_recipes.evaluation.metrics.preference import calibration, calibration_difference
from rlhf_recipes.generation.answers import Answer, Prompt, log_probs, sample
from rlhf_recipes.generation.judges import ChatJudge, read_chat_judge
from rlhf_recipes.generation.policies import Policy, PolicyBank, require_adapter
from rlhf_recipes.models.backbone import base_of
from rlhf_recipes.rewards.matching import KINDS, kinds_of
from rlhf_recipes.rewards.protocol import checked_reward, score_completions
from rlhf_recipes.rewards.reward_funcs import SavedReward, load_rewards
from rlhf_recipes.rewards.saved import load_saved_reward
from rlhf_recipes.training.resume import TRAINER_STATE, checkpoints_in, step_of

import numpy as np
from datasets import Dataset
from trl.trainer.utils import get_callable_name

Figure = dict[str, Any]

FEWEST = 6  # prompts
SHORT = 8  # words of a reference of which there is but one wording

_EXPECTED = {"name": "a text", "trained": "true, false or a list of policies", "optional": "true or false"}


# --- What is measured on, and by ------------------------------------------------------------------------


def held_out_prompts(data: DataArguments, arguments: EvaluateArguments) -> Dataset:
    """The prompts of the YAML file: `eval_datasets`, else the split `dataset_test_split` of `dataset_name`, or a whole file.

    A prompt that comes again with the same reference, as where preference data have several pairs of it, is asked once: its
    first row stays. Twice it would count as two independent ones, and intervals would be too narrow.

    Raises:
        RecipeError: as in `load_data`; if there is no column `group_by`, or it holds lists or mappings; for a `reference` that
            is no text.
    """
    if data.eval_datasets:
        for key in ("column_mapping", "dataset_arguments"):
            if getattr(data, key) and not data.dataset_name:
                raise RecipeError(f"{key}: belongs to `dataset_name`: set it in each entry of `eval_datasets` that needs it")
        data = DataArguments(datasets=data.eval_datasets, bad_rows=data.bad_rows)
    elif data.dataset_name and has_splits(data.dataset_name):
        data = replace(data, dataset_train_split=data.dataset_test_split)
    rows = load_data(data, "prompt", evaluate=False, seed=arguments.seed).train
    if arguments.group_by and arguments.group_by not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise RecipeError(f"group_by: the data have no column '{arguments.group_by}'; the columns are: {known}")
    if arguments.group_by:
        _check_column(rows, arguments.group_by, Hashable, "group_by", "name a column of texts, numbers or truths")
    if "reference" in rows.column_names:
        _check_column(rows, "reference", str | None, "reference", "write it in quotes, or rename the column")
    return _each_once(rows)


def _each_once(rows: Dataset) -> Dataset:
    """Without the rows whose prompt and reference came before; how many they are is printed."""
    references = rows["reference"] if "reference" in rows.column_names else [None] * len(rows)
    first: dict[Hashable, int] = {}
    for row, key in enumerate(zip(map(repr, rows["prompt"]), references, strict=True)):
        first.setdefault(key, row)
    if len(first) < len(rows):
        print(f"{len(rows) - len(first)} of {len(rows)} rows have the prompt and reference of another: they are left out")
    return rows.select(first.values())


def _check_column(rows: Dataset, column: str, kind: Any, where: str, remedy: str) -> None:
    """Refuses a column with a value of another kind: the types of columns that no stage trains on are as they came."""
    for row, value in enumerate(rows[column]):
        if not isinstance(value, kind):
            raise RecipeError(f"{where}: the column '{column}' holds {value!r:.80} in row {row}: {remedy}")


@dataclass(frozen=True)
class NamedReward:
    """A reward by which answers are scored.

    Parameters:
        function: with TRL's signature.
        trained: the policies that were trained against it, or all of them (True), or none (False).
        folder: where its model was loaded from, or None.
    """

    name: str
    function: Callable[..., Any]
    trained: bool | list[str] = False
    folder: str | None = None

    @property
    def about(self) -> str | None:
        """What a function gives, in the first line of its documentation; None of a model."""
        documentation = None if self.folder else inspect.getdoc(self.function)
        return documentation.splitlines()[0] if documentation else None


def load_named_rewards(specs: Sequence[str | dict[str, Any]], bank: PolicyBank, batch_size: int = 32) -> dict[str, NamedReward]:
    """The rewards that the YAML key `rewards` lists, by name, reward models as adapters on the bank's base.

    Args:
        specs: as the key has them.
        bank: with the base.
        batch_size: answers that a reward model reads at once.

    Raises:
        RecipeError: as in `load_rewards` and `load_saved_reward`; if two have one name.
    """
    rewards: dict[str, NamedReward] = {}
    for number, spec in enumerate(specs, start=1):
        where = f"rewards, entry {number}"
        spec = {"path": spec} if isinstance(spec, str) else dict(spec)
        own = {key: spec.pop(key) for key in ("name", "trained", "optional") if key in spec}
        _check_own(own, where)
        path = str(spec.get("path"))
        if own.get("optional") and not holds_result(path):
            print(f"{where}: left out, since there is no result in {path}")
            continue
        function, folder = _load_reward(spec, bank, where, batch_size)
        name = own.get("name") or get_callable_name(function)
        if name in rewards:
            raise RecipeError(f"{where}: the name '{name}' is taken: set another `name`")
        rewards[name] = NamedReward(name, function, own.get("trained", False), folder)
    return rewards


def _check_own(own: dict[str, Any], where: str) -> None:
    for key, kind in (("name", str), ("trained", bool | list), ("optional", bool)):
        if key in own and not isinstance(own[key], kind):
            raise RecipeError(f"{where}: {key}: expected {_EXPECTED[key]}, found {own[key]!r}")


def _load_reward(spec: dict[str, Any], bank: PolicyBank, where: str, batch_size: int) -> tuple[Callable[..., Any], str | None]:
    try:
        (reward,), _ = load_rewards([spec])
    except RecipeError as error:  # which knows the key by another name
        raise RecipeError(str(error).replace("reward_funcs, entry 1", where)) from error
    if not isinstance(reward, SavedReward):
        return reward, None
    combination = (reward.combine, reward.uncertainty_coef, batch_size)
    scorer = load_saved_reward(reward.folder, bank.model, bank.tokenizer, *combination)
    return scorer, reward.folder


def choose_judge(arguments: EvaluateArguments, rewards: dict[str, NamedReward]) -> str | ChatJudge | None:
    """Who decides win rates: the name of a reward, a chat model, or None where there is no reward.

    Raises:
        RecipeError: for a name that no reward has, or a chat judge that is malformed or does not answer.
    """
    if isinstance(arguments.judge, dict):
        judge = read_chat_judge(arguments.judge)
        judge.check_replies()
        return judge
    if arguments.judge is not None and arguments.judge not in rewards:
        raise RecipeError(f"judge: {arguments.judge!r} is none of the rewards ({', '.join(rewards)})")
    held_out = (name for name, reward in rewards.items() if not reward.trained)
    return arguments.judge or next(held_out, next(iter(rewards), None))


def check_choosers(policies: dict[str, Policy], measurement: "Measurement") -> None:
    """Refuses a best-of-n without a reward to choose by, before anything is sampled.

    Raises:
        RecipeError: with the policy.
    """
    for policy in policies.values():
        chooser = measurement.chooser_of(policy)
        if policy.best_of and chooser not in measurement.rewards:
            known = ", ".join(measurement.rewards) or "there is none"
            raise RecipeError(f"policies: {policy.name}: best_of: reward: {chooser!r} is none of the rewards ({known})")


def check_names(arguments: EvaluateArguments, policies: dict[str, Policy]) -> None:
    """Refuses a `compare_with`, `kl_reference` or `frontier` that is not there, before anything is sampled.

    Raises:
        RecipeError: with the key.
    """
    for key, name in (("compare_with", arguments.compare_with), ("kl_reference", arguments.kl_reference)):
        if name is not None and (name not in policies or (key == "kl_reference" and policies[name].best_of)):
            known = ", ".join(name for name, policy in policies.items() if key == "compare_with" or not policy.best_of)
            raise RecipeError(f"{key}: {name!r} is none of the policies ({known})")
    if policies[arguments.compare_with].best_of and arguments.kl_reference is None:
        raise RecipeError("kl_reference: name a policy with probabilities of its own, since `compare_with` is a best-of-n")
    for number, folder in enumerate(arguments.frontier, start=1):
        require_adapter(folder, f"frontier, entry {number}")
    if arguments.lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
        raise RecipeError("lm_eval_tasks: lm-eval is not installed: `pip install lm-eval`, or leave the key out")


# --- Answers --------------------------------------------------------------------------------------------


@dataclass
class Drawn:
    """The answers of a policy, prompt after prompt, K to each.

    Parameters:
        answers: (P * K,).
        scores: of each reward, (P, K); NaN where it does not apply.
        logps: (P, K) log-probabilities under the policy, in nats, or None for a best-of-n.
        ref_logps: those under the KL reference.
    """

    answers: list[Answer]
    scores: dict[str, Floats] = field(default_factory=dict)
    logps: Floats | None = None
    ref_logps: Floats | None = None

    @property
    def texts(self) -> list[str]:
        """(P * K,) without surrounding space."""
        return [answer.text.strip() for answer in self.answers]


@dataclass(frozen=True)
class Measurement:
    """What all policies have in common: the base, the prompts, the rewards.

    Parameters:
        rows: `prompt`, and what rewards read besides.
        scored: reward -> what was scored -> its score. A model's score of one text differs from batch to batch by rounding:
            scored once, equal answers of two policies tie.
    """

    bank: PolicyBank
    rows: Dataset
    rewards: dict[str, NamedReward]
    arguments: EvaluateArguments
    scored: dict[str, dict[Hashable, float]] = field(default_factory=dict, init=False, repr=False)

    @property
    def reference(self) -> str:
        """The policy that KL is measured from."""
        return self.arguments.kl_reference or self.arguments.compare_with

    @property
    def chooser(self) -> str | None:
        """The reward that best-of-n chooses by, if an entry names no other."""
        return next((name for name, reward in self.rewards.items() if reward.trained), next(iter(self.rewards), None))

    def chooser_of(self, policy: Policy) -> str | None:
        """The reward that a best-of-n is chosen by."""
        return policy.reward or self.chooser

    @functools.cached_property
    def tells_truth(self) -> bool:
        """Whether answers are right or made up: there are references, and as `truthfulness` says, or they are short."""
        if "reference" not in self.rows.column_names:
            return False
        lengths = [len(text.split()) for text in self.rows["reference"] if text and text.strip()]
        wanted = self.arguments.truthfulness
        return bool(lengths) and (np.median(lengths) <= SHORT if wanted is None else wanted)

    def draw(self, policy: str, count: int, seed: int) -> list[Answer]:
        """`count` answers to each prompt."""
        arguments = self.arguments
        with self.bank.use_policy(policy) as model:
            return sample(
                model,
                self.bank.tokenizer,
                self.repeated("prompt", count),
                temperature=arguments.temperature,
                max_new_tokens=arguments.max_completion_length,
                batch_size=arguments.batch_size,
                seed=seed,
            )

    def repeated(self, column: str, count: int) -> list[Any]:
        """A column of the data, each row `count` times."""
        return [value for value in self.rows[column] for _ in range(count)]

    def log_probs(self, policy: str, answers: list[Answer]) -> Floats:
        """(P, K) log-probabilities of the answers, whoever drew them, under a policy."""
        count, arguments = len(answers) // len(self.rows), self.arguments
        options = {"temperature": arguments.temperature, "batch_size": arguments.batch_size}
        with self.bank.use_policy(policy) as model:
            logps = log_probs(model, self.bank.tokenizer, self.repeated("prompt", count), answers, **options)
        return logps.reshape(-1, count)

    def score(self, reward: str, answers: list[Answer]) -> Floats:
        """(P, K) scores of the answers under a reward; NaN where it does not apply. What was scored before is not again.

        Raises:
            RecipeError: if the reward fails, or does not return one finite number or None for each answer.
        """
        count, known = len(answers) // len(self.rows), self.scored.setdefault(reward, {})
        keys = [_scored_as(self.rewards[reward], place // count, answer) for place, answer in enumerate(answers)]
        new = {key: place for place, key in enumerate(keys) if key not in known}
        if new:
            places = list(new.values())
            scores = self._ask(self.rewards[reward], [place // count for place in places], [answers[place] for place in places])
            known |= zip(new, scores, strict=True)
        return np.array([known[key] for key in keys]).reshape(-1, count)

    def _ask(self, reward: NamedReward, rows: list[int], answers: list[Answer]) -> list[float]:
        """The score of each answer to its row."""
        asked = self.rows.select(rows)
        scores = score_completions(
            checked_reward(reward.function, reward.name),
            list(asked["prompt"]),
            [_completion(prompt, answer) for prompt, answer in zip(asked["prompt"], answers, strict=True)],
            completion_ids=[list(answer.ids) for answer in answers],
            **{column: list(asked[column]) for column in self.rows.column_names if column != "prompt"},
        )
        return [math.nan if score is None else score for score in scores]


def draw_policy(measurement: Measurement, policy: Policy, seed: int) -> Drawn:
    """The answers of a policy, with their scores and probabilities; of a best-of-n the answers that it would choose."""
    count = measurement.arguments.num_answers
    if policy.best_of is None:
        drawn = Drawn(measurement.draw(policy.name, count, seed))
        drawn.logps = measurement.log_probs(policy.name, drawn.answers)
        same = policy.name == measurement.reference
        drawn.ref_logps = drawn.logps if same else measurement.log_probs(measurement.reference, drawn.answers)
    else:
        chooser = measurement.chooser_of(policy)
        answers = measurement.draw(policy.best_of, count * policy.n, seed)
        sets = np.nan_to_num(measurement.score(chooser, answers), nan=-np.inf).reshape(-1, policy.n)
        drawn = Drawn([answers[row * policy.n + best] for row, best in enumerate(sets.argmax(1))])
    drawn.scores = {name: measurement.score(name, drawn.answers) for name in measurement.rewards}
    return drawn


def _scored_as(reward: NamedReward, row: int, answer: Answer) -> Hashable:
    """What a score depends on: a reward model reads the text alone, a function may count tokens too."""
    return (row, answer.text) if reward.folder else (row, answer)


def _completion(prompt: Prompt, answer: Answer) -> Any:
    return answer.text if isinstance(prompt, str) else [{"role": "assistant", "content": answer.text}]


# --- Figures --------------------------------------------------------------------------------------------


def describe(
    measurement: Measurement, policy: Policy, drawn: Drawn, baseline: Drawn | None, judge: str | ChatJudge | None
) -> dict:
    """Everything about a policy, JSON-serialisable.

    Args:
        measurement: what all have in common.
        policy: the policy.
        drawn: its answers.
        baseline: those of the policy that it is compared with; None for that one itself.
        judge: decides who wins.
    """
    arguments, seed = measurement.arguments, measurement.arguments.seed
    shape = (len(measurement.rows), arguments.num_answers)

    def compared(of: Callable[[Drawn], Floats], share: bool = False, rows: Any = slice(None)) -> Figure:
        return figure(of(drawn)[rows], of(baseline)[rows] if baseline else None, share=share, seed=seed)

    result: dict[str, Any] = {"adapter": policy.folder}
    if policy.best_of:
        result["best_of"] = {"policy": policy.best_of, "n": policy.n, "reward": measurement.chooser_of(policy)}
    result["rewards"] = {name: compared(lambda one, name=name: one.scores[name]) for name in measurement.rewards}
    if baseline is not None:
        for name, reward in result["rewards"].items():
            if reward is not None:  # None: it applies nowhere
                reward["win_rate"] = _win_rate(drawn.scores[name], baseline.scores[name], seed)
        result["win_rate"] = _judged(measurement, drawn, baseline, judge)
    result["kl"], result["entropy"] = _kl_and_entropy(measurement, policy, drawn, seed)
    result["length"] = compared(lambda one: np.array([len(answer.ids) for answer in one.answers], float).reshape(shape))
    result["ended"] = compared(lambda one: np.array([answer.ended for answer in one.answers], float).reshape(shape), True)
    result["diversity"] = diversity(drawn.texts, np.repeat(np.arange(shape[0]), shape[1]).tolist())
    if measurement.tells_truth:
        result |= _truthfulness(measurement, drawn, baseline, compared)
    return result


def figure(values: Floats, baseline: Floats | None = None, *, share: bool = False, seed: int = 0) -> Figure | None:
    """The mean over prompts of the means over a prompt's answers, with its interval, and the difference from a baseline.

    Args:
        values: (P, K); NaN is left out, with its prompt where there is nothing else.
        baseline: (P, K') of another policy on the same prompts, or None.
        share: whether the values lie in [0, 1], so that there is an interval also where all are alike.
        seed: of the resampling.

    Returns:
        None where there is no value.
    """
    means = _means(values)
    there = ~np.isnan(means)
    if not there.any():
        return None
    result = _mean(means[there], seed)
    if share and result["interval"] is None:
        result["interval"] = wilson_interval(result["mean"], int(there.sum()))
    if baseline is not None:
        differences = means - _means(baseline)
        both = ~np.isnan(differences)
        result["difference"] = _mean(differences[both], seed) if both.any() else None
    return result


def is_insignificant(difference: Figure | None) -> bool:
    """Whether a difference may be nothing but chance: its interval holds 0, or it is of fewer than 6 prompts.

    Where all prompts differ alike, resampling gives no interval. By the sign test 6 prompts agree by chance with probability
    2 * 2**-6 = .03, and 5 with .06; so fewer than 6 tell nothing, with an interval or without.
    """
    if difference is None or not difference["mean"]:
        return True
    interval = difference["interval"]
    if difference.get("n", 0 if interval is None else FEWEST) < FEWEST:  # metrics.json once had no `n`
        return True
    return interval is not None and interval[0] <= 0 <= interval[1]


def _means(values: Floats) -> Floats:
    """(P,) means over answers, without NaN; NaN where a prompt has nothing else."""
    counts = (~np.isnan(values)).sum(1)
    return np.where(counts > 0, np.nansum(values, 1) / np.maximum(counts, 1), np.nan)


def _mean(values: Floats, seed: int) -> Figure:
    interval = mean_interval(values, np.arange(len(values)), seed)
    return {"mean": float(values.mean()), "interval": interval, "n": len(values)}


def _win_rate(scores: Floats, others: Floats, seed: int) -> dict[str, Any] | None:
    """Every answer of the one against every answer of the other to the same prompt."""
    one, other = np.broadcast_arrays(scores[:, :, None], others[:, None, :])
    there = ~(np.isnan(one) | np.isnan(other))
    prompts = np.broadcast_to(np.arange(len(scores))[:, None, None], one.shape)
    return win_rate(one[there], other[there], groups=prompts[there].tolist(), seed=seed) if there.any() else None


def _judged(measurement: Measurement, drawn: Drawn, baseline: Drawn, judge: str | ChatJudge | None) -> dict[str, Any] | None:
    seed, count = measurement.arguments.seed, measurement.arguments.num_answers
    if judge is None:
        return None
    if isinstance(judge, str):
        result = _win_rate(drawn.scores[judge], baseline.scores[judge], seed)
        return result and {"judge": judge} | result
    pairs = min(judge.max_pairs, len(drawn.answers))
    verdict = judge.compare(measurement.repeated("prompt", count)[:pairs], drawn.texts[:pairs], baseline.texts[:pairs])
    prompts = [pair // count for pair in range(pairs)]
    return {"judge": judge.model} | share_won(verdict.pop("credits"), groups=prompts, seed=seed) | verdict


def _kl_and_entropy(measurement: Measurement, policy: Policy, drawn: Drawn, seed: int) -> tuple[Figure | None, Figure | None]:
    """KL from the reference, by Monte Carlo or the bound of a best-of-n of the reference, and entropy; nats an answer."""
    if drawn.logps is None:
        bound = {"mean": best_of_n_kl(policy.n), "interval": None, "bound": True}
        return bound if policy.best_of == measurement.reference else None, None
    prompts, count = drawn.logps.shape
    groups = np.repeat(np.arange(prompts), count).tolist()
    found = divergence(drawn.logps.ravel(), drawn.ref_logps.ravel(), groups=groups, seed=seed)
    kl, entropy = ({"mean": found[name], "interval": found[f"{name}_interval"], "n": prompts} for name in ("kl", "entropy"))
    return kl, entropy


def _truthfulness(
    measurement: Measurement, drawn: Drawn, baseline: Drawn | None, compared: Callable[..., Figure]
) -> dict[str, Any]:
    """Shares of right, abstaining and made-up answers, and calibration, for all prompts and for each group."""
    arguments, count = measurement.arguments, measurement.arguments.num_answers
    references = measurement.repeated("reference", count)
    has_reference = np.array([bool((text or "").strip()) for text in measurement.rows["reference"]])

    @functools.cache
    def kinds(texts: tuple[str, ...]) -> np.ndarray:
        return np.array(kinds_of(texts, [text or "" for text in references], arguments.abstentions)).reshape(-1, count)

    def is_kind(kind: str) -> Callable[[Drawn], Floats]:
        return lambda one: (kinds(tuple(one.texts)) == kind).astype(float)

    groups = {name: rows & has_reference for name, rows in groups_of(measurement.rows, arguments.group_by).items()}
    groups = {name: rows for name, rows in groups.items() if rows.any()}
    result: dict[str, Any] = {
        "truthfulness": {name: {kind: compared(is_kind(kind), True, rows) for kind in KINDS} for name, rows in groups.items()}
    }
    column = arguments.group_by
    if column in groups and f"not {column}" in groups:
        result["over_abstained"] = result["truthfulness"][column]["abstained"]
    one, other = _told(drawn, is_kind), _told(baseline, is_kind)
    if one is not None:
        result["calibration"] = {name: _calibration(one, other, rows, arguments.seed) for name, rows in groups.items()}
    return result


@dataclass(frozen=True)
class CalibrationInputs:
    """What a policy's answers stake: (P, K) each.

    Parameters:
        confidences: the probability of the answer.
        right: 1 or 0.
        counts: whether the answer tells something, and does not abstain.
        texts: of the answers.
    """

    confidences: Floats
    right: Floats
    counts: np.ndarray
    texts: np.ndarray

    def of(self, rows: np.ndarray) -> tuple[Floats, Floats, list[int], list[str]]:
        """Of the answers that count, to these prompts (P,) only: confidence, outcome, number of the prompt, and text."""
        chosen = self.counts & rows[:, None]
        return self.confidences[chosen], self.right[chosen], np.nonzero(chosen)[0].tolist(), self.texts[chosen].tolist()


def _told(drawn: Drawn | None, is_kind: Callable[[str], Callable[[Drawn], Floats]]) -> CalibrationInputs | None:
    """None where there are no answers, or no probabilities of them."""
    if drawn is None or drawn.logps is None:
        return None
    confidences, texts = np.minimum(np.exp(drawn.logps), 1), np.array(drawn.texts, dtype=object)
    return CalibrationInputs(
        confidences, is_kind("right")(drawn), is_kind("abstained")(drawn) == 0, texts.reshape(confidences.shape)
    )


def _calibration(one: CalibrationInputs, other: CalibrationInputs | None, rows: np.ndarray, seed: int) -> dict[str, Any] | None:
    """Of the answers that do not abstain: whether those of probability p are right with frequency p."""
    confidences, right, prompts, texts = one.of(rows)
    if not prompts:
        return None
    events = list(zip(prompts, texts, strict=True))  # an answer that is given twice is right twice, or not at all
    result = calibration(confidences, right, groups=prompts, events=events, seed=seed)
    if other is not None and (other.counts & rows[:, None]).any():
        others, others_right, others_prompts, _ = other.of(rows)
        result["difference"] = calibration_difference(
            confidences, right, others, others_right, groups=prompts, other_groups=others_prompts, seed=seed
        )
    return result


def groups_of(rows: Dataset, column: str | None) -> dict[str, Any]:
    """The rows of each group as masks (P,): `all`, and one for each value of the column, named after it.

    Of a column of true and false the groups are called by its name: `known` and `not known`.
    """
    groups = {"all": np.ones(len(rows), dtype=bool)}
    if column:
        values = rows[column]
        truths = all(isinstance(value, bool) for value in values)
        for value in sorted(set(values), key=lambda value: (not value, str(value)) if truths else (False, str(value))):
            name = (column if value else f"not {column}") if truths else f"{column}: {value}"
            groups[name] = np.array([other == value for other in values])
    return groups


# --- The frontier, and what alignment costs -------------------------------------------------------------


def frontier(measurement: Measurement, seed: int) -> dict[str, Any] | None:
    """Reward against KL: of the checkpoints of each run in `frontier`, and of best-of-n of the reference.

    Returns:
        `runs`: folder -> points of `step`, `kl` and `rewards` (figures); `best_of`: points of `n`, `kl` (a bound), `rewards`;
        `chooser`: the reward that best-of-n chooses by. None where the YAML file asks for neither.
    """
    arguments = measurement.arguments
    if not arguments.frontier and not arguments.frontier_best_of:
        return None
    runs = {folder: _run_points(measurement, Path(folder), seed) for folder in arguments.frontier}
    best_of = _best_of_points(measurement, seed + 1) if arguments.frontier_best_of and measurement.rewards else []
    return {"runs": runs, "best_of": best_of, "chooser": measurement.chooser}


def _run_points(measurement: Measurement, run: Path, seed: int) -> list[dict[str, Any]]:
    points = []
    for checkpoint in sorted(checkpoints_in(run), key=step_of):
        if not (checkpoint / TRAINER_STATE).is_file():  # of a killed run, half a checkpoint
            continue
        require_adapter(str(checkpoint), "frontier")
        name = f"frontier: {checkpoint}"  # a policy may be called checkpoint-10 too
        measurement.bank.add(name, str(checkpoint), "frontier")
        policy = Policy(name, str(checkpoint))
        drawn = draw_policy(measurement, policy, seed)
        measurement.bank.remove(name)
        rewards = {name: figure(scores, seed=seed) for name, scores in drawn.scores.items()}
        kl, _ = _kl_and_entropy(measurement, policy, drawn, seed)
        points.append({"step": step_of(checkpoint), "kl": kl, "rewards": rewards})
    return points


def _best_of_points(measurement: Measurement, seed: int) -> list[dict[str, Any]]:
    ns = sorted(set(measurement.arguments.frontier_best_of))
    answers = measurement.draw(measurement.reference, ns[-1], seed)
    scores = {name: measurement.score(name, answers) for name in measurement.rewards}
    chosen_by = scores[measurement.chooser]
    return [
        {
            "n": n,
            "kl": {"mean": best_of_n_kl(n), "interval": None, "bound": True},
            "rewards": {name: _best_of_figure(chosen_by, n, values, seed) for name, values in scores.items()},
        }
        for n in ns
    ]


def _best_of_figure(chosen_by: Floats, n: int, values: Floats, seed: int) -> Figure | None:
    """Over the prompts to whose answers (P, N) both rewards say something; None if there are none."""
    there = ~np.isnan(chosen_by + values).any(1)
    return _mean(best_of_n(chosen_by[there], n, values[there]), seed) if there.any() else None


def perplexities(measurement: Measurement, policies: dict[str, Policy], texts: Dataset) -> dict[str, float]:
    """Perplexity on pretraining text under every policy that has probabilities."""
    result = {}
    for policy in policies.values():
        if policy.best_of is None:
            with measurement.bank.use_policy(policy.name) as model:
                length, size = measurement.arguments.ptx_max_length, measurement.arguments.batch_size
                result[policy.name] = perplexity(
                    model, measurement.bank.tokenizer, texts["text"], max_length=length, batch_size=size
                )
    return result


def lm_eval_results(measurement: Measurement, policies: dict[str, Policy]) -> dict[str, dict[str, Any]]:
    """What lm-eval says of every policy that has probabilities, on `lm_eval_tasks`: its `results`, task by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = {}
    for policy in policies.values():
        if policy.best_of is None:
            with measurement.bank.use_policy(policy.name) as model:
                # the base, in whose layers the active adapter sits
                wrapped = HFLM(
                    base_of(model), tokenizer=measurement.bank.tokenizer, batch_size=measurement.arguments.batch_size
                )
                output = simple_evaluate(wrapped, tasks=measurement.arguments.lm_eval_tasks)
            results[policy.name] = output["results"]
    return results
