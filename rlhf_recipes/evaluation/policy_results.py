"""All that is measured of one policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf_recipes.evaluation.estimates import best_of_n_kl_bound, estimate, kl_and_entropy, win_rate_of
from rlhf_recipes.evaluation.measurement import Measurement, PolicySamples
from rlhf_recipes.evaluation.metrics.comparison import share_won
from rlhf_recipes.evaluation.metrics.diversity import diversity
from rlhf_recipes.evaluation.metrics.intervals import Floats
from rlhf_recipes.evaluation.metrics.perplexity import perplexity
from rlhf_recipes.evaluation.references import compare_with_references
from rlhf_recipes.evaluation.types import UNSET, BestOf, Estimate, PolicyResult, WinRate
from rlhf_recipes.generation.judges import ChatJudge
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.models.backbone import base_of

import numpy as np
from datasets import Dataset


def measure_policy(
    measurement: Measurement,
    policy: Policy,
    samples: PolicySamples,
    baseline: PolicySamples | None,
    judge: str | ChatJudge | None = None,
    texts: Dataset | None = None,
) -> PolicyResult:
    """Measure a policy.

    Args:
        measurement: What all policies share.
        policy: The policy.
        samples: Its answers.
        baseline: Answers of the policy that it is compared with; None for that policy itself.
        judge: Decides win rates.
        texts: Pretraining text, to measure perplexity on.
    """
    seed, shape = measurement.arguments.seed, (len(measurement.rows), measurement.arguments.num_answers)

    def compared(read: Callable[[PolicySamples], Floats], share: bool = False) -> Estimate | None:
        return estimate(read(samples), None if baseline is None else read(baseline), share=share, seed=seed)

    def per_answer(read: Callable[[Any], float]) -> Callable[[PolicySamples], Floats]:
        return lambda one: np.array([read(answer) for answer in one.answers], float).reshape(shape)

    best_of = UNSET
    if policy.best_of:
        best_of = BestOf(policy=policy.best_of, n=policy.n, reward=measurement.chooser_of(policy))
    if samples.logps is not None:
        kl, entropy = kl_and_entropy(samples.logps, samples.ref_logps, seed)
    else:
        kl, entropy = best_of_n_kl_bound(policy.n) if policy.best_of == measurement.reference else None, None
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
        **(compare_with_references(measurement, samples, baseline) if measurement.compares_references else {}),
        perplexity=UNSET if texts is None or policy.best_of else _perplexity(measurement, policy, texts),
        lm_eval=lm_eval_results(measurement, policy) if measurement.arguments.lm_eval_tasks and not policy.best_of else UNSET,
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
    if isinstance(judge, str):
        return win_rate_of(samples.scores[judge], baseline.scores[judge], seed, judge)
    pairs = min(judge.max_pairs, len(samples.answers))
    verdict = judge.compare(measurement.repeated("prompt", count)[:pairs], samples.texts[:pairs], baseline.texts[:pairs])
    prompts = [pair // count for pair in range(pairs)]
    return WinRate(judge=judge.model, **share_won(verdict.pop("credits"), groups=prompts, seed=seed), **verdict)


def _perplexity(measurement: Measurement, policy: Policy, texts: Dataset) -> float:
    arguments = measurement.arguments
    with measurement.bank.use_policy(policy.name) as model:
        options = {"max_length": arguments.ptx_max_length, "batch_size": arguments.batch_size}
        return perplexity(model, measurement.bank.tokenizer, texts["text"], **options)


def lm_eval_results(measurement: Measurement, policy: Policy) -> dict[str, Any]:
    """Run lm-eval's `lm_eval_tasks` with a policy; return its `results` by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    arguments = measurement.arguments
    with measurement.bank.use_policy(policy.name) as model:
        # the base, whose layers hold the active adapter
        wrapped = HFLM(base_of(model), tokenizer=measurement.bank.tokenizer, batch_size=arguments.batch_size)
        return simple_evaluate(wrapped, tasks=arguments.lm_eval_tasks)["results"]
