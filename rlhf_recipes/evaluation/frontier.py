"""Reward against KL: the checkpoints of runs, and best-of-n beside them."""

from pathlib import Path

from rlhf_recipes.core.errors import error_context
from rlhf_recipes.evaluation.estimates import best_of_n_kl_bound, estimate, kl_and_entropy, mean_estimate
from rlhf_recipes.evaluation.measurement import Measurement, sample_policy
from rlhf_recipes.evaluation.metrics.comparison import best_of_n
from rlhf_recipes.evaluation.types import Frontier, FrontierPoint
from rlhf_recipes.generation.policies import Policy
from rlhf_recipes.inputs import require_adapter
from rlhf_recipes.training.resume import TRAINER_STATE, checkpoints_in, step_of

import numpy as np


def measure_frontier(measurement: Measurement, seed: int) -> Frontier | None:
    """Measure `frontier` and `frontier_best_of`; None without either."""
    arguments = measurement.arguments
    if not arguments.frontier and not arguments.frontier_best_of:
        return None
    runs = {folder: _run_points(measurement, Path(folder), seed) for folder in arguments.frontier}
    best_of = _best_of_points(measurement, seed + 1) if arguments.frontier_best_of and measurement.rewards else []
    return Frontier(runs=runs, best_of=best_of, chooser=measurement.chooser)


def _run_points(measurement: Measurement, run: Path, seed: int) -> list[FrontierPoint]:
    points = []
    for checkpoint in sorted(checkpoints_in(run), key=step_of):
        if not (checkpoint / TRAINER_STATE).is_file():  # an incomplete checkpoint of a killed run
            continue
        with error_context("frontier"):
            require_adapter(str(checkpoint))
        policy = Policy(f"frontier: {checkpoint}", str(checkpoint))  # a policy may be called checkpoint-10 too
        measurement.bank.add(policy.name, policy.folder, "frontier")
        samples = sample_policy(measurement, policy, seed)
        measurement.bank.remove(policy.name)
        rewards = {name: estimate(scores, seed=seed) for name, scores in samples.scores.items()}
        kl, _ = kl_and_entropy(samples.logps, samples.ref_logps, seed)
        points.append(FrontierPoint(step=step_of(checkpoint), kl=kl, rewards=rewards))
    return points


def _best_of_points(measurement: Measurement, seed: int) -> list[FrontierPoint]:
    ns = sorted(set(measurement.arguments.frontier_best_of))
    answers = measurement.sample(measurement.reference, ns[-1], seed)
    scores = {name: measurement.score(name, answers) for name in measurement.rewards}
    points = [FrontierPoint(n=n, kl=best_of_n_kl_bound(n), rewards={}) for n in ns]
    for name, values in scores.items():
        present = ~np.isnan(scores[measurement.chooser] + values).any(1)  # prompts that both rewards apply to
        chosen_by, values = scores[measurement.chooser][present], values[present]
        for point in points:
            point.rewards[name] = mean_estimate(best_of_n(chosen_by, point.n, values), seed) if len(values) else None
    return points
