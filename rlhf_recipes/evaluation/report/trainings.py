"""What was trained on what: a line for each policy and reward model."""

from pathlib import Path

from rlhf_recipes.evaluation.report.words import duration, listed
from rlhf_recipes.evaluation.types import EvaluationResults, Training
from rlhf_recipes.export.model_card import display_name

# How each recipe trains, and on rows of what
_METHODS = {
    "sft": ("taught (SFT) on", "answers to imitate"),
    "reward": ("taught to score answers on", "rankings, or comparisons of two answers"),
    "dpo": ("taught (DPO) on", "pairs of a better and a worse answer"),
    "ppo": ("rewarded (PPO) for its own answers to", "prompts"),
}


def trainings(results: EvaluationResults) -> dict[str, str]:
    """Return policy or reward model -> how it was made."""
    lines = {}
    bases = [display_name(one.training.base) for one in results.policies.values() if one.training and one.training.base]
    base = next(iter(bases), None)
    for name, policy in results.policies.items():
        if policy.best_of:
            best = policy.best_of
            lines[name] = f"the best of {best.n} answers of {best.policy}, chosen by {best.reward}; nothing is trained"
        elif policy.adapter is None:
            lines[name] = f"the base model{f' {base}' if base not in (None, name) else ''}, as it came"
        else:
            lines[name] = _line(policy.training or None, policy.adapter, results)
        if policy.same_as:
            lines[name] += f". Its weights are exactly those of {policy.same_as}"
    models = {name: reward for name, reward in results.rewards.items() if reward.folder}
    return lines | {name: _line(reward.training or None, reward.folder, results) for name, reward in models.items()}


def _line(training: Training | None, folder: str, results: EvaluationResults) -> str:
    if training is None:
        return f"{folder}, which has no record of its training"
    method, kind = _METHODS.get(training.recipe, (f"trained by {training.recipe} on", "rows"))
    start = _name_of(training.start_from, results) if training.start_from else "the base"
    rows = f"{training.rows:,} {kind}" if training.rows is not None else kind
    sources = listed([_short(source) for source in training.sources])
    paid = f", scored by {listed([_name_of(path, results) for path in training.rewards])}" if training.rewards else ""
    steps = f"{training.steps} steps" if training.steps else ""
    cost = " in ".join(filter(None, [steps, duration(training.seconds) if training.seconds else ""]))
    return f"{start}, {method} {rows}{f' ({sources})' if sources else ''}{paid}{f'; {cost}' if cost else ''}"


def _name_of(path: str, results: EvaluationResults) -> str:
    """Return the policy or reward model of a folder, else the end of its name."""
    folders = {policy.adapter: name for name, policy in results.policies.items() if policy.adapter}
    folders |= {reward.folder: name for name, reward in results.rewards.items() if reward.folder}
    known = {Path(folder).resolve(): name for folder, name in folders.items()}
    return known.get(Path(path).resolve()) or path.rsplit(".", 1)[-1].rsplit("/", 1)[-1]


def _short(source: str) -> str:
    """Return the file or function of a source, without its folders and packages."""
    name = source.partition(" [")[0]
    return Path(name).name if "/" in name else ".".join(name.rsplit(".", 2)[-2:]) if name.count(".") > 1 else name
