"""All that is measured of one policy."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rlhf_recipes.evaluation.estimates import at_equal_length, best_of_n_kl_bound, estimate, kl_and_entropy, win_rate_of
from rlhf_recipes.evaluation.measurement import Measurement, PolicySamples
from rlhf_recipes.evaluation.metrics.calibration import calibration, calibration_difference
from rlhf_recipes.evaluation.metrics.comparison import share_won
from rlhf_recipes.evaluation.metrics.intervals import Floats
from rlhf_recipes.evaluation.metrics.perplexity import perplexity
from rlhf_recipes.evaluation.metrics.texts import diversity
from rlhf_recipes.evaluation.prompts import groups_of
from rlhf_recipes.evaluation.types import UNSET, BestOf, CalibrationBin, CalibrationResult, Estimate, PolicyResult, WinRate
from rlhf_recipes.generation.judges import ChatJudge
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.models.backbone import base_of
from rlhf_recipes.rewards.matching import KINDS, accepted_answers, kinds_of, normalise

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray


def measure_policy(
    measurement: Measurement,
    policy: Policy,
    samples: PolicySamples,
    baseline: PolicySamples | None,
    judge: str | ChatJudge | None = None,
    texts: Dataset | None = None,
) -> PolicyResult:
    """Measure a policy by its answers.

    `baseline` holds the answers of the policy that it is compared with, and is None for that policy itself. `judge` decides
    win rates, and `texts` is pretraining text to measure perplexity on.
    """
    arguments = measurement.arguments
    seed, shape = arguments.seed, (len(measurement.rows), arguments.num_answers)

    def compared(read: Callable[[PolicySamples], Floats], share: bool = False) -> Estimate | None:
        return estimate(read(samples), None if baseline is None else read(baseline), share=share, seed=seed)

    def per_answer(read: Callable[[Any], float]) -> Callable[[PolicySamples], Floats]:
        return lambda one: np.array([read(answer) for answer in one.answers], float).reshape(shape)

    best_of = UNSET
    if policy.best_of:
        best_of = BestOf(policy=policy.best_of, n=policy.n, reward=policy.reward or measurement.chooser)
    if samples.logps is not None:
        kl, entropy = kl_and_entropy(samples.logps, samples.ref_logps, seed)
    else:
        kl, entropy = best_of_n_kl_bound(policy.n) if policy.best_of == measurement.reference else None, None
    ppl = UNSET
    if texts is not None and not policy.best_of:
        with measurement.bank.use_policy(policy.name) as model:
            options = {"max_length": arguments.ptx_max_length, "batch_size": arguments.batch_size}
            ppl = perplexity(model, measurement.bank.tokenizer, texts["text"], **options)
    return PolicyResult(
        adapter=policy.folder,
        best_of=best_of,
        rewards={name: _reward(name, samples, baseline, seed) for name in measurement.rewards},
        win_rate=UNSET if baseline is None else _judged(measurement, samples, baseline, judge),
        kl=kl,
        entropy=entropy,
        length=compared(per_answer(lambda answer: len(answer.ids))),
        ended=compared(per_answer(lambda answer: answer.ended), share=True),
        diversity=diversity(samples.texts, np.repeat(np.arange(shape[0]), shape[1]).tolist()),
        **(_compare_with_references(measurement, samples, baseline) if measurement.compares_references else {}),
        perplexity=ppl,
        lm_eval=lm_eval_results(measurement, policy) if arguments.lm_eval_tasks and not policy.best_of else UNSET,
    )


def _reward(name: str, samples: PolicySamples, baseline: PolicySamples | None, seed: int) -> Estimate | None:
    if baseline is None:
        return estimate(samples.scores[name], seed=seed)
    scores, others = samples.scores[name], baseline.scores[name]
    result = estimate(scores, others, seed=seed)
    return result and replace(result, win_rate=win_rate_of(scores, others, seed))


def _judged(
    measurement: Measurement, samples: PolicySamples, baseline: PolicySamples, judge: str | ChatJudge | None
) -> WinRate | None:
    seed, count = measurement.arguments.seed, measurement.arguments.num_answers
    if judge is None:
        return None
    mine, theirs = (np.array([len(answer.ids) for answer in one.answers], float) for one in (samples, baseline))
    if isinstance(judge, str):
        lengths = None if measurement.compares_references else (mine.reshape(-1, count), theirs.reshape(-1, count))
        return win_rate_of(samples.scores[judge], baseline.scores[judge], seed, judge, lengths)
    pairs = min(judge.max_pairs, len(samples.answers))
    verdict = judge.compare(measurement.repeated("prompt", count)[:pairs], samples.texts[:pairs], baseline.texts[:pairs])
    prompts, credits = [pair // count for pair in range(pairs)], verdict.pop("credits")
    equal = at_equal_length(credits, mine[:pairs], theirs[:pairs], prompts, seed)
    return WinRate(judge=judge.model, **share_won(credits, groups=prompts, seed=seed), equal_length=equal, **verdict)


def lm_eval_results(measurement: Measurement, policy: Policy) -> dict[str, Any]:
    """Run lm-eval's `lm_eval_tasks` with a policy; return its `results` by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    arguments = measurement.arguments
    with measurement.bank.use_policy(policy.name) as model:
        # the base, whose layers hold the active adapter
        wrapped = HFLM(base_of(model), tokenizer=measurement.bank.tokenizer, batch_size=arguments.batch_size)
        return simple_evaluate(wrapped, tasks=arguments.lm_eval_tasks)["results"]


