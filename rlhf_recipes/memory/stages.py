"""What each stage of a run needs: what is in memory all the time, and what comes and goes in its phases."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import REWARD, read_json
from rlhf_recipes.memory import arithmetic as sizes
from rlhf_recipes.memory.arithmetic import Numbers, Training
from rlhf_recipes.memory.models import Adapter, adapter_of, load_config, shape_of
from rlhf_recipes.models.adapters import read_adapter_config
from rlhf_recipes.rewards.reward_funcs import reward_paths
from rlhf_recipes.stages import STAGES

from peft import LoraConfig
from transformers import PretrainedConfig

GIB = 2**30
OVERHEAD = 0.75 * GIB
"""What is taken besides tensors: the CUDA context with its kernels, and the workspaces of cuBLAS and bitsandbytes. Assumed, not
measured."""
SPARE = 0.05
"""The share of a card that is left for what the allocator cannot use, and for a screen."""
CARDS = (6, 8, 10, 12, 16, 24, 32, 48, 80)
"""GiB of common cards."""

QUANTISED, WHOLE, ADAPTERS, GRADIENTS = "weights, quantised", "weights, others", "adapters", "gradients"
OPTIMIZER, MODELS = "optimizer", "further models"
CACHE, ACTIVATIONS, LOGITS, DEQUANTISED, BATCH = "KV cache", "activations", "logits", "a matrix, dequantised", "the batch"
COMPONENTS = (QUANTISED, WHOLE, ADAPTERS, MODELS, GRADIENTS, OPTIMIZER, CACHE, ACTIVATIONS, LOGITS, DEQUANTISED, BATCH)
"""In the order of the table."""

_ROLLOUT_COLUMNS = 80  # bytes a token of a batch of completions: ids and masks of 8, five columns of fp32, and their copies


@dataclass(frozen=True)
class Plan:
    """What a stage needs, in bytes.

    Parameters:
        stage: its name.
        recipe: that it runs.
        resident: component -> bytes that are in memory all the time.
        phases: phase -> component -> bytes that come on top in it.
        parameters: role -> number of weights of its own.
        notes: what the plan took for granted.
        reserved: the share of a card that something else takes on top: vLLM beside PPO.
    """

    stage: str
    recipe: str
    resident: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    parameters: Mapping[str, int]
    notes: tuple[str, ...] = ()
    reserved: float = 0.0

    @property
    def worst(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def allocated(self) -> float:
        """Bytes of all tensors at the peak: what `torch.cuda.max_memory_allocated` would say."""
        return sum(self.resident.values()) + sum(self.phases[self.worst].values())

    def at_peak(self) -> dict[str, float]:
        """Component -> bytes at the peak."""
        phase = self.phases[self.worst]
        return {name: self.resident.get(name, 0) + phase.get(name, 0) for name in COMPONENTS}

    def fits(self, card: float) -> bool:
        """Whether it fits a card of so many GiB."""
        return self.allocated + OVERHEAD <= card * GIB * self.share

    @property
    def share(self) -> float:
        """Of a card, what is left for the stage."""
        return max(0.0, 1 - SPARE - self.reserved)

    @property
    def smallest(self) -> int | None:
        """The smallest of the common cards that it fits, GiB, or None."""
        return next((card for card in CARDS if self.fits(card)), None)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a stage, and what is known of the stages before it.

    Parameters:
        stage: its name.
        recipe: the recipe's name.
        values: of all of the recipe's dataclasses, defaults too.
        earlier: folder -> the arguments of the stage that writes it.
        triton: whether the device is a GPU; a CPU is for comparison.
    """

    stage: str
    recipe: str
    values: Mapping[str, Any]
    earlier: Mapping[str, "Arguments"] = field(default_factory=dict)
    triton: bool = True

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the default where the recipe has no such key."""
        return self.values.get(name, default)


def can_be_planned(recipe: str) -> bool:
    """Whether there is a plan for a recipe."""
    return recipe in STAGES and STAGES[recipe].planner is not None


def plan_stage(arguments: Arguments) -> Plan:
    """The plan of a stage.

    Raises:
        RecipeError: for a model that cannot be planned, or a length that has no bound.
    """
    if not can_be_planned(arguments.recipe):
        known = ", ".join(filter(can_be_planned, STAGES))
        raise RecipeError(f"{arguments.stage}: there is no plan for recipes/{arguments.recipe}.py, only for {known}")
    return STAGES[arguments.recipe].memory_planner()(_Run(arguments))


class _Run:
    """The sizes that the arguments of a stage come down to."""

    def __init__(self, arguments: Arguments):
        self.arguments, self.notes = arguments, []
        self.config = _config_of(arguments)
        self.shape = shape_of(self.config)
        self.numbers = _numbers(arguments, self.config)
        self.peft = bool(arguments.get("use_peft")) or not STAGES[arguments.recipe].trains
        self.adapter = self._lora() if arguments.get("use_peft") else None
        self.reserved = 0.0
        self.asked: frozenset[str] = frozenset()  # parts of a layer that adapters are on, where none is trained

    # --- What is there ---

    def _lora(self) -> Adapter:
        if found := self.adapter_in(self.arguments.get("start_from")):
            return found
        return self.counted(own_lora(self.arguments))

    def adapter_in(self, folder: str | None) -> Adapter | None:
        """The adapter that is in a folder, or will be; None where none is named, or nothing is known of it."""
        if folder is None:
            return None
        lora = lora_in(folder, self.arguments.earlier)
        if lora is None:
            lora = own_lora(self.arguments)
            self.note(f"{folder} is not there yet: taken for LoRA of rank {lora.r} on {lora.target_modules or 'some layers'}")
        return self.counted(lora)

    def counted(self, lora: LoraConfig) -> Adapter:
        """What an adapter adds to the base."""
        if lora.use_dora:
            self.note("DoRA is counted with its weights; what its passes take beyond those of LoRA is not in the plan")
        return adapter_of(self.config, lora)

    def note(self, text: str) -> None:
        """Says what the plan takes for granted."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def width(self) -> int:
        """Bytes of a weight that is not quantised."""
        return self.numbers.weights

    def weights(self, head: bool = True) -> dict[str, float]:
        """Bytes of the base; without its LM head for a reward model."""
        shape, bits = self.shape, self.numbers.bits
        others = shape.parameters(head) - (shape.matrices if bits else 0)
        quantised = sizes.quantised_bytes(shape.matrices, bits, self.numbers.nested) if bits else 0.0
        return {QUANTISED: quantised, WHOLE: float(others * self.width)}

    def trained(self, head: bool = True, heads: int = 0) -> tuple[int, int]:
        """Number of trained weights, and bytes of each: LoRA is in fp32, whatever the base is in."""
        if self.adapter is not None:
            return self.adapter.parameters + heads, 4
        return self.shape.parameters(head) + heads, self.width

    def training_state(self, trained: int, width: int) -> dict[str, float]:
        """Gradients, and the optimizer's state."""
        optimizer = plain(self.arguments.optim)
        if not sizes.knows_optimizer(optimizer):
            self.note(f"optim: {optimizer} is not known to the plan: its state is taken for that of AdamW in fp32")
        return {GRADIENTS: float(trained * width), OPTIMIZER: sizes.optimizer_bytes(optimizer, trained, width)}

    def training(self, **options: Any) -> Training:
        """What is trained, as activations see it."""
        adapter, values = self.adapter, self.arguments
        dropout = adapter is not None and adapter.dropout and not values.get("disable_dropout", False)
        return Training(
            adapted=adapter.parts if adapter else frozenset(),
            rank=adapter.rank if adapter else 0,
            dropout=dropout,
            whole=adapter is None,
            checkpointing=bool(values.get("gradient_checkpointing")),
            eager=values.get("attn_implementation") == "eager",
            **options,
        )

    def casts(self, trained: int) -> float:
        """Bytes of the copies that autocast makes of fp32 weights: of what is trained, and of a base in fp32."""
        numbers = self.numbers
        copies = trained * 2.0 if numbers.mixed and (self.adapter is not None or numbers.weights == 4) else 0.0
        if numbers.compute < numbers.weights and self.adapter is not None and numbers.bits is None:
            layers = 1 if self.arguments.get("gradient_checkpointing") else self.shape.layers
            copies += 2.0 * self.shape.matrices / self.shape.layers * layers
        return copies

    # --- Phases ---

    def update(self, rows: int, length: int, scored: int, trained: int, head: bool = True) -> dict[str, dict[str, float]]:
        """A micro-batch forward and backward: at the LM head, where all layers have kept what they keep; and in a layer."""
        shape, numbers, training = self.shape, self.numbers, self.training()
        kept = sizes.saved_bytes(shape, numbers, training, rows, length) + self.casts(trained)
        kept += rows * length * length * (1 if training.padded else 0)  # the mask, of bools
        end = rows * length * shape.hidden * 4.0  # what the norm behind the last layer keeps
        layer = {
            ACTIVATIONS: kept + sizes.backward_bytes(shape, numbers, training, rows, length),
            DEQUANTISED: sizes.dequantised_bytes(shape, numbers),
        }
        if not head:
            return {"update": layer}
        logits = sizes.fused_head_bytes(shape, numbers, scored, gradients=True)
        if self.adapter is None:  # the LM head is trained too
            logits += shape.embedding * 4.0
        return {"update, LM head": {ACTIVATIONS: kept + end, LOGITS: logits}, "update, layers": layer}

    def forward(self, rows: int, length: int, scored: int = 0, autocast: bool | None = None) -> dict[str, float]:
        """A pass that keeps nothing."""
        shape, numbers, training = self.shape, self.numbers, self.training()
        if self.adapter is None and self.peft:
            training = Training(adapted=self.asked, rank=1)
        layer = sizes.forward_bytes(shape, numbers, training, rows, length, autocast)
        ends = rows * length * shape.hidden * (numbers.weights + 4.0)
        logits = sizes.fused_head_bytes(shape, numbers, scored, gradients=False) if scored else 0.0
        # One after the other: the larger of the two
        if logits + ends > layer:
            return {ACTIVATIONS: ends, LOGITS: logits}
        return {ACTIVATIONS: layer, DEQUANTISED: sizes.dequantised_bytes(shape, numbers)}

    def rollout(self, rows: int, prompt: int, completion: int, recorded: bool = False) -> dict[str, dict[str, float]]:
        """Sampling: these prompts all at once, then token by token, without autocast where there are adapters."""
        shape, numbers = self.shape, self.numbers
        autocast = False if self.peft else None
        cache = sizes.kv_cache_bytes(shape, rows, prompt + completion, numbers.weights)
        logits = sizes.sampling_bytes(shape, numbers, rows, recorded)
        reading = self.forward(rows, prompt, autocast=autocast)
        begun = float(sizes.kv_cache_bytes(shape, rows, prompt, numbers.weights))
        return {
            "prompts read": {**reading, CACHE: begun},
            "sampling": {CACHE: float(cache), LOGITS: logits, DEQUANTISED: sizes.dequantised_bytes(shape, numbers)},
        }

    def sampled(self, rows: int, prompt: int, completion: int, recorded: bool) -> dict[str, dict[str, float]]:
        """PPO's rollout: in parts, if it is asked for; by others in memory of theirs."""
        values = self.arguments
        if values.get("use_vllm"):
            self._reserve_for_vllm()
            return {}
        if values.get("use_transformers_continuous_batching"):
            self.note("continuous batching takes a share of the memory that is free (`max_memory_percent`), not in the plan")
            return {}
        return self.rollout(sampled_at_once(values, rows), prompt, completion, recorded)

    def _reserve_for_vllm(self) -> None:
        values = self.arguments
        if values.get("vllm_mode", "colocate") != "colocate":
            self.note("vLLM runs in a process of its own: if that is on this card, what it takes there comes on top")
            return
        self.reserved = float(values.get("vllm_gpu_memory_utilization", 0.3))
        self.note(
            f"vLLM takes `vllm_gpu_memory_utilization: {self.reserved:g}` of the card on top: what fits is judged by the rest"
        )

    def plan(self, resident: dict[str, float], phases: dict[str, dict[str, float]], parameters: dict[str, int]) -> Plan:
        """The whole."""
        values = self.arguments
        roles = {"base": self.shape.parameters(), **parameters}
        return Plan(values.stage, values.recipe, resident, phases, roles, tuple(self.notes), self.reserved)


