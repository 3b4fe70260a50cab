"""What parts of a run take in memory, in bytes: pure arithmetic on the sizes of a model, without models or files.

It describes decoder layers as those of Llama: RMSNorm, attention with rotary embeddings, a gated MLP, each with a residual
connection. `tokens` counts those of a micro-batch, padding too. Where a formula follows from what a library keeps for the
backward pass, its docstring names the library's code.
"""

from dataclasses import dataclass

from rlhf_recipes.config.launcher import uses_bitsandbytes

BLOCK, NESTED_BLOCK = 64, 256  # weights with a scale of their own, and scales with one, in bitsandbytes
TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's fused LM head: `trl/kernels/chunked_logprob.py`, `trl/trainer/utils.py`

_MLP = frozenset({"gate", "up", "down"})

MOMENTS_OF_TORCH = {"adamw_torch": 2, "adamw_torch_fused": 2, "rmsprop": 1, "adagrad": 1, "sgd": 0}
"""Optimizer of PyTorch -> numbers that it keeps for each trainable parameter, in the parameter's own type."""
MOMENTS_OF_BITSANDBYTES = {"adamw": 2, "lion": 1, "rmsprop_bnb": 1, "ademamix": 3}
"""Optimizer of bitsandbytes, without `paged_` and bits -> numbers for each trainable parameter, in a type of its own: of 4
bytes whatever the parameter has; in 8 bits, of 1 byte and an fp32 scale for each 256 (Dettmers et al., 2022, "8-bit optimizers
via block-wise quantization")."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a language model of Llama's kind.

    Parameters:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary: as in its `config.json`.
        qk_norm: whether queries and keys are normalised, as in Qwen3.
        matrices: the weights of all linear layers of the decoder: what bitsandbytes quantises.
        largest: the weights of the largest of them.
        vectors: its other weights: norms and biases.
        tied: whether the LM head is the embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qk_norm: bool
    matrices: int
    largest: int
    vectors: int
    tied: bool

    @property
    def embedding(self) -> int:
        """Weights of the embedding; those of an LM head of its own are as many."""
        return self.vocabulary * self.hidden

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token, and of all values."""
        return self.kv_heads * self.head_dim

    def parameters(self, head: bool = True) -> int:
        """All weights; those of the LM head too, if it is in memory and not tied."""
        return self.matrices + self.vectors + self.embedding * (1 if self.tied or not head else 2)


@dataclass(frozen=True)
class Numbers:
    """In what numbers a run computes.

    Parameters:
        weights: bytes of a base weight that is not quantised, and of a value between layers.
        compute: bytes of what a matrix product gives: 2 under autocast, else those of `weights`.
        bits: 4, 8 or None: how the matrices of the base are stored.
        nested: whether the scales of 4-bit weights are quantised too.
        triton: whether there is Triton, as on a GPU: without it TRL's fused LM head works on copies of a tile in fp32.
        mixed: whether there is autocast, by which LoRA, which is kept in fp32, computes in `compute` too.
    """

    weights: int = 2
    compute: int = 2
    bits: int | None = None
    nested: bool = False
    triton: bool = True
    mixed: bool = True


@dataclass(frozen=True)
class Training:
    """What is trained on a base, of an activation's point of view.

    Parameters:
        adapted: parts of a layer with LoRA: some of q, k, v, o, gate, up, down; without LoRA empty.
        rank: of LoRA.
        dropout: whether LoRA has dropout.
        whole: whether the base's own weights are trained.
        checkpointing: whether a layer's activations are computed again in the backward pass.
        eager: whether attention keeps its matrix, as with `attn_implementation: eager`.
        padded: whether rows may be padded; if so attention needs a mask, and keys and values are repeated for it.
    """

    adapted: frozenset[str] = frozenset()
    rank: int = 0
    dropout: bool = False
    whole: bool = False
    checkpointing: bool = True
    eager: bool = False
    padded: bool = True


# --- What is always there --------------------------------------------------------------------------------


