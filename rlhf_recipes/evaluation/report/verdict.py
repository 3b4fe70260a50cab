"""The verdict of an evaluation: five plain sentences, the best policy first."""

from rlhf_recipes.evaluation.estimates import MIN_PROMPTS, is_insignificant
from rlhf_recipes.evaluation.report.details import WORTH_A_WARNING, over_optimised
from rlhf_recipes.evaluation.report.standing import compared, judge_of, leader_of, made_for, rivals_of
from rlhf_recipes.evaluation.report.truth import CHANCE, answers_of
from rlhf_recipes.evaluation.report.words import hundredths, listed, of_answers, one_decimal
from rlhf_recipes.evaluation.types import Estimate, EvaluationResults, PolicyResult, WinRate

_SMALL = 50  # prompts: below, only large differences show
_SAME = 0.02  # change of perplexity that is not worth a word
_BESIDE = 3  # other policies whose perplexity is named


def verdict(results: EvaluationResults) -> list[str]:
    """Return who is better, the others, what they answer, the cost, and trust."""
    sentences = [_result(results), _others(results), answers_of(subject_of(results), results), _cost(results), _trust(results)]
    return [sentence for sentence in sentences if sentence]


def heading(results: EvaluationResults) -> str:
    """Return the result in few words."""
    leader, baseline = leader_of(results), results.compare_with
    if leader:
        first, judge = [leader, *rivals_of(results)], judge_of(results)
        if cut := _mostly_cut_off(leader, results):
            return f"{leader} is ahead of {baseline}, but most answers of {listed(cut)} were cut off"
        if made_for(leader, judge, results):
            return f"{leader} is better than {baseline}, by a judge that favours it"
        distinct = [name for names in compared(results) for name in names if not results.policies[name].same_as]
        if len(first) == 1 < len(distinct):
            return f"{leader} is the best of {len(distinct) + 1} policies"
        if len(first) > 1:
            rivals = first[1] if len(first) == 2 else f"{len(first) - 1} others"
            return f"{leader} is better than {baseline}, and {rivals} may be as good"
        return f"{leader} is better than {baseline}"
    if not results.others:
        return f"The answers of {baseline}"
    return f"No policy is better than {baseline}" if judge_of(results) else f"{listed([*results.policies])}, without a judge"


def _result(results: EvaluationResults) -> str:
    """Return which policy is better, by whose judgement."""
    baseline, judge, leader = results.compare_with, judge_of(results), leader_of(results)
    if not results.others:
        return f"{baseline} is the only policy: there is nothing to compare it with."
    if judge is None:
        return "No reward or judge compared the answers, so no policy is called better."
    if leader is None:
        _, worse, unclear = ([_with_twin(name, results) for name in names] for names in compared(results))
        told = f"{listed(worse)} {'is' if len(worse) == 1 else 'are'} worse" if worse else ""
        chance = f"{listed(unclear)} cannot be told apart from it" if unclear else ""
        return f"No policy is better than {baseline}, judged by {judge}: {'; '.join(filter(None, [told, chance]))}."
    sentence = f"{leader} is better than {baseline}, judged by {judge}: {_wins(leader, results)}."
    sentence += _against_the_next(leader, results)
    if equal := results.policies[leader].win_rate.equal_length:
        chance = CHANCE if is_insignificant(equal.difference) else ""
        sentence += f" If all answers were equally long, it would win {100 * equal.mean:.0f} of 100{chance}."
    if made := made_for(leader, judge, results):
        sentence += f" But it was {made} this very judge, which flatters it."
        fair = next((name for name in compared(results)[0] if not made_for(name, judge, results)), None)
        sentence += f" The best that was not: {fair}." if fair else ""
    if cut := _mostly_cut_off(leader, results):
        sentence += (
            f" But most answers of {listed(cut)} were cut off before they ended: this says little, unless length matters."
        )
    if rivals := rivals_of(results):
        sentence += f" {listed(rivals)} may be as good: the difference may be chance."
    return sentence


def subject_of(results: EvaluationResults) -> str:
    """Return the policy that answers and costs are told of.

    The leader; without one the last that was trained, or else a best-of-n, the baseline, the base.
    """

    def interest(name: str) -> tuple[bool, bool, bool]:
        policy = results.policies[name]
        trained = policy.adapter is not None and not policy.same_as
        return trained and name != results.compare_with, policy.best_of is not None, trained

    return leader_of(results) or max([*reversed(results.others), results.compare_with], key=interest)