# --- Of the arguments ------------------------------------------------------------------------------------


def _config_of(arguments: Arguments) -> PretrainedConfig:
    if not arguments.get("model_name_or_path"):
        raise RecipeError(f"{arguments.stage}: model_name_or_path: name the base model: a Hub name or a local folder")
    revision, trust = arguments.get("model_revision") or "main", bool(arguments.get("trust_remote_code"))
    return load_config(arguments.model_name_or_path, revision, trust)


def _numbers(arguments: Arguments, config: PretrainedConfig) -> Numbers:
    named = arguments.get("dtype")
    named = str(config.dtype or "float32").removeprefix("torch.") if named in (None, "auto") else named
    weights = 4 if named == "float32" else 2
    mixed = arguments.get("bf16") or arguments.get("fp16")
    bits = 4 if arguments.get("load_in_4bit") else 8 if arguments.get("load_in_8bit") else None
    nested = bool(arguments.get("use_bnb_nested_quant"))
    return Numbers(weights, 2 if mixed else weights, bits, nested, arguments.triton, bool(mixed))


def own_lora(arguments: Arguments) -> LoraConfig:
    """The LoRA that the arguments of a stage describe."""
    values = arguments.values
    trains = STAGES[arguments.recipe].trains  # which know nothing of what their policies are
    return LoraConfig(
        r=values.get("lora_r", 16),
        lora_alpha=values.get("lora_alpha", 32),
        lora_dropout=values.get("lora_dropout", 0.05),
        target_modules=values.get("lora_target_modules") or (None if trains else "all-linear"),
        modules_to_save=values.get("lora_modules_to_save"),
        target_parameters=values.get("lora_target_parameters"),
        use_dora=bool(values.get("use_dora")),
        task_type="CAUSAL_LM",
    )