def quantised_bytes(weights: int, bits: int, nested: bool) -> float:
    """Bytes of quantised weights with their scales.

    In 4 bits: 4 bits and an fp32 scale for each 64 weights, 4.5 bits in all; nested, a scale of 8 bits and an fp32 one for each
    256 of them: 4 + 8/64 + 32/(64*256) = 4.127 bits (Dettmers et al., 2023, "QLoRA", section 3). In 8 bits: a byte each; the
    scales, one a row, are too few to count.

    Args:
        weights: how many.
        bits: 4 or 8.
        nested: whether scales are quantised (`use_bnb_nested_quant`).
    """
    if bits == 8:
        return float(weights)
    scales = 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK) if nested else 32 / BLOCK
    return weights * (bits + scales) / 8


def optimizer_bytes(optimizer: str, trainable: int, width: int = 4) -> float:
    """Bytes of an optimizer's state.

    Args:
        optimizer: as `optim` names it; one that is not known is taken for AdamW in fp32.
        trainable: number of parameters.
        width: bytes of each.
    """
    if optimizer in MOMENTS_OF_TORCH:
        return float(trainable * MOMENTS_OF_TORCH[optimizer] * width)
    moments = MOMENTS_OF_BITSANDBYTES.get(_family(optimizer), 2) if uses_bitsandbytes(optimizer) else 2
    in_8_bits = uses_bitsandbytes(optimizer) and "8bit" in optimizer
    return trainable * moments * (1 + 4 / NESTED_BLOCK if in_8_bits else 4.0)


def knows_optimizer(optimizer: str) -> bool:
    """Whether `optimizer_bytes` is of this very optimizer."""
    return optimizer in MOMENTS_OF_TORCH or (uses_bitsandbytes(optimizer) and _family(optimizer) in MOMENTS_OF_BITSANDBYTES)


def _family(optimizer: str) -> str:
    """The name without how its state is stored: `rmsprop_bnb` is another optimizer than `rmsprop`, `adamw_bnb` is no other."""
    name = optimizer.removeprefix("paged_").removesuffix("_8bit").removesuffix("_32bit")
    return "adamw" if name == "adamw_bnb" else name


def kv_cache_bytes(shape: Shape, rows: int, tokens: int, width: int) -> int:
    """Bytes of keys and values of all layers; one layer's exist twice while a token is appended (`DynamicCache`).

    Args:
        shape: of the model.
        rows: completions that are sampled at once.
        tokens: of prompt and completion.
        width: bytes of a value.
    """
    return 2 * (shape.layers + 1) * shape.keys * rows * tokens * width


# --- A pass with gradients -------------------------------------------------------------------------------


def mask_bytes(rows: int, length: int, numbers: Numbers, training: Training) -> int:
    """Bytes of one layer's attention mask, (rows, 1, T, T), which is made a matrix of numbers; 0 where nothing is padded."""
    return rows * length * length * numbers.compute if training.padded else 0


def saved_by_attention(shape: Shape, numbers: Numbers, training: Training, length: int) -> float:
    """Bytes a token that the attention of one layer keeps for the backward pass, without the mask.

    The norm keeps its input in fp32; rotary embeddings keep nothing; `scaled_dot_product_attention` keeps queries, keys,
    values, its output and an fp32 number a head. With a mask, `sdpa_attention_forward` in Transformers repeats keys and values
    for every query head before; eager attention repeats them always, and keeps two matrices of (heads, T, T), one in fp32.

    Args:
        shape: of the model.
        numbers: of the run.
        training: of the run.
        length: T, of a row.
    """
    a, q, kv = numbers.compute, shape.queries, shape.keys
    kept = 4 * shape.hidden + (4 * (q + kv) if shape.qk_norm else 0)
    repeated = q if training.padded or training.eager else kv
    kept += a * (q + 2 * repeated)
    kept += shape.heads * length * (4 + a) if training.eager else a * q + 4 * shape.heads
    kept += _inputs(shape.hidden, "qkv", numbers.weights, numbers, training)
    kept += _inputs(q, ["o"], a, numbers, training, kept_anyway=not training.eager)
    if training.whole:  # the norms are trained too
        kept += numbers.weights * (shape.hidden + (q + kv if shape.qk_norm else 0))
    return kept + _bottlenecks(["q", "k", "v", "o"], numbers, training)


