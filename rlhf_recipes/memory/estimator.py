"""Bytes of one stage's weights and phases, the parts that its plan is made of."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import REWARD, read_json
from rlhf_recipes.memory import arithmetic
from rlhf_recipes.memory.activations import Activations
from rlhf_recipes.memory.arithmetic import Precision
from rlhf_recipes.memory.gpu_arguments import StageArguments
from rlhf_recipes.memory.model_shape import AdapterShape, load_config, measure_adapter, measure_shape
from rlhf_recipes.memory.plan import ACTIVATIONS, CACHE, DEQUANTISED, GRADIENTS, LOGITS, OPTIMIZER, QUANTISED, UNQUANTISED, Plan
from rlhf_recipes.models.adapters import read_adapter_config
from rlhf_recipes.stages import STAGES

from peft import LoraConfig
from transformers import PretrainedConfig

Phase = dict[str, float]
"""Component -> bytes on top of what stays in memory."""


class Estimator:
    """Bytes of the weights and phases that the arguments of a stage imply."""

    def __init__(self, arguments: StageArguments):
        self.arguments, self.notes = arguments, []
        self.config = _config_of(arguments)
        self.shape = measure_shape(self.config)
        self.precision = _precision_of(arguments, self.config)
        self.trains = STAGES[arguments.recipe].trains
        self.adapter = self._trained_adapter() if arguments.get("use_peft") else None
        self.adapter_parameters = self.adapter.parameters if self.adapter else 0
        self.evaluates = plain(arguments.get("eval_strategy", "no")) != "no"
        self.vllm_share = 0.0
        self.frozen_parts: frozenset[str] = frozenset()  # parts with adapters, where no adapter is trained

    # --- What stays in memory --------------------------------------------------------------------------------

    def base_weights(self, head: bool = True) -> Phase:
        """Return the bytes of the base, without its LM head for a reward model."""
        shape, bits = self.shape, self.precision.bits
        unquantised = shape.parameters(head) - (shape.matrices if bits else 0)
        quantised = arithmetic.quantised_bytes(shape.matrices, bits, self.precision.nested) if bits else 0.0
        return {QUANTISED: quantised, UNQUANTISED: float(unquantised * self.precision.weights)}

    def trainable(self, head: bool = True, heads: int = 0) -> tuple[int, int]:
        """Return the number of trainable weights and the bytes of each (LoRA: fp32)."""
        if self.adapter is not None:
            return self.adapter_parameters + heads, 4
        return self.shape.parameters(head) + heads, self.precision.weights

    def training_state(self, trainable: int, width: int) -> Phase:
        """Return the bytes of gradients and optimizer states."""
        optimizer = plain(self.arguments.optim)
        each = arithmetic.optimizer_bytes(optimizer, width)
        if each is None:
            self.note(f"optim: {optimizer} is not known to the plan. Its state counts as that of AdamW in fp32")
        return {GRADIENTS: float(trainable * width), OPTIMIZER: trainable * (8.0 if each is None else each)}

    def _trained_adapter(self) -> AdapterShape:
        return self.adapter_in(self.arguments.get("start_from")) or self._measure(_lora_config(self.arguments))

    def adapter_in(self, folder: str | None) -> AdapterShape | None:
        """Return the adapter that a folder holds or will hold; None without a folder."""
        if folder is None:
            return None
        lora = _lora_config_in(folder, self.arguments.producers)
        if lora is None:
            lora = _lora_config(self.arguments)
            layers = lora.target_modules or "some layers"
            self.note(f"{folder} does not exist yet. The plan assumes LoRA of rank {lora.r} on {layers}")
        return self._measure(lora)

    def _measure(self, lora: LoraConfig) -> AdapterShape:
        if lora.use_dora:
            self.note("The plan counts the weights of DoRA, but not what its passes need beyond those of LoRA")
        return measure_adapter(self.config, lora)

    def reward_models(self, paths: Iterable[str | None]) -> tuple[list[int], int]:
        """Return the weights of each reward adapter, and the sum of full reward models."""
        adapters: list[int] = []
        full = 0
        for path in filter(None, paths):
            producer, folder = self.arguments.producers.get(path), Path(path)
            if producer is None and not folder.is_dir() and "/" not in path:
                continue  # a reward function
            if producer is not None and not producer.get("use_peft"):
                full += measure_shape(_config_of(producer)).parameters(head=False)
            elif producer is None and (folder / "config.json").is_file():
                full += measure_shape(load_config(path)).parameters(head=False)
            else:
                ensemble = read_json(folder / REWARD).get("ensemble") or {}
                members = producer.ensemble_size if producer else len(ensemble.get("members", [path]))
                adapter = self.adapter_in(path if producer or members == 1 else f"{path}/member-0")
                adapters += [adapter.parameters + self.shape.hidden] * members
        return adapters, full

    # --- Phases ----------------------------------------------------------------------------------------------

    def update(self, rows: int, length: int, scored: int, trainable: int, head: bool = True) -> dict[str, Phase]:
        """Return the phases of one micro-batch, forward and backward.

        The peak is at the LM head, when all layers have kept their activations, or in the backward pass of a layer.
        """
        shape, precision, activations = self.shape, self.precision, self._activations()
        kept = activations.saved_bytes(rows, length) + self._autocast_copies(trainable)
        kept += rows * length * length  # the attention mask, of booleans
        layers = {
            ACTIVATIONS: kept + activations.backward_bytes(rows, length),
            DEQUANTISED: arithmetic.dequantised_bytes(shape, precision),
        }
        if not head:
            return {"update": layers}
        final_norm = rows * length * shape.hidden * 4.0
        logits = arithmetic.fused_head_bytes(shape, precision, scored, gradients=True)
        if self.adapter is None:  # the LM head is trained too
            logits += shape.embedding * 4.0
        return {"update, LM head": {ACTIVATIONS: kept + final_norm, LOGITS: logits}, "update, layers": layers}

    def forward(self, rows: int, length: int, scored: int = 0, autocast: bool = True) -> Phase:
        """Return a pass without gradients; `scored` tokens get log-probabilities."""
        shape, precision = self.shape, self.precision
        layer = self._activations().forward_bytes(rows, length, autocast)
        ends = rows * length * shape.hidden * (precision.weights + 4.0)
        logits = arithmetic.fused_head_bytes(shape, precision, scored, gradients=False) if scored else 0.0
        if logits + ends > layer:  # one comes after the other: the larger counts
            return {ACTIVATIONS: ends, LOGITS: logits}
        return {ACTIVATIONS: layer, DEQUANTISED: arithmetic.dequantised_bytes(shape, precision)}

    def sampling(self, rows: int, prompt: int, completion: int, recorded: bool = False) -> dict[str, Phase]:
        """Return the phases of generation: all prompts at once, then token by token.

        A step holds its logits, three fp32 copies, and two more where PPO records log-probabilities. PEFT generates without
        autocast.
        """
        shape, precision = self.shape, self.precision
        prefill = self.forward(rows, prompt, autocast=not self._has_adapters)
        return {
            "prompts read": {**prefill, CACHE: float(arithmetic.kv_cache_bytes(shape, rows, prompt, precision.weights))},
            "sampling": {
                CACHE: float(arithmetic.kv_cache_bytes(shape, rows, prompt + completion, precision.weights)),
                LOGITS: rows * shape.vocabulary * (precision.weights + 4 * (5 if recorded else 3)),
                DEQUANTISED: arithmetic.dequantised_bytes(shape, precision),
            },
        }

    @property
    def _has_adapters(self) -> bool:
        return self.adapter is not None or not self.trains

    def _activations(self) -> Activations:
        adapter, values = self.adapter, self.arguments
        if adapter is None and self._has_adapters:
            return Activations(self.shape, self.precision, self.frozen_parts, rank=1)
        return Activations(
            self.shape,
            self.precision,
            adapted=adapter.parts if adapter else frozenset(),
            rank=adapter.rank if adapter else 0,
            dropout=adapter is not None and adapter.dropout and not values.get("disable_dropout", False),
            full=adapter is None,
            checkpointing=bool(values.get("gradient_checkpointing")),
            eager=values.get("attn_implementation") == "eager",
        )

    def _autocast_copies(self, trainable: int) -> float:
        """Return the bytes of autocast's 2-byte copies: trainable weights, an fp32 base."""
        precision = self.precision
        copies = trainable * 2.0 if precision.autocast and (self.adapter is not None or precision.weights == 4) else 0.0
        if precision.compute < precision.weights and self.adapter is not None and precision.bits is None:
            layers = 1 if self.arguments.get("gradient_checkpointing") else self.shape.layers
            copies += 2.0 * self.shape.matrices / self.shape.layers * layers
        return copies

    # --- The plan --------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Record an assumption or omission of the plan, once."""
        if text not in self.notes:
            self.notes.append(text)

    def length(self, key: str) -> int:
        """Return a number of tokens.

        Raises:
            RecipeError: where it has no bound.
        """
        value = self.arguments.get(key)
        if value is None:
            raise RecipeError(f"{self.arguments.stage}: {key}: null has no bound to plan for. Fix: set a number of tokens")
        return value

    def plan(self, resident: Phase, phases: dict[str, Phase], parameters: dict[str, int]) -> Plan:
        """Return the plan of the stage."""
        roles = {"base": self.shape.parameters(), **parameters}
        return Plan(self.arguments.stage, resident, phases, roles, tuple(self.notes), self.vllm_share)


