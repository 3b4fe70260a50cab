"""The report of an evaluation: one HTML file that needs nothing else."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from rlhf_recipes.core.files import METRICS, RECIPE, read_json, write_json, write_text
from rlhf_recipes.evaluation.estimates import is_insignificant
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.report.columns import form_columns, number, percent, score_columns, truthfulness_columns
from rlhf_recipes.evaluation.report.picture import panels
from rlhf_recipes.evaluation.report.trainings import trainings
from rlhf_recipes.evaluation.report.verdict import heading
from rlhf_recipes.evaluation.reward_evaluation import summary
from rlhf_recipes.evaluation.types import UNSET, EvaluationResults, Example, FrontierPoint, PolicyResult, to_json
from rlhf_recipes.stages import STAGES, Stage

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

PAGE = "index.html"
_UNKNOWN = Stage(arguments=())  # of a recipe that is not in the registry


def write_report(folder: str | Path, results: EvaluationResults) -> Path:
    """Write `index.html` and, last, `metrics.json`; return the path of the page."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PAGE, render(results))
    write_json(folder / METRICS, to_json(results))  # marks the stage as complete
    return folder / PAGE


def render(results: EvaluationResults) -> str:
    """Return the page. Everything is escaped except the pictures."""
    environment = Environment(
        loader=PackageLoader("rlhf_recipes.evaluation.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "percent": percent}
    environment.tests |= {"insignificant": is_insignificant, "unset": lambda value: value is UNSET}
    return environment.get_template("report.html.jinja").render(
        results=results,
        policies=results.policies,
        heading=heading(results),
        panels=panels(results),
        trainings=trainings(results),
        first=_first_of_groups(results.examples),
        scores=score_columns(results),
        truthfulness=truthfulness_columns(results),
        form=[column for column in form_columns(results) if any(map(column.read, results.policies.values()))],
        curves=_curves(results),
        frontiers=_frontiers(results),
        diagrams=_diagrams(results),
        reward_lines=[
            f"{reward}: {summary(name, result)}"
            for reward, about in results.rewards.items()
            for name, result in (about.evaluation or {}).items()
        ],
    )


def _first_of_groups(examples: Sequence[Example]) -> list[Example]:
    """Return an example of each group, of three at most; two where there is one group."""
    first = list({example.group: example for example in reversed(examples)}.values())[::-1]
    return first[:3] if len(first) > 1 else list(examples[:2])


def _picture(svg: str) -> Markup:
    """Return an SVG to embed, without its XML declaration."""
    return Markup(svg[svg.index("<svg") :])


def _curves(results: EvaluationResults) -> dict[str, list[Markup]]:
    """Return the learning curves of every policy and reward model that has a record.

    One picture for each logged number, to fit a phone.
    """
    folders = {name: policy.adapter for name, policy in results.policies.items()}
    folders |= {name: reward.folder for name, reward in results.rewards.items()}
    pictures = {}
    for name, folder in folders.items():
        record = read_json(Path(folder) / RECIPE) if folder else {}
        log, curves = record.get("log", ()), STAGES.get(record.get("recipe"), _UNKNOWN).curves
        logged = [key for key in curves if any(entry.get(key) is not None for entry in log)]
        pictures[name] = [_picture(plots.learning_curves(log, [key])) for key in logged]
    return {name: curves for name, curves in pictures.items() if curves}


def _frontiers(results: EvaluationResults) -> list[Markup]:
    """Return a picture of reward against KL for each reward that applies anywhere."""
    frontier = results.frontier
    if not frontier:
        return []

    def points(entries: Sequence[tuple[FrontierPoint | PolicyResult, str]], reward: str) -> list[tuple[float, float, str]]:
        measured = [(entry.kl, entry.rewards[reward], label) for entry, label in entries]
        return [(kl.mean, score.mean, label) for kl, score, label in measured if kl and score]

    names, pictures = _short_names(frontier.runs), []
    policies = [(policy, name) for name, policy in results.policies.items() if not policy.best_of]
    best_of = [(point, f"n={point.n}") for point in frontier.best_of]
    for reward, about in results.rewards.items():
        runs = {
            names[folder]: points([(point, str(point.step)) for point in run], reward) for folder, run in frontier.runs.items()
        }
        parts = runs, points(best_of, reward), points(policies, reward)
        if any(runs.values()) or any(parts[1:]):
            title = f"{reward} ({'trained against' if about.trained else 'held out'})"
            pictures.append(_picture(plots.frontier(*parts, title)))
    return pictures


def _short_names(folders: Iterable[str]) -> dict[str, str]:
    """Return the end of each folder's path, as few parts as tell all folders apart."""
    parts = {folder: Path(folder).parts for folder in folders}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {folder: "/".join(path[-count:]) for folder, path in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {folder: folder for folder in parts}


def _diagrams(results: EvaluationResults) -> list[Markup]:
    """Return reliability diagrams of the baseline and of the last trained policy."""
    trained = [name for name, policy in results.others.items() if policy.adapter]
    titles = {results.compare_with: f"before: {results.compare_with}"} | {name: f"after: {name}" for name in trained[-1:]}
    measured = {title: results.policies[name].calibration_of_all for name, title in titles.items()}
    return [_picture(plots.reliability_diagram(one.bins, title)) for title, one in measured.items() if one]
