"""Read weights from safetensors files, and check that they are finite."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.inputs import require_weights

import torch
from safetensors import SafetensorError, safe_open


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights in a safetensors file; pickles are never read.

    Raises:
        RecipeError: if the file is missing or damaged, or a weight is NaN or infinite.
    """
    return dict(iterate_weights(path))


def iterate_weights(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the same weights one by one, so that a large model need not fit in memory.

    Raises:
        RecipeError: as in `read_weights`.
    """
    path = Path(path)
    require_weights(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                weight = file.get_tensor(name)
                check_finite({name: weight}, path)
                yield name, weight
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path}: cannot be read ({first_line(error)}). Fix: copy or train it again") from error


@torch.no_grad()
def check_finite(weights: Mapping[str, torch.Tensor], where: str | Path, fix: str = "train it again") -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        RecipeError: names the first of them.
    """
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise RecipeError(f"{where}: {name} holds numbers that are not finite (NaN or infinity). Fix: {fix}")


def _is_finite(weight: torch.Tensor) -> bool:
    packed = getattr(weight, "quant_state", None) is not None  # 4 bits, whatever type stores them
    if packed or not weight.is_floating_point() or not weight.numel() or weight.is_meta or weight.element_size() == 1:
        return True
    # A sum is NaN or infinite if a weight is. If weights are only large, look at each. In parts, which a CPU converts to fp32
    parts = weight.split(4096) if weight.ndim else [weight]
    return all(part.sum(dtype=torch.float32).isfinite() or part.float().isfinite().all() for part in parts)
