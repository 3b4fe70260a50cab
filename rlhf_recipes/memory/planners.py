"""The memory plan of each stage: what stays in memory, and what its phases add."""

from collections.abc import Mapping

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory.estimator import Estimator, Phase
from rlhf_recipes.memory.gpu_arguments import StageArguments
from rlhf_recipes.memory.plan import ACTIVATIONS, ADAPTERS, BATCH, LOGITS, MODELS, Plan
from rlhf_recipes.models.lm_head import MOST_LOGITS, TOKENS_AT_ONCE
from rlhf_recipes.rewards.reward_funcs import reward_paths
from rlhf_recipes.stages import STAGES

_ROLLOUT_BYTES = 80  # a token of a rollout: ids and masks of 8 bytes, five columns of fp32, and their copies


def has_planner(recipe: str) -> bool:
    """Return whether a recipe can be planned."""
    return recipe in STAGES and STAGES[recipe].planner is not None


def plan_stage(arguments: StageArguments) -> Plan:
    """Return the memory plan of a stage.

    Raises:
        RecipeError: for a recipe or model that cannot be planned, or a length without a bound.
    """
    if not has_planner(arguments.recipe):
        known = ", ".join(filter(has_planner, STAGES))
        raise RecipeError(f"{arguments.stage}: no memory plan for recipes/{arguments.recipe}.py, only for {known}")
    return STAGES[arguments.recipe].memory_planner()(Estimator(arguments))


def plan_sft(run: Estimator) -> Plan:
    """Return the plan of supervised fine-tuning."""
    values, length = run.arguments, run.length("max_length")
    trainable, width = run.trainable()
    resident = {**run.base_weights(), **run.training_state(trainable, width), ADAPTERS: 4.0 * run.adapter_parameters}
    rows = values.per_device_train_batch_size
    phases = run.update(rows, length, rows * length, trainable)
    if run.evaluates:
        rows = values.per_device_eval_batch_size
        phases["evaluation"] = run.forward(rows, length, rows * length)
    return run.plan(resident, phases, {"policy": run.adapter_parameters})


def plan_reward(run: Estimator) -> Plan:
    """Return the plan of training a reward model."""
    values, length, hidden = run.arguments, run.length("max_length"), run.shape.hidden
    adapter = run.adapter_parameters
    trainable, width = run.trainable(head=False, heads=hidden)
    members = values.ensemble_size if run.adapter else 1
    resident = {**run.base_weights(head=False), **run.training_state(trainable, width), ADAPTERS: 4.0 * adapter}
    answers = (values.get("dataset_arguments") or {}).get("k", 2)
    if values.train_on == "rankings" and answers == 2:
        run.note("The plan assumes rankings of two answers. With K answers the activations are K / 2 times as large")
    rows = values.per_device_train_batch_size * (answers if values.train_on == "rankings" else 2)
    phases = run.update(rows, length, 0, trainable, head=False)
    phases["update"][ACTIVATIONS] += rows * length * hidden * 4.0  # the scalar head reads all tokens, in fp32
    rows = values.per_device_eval_batch_size
    if run.evaluates:
        phases["evaluation"] = run.forward(rows * answers, length)
    phases["scaling"] = run.forward(rows, length, autocast=False)
    if run.adapter:
        phases["scaling"][ADAPTERS] = (members - 1) * adapter * 4.0
    role = "reward models" if members > 1 else "reward model"
    return run.plan(resident, phases, {role: members * adapter + members * hidden})


