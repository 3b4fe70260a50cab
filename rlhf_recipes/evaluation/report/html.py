"""The report of an evaluation: one HTML file that needs nothing else, for a person who has five minutes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import METRICS, RECIPE, read_json, write_json, write_text
from rlhf_recipes.evaluation.evaluate import is_insignificant
from rlhf_recipes.evaluation.report import plots
from rlhf_recipes.evaluation.reward_models import summary
from rlhf_recipes.stages import STAGES, Stage

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

PAGE = "index.html"
_UNKNOWN = Stage(arguments=())  # a training of others


def write_report(folder: str | Path, metrics: dict[str, Any]) -> Path:
    """Writes `index.html` and, last, `metrics.json`; returns the path of the page.

    Args:
        folder: made where it is missing.
        metrics: JSON-serialisable; docs/evaluation.md says what is in it.

    Raises:
        RecipeError: if the folder cannot be written to.
    """
    folder, page = Path(folder), render(metrics)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PAGE, page)
        write_json(folder / METRICS, metrics)  # the last: by it the stage is done
    except OSError as error:
        raise RecipeError(f"output_dir: {folder}: cannot be written to ({error.strerror}): name another folder") from error
    return folder / PAGE


def render(metrics: dict[str, Any]) -> str:
    """The page. All text is escaped but for the pictures, which are made here."""
    environment = Environment(
        loader=PackageLoader("rlhf_recipes.evaluation.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent}
    environment.tests["insignificant"] = is_insignificant
    return environment.get_template("report.html.jinja").render(
        m=metrics,
        policies=metrics["policies"],
        groups=groups_shown(metrics),
        curves=_curves(metrics),
        frontiers=_frontiers(metrics),
        diagrams=_diagrams(metrics),
        reward_lines=_reward_lines(metrics),
    )


def groups_shown(metrics: dict[str, Any]) -> list[str]:
    """The groups by which truthfulness is split; without the whole, where there are parts.

    Args:
        metrics: what `metrics.json` holds.
    """
    found = list(next((policy["truthfulness"] for policy in metrics["policies"].values() if policy.get("truthfulness")), {}))
    return found[1:] or found


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.00"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _picture(svg: str) -> Markup:
    """A picture to stand in the page: without the declarations of a file, and without a fixed size."""
    return Markup(svg[svg.index("<svg") :])


def _curves(metrics: dict[str, Any]) -> dict[str, list[Markup]]:
    """The learning curves of every stage that left a record: policies, and reward models; one picture each, to fit a phone."""
    folders = {name: policy["adapter"] for name, policy in metrics["policies"].items()}
    folders |= {name: reward["folder"] for name, reward in metrics["rewards"].items()}
    pictures = {}
    for name, folder in folders.items():
        path = Path(folder or "") / RECIPE
        if folder and path.is_file():
            record = read_json(path)
            log, wanted = record.get("log", ()), STAGES.get(record.get("recipe"), _UNKNOWN).curves
            logged = [key for key in wanted if any(entry.get(key) is not None for entry in log)]
            pictures[name] = [_picture(plots.learning_curves(log, [key])) for key in logged]
    return {name: drawn for name, drawn in pictures.items() if drawn}


def _frontiers(metrics: dict[str, Any]) -> list[Markup]:
    """One picture for each reward."""
    found = metrics.get("frontier")
    if not found:
        return []

    def point(entry: dict[str, Any], reward: str, label: str) -> tuple[float, float, str] | None:
        place = entry.get("kl"), entry["rewards"][reward]
        return None if None in place else (place[0]["mean"], place[1]["mean"], label)

    names, pictures = _short_names(found["runs"]), []
    for reward, about in metrics["rewards"].items():
        runs = {
            names[folder]: [*filter(None, (point(entry, reward, str(entry["step"])) for entry in points))]
            for folder, points in found["runs"].items()
        }
        best_of = [*filter(None, (point(entry, reward, f"n={entry['n']}") for entry in found["best_of"]))]
        named = [point(entry, reward, name) for name, entry in metrics["policies"].items() if not entry.get("best_of")]
        if not (best_of or any(named) or any(runs.values())):  # it applies nowhere
            continue
        title = f"{reward} ({'trained against' if about['trained'] else 'held out'})"
        pictures.append(_picture(plots.frontier(runs, best_of, [*filter(None, named)], title)))
    return pictures


def _short_names(folders: Iterable[str]) -> dict[str, str]:
    """Of each folder the end of its path, of as few parts as tell them all apart."""
    parts = {folder: Path(folder).parts for folder in folders}
    for count in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {folder: "/".join(path[-count:]) for folder, path in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {folder: folder for folder in parts}


def _diagrams(metrics: dict[str, Any]) -> list[Markup]:
    """Reliability before and after: of the policy that all are compared with, and of the last one that was trained."""
    before = metrics["compare_with"]
    trained = [name for name, policy in metrics["policies"].items() if policy["adapter"] and name != before]
    bins = {
        name: ((metrics["policies"][name].get("calibration") or {}).get("all") or {}).get("bins")
        for name in metrics["policies"]
    }
    titles = {before: f"before: {before}"} | {name: f"after: {name}" for name in trained[-1:]}
    return [_picture(plots.reliability_diagram(bins[name], title)) for name, title in titles.items() if bins[name]]


def _reward_lines(metrics: dict[str, Any]) -> list[str]:
    """What each reward model's own evaluation said of it, in a line."""
    return [
        f"{reward}: {summary(name, result)}"
        for reward, about in metrics["rewards"].items()
        for name, result in (about.get("evaluation") or {}).items()
    ]