def _mostly_cut_off(name: str, results: EvaluationResults) -> list[str]:
    """Return it and the baseline, if fewer than half of their answers end."""
    return [one for one in dict.fromkeys((name, results.compare_with)) if results.policies[one].ended.mean < 0.5]


def _wins(name: str, results: EvaluationResults) -> str:
    rate = results.policies[name].win_rate
    if rate.judge not in results.rewards:
        return f"it wins {100 * rate.win_rate:.0f} of 100 comparisons (a tie counts half)"
    won, equal, lost = _outcomes(rate)
    return f"its answer is the better one in {won} of 100 comparisons, equal in {equal}, worse in {lost}"


def _against_the_next(leader: str, results: EvaluationResults) -> str:
    """Return the leader's direct comparison with the second best, if it is clear."""
    better = [name for name in compared(results)[0] if name != leader and not results.policies[name].same_as]
    wins = results.policies[better[0]].leader_wins if better else None
    if not wins or better[0] in rivals_of(results):
        return ""
    won, _, lost = _outcomes(wins)
    return f" Directly against {better[0]}, the next: better in {won} of 100, worse in {lost}."


def _outcomes(rate: WinRate) -> tuple[str, str, str]:
    """Return the wins, ties and losses of 100 comparisons."""
    equal = rate.ties / rate.n
    won, lost = (max(0.0, share - equal / 2) for share in (rate.win_rate, 1 - rate.win_rate))
    shares = won, equal, lost
    if any(0 < share < 0.005 for share in shares):
        return tuple(map(hundredths, shares))
    # They add up: of those rounded down, the ones with the largest rests get one more
    whole = [int(100 * share + 1e-9) for share in shares]
    largest = sorted(range(3), key=lambda place: whole[place] - 100 * shares[place])
    return tuple(str(whole[place] + (place in largest[: 100 - sum(whole)])) for place in range(3))


def _others(results: EvaluationResults) -> str | None:
    """Return the other policies against the baseline, the best first."""
    leader, baseline = leader_of(results), results.compare_with
    if leader is None:
        return None
    labels = "Also better", f"Worse than {baseline}", f"No clear difference from {baseline}"
    parts = []
    for label, names in zip(labels, compared(results), strict=True):
        texts = [_other(name, results) for name in names if name != leader]
        parts += [f"{label}: {', '.join(texts)}."] if texts else []
    return " ".join(parts) or None


def _other(name: str, results: EvaluationResults) -> str:
    policy = results.policies[name]
    if policy.same_as:
        return _with_twin(name, results)
    if policy.win_rate.judge in results.rewards:
        won, _, lost = _outcomes(policy.win_rate)
        text = f"{won} of 100 answers better, {lost} worse"
    else:
        text = f"wins {100 * policy.win_rate.win_rate:.0f} of 100"
    made = made_for(name, policy.win_rate.judge, results)
    return f"{name} ({text}{f'; {made} this judge' if made else ''})"


def _with_twin(name: str, results: EvaluationResults) -> str:
    """Return a policy's name, with the one whose weights it has."""
    twin = results.policies[name].same_as
    return f"{name} (it has exactly the weights of {twin})" if twin else name


# --- What it cost -----------------------------------------------------------------------------------------


def _cost(results: EvaluationResults) -> str:
    name, baseline = subject_of(results), results.compare_with
    policy, base = results.policies[name], results.policies[baseline]
    parts = [_perplexity(name, results), *_tasks(policy, base)]
    if name != baseline and policy.over_abstained and _rises(policy.over_abstained):
        parts.append("it abstains more where it could know")
    if policy.best_of:
        parts.append(f"{policy.best_of.n} answers are sampled for each that is given")
    elif policy.kl and results.kl_reference not in (name, policy.same_as):
        moved = "moved away" if policy.kl.mean > 0 and (policy.kl.interval or [1])[0] > 0 else "hardly moved away"
        parts.append(
            f"its answers {moved} from those of {results.kl_reference} (KL: {max(0, policy.kl.mean):.1f} nats; 0 is no change)"
        )
    if not (policy.perplexity or policy.lm_eval):
        parts.append("what it forgot was not measured (`ptx_dataset`, `lm_eval_tasks`)")
    return f"Cost of {name}: {'; '.join(filter(None, parts))}."