def plan_dpo(run: Estimator) -> Plan:
    """Return the plan of DPO."""
    values, length = run.arguments, run.length("max_length")
    adapter = run.adapter_parameters
    trainable, width = run.trainable()
    resident = {**run.base_weights(), **run.training_state(trainable, width)}
    roles = {"policy": adapter}
    needs_reference = not values.get("precompute_ref_log_probs")
    if run.adapter:
        roles["reference"] = adapter if needs_reference and values.get("start_from") else 0
        resident[ADAPTERS] = (adapter + roles["reference"]) * 4.0
    elif needs_reference:
        roles["reference"] = run.shape.parameters()
        resident[MODELS] = float(run.shape.parameters() * run.precision.weights)
    rows = 2 * values.per_device_train_batch_size
    phases = run.update(rows, length, rows * length, trainable)
    if needs_reference:
        kept = phases["update, LM head"][ACTIVATIONS]
        reference = run.forward(rows, length, rows * length)
        phases["reference"] = {**reference, ACTIVATIONS: reference[ACTIVATIONS] + kept}
    if run.evaluates:
        rows = 2 * values.per_device_eval_batch_size
        phases["evaluation"] = run.forward(rows, length, rows * length)
    return run.plan(resident, phases, roles)


def plan_ppo(run: Estimator) -> Plan:
    """Return the plan of PPO."""
    values = run.arguments
    prompt, completion = run.length("max_prompt_length"), run.length("max_completion_length")
    resident, roles, trainable = _ppo_roles(run)
    rows, length = values.per_device_train_batch_size, prompt + completion
    batch = {BATCH: float(completions_per_iteration(values) * length * _ROLLOUT_BYTES)}
    pass_rows = values.get("local_rollout_forward_batch_size") or rows
    phases = _ppo_sampling(run, completions_per_iteration(values), prompt, completion)
    phases["log-probabilities"] = {**run.forward(pass_rows, length, pass_rows * completion), **batch}
    if roles.get("reward models"):
        phases["rewards"] = {**run.forward(pass_rows, length, autocast=False), **batch}
    update = run.update(rows, length, rows * completion, trainable)
    critic_states = rows * completion * run.shape.hidden * 4.0  # the value head keeps the completion's states in fp32
    if values.critic == "shared":
        for phase in update.values():
            phase[ACTIVATIONS] += critic_states
    else:
        critic = run.update(rows, length, 0, trainable, head=False)["update"]
        update["update, critic"] = {**critic, ACTIVATIONS: critic[ACTIVATIONS] + critic_states}
    if values.get("ptx_coef"):
        texts, tokens = values.get("ptx_batch_size") or rows, values.ptx_max_length
        extra = run.update(texts, tokens, texts * tokens, trainable)
        update |= {name.replace("update", "pretraining text"): phase for name, phase in extra.items()}
    phases |= {name: {**phase, **batch} for name, phase in update.items()}
    if run.evaluates:
        rows = values.per_device_eval_batch_size
        for name, phase in _ppo_sampling(run, rows, prompt, completion).items():
            phases[f"evaluation, {name}"] = phase
        pass_rows = values.get("local_rollout_forward_batch_size") or rows
        phases["evaluation, passes"] = run.forward(pass_rows, length, pass_rows * completion)
    return run.plan(resident, phases, roles)


def _ppo_roles(run: Estimator) -> tuple[Phase, dict[str, int], int]:
    """Return the resident memory, the weights of each role, and the trainable weights."""
    values, shape, width = run.arguments, run.shape, run.precision.weights
    trainable, trainable_width = run.trainable()
    resident = {**run.base_weights(), MODELS: 0.0}
    policy = run.adapter_parameters
    roles = {"policy": policy, "reference": 0, "reward models": 0, "critic": shape.hidden + 1}
    if values.kl_coef > 0 and not run.adapter:
        roles["reference"] = shape.parameters()
        resident[MODELS] += float(shape.parameters() * width)
    elif values.kl_coef > 0 and values.get("start_from"):
        roles["reference"] = policy
    adapters, full_models = run.reward_models(reward_paths(values.get("reward_funcs") or []))
    roles["reward models"] = sum(adapters) + full_models
    resident[MODELS] += full_models * float(width)
    critic = shape.hidden  # of the adapters' kind: in fp32
    if values.critic == "adapter":  # a copy of the first reward adapter
        roles["critic"] += adapters[0] if adapters else policy
        critic = roles["critic"]
    elif values.critic == "model":
        roles["critic"] += shape.parameters(head=False)
        resident[MODELS] += float(shape.parameters(head=False) * width)
    resident[ADAPTERS] = 4.0 * (policy + critic + sum(adapters) + (roles["reference"] if run.adapter else 0))
    return {**resident, **run.training_state(trainable + roles["critic"], trainable_width)}, roles, trainable


