"""A stage's memory plan: bytes by component and phase, and the cards that fit it."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
OVERHEAD = 0.75 * GIB
"""Memory besides tensors: the CUDA context, its kernels, workspaces of cuBLAS and bitsandbytes. Assumed, not measured."""
SPARE = 0.05
"""The share of a card that is left for fragmentation and a screen. Assumed, not measured."""
CARDS = (6, 8, 10, 12, 16, 24, 32, 48, 80)
"""GiB of common cards."""

QUANTISED, UNQUANTISED, ADAPTERS, GRADIENTS = "weights, quantised", "weights, others", "adapters", "gradients"
OPTIMIZER, MODELS = "optimizer", "further models"
CACHE, ACTIVATIONS, LOGITS, DEQUANTISED, BATCH = "KV cache", "activations", "logits", "a matrix, dequantised", "the batch"
COMPONENTS = (QUANTISED, UNQUANTISED, ADAPTERS, MODELS, GRADIENTS, OPTIMIZER, CACHE, ACTIVATIONS, LOGITS, DEQUANTISED, BATCH)
"""In the order of the table."""


@dataclass(frozen=True)
class Plan:
    """The memory that a stage needs, in bytes.

    Parameters:
        stage: its name.
        recipe: the recipe's name.
        resident: component -> bytes that stay in memory.
        phases: phase -> component -> bytes that it adds.
        parameters: role -> number of its own weights.
        notes: assumptions and omissions of the plan.
        vllm_share: the share of the card that vLLM takes beside PPO.
    """

    stage: str
    recipe: str
    resident: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    parameters: Mapping[str, int]
    notes: tuple[str, ...] = ()
    vllm_share: float = 0.0

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def allocated(self) -> float:
        """Bytes of all tensors at the peak, as in `torch.cuda.max_memory_allocated`."""
        return sum(self.resident.values()) + sum(self.phases[self.worst].values())

    def at_peak(self) -> dict[str, float]:
        """Return component -> bytes at the peak."""
        phase = self.phases[self.worst]
        return {name: self.resident.get(name, 0) + phase.get(name, 0) for name in COMPONENTS}

    @property
    def usable_share(self) -> float:
        """The share of a card that the stage may use."""
        return max(0.0, 1 - SPARE - self.vllm_share)

    def fits(self, card: float) -> bool:
        """Return whether the plan fits a card of this many GiB."""
        return self.allocated + OVERHEAD <= card * GIB * self.usable_share

    @property
    def smallest_card(self) -> float | None:
        """GiB of the smallest card that fits; None if vLLM leaves nothing of any card."""
        return (self.allocated + OVERHEAD) / self.usable_share / GIB if self.usable_share else None

    @property
    def smallest_common_card(self) -> int | None:
        """GiB of the first of `CARDS` that it fits, or None."""
        return next((card for card in CARDS if self.fits(card)), None)
