"""Weights in safetensors files: read, and checked to be finite."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, first_line

import torch
from safetensors import SafetensorError, safe_open

_PICKLES = ("adapter_model.bin", "pytorch_model.bin")
ADAPTER = "adapter_model.safetensors"
"""The weights of an adapter."""


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a file of safetensors, the only format that is read: a pickle may run code.

    Raises:
        RecipeError: if the file is missing or damaged, or a weight is NaN or infinite.
    """
    return dict(iterate_weights(path))


def iterate_weights(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The same one after the other, so that a whole model need not be in memory to be looked at.

    Raises:
        RecipeError: as in `read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        pickled = [name for name in _PICKLES if (path.parent / name).exists()]
        remedy = f": {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        raise RecipeError(f"{path.parent}: no {path.name} there{remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                weight = file.get_tensor(name)
                check_finite({name: weight}, path)
                yield name, weight
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path}: cannot be read ({first_line(error)}): copy or train it again") from error


@torch.no_grad()
def check_finite(weights: Mapping[str, torch.Tensor], where: str | Path, remedy: str = "train it again") -> None:
    """Refuses weights that are NaN or infinite: all that comes of them would be, or look like an answer.

    Raises:
        RecipeError: names the first of them, and the remedy.
    """
    for name, weight in weights.items():
        if not _is_finite(weight):
            raise RecipeError(f"{where}: {name} holds numbers that are not finite (NaN or infinity): {remedy}")


def _is_finite(weight: torch.Tensor) -> bool:
    packed = getattr(weight, "quant_state", None) is not None  # 4 bits, whatever type they are stored as
    if packed or not weight.is_floating_point() or not weight.numel() or weight.is_meta or weight.element_size() == 1:
        return True  # elsewhere, or in 8 bits, of which there is no sum
    # A sum is infinite or NaN where a weight is; where it is only large, one looks again. In parts: a CPU makes fp32 of them
    parts = weight.split(4096) if weight.ndim else [weight]
    return all(part.sum(dtype=torch.float32).isfinite() or part.float().isfinite().all() for part in parts)