def saved_by_mlp(shape: Shape, numbers: Numbers, training: Training) -> float:
    """Bytes a token that the gated MLP of one layer keeps: its norm's input in fp32, gate, act(gate), up, and what LoRA reads.

    Args:
        shape: of the model.
        numbers: of the run.
        training: of the run.
    """
    kept = 4 * shape.hidden + 3 * numbers.compute * shape.intermediate
    kept += _inputs(shape.hidden, ["gate", "up"], numbers.weights, numbers, training)
    kept += _inputs(shape.intermediate, ["down"], numbers.compute, numbers, training)
    kept += numbers.weights * shape.hidden if training.whole else 0
    return kept + _bottlenecks(["gate", "up", "down"], numbers, training)


def _inputs(
    width: int, parts: list[str] | str, stored: int, numbers: Numbers, training: Training, kept_anyway: bool = False
) -> float:
    """Bytes a token of the inputs that the trained matrices among `parts`, which read the same, keep.

    A frozen matrix keeps nothing. PEFT casts the input of each LoRA layer to fp32 and autocast casts it back, on a base that is
    not quantised (`peft/tuners/lora/layer.py`): each keeps a copy of its own. On a quantised base (`bnb.py`) they share it.

    Args:
        width: of the input.
        parts: that read it.
        stored: bytes of one of its values.
        numbers: of the run.
        training: of the run.
        kept_anyway: whether something else keeps it already, which costs nothing again.
    """
    count = len(parts) if training.whole else len(training.adapted & set(parts))
    each = numbers.compute if training.whole or numbers.mixed else 4
    if training.dropout and training.adapted:  # what it leaves, and its mask: bits as bytes, on a CPU numbers
        return count * width * (each + (1 if numbers.triton else each))
    cast = stored != each or (not training.whole and numbers.bits is None and stored != 4)
    if cast:
        return count * width * each
    return 0 if kept_anyway or not count else width * each


def _bottlenecks(parts: list[str], numbers: Numbers, training: Training) -> float:
    return len(training.adapted & set(parts)) * training.rank * numbers.compute


def saved_bytes(shape: Shape, numbers: Numbers, training: Training, rows: int, length: int) -> float:
    """Bytes that the layers keep from a forward pass to its backward pass.

    With checkpointing each layer keeps its input alone.

    Args:
        shape: of the model.
        numbers: of the run.
        training: of the run.
        rows: of the micro-batch.
        length: T, of a row.
    """
    if training.checkpointing:
        return rows * length * shape.layers * shape.hidden * numbers.weights
    return shape.layers * layer_bytes(shape, numbers, training, rows, length)


def layer_bytes(shape: Shape, numbers: Numbers, training: Training, rows: int, length: int) -> float:
    """Bytes that one layer keeps for its backward pass; with checkpointing, while that is at work, besides its input."""
    each = saved_by_attention(shape, numbers, training, length) + saved_by_mlp(shape, numbers, training)
    if training.checkpointing and numbers.weights == 4:  # the first norm's input in fp32 is what checkpointing keeps
        each -= 4 * shape.hidden
    return rows * length * each + mask_bytes(rows, length, numbers, training)


def backward_bytes(shape: Shape, numbers: Numbers, training: Training, rows: int, length: int) -> float:
    """Bytes that come on top of `saved_bytes` in the backward pass of one layer, at its peak.

    With checkpointing all that the layer keeps is there again. In the MLP, the gradients of gate and up are made from that of
    their product: two values a token beyond what is freed by then, and gradients of the residual. Attention comes later, when
    what the MLP kept is gone. LoRA on a base that is neither quantised nor in fp32 casts its input's gradient to fp32.

    Args:
        shape: of the model.
        numbers: of the run.
        training: of the run.
        rows: of the micro-batch.
        length: T, of a row.
    """
    a, tokens = numbers.compute, rows * length
    mlp = 2 * a * shape.intermediate + (numbers.weights + a) * shape.hidden
    if training.adapted & _MLP and numbers.bits is None and (numbers.weights, a) != (4, 4):
        mlp += 4 * shape.intermediate
    layer = layer_bytes(shape, numbers, training, rows, length)
    freed = tokens * saved_by_mlp(shape, numbers, training)
    attention = tokens * (a * 5 * shape.queries + 4 * shape.queries + numbers.weights * shape.hidden) - freed
    return max(tokens * mlp, attention) + (layer if training.checkpointing else 0)