# --- Answers against reference answers --------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    """A policy's answers as right or wrong, (P, K) each."""

    kinds: NDArray[np.str_]  # of `KINDS`
    texts: NDArray[np.object_]
    confidences: Floats | None  # probability of each answer; None for best-of-n

    def select(self, rows: NDArray[np.bool_]) -> tuple[Floats, Floats, list[int], list[str]]:
        """Return confidences, outcomes, prompts, texts, abstentions left out."""
        chosen = (self.kinds != "abstained") & rows[:, None]
        right = (self.kinds[chosen] == "right").astype(float)
        return self.confidences[chosen], right, np.nonzero(chosen)[0].tolist(), self.texts[chosen].tolist()


def _compare_with_references(
    measurement: Measurement, samples: PolicySamples, baseline: PolicySamples | None
) -> dict[str, Any]:
    """Return `truthfulness`, `over_abstained` and `calibration`, by group."""
    arguments = measurement.arguments
    has_reference = np.array([bool(accepted_answers(one)) for one in measurement.rows["reference"]])
    groups = {name: rows & has_reference for name, rows in groups_of(measurement.rows, arguments.group_by).items()}
    groups = {name: rows for name, rows in groups.items() if rows.any()}
    references = measurement.repeated("reference", arguments.num_answers)

    def judged(one: PolicySamples) -> _Judged:
        kinds = np.array(kinds_of(one.texts, references, arguments.abstentions)).reshape(-1, arguments.num_answers)
        confidences = None if one.logps is None else np.minimum(np.exp(one.logps), 1)
        return _Judged(kinds, np.array(one.texts, dtype=object).reshape(kinds.shape), confidences)

    one, other = judged(samples), None if baseline is None else judged(baseline)

    def share(kind: str, rows: NDArray[np.bool_]) -> Estimate:
        values, others = (None if who is None else (who.kinds == kind).astype(float)[rows] for who in (one, other))
        return estimate(values, others, share=True, seed=arguments.seed)

    truthfulness = {name: {kind: share(kind, rows) for kind in KINDS} for name, rows in groups.items()}
    result: dict[str, Any] = {"truthfulness": truthfulness}
    contained = [contains(text, reference) for text, reference in zip(samples.texts, references, strict=True)]
    reworded = (one.kinds == "made_up") & np.array(contained).reshape(one.kinds.shape)
    result["reworded"] = estimate(reworded.astype(float)[groups["all"]], share=True, seed=arguments.seed)
    column = arguments.group_by
    if column in groups and f"not {column}" in groups:
        result["over_abstained"] = truthfulness[column]["abstained"]
    if one.confidences is not None:
        result["calibration"] = {name: _calibration(one, other, rows, arguments.seed) for name, rows in groups.items()}
    return result


def contains(text: str, reference: Any) -> bool:
    """Return whether an answer contains an accepted one, as whole words."""
    accepted = filter(None, (re.escape(normalise(one)) for one in accepted_answers(reference)))
    return any(re.search(rf"(?<!\w){words}(?!\w)", normalise(text)) for words in accepted)


def _calibration(one: _Judged, other: _Judged | None, rows: NDArray[np.bool_], seed: int) -> CalibrationResult | None:
    """Return None where all answers abstain."""
    confidences, right, prompts, texts = one.select(rows)
    if not prompts:
        return None
    events = list(zip(prompts, texts, strict=True))  # an answer given twice has one outcome
    values = calibration(confidences, right, groups=prompts, events=events, seed=seed)
    difference = UNSET
    if other is not None and other.confidences is not None and (others := other.select(rows))[2]:
        differences = calibration_difference((confidences, right, prompts), others[:3], seed=seed)
        difference = {name: Estimate(**fields) for name, fields in differences.items()}
    bins = [CalibrationBin(**entry) for entry in values.pop("bins")]
    return CalibrationResult(**values, bins=bins, difference=difference)
