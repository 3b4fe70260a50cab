"""The fastest arguments with which a stage fits a card, or what else to change."""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory.gpu_arguments import StageArguments
from rlhf_recipes.memory.plan import Plan
from rlhf_recipes.memory.planners import completions_per_iteration, plan_stage, rollout_batch_size

MAX_ROWS = 8
"""Rows of a micro-batch beyond which a card computes hardly faster."""
FULL_PRECISION, PAGED_8BIT = "adamw_torch_fused", "paged_adamw_8bit"
_ADAMW = (FULL_PRECISION, PAGED_8BIT, "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit")
_BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")


class NoFitError(RecipeError):
    """No choice of `autofit` makes a stage fit a card of so many GiB.

    Parameters:
        choice: the arguments that take least memory.
        plan: with them.
    """

    def __init__(self, arguments: StageArguments, card: float, choice: dict[str, Any], plan: Plan):
        super().__init__(
            f"gpu_memory: {card:g}: {arguments.stage} needs at least {needed(plan)} (peak: {plan.worst}). "
            f"Fix: {advice(arguments, card)}"
        )
        self.choice, self.plan = choice, plan


def autofit(arguments: StageArguments, card: float, fixed: Collection[str] = ()) -> tuple[dict[str, Any], Plan]:
    """Return the first of `choices` that fits a card, and the plan with it.

    An optimizer step learns from the same rows as before, and a PPO iteration from as many completions. `card` is in GiB; keys
    in `fixed` do not change.

    Raises:
        NoFitError: with the least memory that is needed.
        RecipeError: for a stage that cannot be planned.
    """
    choice, plan = _first_fit(arguments, choices(arguments, fixed), card)
    if not plan.fits(card):
        raise NoFitError(arguments, card, choice, plan)
    return _enlarge_passes(arguments, choice, plan, card, fixed)


def _first_fit(arguments: StageArguments, candidates: Iterable[dict[str, Any]], card: float) -> tuple[dict[str, Any], Plan]:
    """Return the first candidate that fits, else the one that takes least memory."""
    plans = []
    for choice in candidates:
        plans.append((choice, plan_stage(arguments.override(choice))))
        if plans[-1][1].fits(card):
            return plans[-1]
    return min(plans, key=lambda pair: pair[1].allocated)


def needed(plan: Plan) -> str:
    """Return the memory of the smallest card that a plan would fit, as text."""
    size = plan.smallest_card
    return "more than vLLM leaves of any card" if size is None else f"{size:.1f} GiB"