def lora_in(folder: str, earlier: Mapping[str, Arguments]) -> LoraConfig | None:
    """The LoRA of the adapter in a folder: of the stage that will write it, or as it is on the disk."""
    before = earlier.get(folder)
    if before is not None:
        parent = before.get("start_from")
        return lora_in(parent, earlier) if parent else own_lora(before)
    if (Path(folder) / "adapter_config.json").is_file():
        return read_adapter_config(folder)
    return None


def _length(arguments: Arguments, key: str) -> int:
    value = arguments.get(key)
    if value is None:
        raise RecipeError(f"{arguments.stage}: {key}: null has no bound that could be planned for: set a number of tokens")
    return value


# --- The stages ------------------------------------------------------------------------------------------


def plan_sft(run: _Run) -> Plan:
    """Return the plan of supervised fine-tuning."""
    values, length = run.arguments, _length(run.arguments, "max_length")
    trained, width = run.trained()
    resident = {**run.weights(), **run.training_state(trained, width)}
    resident[ADAPTERS] = run.adapter.parameters * 4.0 if run.adapter else 0.0
    rows = values.per_device_train_batch_size
    phases = run.update(rows, length, rows * length, trained)
    if _evaluates(values):
        rows = values.per_device_eval_batch_size
        phases["evaluation"] = run.forward(rows, length, rows * length)
    return run.plan(resident, phases, {"policy": run.adapter.parameters if run.adapter else 0})


