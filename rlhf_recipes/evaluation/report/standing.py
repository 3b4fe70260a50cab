"""Who is better than whom, by the judge, and whom the judge favours."""

from rlhf_recipes.evaluation.estimates import is_insignificant
from rlhf_recipes.evaluation.types import EvaluationResults


def judge_of(results: EvaluationResults) -> str | None:
    """Return who decided the win rates; None if nobody did."""
    return next((policy.win_rate.judge for policy in results.others.values() if policy.win_rate), None) or None


def ranked(results: EvaluationResults) -> list[str]:
    """Return the policies, the best first: by wins, else by truth.

    Truth is right answers less made-up ones. Without either they keep their order.
    """

    def value(name: str) -> float:
        policy = results.policies[name]
        if judge_of(results):
            return 0.5 if name == results.compare_with else policy.win_rate.win_rate if policy.win_rate else -1.0
        shares = (policy.truthfulness or {}).get("all")
        return shares["right"].mean - shares["made_up"].mean if shares else 0.0

    return sorted(results.policies, key=value, reverse=True)


def compared(results: EvaluationResults) -> tuple[list[str], list[str], list[str]]:
    """Return those better than, worse than, not told apart from the baseline.

    Each the best first. A policy of exactly another's weights stands where that stands; with the baseline's it cannot be told
    apart from it.
    """
    better, worse, unclear = [], [], []
    for name in ranked(results):
        owner = results.policies[name].same_as or name
        rate = results.policies[owner].win_rate
        if name == results.compare_with or not results.policies[name].win_rate:
            continue
        if not rate or is_insignificant(rate.difference):  # the baseline has none
            unclear.append(name)
        else:
            (better if rate.win_rate > 0.5 else worse).append(name)
    return better, worse, unclear


def leader_of(results: EvaluationResults) -> str | None:
    """Return the policy that wins most against the baseline, None if none is better."""
    better, *_ = compared(results)
    return next((name for name in better if not results.policies[name].same_as), None)


def rivals_of(results: EvaluationResults) -> list[str]:
    """Return the policies that may be as good as the leader.

    By the leader's own wins against them; where there are none, by whether the two intervals overlap. Those of the leader's
    or the baseline's weights are left out.
    """
    leader, (better, _, unclear) = leader_of(results), compared(results)
    others = [name for name in (*better, *unclear) if name != leader and not results.policies[name].same_as]
    return [name for name in others if leader and _may_be_as_good(name, leader, results)]


def _may_be_as_good(name: str, leader: str, results: EvaluationResults) -> bool:
    wins = results.policies[name].leader_wins
    if wins:
        return wins.win_rate <= 0.5 or is_insignificant(wins.difference)
    return results.policies[name].win_rate.interval[1] >= results.policies[leader].win_rate.interval[0]


def made_for(name: str, reward: str, results: EvaluationResults) -> str | None:
    """Return how a policy was made to please a reward, or None if it was not.

    By `trained`, of the policy or of the one that it is the best of.
    """
    if reward not in results.rewards:  # a chat model
        return None
    best_of = results.policies[name].best_of
    if best_of and best_of.reward == reward:
        return "chosen by"
    trained, names = results.rewards[reward].trained, {name, best_of.policy} if best_of else {name}
    return "trained against" if trained is True or (trained and names & set(trained)) else None