def _rises(share: Estimate) -> bool:
    return bool(share.difference) and share.difference.mean > 0 and not is_insignificant(share.difference)


def _perplexity(name: str, results: EvaluationResults) -> str | None:
    """Return how much worse ordinary text is predicted."""
    now, before = results.policies[name].perplexity, results.policies[results.compare_with].perplexity
    if not now:
        return None
    if name == results.compare_with or not before:
        return f"perplexity on ordinary text is {one_decimal(now)} (lower is better)"
    change = now / before - 1
    judged = "a cost" if change > _SAME else "no cost" if change < -_SAME else "hardly a change"
    others = {one: results.policies[one].perplexity for one in compared(results)[0] if one != name}
    beside = [f"with {one} to {one_decimal(value)}" for one, value in others.items() if value][:_BESIDE]
    return (
        f"perplexity on ordinary text (lower is better) went from {one_decimal(before)} ({results.compare_with}) to "
        f"{one_decimal(now)}, {judged}{f'; {listed(beside)}' if beside else ''}"
    )


def _tasks(policy: PolicyResult, base: PolicyResult) -> list[str]:
    """Return the accuracy on each task of lm-eval, against that of the baseline."""
    parts = []
    for task, values in (policy.lm_eval or {}).items():
        key = next((key for key in values if key.startswith("acc,")), None)
        others = (base.lm_eval or {}).get(task, {})
        if key is None or policy is base or key not in others:
            continue
        error = key.replace("acc,", "acc_stderr,")
        noise = 1.96 * sum(float(one[error]) ** 2 for one in (values, others) if _is_number(one.get(error))) ** 0.5
        chance = CHANCE if abs(values[key] - others[key]) <= noise else ""
        parts.append(f"{task} went from {100 * others[key]:.0f} to {100 * values[key]:.0f} of 100 right{chance}")
    return parts


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


# --- How far to trust it ----------------------------------------------------------------------------------


def _trust(results: EvaluationResults) -> str:
    judge, many = judge_of(results), results.num_answers > 1
    size = f"{results.prompts} held-out prompts, {results.num_answers} answer{'s' if many else ''} each"
    if results.prompts < MIN_PROMPTS:
        size += ": too few to tell anything"
    elif results.prompts < _SMALL:
        size += ": a small sample, in which only large differences show"
    parts = [size]
    if judge:
        parts += _about_judge(judge, results)
    parts += [text.rstrip(".") for name in results.others if (text := over_optimised(name, results))]
    for name in dict.fromkeys([subject_of(results), results.compare_with]):
        policy = results.policies[name]
        if 1 - policy.ended.mean >= WORTH_A_WARNING:
            parts.append(f"{of_answers(policy.ended, results.num_answers)} answers of {name} end, the others were cut off")
        if policy.reworded and policy.reworded.mean >= WORTH_A_WARNING:
            reworded = of_answers(policy.reworded, results.num_answers)
            parts.append(f"{reworded} answers of {name} count as made up though they contain the right one")
    if any(policy.training for policy in results.others.values()):
        parts.append("each training ran once, and another seed may differ")
    return f"Trust: {'; '.join(parts)}."


def _about_judge(judge: str, results: EvaluationResults) -> list[str]:
    rates = [policy.win_rate for policy in results.others.values() if policy.win_rate]
    parts = []
    if judge in results.rewards:
        favoured = [name for name in results.policies if made_for(name, judge, results)]
        if favoured:
            parts.append(f"{judge}, the judge, favours {listed(favoured)}, made to please it")
        else:
            parts.append(f"no policy was trained directly against {judge}, the judge")
        if about := results.rewards[judge].about:
            parts.append(f"{judge} is a rule: {about[:1].lower()}{about[1:].rstrip('.')}")
    swayed = max((rate.swayed for rate in rates if rate.swayed), default=0)
    if swayed >= 0.2:
        parts.append(f"the judge changed its mind in up to {100 * swayed:.0f} of 100 pairs when their order changed")
    most = max(rate.prompts for rate in rates)
    if most < results.prompts:
        parts.append(f"the judge compared answers to {most} of these prompts only")
    return parts