def plan_reward(run: _Run) -> Plan:
    """Return the plan of training a reward model."""
    values, length, shape = run.arguments, _length(run.arguments, "max_length"), run.shape
    trained, width = run.trained(head=False, heads=shape.hidden)
    members = values.ensemble_size if run.adapter else 1
    resident = {**run.weights(head=False), **run.training_state(trained, width)}
    resident[ADAPTERS] = run.adapter.parameters * 4.0 if run.adapter else 0.0
    answers = (values.get("dataset_arguments") or {}).get("k", 2)
    if values.train_on == "rankings" and answers == 2:
        run.note("rankings are taken for pairs: of K answers each the activations are K / 2 times as large")
    rows = values.per_device_train_batch_size * (answers if values.train_on == "rankings" else 2)
    phases = run.update(rows, length, 0, trained, head=False)
    phases["update"][ACTIVATIONS] += rows * length * shape.hidden * 4.0  # the scalar head reads all tokens, in fp32
    rows = values.per_device_eval_batch_size
    if _evaluates(values):
        phases["evaluation"] = run.forward(rows * answers, length)
    phases["scaling"] = run.forward(rows, length, autocast=False)
    if run.adapter:
        phases["scaling"][ADAPTERS] = (members - 1) * run.adapter.parameters * 4.0
    count = members * (run.adapter.parameters if run.adapter else 0) + members * shape.hidden
    return run.plan(resident, phases, {"reward models" if members > 1 else "reward model": count})


