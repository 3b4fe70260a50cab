"""Bytes of weights, optimizer states, KV caches and logits, from a model's sizes."""

from dataclasses import dataclass

from rlhf_recipes.config.launcher import uses_bitsandbytes
from rlhf_recipes.memory.model_shape import ModelShape

BLOCK, NESTED_BLOCK = 64, 256  # of bitsandbytes: weights that share a scale, and scales that share a scale
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # of TRL's fused LM head: trl/kernels/chunked_logprob.py, trl/trainer/utils.py

TORCH_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""Optimizer of PyTorch -> values that it keeps for each trainable weight, in the type of the weight."""
BITSANDBYTES_MOMENTS = {"adamw": 2, "adamw_bnb": 2, "lion": 1, "rmsprop_bnb": 1, "ademamix": 3}
"""Optimizer of bitsandbytes, without `paged_` and bits -> values for each trainable weight.

They have 4 bytes whatever the type of the weight; in 8 bits, 1 byte and an fp32 scale for each 256 values (Dettmers et al.,
2022, "8-bit optimizers via block-wise quantization").
"""


@dataclass(frozen=True)
class Precision:
    """The number formats of a run.

    Parameters:
        weights: bytes of a base weight that is not quantised, and of the hidden states between layers.
        compute: bytes of the result of a matrix product: 2 under autocast, else `weights`.
        bits: 4, 8 or None: how the linear layers of the base are quantised.
        nested: whether the scales of 4-bit weights are quantised too.
        triton: whether there is Triton, as on a GPU. Without it TRL's fused LM head copies a tile to fp32.
        autocast: whether autocast is on. Then LoRA, which is stored in fp32, computes in `compute` too.
    """

    weights: int = 2
    compute: int = 2
    bits: int | None = None
    nested: bool = False
    triton: bool = True
    autocast: bool = True


def quantised_bytes(weights: int, bits: int, nested: bool) -> float:
    """Return the bytes of quantised weights with their scales.

    In 4 bits there is an fp32 scale for each 64 weights: 4.5 bits a weight. Nested (`use_bnb_nested_quant`), the scale has 8
    bits and each 256 scales share one in fp32: 4 + 8/64 + 32/(64*256) = 4.127 bits (Dettmers et al., 2023, "QLoRA", section
    3). In 8 bits the scales, one a row, are too few to count.
    """
    if bits == 8:
        return float(weights)
    scales = 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK) if nested else 32 / BLOCK
    return weights * (bits + scales) / 8


def dequantised_bytes(shape: ModelShape, precision: Precision) -> float:
    """Return the bytes of the largest quantised matrix, dequantised, and its scales.

    Every backward pass makes one, and so do large forward passes (`MatMul4Bit` of bitsandbytes).
    """
    if precision.bits is None:
        return 0.0
    scales = 2 * 4 / BLOCK if precision.nested and precision.bits == 4 else 0
    return shape.largest * (precision.compute + scales)


def optimizer_bytes(optimizer: str, width: int = 4) -> float | None:
    """Return the bytes of optimizer state per weight of `width` bytes, if known."""
    if optimizer in TORCH_MOMENTS:
        return float(TORCH_MOMENTS[optimizer] * width)
    name = optimizer.removeprefix("paged_").removesuffix("_8bit").removesuffix("_32bit")
    if not uses_bitsandbytes(optimizer) or name not in BITSANDBYTES_MOMENTS:
        return None
    return BITSANDBYTES_MOMENTS[name] * (1 + 4 / NESTED_BLOCK if "8bit" in optimizer else 4.0)


def kv_cache_bytes(shape: ModelShape, rows: int, tokens: int, width: int) -> int:
    """Return the bytes of all layers' keys and values for prompt and completion.

    One layer's exist twice while a token is appended (`DynamicCache` of Transformers).
    """
    return 2 * (shape.layers + 1) * shape.keys * rows * tokens * width


def fused_head_bytes(shape: ModelShape, precision: Precision, scored: int, gradients: bool) -> float:
    """Return the peak bytes of TRL's fused LM head: a tile of logits, hidden states.

    A tile has at most 4,096 tokens by 32,768 vocabulary entries, and is reserved at that width even for a smaller vocabulary.
    Without Triton its statistics are computed on fp32 copies: 4 of a tile forward, 7 backward. A backward pass adds the
    gradient of the hidden states in fp32.
    """
    entries = min(TILE_VOCABULARY, shape.vocabulary)
    tile = min(scored, TILE_TOKENS) * TILE_VOCABULARY * precision.compute
    if not precision.triton:
        tile += min(scored, TILE_TOKENS) * entries * 4 * (7 if gradients else 4)
    if precision.weights != precision.compute:  # the head's weight is cast piece by piece
        tile += entries * shape.hidden * precision.compute
    return tile + scored * shape.hidden * (precision.weights + (4 if gradients else 0))
