"""What an evaluation says, in words, and which of its differences may be chance."""

from typing import Any

from rlhf_recipes.evaluation.evaluate import is_insignificant


def verdict(metrics: dict[str, Any]) -> list[str]:
    """The result in a few sentences, the most important first.

    A difference counts if its 95% interval does not hold 0; of twenty that are nothing, about one counts all the same.

    Args:
        metrics: what `metrics.json` holds.
    """
    sentences = [_winner(metrics)]
    sentences += filter(None, (_rewards(name, metrics) for name in _others(metrics)))
    sentences += filter(None, (_over_optimised(name, metrics) for name in _others(metrics)))
    sentences += filter(None, (_made_up(metrics), _over_abstained(metrics), _calibration(metrics), _tax(metrics)))
    return [*sentences, _noise(metrics)]


def _others(metrics: dict[str, Any]) -> list[str]:
    return [name for name in metrics["policies"] if name != metrics["compare_with"]]


def _winner(metrics: dict[str, Any]) -> str:
    """Who wins against the policy that all are compared with."""
    rival = metrics["compare_with"]
    rates = {name: rate for name in _others(metrics) if (rate := metrics["policies"][name].get("win_rate"))}
    if not rates:
        return f"There is no reward or judge, or no policy besides {rival}, so nobody wins."
    judge = next(iter(rates.values()))["judge"]
    better = sorted((name for name in rates if rates[name]["interval"][0] > 0.5), key=lambda name: -rates[name]["win_rate"])
    worse = [name for name in rates if rates[name]["interval"][1] < 0.5]
    unclear = [name for name in rates if name not in better and name not in worse]
    parts = []
    if better:
        wins = ", ".join(f"{name} (wins {_rate(rates[name])}{_interest(name, judge, metrics)})" for name in better)
        parts.append(f"better than {rival}: {wins}")
    if worse:
        parts.append(f"worse: {', '.join(f'{name} ({_rate(rates[name])})' for name in worse)}")
    if unclear:
        parts.append(f"not told apart from {rival}: {', '.join(f'{name} ({_rate(rates[name])})' for name in unclear)}")
    return f"Judged by {judge}, {'; '.join(parts)}."


def _interest(name: str, judge: str, metrics: dict[str, Any]) -> str:
    """What makes a win by a judge less than it seems."""
    made = _made_for(name, judge, metrics) if judge in metrics["rewards"] else None  # a chat model is no reward
    return f"; {made} this judge" if made else ""


def _rewards(name: str, metrics: dict[str, Any]) -> str | None:
    """How a policy's rewards differ from those of the policy that it is compared with."""
    changes = []
    for reward, result in metrics["policies"][name]["rewards"].items():
        if result and result.get("difference"):
            held_out = "" if _made_for(name, reward, metrics) else " (not trained against)"
            changes.append(f"{reward}{held_out} {_change(result['difference'])}")
    return f"{name} against {metrics['compare_with']}: {'; '.join(changes)}." if changes else None


def _over_optimised(name: str, metrics: dict[str, Any]) -> str | None:
    """Gao et al. (2023): the reward that is trained against rises while another, which stands for the aim, falls."""
    differences = {reward: (result or {}).get("difference") for reward, result in metrics["policies"][name]["rewards"].items()}
    clear = {reward: found["mean"] for reward, found in differences.items() if found and not is_insignificant(found)}
    trained = [reward for reward in clear if clear[reward] > 0 and _made_for(name, reward, metrics)]
    held_out = [reward for reward in clear if not metrics["rewards"][reward]["trained"] and clear[reward] < 0]
    if not (trained and held_out):
        return None
    return (
        f"{name} may be over-optimised: it gains by {', '.join(trained)}, which it was made for, and loses by "
        f"{', '.join(held_out)}, which no policy was trained against."
    )


def _made_for(name: str, reward: str, metrics: dict[str, Any]) -> str | None:
    """How a policy came to please a reward, as words that go before its name; None where it was made without."""
    best_of = metrics["policies"][name].get("best_of") or {}
    if best_of.get("reward") == reward:
        return "chosen by"
    trained = metrics["rewards"][reward]["trained"]
    return "trained against" if trained is True or (trained and {name, best_of.get("policy")} & set(trained)) else None


def _made_up(metrics: dict[str, Any]) -> str | None:
    """How much is made up, in the group where most is."""
    told = {name: found["truthfulness"] for name, found in metrics["policies"].items() if found.get("truthfulness")}
    if not told:
        return None
    groups = next(iter(told.values()))
    group = max(groups, key=lambda group: max(found[group]["made_up"]["mean"] for found in told.values()))
    shares = ", ".join(f"{name} {found[group]['made_up']['mean']:.0%}" for name, found in told.items())
    return f"Made up, of the answers{_on(group)}: {shares}."


def _over_abstained(metrics: dict[str, Any]) -> str | None:
    shares = {name: found["over_abstained"] for name, found in metrics["policies"].items() if found.get("over_abstained")}
    listed = ", ".join(f"{name} {share['mean']:.0%}" for name, share in shares.items())
    return f"Abstained although the answer could be known: {listed}." if shares else None


def _calibration(metrics: dict[str, Any]) -> str | None:
    found = {name: (policy.get("calibration") or {}).get("all") for name, policy in metrics["policies"].items()}
    errors = [f"{name} {one['ece']:.2f} ({one['ece_if_calibrated']:.2f})" for name, one in found.items() if one]
    return f"Expected calibration error, beside what chance alone would give: {', '.join(errors)}." if errors else None


def _tax(metrics: dict[str, Any]) -> str | None:
    found = {name: policy.get("perplexity") for name, policy in metrics["policies"].items()}
    listed = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value)
    return f"Perplexity on pretraining text: {listed}." if listed else None


def _noise(metrics: dict[str, Any]) -> str:
    """What cannot be told from chance."""
    lost = {
        name: [label for label, found in differences(metrics["policies"][name]) if is_insignificant(found)]
        for name in _others(metrics)
    }
    listed = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in lost.items() if labels)
    rival = metrics["compare_with"]
    covered = "Looked at: scores, shares of answers, calibration and length; perplexity and diversity have no interval."
    if not listed:
        return f"No difference from {rival} that was measured lies inside the noise. {covered}"
    return f"Inside the noise, as differences from {rival}: {listed}. {covered}"


def differences(policy: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None]]:
    """Everything in which a policy was compared, by name, with the difference."""
    found = [(f"score by {name}", reward) for name, reward in policy["rewards"].items()]
    for group, kinds in (policy.get("truthfulness") or {}).items():
        found += [(f"{kind.replace('_', ' ')}{_on(group)}", share) for kind, share in kinds.items()]
    calibration = ((policy.get("calibration") or {}).get("all") or {}).get("difference") or {}
    labels = {"ece": "calibration error", "brier": "Brier score"}
    found += [(labels[key], {"difference": difference}) for key, difference in calibration.items()]
    found += [("length", policy["length"]), ("share ended", policy["ended"])]
    return [(label, one["difference"]) for label, one in found if one and "difference" in one]


def _on(group: str) -> str:
    return "" if group == "all" else f" ({group})"


def _rate(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['win_rate']:.0%} [{low:.0%}, {high:.0%}]"


def _change(difference: dict[str, Any]) -> str:
    interval = difference["interval"]
    bounds = f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
    return f"{difference['mean']:+.2f}{bounds}{' (inside the noise)' if is_insignificant(difference) else ''}"