def plan_dpo(run: _Run) -> Plan:
    """Return the plan of DPO."""
    values, length = run.arguments, _length(run.arguments, "max_length")
    trained, width = run.trained()
    resident = {**run.weights(), **run.training_state(trained, width)}
    roles = {"policy": run.adapter.parameters if run.adapter else 0}
    kept = not values.get("precompute_ref_log_probs")
    if run.adapter:
        reference = run.adapter.parameters if kept and values.get("start_from") else 0
        resident[ADAPTERS], roles["reference"] = (run.adapter.parameters + reference) * 4.0, reference
    elif kept:
        resident[MODELS], roles["reference"] = float(run.shape.parameters() * run.width), run.shape.parameters()
    rows = 2 * values.per_device_train_batch_size
    phases = run.update(rows, length, rows * length, trained)
    if kept:
        held = phases["update, LM head"][ACTIVATIONS]
        reference = run.forward(rows, length, rows * length)
        phases["reference"] = {**reference, ACTIVATIONS: reference[ACTIVATIONS] + held}
    if _evaluates(values):
        rows = 2 * values.per_device_eval_batch_size
        phases["evaluation"] = run.forward(rows, length, rows * length)
    return run.plan(resident, phases, roles)


def plan_ppo(run: _Run) -> Plan:
    """Return the plan of PPO."""
    values, shape = run.arguments, run.shape
    prompt, completion = _length(values, "max_prompt_length"), _length(values, "max_completion_length")
    resident, roles, trained = _ppo_roles(run)
    rows, length = values.per_device_train_batch_size, prompt + completion
    whole = sampled_rows(values)
    batch = {BATCH: float(whole * length * _ROLLOUT_COLUMNS)}
    exact = run.width == 4 and run.numbers.compute == 4 and run.numbers.bits is None
    recorded = exact if values.get("sampler_logps") is None else bool(values.sampler_logps)
    phases = run.sampled(whole, prompt, completion, recorded)
    scored = values.get("local_rollout_forward_batch_size") or rows
    phases["log-probabilities"] = {**run.forward(scored, length, scored * completion), **batch}
    if roles.get("reward models"):
        phases["rewards"] = {**run.forward(scored, length, autocast=False), **batch}
    update = run.update(rows, length, rows * completion, trained)
    for phase in update.values():
        if values.critic == "shared":  # its head keeps the states of the completion in fp32
            phase[ACTIVATIONS] += rows * completion * shape.hidden * 4.0
    phases |= {name: {**phase, **batch} for name, phase in update.items()}
    if values.critic != "shared":
        critic = run.update(rows, length, 0, trained, head=False)["update"]
        phases["update, critic"] = {**critic, **batch}
        phases["update, critic"][ACTIVATIONS] += rows * completion * shape.hidden * 4.0
    if values.get("ptx_coef"):
        texts, tokens = values.get("ptx_batch_size") or rows, values.ptx_max_length
        extra = run.update(texts, tokens, texts * tokens, trained)
        phases |= {f"{name.replace('update', 'pretraining text')}": {**phase, **batch} for name, phase in extra.items()}
    if _evaluates(values):
        evaluated = values.per_device_eval_batch_size
        for name, phase in run.sampled(evaluated, prompt, completion, recorded).items():
            phases[f"evaluation, {name}"] = phase
        size = values.get("local_rollout_forward_batch_size") or evaluated
        phases["evaluation, passes"] = run.forward(size, length, size * completion)
    return run.plan(resident, phases, roles)


