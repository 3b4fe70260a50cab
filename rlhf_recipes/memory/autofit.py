"""From a card's memory to the arguments of a stage: the fastest that fit."""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from rlhf_recipes.config.launcher import plain
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory.stages import GIB, OVERHEAD, Arguments, Plan, plan_stage, sampled_at_once, sampled_rows

LARGEST = 8
"""Rows of a micro-batch beyond which a card computes hardly faster."""
FULL, PAGED = "adamw_torch_fused", "paged_adamw_8bit"
_ADAMW = (FULL, PAGED, "adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_32bit")
_OF_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")


def autofit(arguments: Arguments, card: float, fixed: Collection[str] = ()) -> tuple[dict[str, Any], Plan]:
    """What the dial sets in a stage for a card, and the plan with it: the first of `choices` that fits.

    What an optimizer step learns from stays as it is: rows of a micro-batch times accumulation, and of PPO the completions of
    an iteration.

    Args:
        arguments: of the stage.
        card: GiB.
        fixed: keys that are not to be touched.

    Raises:
        NoFitError: with the least that is needed, and for what.
        RecipeError: for a stage that cannot be planned.
    """
    least: tuple[dict[str, Any], Plan] | None = None
    for choice in choices(arguments, fixed):
        plan = plan_stage(with_values(arguments, choice))
        if plan.fits(card):
            return _with_larger_passes(arguments, choice, plan, card, fixed)
        if least is None or plan.allocated < least[1].allocated:
            least = choice, plan
    raise NoFitError(arguments, card, *least)


class NoFitError(RecipeError):
    """Nothing that the dial may set makes a stage fit a card.

    Parameters:
        arguments: of the stage.
        card: GiB.
        choice: what takes least.
        plan: with it.
    """

    def __init__(self, arguments: Arguments, card: float, choice: dict[str, Any], plan: Plan):
        super().__init__(
            f"gpu_memory: {card:g}: {arguments.stage} needs {needed(plan)} at the least (at its peak, {plan.worst}): "
            f"{'; '.join(advice(arguments, card))}"
        )
        self.choice, self.plan = choice, plan


def needed(plan: Plan) -> str:
    """GiB of the smallest card that a plan would fit."""
    size = smallest_card(plan)
    return "more than vLLM leaves of any card" if size is None else f"{size:.1f} GiB"


def smallest_card(plan: Plan) -> float | None:
    """GiB of the smallest card that a plan would fit; None where there is none, as vLLM takes all of it."""
    return (plan.allocated + OVERHEAD) / plan.share / GIB if plan.share else None


def with_values(arguments: Arguments, values: dict[str, Any]) -> Arguments:
    """The arguments of a stage with others over them."""
    return replace(arguments, values={**arguments.values, **values})


