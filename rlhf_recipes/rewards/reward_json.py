"""What is saved beside a reward model: its base, its normalisation, the members of an ensemble."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import REWARD, read_json, write_json

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """The mean and standard deviation of raw scores on demonstrations; normalised scores have 0 and 1 there.

    Raises:
        RecipeError: if one of them is not finite, or the deviation is not positive.
    """

    mean: float
    std: float
    samples: int

    def __post_init__(self):
        if not (is_fp32_number(self.mean) and is_fp32_number(self.std) and self.std > 0):
            raise RecipeError(f"scores of mean {self.mean} and standard deviation {self.std} cannot be normalised")

    def __call__(self, scores: Tensor) -> Tensor:
        """The normalised scores."""
        return (scores - self.mean) / self.std


def write_reward_record(folder: str | Path, base_model: str, base_fingerprint: dict[str, Any]) -> None:
    """Writes `reward.json` for a reward model that has just been trained, and is not normalised yet.

    Args:
        folder: where the model was saved.
        base_model: Hub name or folder of its base.
        base_fingerprint: from `fingerprint`.
    """
    content = {"base_model": {"name": base_model, "fingerprint": base_fingerprint}, "normalisation": None}
    write_json(Path(folder) / REWARD, content)


def write_ensemble_record(folder: str | Path, members: Sequence[str], combine: str, uncertainty_coef: float) -> None:
    """Writes the `reward.json` of an ensemble, when all of its members can be used.

    Args:
        folder: of the ensemble.
        members: the folders of its members, inside it.
        combine: as of `Ensemble`.
        uncertainty_coef: likewise.
    """
    content = {"members": [*members], "combine": combine, "uncertainty_coef": uncertainty_coef}
    write_json(Path(folder) / REWARD, {"ensemble": content})


def read_ensemble(stored: Any, folder: Path) -> tuple[list[str], str, float]:
    """The folders of the members, and how they are combined."""
    try:
        names, combine, coefficient = stored["members"], stored["combine"], stored["uncertainty_coef"]
    except (TypeError, KeyError) as error:
        expected = "expected members, combine and uncertainty_coef"
        raise RecipeError(f"{folder / REWARD}: ensemble: {expected}, found {stored}") from error
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise RecipeError(f"{folder / REWARD}: ensemble: members: must be a list of names of folders, and is {names}")
    if missing := [name for name in names if not (folder / name).is_dir()]:
        raise RecipeError(f"{folder / REWARD}: the member {missing[0]} is not there: train the ensemble again")
    return names, combine, coefficient


def _is_name(value: Any) -> bool:
    """Of a folder in another, and nowhere else."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def store_normalisation(folder: str | Path, scores: Sequence[float] | Tensor) -> Normalisation:
    """Stores the mean and standard deviation (of the population) of raw scores beside a reward model.

    Args:
        folder: of the reward model.
        scores: raw scores of demonstrations, (N,).

    Raises:
        RecipeError: if there are none, one is not finite, or all are equal.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    if not values.numel():
        raise RecipeError(f"{folder}: no scores to normalise by")
    mean, std = values.mean().item(), values.std(correction=0).item()
    if std <= 1e-6 * values.abs().max().item():  # what fp32 leaves between scores that are equal
        std = 0.0
    try:
        normalisation = Normalisation(mean, std, values.numel())
    except RecipeError as error:
        raise RecipeError(f"{folder}: {values.numel()} {error}: does the reward model tell demonstrations apart?") from error
    write_json(Path(folder) / REWARD, {**read_json(Path(folder) / REWARD), "normalisation": asdict(normalisation)})
    return normalisation


def read_normalisation(record: dict[str, Any], folder: Path) -> Normalisation | None:
    """The normalisation in a `reward.json`; None where scores are not normalised yet."""
    stored = record.get("normalisation")
    if stored is None:
        return None
    try:
        return Normalisation(**stored)
    except (TypeError, RecipeError) as error:
        expected = "expected mean, std above 0 and samples"
        raise RecipeError(f"{folder / REWARD}: normalisation: {expected}, found {stored}") from error


def is_fp32_number(value: Any) -> bool:
    """Whether it is one that fp32 can hold, which scores are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < torch.finfo(torch.float32).max
