"""All differences of an evaluation in sentences, with intervals."""

from rlhf_recipes.evaluation.estimates import is_insignificant
from rlhf_recipes.evaluation.report.columns import number
from rlhf_recipes.evaluation.report.standing import made_for
from rlhf_recipes.evaluation.types import UNSET, Estimate, EvaluationResults, PolicyResult, WinRate

WORTH_A_WARNING = 0.05  # share of the answers


def details(results: EvaluationResults) -> list[str]:
    """Return every comparison in sentences, the most important first.

    A difference counts if its 95% interval excludes 0. Of twenty null differences, about one counts all the same.
    """
    every, calibrations = results.policies, {name: one.calibration_of_all for name, one in results.policies.items()}
    sentences = [
        _winner(results),
        *(_rewards(name, results) for name in results.others),
        *(over_optimised(name, results) for name in results.others),
        _warn(
            "Answers cut off at max_completion_length",
            {name: 1 - one.ended.mean for name, one in every.items()},
            "Raise it to judge them whole.",
        ),
        _made_up(results),
        _warn(
            "Answers that count as made up though they contain the reference",
            {name: one.reworded.mean for name, one in every.items() if one.reworded},
            "Only the very words of the reference are right.",
        ),
        _listed(
            "Abstained although the answer could be known",
            {name: f"{one.over_abstained.mean:.0%}" for name, one in every.items() if one.over_abstained},
        ),
        _listed(
            "Expected calibration error, beside what chance alone would give",
            {name: f"{one.ece:.2f} ({one.ece_if_calibrated:.2f})" for name, one in calibrations.items() if one},
        ),
        _listed(
            "Perplexity on pretraining text", {name: number(one.perplexity) for name, one in every.items() if one.perplexity}
        ),
        _insignificant(results),
    ]
    return [sentence for sentence in sentences if sentence]


def differences(policy: PolicyResult) -> list[tuple[str, Estimate | None]]:
    """Return each compared number's label, and its difference from the baseline."""
    estimates = [(f"score by {name}", reward) for name, reward in policy.rewards.items()]
    for group, kinds in (policy.truthfulness or {}).items():
        estimates += [(f"{kind.replace('_', ' ')}{_on(group)}", share) for kind, share in kinds.items()]
    compared = [(label, one.difference) for label, one in estimates if one]
    calibration = policy.calibration_of_all
    labels = {"ece": "calibration error", "brier": "Brier score"}
    compared += [(labels[key], difference) for key, difference in ((calibration and calibration.difference) or {}).items()]
    compared += [("length", policy.length.difference), ("share ended", policy.ended.difference)]
    return [(label, difference) for label, difference in compared if difference is not UNSET]


def _winner(results: EvaluationResults) -> str:
    baseline = results.compare_with
    rates = {name: policy.win_rate for name, policy in results.others.items() if policy.win_rate}
    if not rates:
        return f"There is no reward or judge, or no policy besides {baseline}, so nobody wins."
    judge = next(iter(rates.values())).judge
    unclear = [name for name in rates if is_insignificant(rates[name].difference)]
    clear = sorted((name for name in rates if name not in unclear), key=lambda name: -rates[name].win_rate)
    better, worse = ([name for name in clear if (rates[name].win_rate > 0.5) == wins] for wins in (True, False))
    parts = []
    if better:
        wins = ", ".join(f"{name} (wins {_rate(rates[name])}{_interest(name, judge, results)})" for name in better)
        parts.append(f"better than {baseline}: {wins}")
    if worse:
        parts.append(f"worse: {', '.join(f'{name} ({_rate(rates[name])})' for name in worse)}")
    if unclear:
        parts.append(f"not told apart from {baseline}: {', '.join(f'{name} ({_rate(rates[name])})' for name in unclear)}")
    return f"Judged by {judge}, {'; '.join(parts)}."


def _interest(name: str, judge: str, results: EvaluationResults) -> str:
    """Return what makes a win by this judge count less."""
    made = made_for(name, judge, results) if judge in results.rewards else None  # a chat model is no reward
    return f"; {made} this judge" if made else ""


def _rewards(name: str, results: EvaluationResults) -> str | None:
    """Compare a policy's rewards with those of the baseline."""
    changes = []
    for reward, score in results.policies[name].rewards.items():
        if score and score.difference:
            held_out = "" if made_for(name, reward, results) else " (not trained against)"
            changes.append(f"{reward}{held_out} {_change(score.difference)}")
    return f"{name} against {results.compare_with}: {'; '.join(changes)}." if changes else None


def over_optimised(name: str, results: EvaluationResults) -> str | None:
    """Warn if a trained reward rises while a held-out one falls (Gao et al., 2023)."""
    compared = {reward: score.difference for reward, score in results.policies[name].rewards.items() if score}
    clear = {reward: change.mean for reward, change in compared.items() if change and not is_insignificant(change)}
    trained = [reward for reward in clear if clear[reward] > 0 and made_for(name, reward, results)]
    held_out = [reward for reward in clear if not results.rewards[reward].trained and clear[reward] < 0]
    if not (trained and held_out):
        return None
    return (
        f"{name} may be over-optimised: it gains by {', '.join(trained)}, which it was made for, and loses by "
        f"{', '.join(held_out)}, which no policy was trained against."
    )


def _made_up(results: EvaluationResults) -> str | None:
    """State how much is made up, in the group where most is."""
    shares = {name: policy.truthfulness for name, policy in results.policies.items() if policy.truthfulness}
    if not shares:
        return None
    groups = next(iter(shares.values()))
    group = max(groups, key=lambda group: max(policy[group]["made_up"].mean for policy in shares.values()))
    listed = {name: f"{policy[group]['made_up'].mean:.0%}" for name, policy in shares.items()}
    return _listed(f"Made up, of the answers{_on(group)}", listed)


def _listed(label: str, texts: dict[str, str]) -> str | None:
    """Return `label: policy text, ...`, or None without policies."""
    return f"{label}: {', '.join(f'{name} {text}' for name, text in texts.items())}." if texts else None


def _warn(label: str, shares: dict[str, float], meaning: str) -> str | None:
    """Return `_listed` and its meaning, of the policies that it concerns."""
    concerned = {name: f"{share:.0%}" for name, share in shares.items() if share >= WORTH_A_WARNING}
    return f"{_listed(label, concerned)} {meaning}" if concerned else None


def _insignificant(results: EvaluationResults) -> str:
    """List the differences that may be chance."""
    parts = []
    for name, policy in results.others.items():
        compared = differences(policy)
        noise = [label for label, difference in compared if is_insignificant(difference)]
        if noise:
            parts.append(f"{name}: {'all that was compared' if len(noise) == len(compared) else ', '.join(noise)}")
    listed = "; ".join(parts)
    covered = "Looked at: scores, shares of answers, calibration and length; perplexity and diversity have no interval."
    if not listed:
        return f"No difference from {results.compare_with} that was measured lies inside the noise. {covered}"
    return f"Inside the noise, as differences from {results.compare_with}: {listed}. {covered}"


def _on(group: str) -> str:
    return "" if group == "all" else f" ({group})"


def _rate(rate: WinRate) -> str:
    low, high = rate.interval
    if rate.ties == rate.n:
        return "all tie"
    return f"{rate.win_rate:.0%} [{low:.0%}, {high:.0%}]"


def _change(difference: Estimate) -> str:
    interval = difference.interval
    bounds = f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
    return f"{difference.mean:+.2f}{bounds}{' (inside the noise)' if is_insignificant(difference) else ''}"