def _ppo_roles(run: _Run) -> tuple[dict[str, float], dict[str, int], int]:
    """What is in memory all the time, the weights of each role, and how many weights the policy trains."""
    values, shape = run.arguments, run.shape
    trained, width = run.trained()
    resident = {**run.weights(), MODELS: 0.0}
    own = run.adapter.parameters if run.adapter else 0
    roles = {"policy": own, "reference": 0, "reward models": 0, "critic": shape.hidden + 1}
    if values.kl_coef > 0 and not run.adapter:
        roles["reference"] = shape.parameters()
        resident[MODELS] += float(shape.parameters() * run.width)
    elif values.kl_coef > 0 and values.get("start_from"):
        roles["reference"] = own
    scored, models = rewards_of(run, reward_paths(values.get("reward_funcs") or []))
    roles["reward models"] = sum(scored) + models
    resident[MODELS] += models * float(run.width)
    learnt = trained + roles["critic"]
    if values.critic == "adapter":
        roles["critic"] += scored[0] if scored else own
        learnt += scored[0] if scored else own
    if values.critic == "model":
        trunk = shape.parameters(head=False)
        roles["critic"] += trunk
        resident[MODELS] += float(trunk * run.width)
        learnt += trunk
    critic = roles["critic"] if values.critic == "adapter" else shape.hidden
    resident[ADAPTERS] = 4.0 * (own + critic + sum(scored) + (roles["reference"] if run.adapter else 0))
    return {**resident, **run.training_state(learnt, width)}, roles, trained


def rewards_of(run: _Run, paths: list[str | None]) -> tuple[list[int], int]:
    """Weights of each reward adapter that the paths name, and of the whole models among them."""
    adapters: list[int] = []
    models = 0
    for path in filter(None, paths):
        before = run.arguments.earlier.get(path)
        folder = Path(path)
        if before is None and not folder.is_dir() and "/" not in path:
            continue  # a function
        if before is not None and not before.get("use_peft"):
            models += shape_of(_config_of(before)).parameters(head=False)
        elif before is None and (folder / "config.json").is_file():
            models += shape_of(load_config(path)).parameters(head=False)
        else:
            stored = read_json(folder / REWARD).get("ensemble") or {}
            members = before.ensemble_size if before else len(stored.get("members", [path]))
            found = run.adapter_in(path if before or members == 1 else f"{path}/member-0")
            adapters += [found.parameters + run.shape.hidden] * members
    return adapters, models


def sampled_at_once(arguments: Arguments, rows: int) -> int:
    """Of so many completions those that PPO samples at once."""
    return min(arguments.get("rollout_batch_size") or rows, rows)


def sampled_rows(arguments: Arguments) -> int:
    """Completions that PPO samples in an iteration, on one GPU."""
    if arguments.get("generation_batch_size"):
        return arguments.generation_batch_size
    return arguments.per_device_train_batch_size * (
        arguments.get("steps_per_generation") or arguments.gradient_accumulation_steps
    )


def plan_evaluate(run: _Run) -> Plan:
    """Return the plan of evaluation, and of sampling."""
    values = run.arguments
    prompt, completion = _length(values, "max_prompt_length"), _length(values, "max_completion_length")
    policies = [_folder_of(entry) for entry in values.policies.values()]
    adapters = [run.adapter_in(folder) for folder in dict.fromkeys(filter(None, policies))]
    run.asked = frozenset().union(*(adapter.parts for adapter in adapters))
    own = [adapter.parameters for adapter in adapters]
    rewards, models = rewards_of(run, reward_paths(values.get("rewards") or []))
    resident = {**run.weights(), ADAPTERS: 4.0 * (sum(own) + sum(rewards)), MODELS: models * float(run.width)}
    rows = values.batch_size
    phases = run.rollout(rows, prompt, completion)
    if values.recipe == "evaluate":
        reading = run.forward(rows, prompt + completion, autocast=False)
        phases["log-probabilities"] = {
            ACTIVATIONS: rows * (prompt + completion) * run.shape.hidden * 2.0 * run.width,
            LOGITS: sizes.whole_logits_bytes(run.shape, rows * (completion + 1)),
        }
        phases["answers read"] = reading
        if values.get("ptx_dataset"):
            tokens = rows * values.ptx_max_length
            phases["pretraining text"] = {LOGITS: tokens * run.shape.vocabulary * (2.0 * run.width + 8)}
    if rewards or models:
        phases["rewards"] = run.forward(rows, prompt + completion, autocast=False)
    return run.plan(resident, phases, {"policies": sum(own), "reward models": sum(rewards) + models})


def _folder_of(entry: Any) -> str | None:
    return entry.get("path") if isinstance(entry, dict) else entry


def _evaluates(arguments: Arguments) -> bool:
    """Whether the stage evaluates as it trains."""
    return plain(arguments.get("eval_strategy", "no")) != "no"