def choices(arguments: Arguments, fixed: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """What the dial may set, the fastest first, without the keys that are fixed.

    Of a training: without checkpointing, in micro-batches of 8 rows down to 2; then with it (unless layers are compiled, which
    excludes it), down to 1; each with AdamW in full precision before the paged one in 8 bits, and of PPO with a critic that is
    an adapter before a head on the policy. If nothing fits, PPO's completions are sampled in halves, and halves of those. Of
    sampling: batches of half the size, and half of that.
    """
    if "batch_size" in arguments.values:
        sizes = [arguments.batch_size >> halved for halved in range(arguments.batch_size.bit_length())]
        yield from ({"batch_size": rows} for rows in sizes) if "batch_size" not in fixed else ({},)
        return
    kept = bool(set(_OF_BATCHES) & set(fixed))
    compiled = bool(arguments.get("torch_compile"))
    trained = ((False,) if compiled else (False, True), _micro_batches(arguments, kept), _optimizers(arguments))
    sampled = _rollout_sizes(arguments, fixed)
    for rollout, checkpointing, rows, optimizer, critic in itertools.product(sampled, *trained, _critics(arguments)):
        if not checkpointing and rows == 1 and not kept and not compiled:  # a larger one with checkpointing is faster
            continue
        choice = {"gradient_checkpointing": checkpointing, **optimizer, "per_device_eval_batch_size": rows}
        if not kept:
            choice |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": _global_rows(arguments) // rows}
        if arguments.recipe == "ppo":
            choice |= {**critic, **_rollout(arguments, rows, kept), **rollout}
        yield {key: value for key, value in choice.items() if key not in fixed}


def _global_rows(arguments: Arguments) -> int:
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps


def _micro_batches(arguments: Arguments, kept: bool) -> list[int]:
    """Rows, from most to least, by which those of an optimizer step can be divided, and PPO's completions of an iteration."""
    if kept:
        return [arguments.per_device_train_batch_size]
    whole = _global_rows(arguments)
    if arguments.recipe == "ppo":
        whole = math.gcd(whole, sampled_rows(arguments))
    return [rows for rows in range(min(LARGEST, whole), 0, -1) if whole % rows == 0]


def _optimizers(arguments: Arguments) -> list[dict[str, str]]:
    """How AdamW keeps its moments; another optimizer, which would learn otherwise at the same rate, stays."""
    own = plain(arguments.optim)
    if own not in _ADAMW:
        return [{}]
    return [{"optim": own if own == "adamw_torch" else FULL}, {"optim": PAGED}]


def _critics(arguments: Arguments) -> list[dict[str, str]]:
    """Without an adapter of its own, where there is one: not the other way, nor under a rate that was chosen for the one."""
    if arguments.get("critic") != "adapter" or arguments.get("value_learning_rate") is not None:
        return [{}]
    return [{"critic": "adapter"}, {"critic": "shared"}]


def _rollout_sizes(arguments: Arguments, fixed: Collection[str]) -> list[dict[str, int]]:
    """What sets how many completions PPO samples at once: nothing first, then ever fewer."""
    by_others = arguments.get("use_vllm") or arguments.get("use_transformers_continuous_batching")
    if arguments.recipe != "ppo" or by_others or "rollout_batch_size" in fixed:
        return [{}]
    whole = sampled_at_once(arguments, sampled_rows(arguments))
    return [{}, *({"rollout_batch_size": whole >> halved} for halved in range(1, whole.bit_length()))]


def _with_larger_passes(
    arguments: Arguments, choice: dict[str, Any], plan: Plan, card: float, fixed: Collection[str]
) -> tuple[dict[str, Any], Plan]:
    """The choice with PPO's passes without gradients, which need less than an update, as large as fits.

    In 4 bits every pass dequantises each layer once, whatever it reads.
    """
    key, largest = "local_rollout_forward_batch_size", min(LARGEST, sampled_rows(arguments) if arguments.recipe == "ppo" else 0)
    while key in choice and key not in fixed and 2 * choice[key] <= largest:
        larger = {**choice, key: 2 * choice[key]}
        needed_then = plan_stage(with_values(arguments, larger))
        if not needed_then.fits(card):
            break
        choice, plan = larger, needed_then
    return choice, plan


def _rollout(arguments: Arguments, rows: int, kept: bool) -> dict[str, Any]:
    """Of PPO: as many completions an iteration as before. Evaluation samples as many at once, and reads as training does."""
    whole = sampled_rows(arguments)
    own = {} if kept else {"steps_per_generation": whole // rows, "generation_batch_size": None}
    return {**own, "per_device_eval_batch_size": whole, "local_rollout_forward_batch_size": rows}


# --- If nothing fits -------------------------------------------------------------------------------------


def advice(arguments: Arguments, card: float) -> list[str]:
    """What to change in a stage so that it fits a card: what the dial would set, else first of all what costs most."""
    best = None
    for choice in choices(arguments):
        plan = plan_stage(with_values(arguments, choice))
        if plan.fits(card):
            changed = {key: value for key, value in choice.items() if plain(arguments.get(key)) != value}
            return [f"set {written(changed)}"]
        if best is None or plan.allocated < best[1].allocated:
            best = choice, plan
    smallest, changes = with_values(arguments, best[0]), {}
    for change in _structural(smallest):
        smallest, changes = with_values(smallest, change), changes | change
        if plan_stage(smallest).fits(card):
            return [f"set {written(best[0] | changes)}"]
    if smallest_card(best[1]) is None:
        return ["a smaller `vllm_gpu_memory_utilization`"]
    return [f"a smaller base, or a card of {needed(best[1])}"]


def _structural(arguments: Arguments) -> Iterator[dict[str, Any]]:
    """Changes that do change what is learnt, or how well, the mildest first."""
    values = arguments.values
    if values.get("torch_compile"):
        yield {"torch_compile": False, "gradient_checkpointing": True}
    if not values.get("load_in_4bit") and (values.get("use_peft") or "batch_size" in values):
        yield {"load_in_4bit": True, "use_bnb_nested_quant": True}
    elif values.get("load_in_4bit") and not values.get("use_bnb_nested_quant"):
        yield {"use_bnb_nested_quant": True}
    if values.get("use_peft") and values.get("lora_target_modules") == "all-linear" and not values.get("start_from"):
        yield {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    for part in (2, 4, 8):
        for key in ("max_length", "max_completion_length", "max_prompt_length"):
            if values.get(key) and values[key] // part >= 128:
                yield {key: values[key] // part}


def written(values: dict[str, Any]) -> str:
    """Keys and values as in a YAML file, but for what is unset."""
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in values.items()}
    return ", ".join(f"`{key}: {text}`" for key, text in texts.items() if text is not None)