def choices(arguments: StageArguments, fixed: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield arguments to try, the fastest first, without the fixed keys.

    Training tries micro-batches of 8 rows down to 2 without gradient checkpointing, then down to 1 with it; compiled layers
    exclude checkpointing. Each is tried with AdamW in full precision before paged AdamW in 8 bits, and in PPO with a critic
    adapter before a value head on the policy. Last, PPO samples fewer completions at once. `evaluate` and `sample` halve their
    batch.
    """
    if "batch_size" in arguments.values:
        sizes = [arguments.batch_size >> halved for halved in range(arguments.batch_size.bit_length())]
        yield from ({"batch_size": rows} for rows in sizes) if "batch_size" not in fixed else ({},)
        return
    keeps_batches = bool(set(_BATCH_KEYS) & set(fixed))
    compiled = bool(arguments.get("torch_compile"))
    for rollout, checkpointing, rows, optimizer, critic in itertools.product(
        _rollout_sizes(arguments, fixed),
        (False,) if compiled else (False, True),
        _micro_batches(arguments, keeps_batches),
        _optimizers(arguments),
        _critics(arguments),
    ):
        if not checkpointing and rows == 1 and not keeps_batches and not compiled:
            continue  # a larger micro-batch with checkpointing is faster
        choice = {"gradient_checkpointing": checkpointing, **optimizer, "per_device_eval_batch_size": rows}
        if not keeps_batches:
            steps = _rows_per_step(arguments) // rows
            choice |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        if arguments.recipe == "ppo":
            choice |= {**critic, **_ppo_batches(arguments, rows, keeps_batches), **rollout}
        yield {key: value for key, value in choice.items() if key not in fixed}


def _rows_per_step(arguments: StageArguments) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def _micro_batches(arguments: StageArguments, keeps_batches: bool) -> list[int]:
    """Return micro-batch sizes, largest first, that divide a step's rows evenly."""
    if keeps_batches:
        return [arguments.per_device_train_batch_size]
    total = _rows_per_step(arguments)
    if arguments.recipe == "ppo":
        total = math.gcd(total, completions_per_iteration(arguments))
    return [rows for rows in range(min(MAX_ROWS, total), 0, -1) if total % rows == 0]


def _optimizers(arguments: StageArguments) -> list[dict[str, str]]:
    """Return forms of AdamW; any other optimizer stays, since it learns differently."""
    optimizer = plain(arguments.optim)
    if optimizer not in _ADAMW:
        return [{}]
    return [{"optim": optimizer if optimizer == "adamw_torch" else FULL_PRECISION}, {"optim": PAGED_8BIT}]


def _critics(arguments: StageArguments) -> list[dict[str, str]]:
    """Return critics no larger than the adapter, unless its learning rate was chosen."""
    if arguments.get("critic") != "adapter" or arguments.get("value_learning_rate") is not None:
        return [{}]
    return [{"critic": "adapter"}, {"critic": "shared"}]


def _rollout_sizes(arguments: StageArguments, fixed: Collection[str]) -> list[dict[str, int]]:
    """Return sizes of PPO's rollout batch: unchanged first, then halved repeatedly."""
    other_sampler = arguments.get("use_vllm") or arguments.get("use_transformers_continuous_batching")
    if arguments.recipe != "ppo" or other_sampler or "rollout_batch_size" in fixed:
        return [{}]
    size = rollout_batch_size(arguments, completions_per_iteration(arguments))
    return [{}, *({"rollout_batch_size": size >> halved} for halved in range(1, size.bit_length()))]


def _ppo_batches(arguments: StageArguments, rows: int, keeps_batches: bool) -> dict[str, Any]:
    """Return PPO's other batch sizes: as many completions an iteration as before."""
    total = completions_per_iteration(arguments)
    iteration = {} if keeps_batches else {"steps_per_generation": total // rows, "generation_batch_size": None}
    return {**iteration, "per_device_eval_batch_size": total, "local_rollout_forward_batch_size": rows}


def _enlarge_passes(
    arguments: StageArguments, choice: dict[str, Any], plan: Plan, card: float, fixed: Collection[str]
) -> tuple[dict[str, Any], Plan]:
    """Double PPO's forward batch while it fits: each pass dequantises every layer."""
    key = "local_rollout_forward_batch_size"
    while key in choice and key not in fixed and 2 * choice[key] <= min(MAX_ROWS, completions_per_iteration(arguments)):
        larger = {**choice, key: 2 * choice[key]}
        larger_plan = plan_stage(arguments.override(larger))
        if not larger_plan.fits(card):
            break
        choice, plan = larger, larger_plan
    return choice, plan


def advice(arguments: StageArguments, card: float) -> str:
    """Return what to change so that a stage fits a card, even at a cost in quality."""
    choice, plan = _first_fit(arguments, choices(arguments), card)
    if plan.fits(card):
        return f"set {as_yaml({key: value for key, value in choice.items() if plain(arguments.get(key)) != value})}"
    smallest, changes = arguments.override(choice), {}
    for change in _costly_changes(smallest):
        smallest, changes = smallest.override(change), changes | change
        if plan_stage(smallest).fits(card):
            return f"set {as_yaml(choice | changes)}"
    if plan.smallest_card is None:
        return "set a smaller `vllm_gpu_memory_utilization`"
    return f"take a smaller base, or a card of {needed(plan)}"


def _costly_changes(arguments: StageArguments) -> Iterator[dict[str, Any]]:
    """Yield changes to what is learnt, or how well, the mildest first."""
    values = arguments.values
    if values.get("torch_compile"):
        yield {"torch_compile": False, "gradient_checkpointing": True}
    if not values.get("load_in_4bit") and (values.get("use_peft") or "batch_size" in values):
        yield {"load_in_4bit": True, "use_bnb_nested_quant": True}
    elif values.get("load_in_4bit") and not values.get("use_bnb_nested_quant"):
        yield {"use_bnb_nested_quant": True}
    if values.get("use_peft") and values.get("lora_target_modules") == "all-linear" and not values.get("start_from"):
        yield {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    for divisor in (2, 4, 8):
        for key in ("max_length", "max_completion_length", "max_prompt_length"):
            if values.get(key) and values[key] // divisor >= 128:
                yield {key: values[key] // divisor}


def as_yaml(values: dict[str, Any]) -> str:
    """Return keys and values as a YAML file has them, without those that are null."""
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
    return ", ".join(f"`{key}: {text}`" for key, text in texts.items() if text is not None)
