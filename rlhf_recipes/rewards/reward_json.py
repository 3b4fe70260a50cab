"""`reward.json` beside a reward model: base, normalisation, members."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import REWARD, read_json, write_json

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of raw scores on demonstrations.

    Raises:
        ValueError: if one is not finite, or the deviation is not positive.
    """

    mean: float
    std: float
    samples: int

    def __post_init__(self):
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"scores of mean {self.mean} and standard deviation {self.std} cannot be normalised")

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the normalised scores."""
        return (scores - self.mean) / self.std


def write_reward_record(folder: str | Path, base_model: str, base_fingerprint: dict[str, Any]) -> None:
    """Write `reward.json` for a reward model that is trained and not yet normalised."""
    content = {"base_model": {"name": base_model, "fingerprint": base_fingerprint}, "normalisation": None}
    write_json(Path(folder) / REWARD, content)


def write_ensemble_record(folder: str | Path, members: Sequence[str], combine: str, uncertainty_coef: float) -> None:
    """Write `reward.json` for an ensemble whose members are all finished."""
    content = {"members": [*members], "combine": combine, "uncertainty_coef": uncertainty_coef}
    write_json(Path(folder) / REWARD, {"ensemble": content})


def read_ensemble(folder: Path) -> tuple[list[Path], str, float] | None:
    """Return an ensemble's members, `combine` and `uncertainty_coef`, or None.

    Raises:
        RecipeError: if the record is damaged, or a member is not a folder inside `folder`.
    """
    ensemble = read_json(folder / REWARD).get("ensemble")
    if ensemble is None:
        return None
    with error_context(f"{folder / REWARD}: ensemble: damaged", TypeError, KeyError, AttributeError, fix="train it again"):
        names, combine, uncertainty_coef = ensemble["members"], ensemble["combine"], ensemble["uncertainty_coef"]
        if outside := [name for name in names if name in ("", ".", "..") or Path(name).name != name]:
            raise RecipeError(f"members: {outside[0]!r} is not the name of a folder in {folder}")
        return [folder / name for name in names], combine, uncertainty_coef


def store_normalisation(folder: str | Path, scores: Sequence[float] | Tensor) -> Normalisation:
    """Store the normalisation of raw scores (N,) of demonstrations.

    Raises:
        RecipeError: if there are none, one is not finite, or all are equal.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    if not values.numel():
        raise RecipeError(f"{folder}: there are no demonstrations to normalise scores by")
    std = values.std(correction=0).item()
    if std <= 1e-6 * values.abs().max().item():  # rounding of equal scores in fp32
        std = 0.0
    try:
        normalisation = Normalisation(values.mean().item(), std, values.numel())
    except ValueError as error:
        raise RecipeError(f"{folder}: {values.numel()} {error}: does the reward model tell demonstrations apart?") from error
    write_json(Path(folder) / REWARD, {**read_json(Path(folder) / REWARD), "normalisation": asdict(normalisation)})
    return normalisation


def read_normalisation(record: dict[str, Any], folder: Path) -> Normalisation | None:
    """Return the normalisation in a `reward.json`, or None if it has none yet.

    Raises:
        RecipeError: if it is damaged.
    """
    stored = record.get("normalisation")
    with error_context(f"{folder / REWARD}: normalisation: damaged", TypeError, ValueError, fix="train it again"):
        return None if stored is None else Normalisation(**stored)