def _config_of(arguments: StageArguments) -> PretrainedConfig:
    if not arguments.get("model_name_or_path"):
        raise RecipeError(f"{arguments.stage}: model_name_or_path: missing. Fix: name the base, on the Hub or in a folder")
    revision, trust = arguments.get("model_revision") or "main", bool(arguments.get("trust_remote_code"))
    return load_config(arguments.model_name_or_path, revision, trust)


def _precision_of(arguments: StageArguments, config: PretrainedConfig) -> Precision:
    dtype = arguments.get("dtype")
    dtype = str(config.dtype or "float32").removeprefix("torch.") if dtype in (None, "auto") else dtype
    weights = 4 if dtype == "float32" else 2
    autocast = bool(arguments.get("bf16") or arguments.get("fp16"))
    bits = 4 if arguments.get("load_in_4bit") else 8 if arguments.get("load_in_8bit") else None
    nested = bool(arguments.get("use_bnb_nested_quant"))
    return Precision(weights, 2 if autocast else weights, bits, nested, arguments.on_gpu, autocast)


def _lora_config(arguments: StageArguments) -> LoraConfig:
    """Return the LoRA that the arguments of a stage describe."""
    values = arguments.values
    # The arguments of a stage that does not train do not describe the adapters that it loads
    default_layers = None if STAGES[arguments.recipe].trains else "all-linear"
    return LoraConfig(
        r=values.get("lora_r", 16),
        lora_alpha=values.get("lora_alpha", 32),
        lora_dropout=values.get("lora_dropout", 0.05),
        target_modules=values.get("lora_target_modules") or default_layers,
        modules_to_save=values.get("lora_modules_to_save"),
        target_parameters=values.get("lora_target_parameters"),
        use_dora=bool(values.get("use_dora")),
        task_type="CAUSAL_LM",
    )


def _lora_config_in(folder: str, producers: Mapping[str, StageArguments]) -> LoraConfig | None:
    """Return the LoRA of the stage that writes a folder, or of the adapter in it."""
    producer = producers.get(folder)
    if producer is not None:
        parent = producer.get("start_from")
        return _lora_config_in(parent, producers) if parent else _lora_config(producer)
    return read_adapter_config(folder) if (Path(folder) / "adapter_config.json").is_file() else None