# --- A pass without gradients ----------------------------------------------------------------------------


def forward_bytes(
    shape: Shape, numbers: Numbers, training: Training, rows: int, length: int, autocast: bool | None = None
) -> float:
    """Bytes of the activations of a pass that keeps nothing, at its peak: in the MLP of one layer.

    Alive are the residual, the norm's output, act(gate), and of the layer that makes up: the base's part, LoRA's part and their
    sum. LoRA's are in fp32 where there is no autocast.

    Args:
        shape: of the model.
        numbers: of the run.
        training: of the run.
        rows: of the batch.
        length: T, of a row.
        autocast: whether there is; None: as in training. When PEFT generates there is none.
    """
    a = numbers.compute if autocast in (None, True) else numbers.weights
    lora = 4 if autocast is False else a
    adapted = bool(training.adapted & _MLP)
    mlp = shape.intermediate * (2 * a + 2 * lora if adapted else 3 * a)
    each = (numbers.weights + a + (4 if adapted and lora != a else 0)) * shape.hidden + mlp
    return rows * length * each + mask_bytes(rows, length, numbers, training)


# --- The LM head -----------------------------------------------------------------------------------------


def fused_head_bytes(shape: Shape, numbers: Numbers, scored: int, gradients: bool) -> float:
    """Bytes of TRL's fused LM head at its peak: one tile of logits, and the hidden states that are scored.

    A tile has at most 4,096 tokens by 32,768 words, and is reserved at that width whatever the vocabulary. Without Triton its
    statistics are computed on copies in fp32: 4 of a tile forward, 7 backward.

    Args:
        shape: of the model.
        numbers: of the run.
        scored: tokens of which log-probabilities are asked for.
        gradients: whether there is a backward pass; it adds the hidden states' gradient in fp32.
    """
    words = min(TILE_WORDS, shape.vocabulary)
    tile = min(scored, TILE_TOKENS) * TILE_WORDS * numbers.compute
    if not numbers.triton:
        tile += min(scored, TILE_TOKENS) * words * 4 * (7 if gradients else 4)
    if numbers.weights != numbers.compute:  # its weight is cast piece by piece
        tile += words * shape.hidden * numbers.compute
    return tile + scored * shape.hidden * (numbers.weights + (4 if gradients else 0))


def sampling_bytes(shape: Shape, numbers: Numbers, rows: int, recorded: bool = False) -> float:
    """Bytes of the logits of one step of generation: as they come, in fp32, their softmax, and what is sampled from.

    Args:
        shape: of the model.
        numbers: of the run.
        rows: completions that are sampled at once.
        recorded: whether PPO keeps log-probabilities as it samples: two copies more.
    """
    return rows * shape.vocabulary * (numbers.weights + 4 * (3 + (2 if recorded else 0)))


def whole_logits_bytes(shape: Shape, tokens: int) -> float:
    """Bytes of logits that are kept for all tokens, divided by the temperature: twice fp32 (`evaluation/answers.py`)."""
    return tokens * shape.vocabulary * 8.0


def dequantised_bytes(shape: Shape, numbers: Numbers) -> float:
    """Bytes of the largest 4-bit matrix once it is dequantised.

    It is in every backward pass, and in large forward ones (`MatMul4Bit` of bitsandbytes), with fp32 scales that were nested.
    """
    if numbers.bits is None:
        return 0.0
    return shape.largest * (numbers.compute + (2 * 4 / BLOCK if numbers.nested and numbers.bits == 4 else 0))
