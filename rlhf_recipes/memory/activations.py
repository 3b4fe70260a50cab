"""Bytes of activations in a forward and a backward pass, from a model's sizes.

The layers are those of Llama: RMSNorm, attention with rotary embeddings and a gated MLP, each with a residual connection. Rows
are taken to be padded: attention then needs a mask, and repeats keys and values for every query head (`sdpa_attention_forward`
of Transformers). Where a formula follows from what a library keeps, its docstring names the library's code.
"""

from collections.abc import Collection
from dataclasses import dataclass

from rlhf_recipes.memory.arithmetic import Precision
from rlhf_recipes.memory.model_shape import ModelShape

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


@dataclass(frozen=True)
class Activations:
    """The activations of a model, by its precision and what is trained.

    In every method `rows` is the size of the micro-batch, and `length` (T) the number of tokens of a row with its padding.

    Parameters:
        adapted: the parts of a layer that have LoRA, some of `ATTENTION` and `MLP`; empty without LoRA.
        full: whether the base's own weights are trained.
        eager: whether attention keeps its matrix, as with `attn_implementation: eager`.
    """

    shape: ModelShape
    precision: Precision
    adapted: frozenset[str] = frozenset()
    rank: int = 0
    dropout: bool = False
    full: bool = False
    checkpointing: bool = True
    eager: bool = False

    def mask_bytes(self, rows: int, length: int) -> int:
        """Return the bytes of one layer's attention mask, a matrix (rows, 1, T, T)."""
        return rows * length * length * self.precision.compute

    def attention_bytes(self, length: int) -> float:
        """Return the bytes per token that one layer's attention saves, without the mask.

        The norm keeps its input in fp32, rotary embeddings keep nothing. `scaled_dot_product_attention` keeps queries, keys,
        values, its output, and an fp32 number a head. Eager attention keeps two matrices (heads, T, T), one of them in fp32.
        """
        shape, precision = self.shape, self.precision
        a, q, kv = precision.compute, shape.queries, shape.keys
        kept = 4 * shape.hidden + (4 * (q + kv) if shape.qk_norm else 0)
        kept += a * (q + 2 * q)
        kept += shape.heads * length * (4 + a) if self.eager else a * q + 4 * shape.heads
        kept += self._input_bytes(shape.hidden, ("q", "k", "v"), precision.weights)
        kept += self._input_bytes(q, ("o",), a, already_kept=not self.eager)
        if self.full:  # the norms are trained too
            kept += precision.weights * (shape.hidden + (q + kv if shape.qk_norm else 0))
        return kept + self._bottleneck_bytes(ATTENTION)

    def mlp_bytes(self) -> float:
        """Return the bytes per token that one layer's MLP saves.

        These are the norm's input in fp32, gate, act(gate) and up, and the inputs of LoRA.
        """
        shape, precision = self.shape, self.precision
        kept = 4 * shape.hidden + 3 * precision.compute * shape.intermediate
        kept += self._input_bytes(shape.hidden, ("gate", "up"), precision.weights)
        kept += self._input_bytes(shape.intermediate, ("down",), precision.compute)
        kept += precision.weights * shape.hidden if self.full else 0
        return kept + self._bottleneck_bytes(MLP)

    def _input_bytes(self, width: int, parts: Collection[str], stored: int, already_kept: bool = False) -> float:
        """Return the bytes per token of the input that `parts`, if trained, share.

        A frozen matrix keeps nothing. On a base that is not quantised, PEFT casts the input of each LoRA layer to fp32 and
        autocast casts it back (`peft/tuners/lora/layer.py`): each layer keeps its own copy. On a quantised base (`bnb.py`)
        they share one. The input has `stored` bytes a value; another operation may keep it anyway (`already_kept`).
        """
        precision = self.precision
        count = len(parts) if self.full else len(self.adapted & set(parts))
        each = precision.compute if self.full or precision.autocast else 4
        if self.dropout and self.adapted:  # the result and the mask: a byte a value on a GPU, numbers on a CPU
            return count * width * (each + (1 if precision.triton else each))
        if stored != each or (not self.full and precision.bits is None and stored != 4):  # cast
            return count * width * each
        return 0 if already_kept or not count else width * each

    def _bottleneck_bytes(self, parts: Collection[str]) -> float:
        return len(self.adapted & set(parts)) * self.rank * self.precision.compute

    def layer_bytes(self, rows: int, length: int) -> float:
        """Return the bytes one layer saves (checkpointing: when recomputed, minus input)."""
        each = self.attention_bytes(length) + self.mlp_bytes()
        if self.checkpointing and self.precision.weights == 4:  # the first norm's input is the checkpoint itself
            each -= 4 * self.shape.hidden
        return rows * length * each + self.mask_bytes(rows, length)

    def saved_bytes(self, rows: int, length: int) -> float:
        """Return the bytes that all layers save; under checkpointing their inputs alone."""
        if self.checkpointing:
            return rows * length * self.shape.layers * self.shape.hidden * self.precision.weights
        return self.shape.layers * self.layer_bytes(rows, length)

    def backward_bytes(self, rows: int, length: int) -> float:
        """Return the peak of one layer's backward pass, in bytes on top of `saved_bytes`.

        Under checkpointing all that the layer keeps is there again. In the MLP the gradients of gate and up are made from that
        of their product: two values a token beyond what is freed by then, and the gradients of the residual. Attention comes
        later, when what the MLP kept is gone. LoRA on a base that is neither quantised nor in fp32 casts the gradient of its
        input to fp32.
        """
        shape, precision, tokens = self.shape, self.precision, rows * length
        a = precision.compute
        mlp = 2 * a * shape.intermediate + (precision.weights + a) * shape.hidden
        if self.adapted & set(MLP) and precision.bits is None and (precision.weights, a) != (4, 4):
            mlp += 4 * shape.intermediate
        freed = tokens * self.mlp_bytes()
        attention = tokens * (a * 5 * shape.queries + 4 * shape.queries + precision.weights * shape.hidden) - freed
        return max(tokens * mlp, attention) + (self.layer_bytes(rows, length) if self.checkpointing else 0)

    def forward_bytes(self, rows: int, length: int, autocast: bool = True) -> float:
        """Return the peak bytes of a pass without gradients, reached in one layer's MLP.

        In memory are the residual, the norm's output, act(gate), and of the layer that makes `up` the base's part, LoRA's part
        and their sum. LoRA's are in fp32 without autocast, as when PEFT generates.
        """
        shape, precision = self.shape, self.precision
        a = precision.compute if autocast else precision.weights
        lora = a if autocast else 4
        adapted = bool(self.adapted & set(MLP))
        mlp = shape.intermediate * (2 * a + 2 * lora if adapted else 3 * a)
        each = (precision.weights + a + (4 if adapted and lora != a else 0)) * shape.hidden + mlp
        return rows * length * each + self.mask_bytes(rows, length)