def _ppo_sampling(run: Estimator, rows: int, prompt: int, completion: int) -> dict[str, Phase]:
    """Return the phases of PPO's rollout; none if another sampler plans its own."""
    values, precision = run.arguments, run.precision
    if values.get("use_vllm") and values.get("vllm_mode", "colocate") != "colocate":
        run.note("vLLM runs in its own process. If that is on this card, add what it takes")
    elif values.get("use_vllm"):
        run.vllm_share = float(values.get("vllm_gpu_memory_utilization", 0.3))
        share = f"`vllm_gpu_memory_utilization: {run.vllm_share:g}`"
        run.note(f"vLLM takes {share} of the card. Whether the stage fits is judged by the rest")
    elif values.get("use_transformers_continuous_batching"):
        run.note("The plan leaves out continuous batching, which takes a share of the free memory (`max_memory_percent`)")
    else:
        exact = precision.weights == 4 and precision.compute == 4 and precision.bits is None
        recorded = exact if values.get("sampler_logps") is None else bool(values.sampler_logps)
        return run.sampling(rollout_batch_size(values, rows), prompt, completion, recorded)
    return {}


def rollout_batch_size(arguments: StageArguments, completions: int) -> int:
    """Return how many of the completions PPO samples at once."""
    return min(arguments.get("rollout_batch_size") or completions, completions)


def completions_per_iteration(arguments: StageArguments) -> int:
    """Return how many completions PPO samples in an iteration, on one GPU."""
    if arguments.get("generation_batch_size"):
        return arguments.generation_batch_size
    return arguments.per_device_train_batch_size * (
        arguments.get("steps_per_generation") or arguments.gradient_accumulation_steps
    )


def plan_evaluate(run: Estimator) -> Plan:
    """Return the plan of evaluation, or of sampling answers."""
    values, width = run.arguments, run.precision.weights
    prompt, completion = run.length("max_prompt_length"), run.length("max_completion_length")
    folders = [policy.get("path") if isinstance(policy, Mapping) else policy for policy in values.policies.values()]
    adapters = [run.adapter_in(folder) for folder in dict.fromkeys(filter(None, folders))]
    run.frozen_parts = frozenset().union(*(adapter.parts for adapter in adapters))
    policies = sum(adapter.parameters for adapter in adapters)
    rewards, full_models = run.reward_models(reward_paths(values.get("rewards") or []))
    resident = {**run.base_weights(), ADAPTERS: 4.0 * (policies + sum(rewards)), MODELS: full_models * float(width)}
    rows, length = values.batch_size, prompt + completion
    phases = run.sampling(rows, prompt, completion)
    if values.recipe == "evaluate":
        phases["log-probabilities"] = {
            ACTIVATIONS: rows * length * run.shape.hidden * 2.0 * width,
            LOGITS: _scored_logits(run, rows, completion),
        }
        phases["answers read"] = run.forward(rows, length, autocast=False)
        if values.get("ptx_dataset"):
            phases["pretraining text"] = {LOGITS: _scored_logits(run, rows, values.ptx_max_length)}
    if rewards or full_models:
        phases["rewards"] = run.forward(rows, length, autocast=False)
    return run.plan(resident, phases, {"policies": policies, "reward models": sum(rewards) + full_models})


def _scored_logits(run: Estimator, rows: int, tokens: int) -> float:
    """Return the bytes of logits in `token_log_probs`: of some rows, and in fp32."""
    vocabulary = run.shape.vocabulary
    logits = min(rows * tokens * vocabulary, max(MOST_LOGITS, tokens * vocabulary))
    # of a part: its fp32 copy, divided by the temperature, and its log-probabilities
    return logits * run.precision.weights + TOKENS_AT_ONCE * vocabulary * 3 * 4.0
