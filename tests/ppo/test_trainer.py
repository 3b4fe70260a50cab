"""PPOTrainer against the optimum in closed form and formulas in plain Python, and what must not change."""

import copy
import math
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace

from rlhf_recipes.config.ppo import LOSSES
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.training.ppo.data import PretrainingText
from support import ROOT
from support.small_ppo import (
    EOS,
    PROMPTS,
    Remembering,
    answers_of,
    copies,
    count_words,
    in_4_bits,
    logged,
    lora,
    make_args,
    make_family,
    make_model,
    make_tokenizer,
    make_trainer,
    moved,
    plain_logps,
    plain_roles,
    plain_values,
    prompts,
    rows_of,
    save_base,
    save_reward,
    with_adapter,
)

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast

SHARED, ADAPTER, MODEL = {"critic": "shared"}, {"critic": "adapter"}, {"critic": "model"}


# --- The optimum -----------------------------------------------------------------------------------------


@pytest.fixture
def closed_form(monkeypatch):
    """`benchmarks/closed_form.py` at a small size: two prompts, and few words."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = import_module("closed_form")
    monkeypatch.setattr(bench, "PROMPTS", 2)
    monkeypatch.setattr(bench, "WORDS", {1: 8, 2: 4})
    return bench


@pytest.mark.parametrize(
    ("length", "adapted", "options"),
    [
        (1, False, MODEL | {"learning_rate": 3e-3}),
        (2, False, SHARED | {"learning_rate": 3e-3}),
        (2, True, SHARED | {"learning_rate": 1e-2}),
        (2, True, ADAPTER | {"learning_rate": 1e-2}),
    ],
    ids=["model", "shared", "lora-shared", "lora-adapter"],
)
def test_ppo_finds_the_optimum_in_closed_form(closed_form, length, adapted, options):
    task = closed_form.make_task(0, length)
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if adapted else None
    result = closed_form.train(task, 0, length, steps=60, peft=peft, per_device_train_batch_size=128, **options)
    assert result.best - result.start > 0.5  # nats and scores are of size 1: there is a gap to close
    assert result.closed >= 0.99, f"{100 * result.closed:.2f}% of the gap between start and optimum are closed"
    assert result.closed <= 1 + 1e-6, "better than the optimum: one of the two is computed wrongly"
    assert result.distance < 0.05 < result.distance_at_start


# --- The same numbers as the formulas --------------------------------------------------------------------


def score_of(ids, penalty):
    """Return the score of `count_words`, less the penalty for a missing EOS."""
    return sum(ids) / 20 - len(ids) / 3 - (penalty or 0) * (ids[-1] != EOS)


def kl_of(logps, ref_logps, estimator):
    if estimator == "k1":
        return [new - ref for new, ref in zip(logps, ref_logps, strict=True)]
    return [math.exp(ref - new) - 1 - (ref - new) for new, ref in zip(logps, ref_logps, strict=True)]


def whitened(rows, shift_mean):
    """Scale the numbers of all rows to variance 1, and mean 0 or the old mean."""
    numbers = [number for row in rows for number in row]
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    offset = 0 if shift_mean else mean
    return [[(number - mean) / math.sqrt(variance + 1e-8) + offset for number in row] for row in rows]


def advantages_of(rewards, values, gamma, lam):
    advantages, following = [0.0] * len(rewards), 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        following = rewards[t] + gamma * next_value - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages


WHOLE = {"learning_rate": 1e-3, "missing_eos_penalty": 0.5}
RUNS = {
    "k1, lora, shared": (True, SHARED | {"kl_estimator": "k1", "missing_eos_penalty": 1.5}),
    "k3, lora, adapter": (
        True,
        ADAPTER | {"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9, "lam": 0.8, "gradient_accumulation_steps": 2},
    ),
    "k3, whole, shared": (
        False,
        SHARED | WHOLE | {"kl_estimator": "k3", "gradient_accumulation_steps": 2, "cliprange_value": None},
    ),
    "k1, whole, model": (False, MODEL | WHOLE | {"whiten_rewards": True, "whiten_advantages": False}),
    # the policy takes one step from each batch: TRL does not compute old log-probabilities then
    "one pass": (True, SHARED | {"num_iterations": 1, "gradient_accumulation_steps": 2}),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """A run of three iterations on answers of all lengths, and a copy of the policy before it."""
    adapted, options = RUNS[request.param]
    untouched = with_adapter(make_model()) if adapted else make_model()
    arguments = {
        "steps_per_generation": 2,
        "kl_coef": 0.3,
        "max_grad_norm": 1e9,
        "epsilon": 0.05,
        "cliprange_value": 0.1,
        "value_learning_rate": 0.05,
        "learning_rate": 0.005,
        **options,
    }
    steps = 2 // arguments.get("gradient_accumulation_steps", 1) * arguments.get("num_iterations", 2)  # of an iteration
    trainer = make_trainer(
        tmp_path_factory.mktemp("run"),
        copy.deepcopy(untouched),
        kind=Remembering,
        init={"rollout_func": answers_of()},
        max_steps=3 * steps,
        **arguments,
    )
    trainer.train()
    assert len(trainer.batches) == 3
    return trainer, untouched


@torch.no_grad()
def expected_rollout(trainer, untouched, place):
    """Return log-probabilities, values, advantages and returns of each row, in lists."""
    args, batch = trainer.args, trainer.batches[place]
    policy, critic, head = plain_roles(trainer, untouched, trainer.at_rollout[place])
    reference = untouched.eval()
    rows = list(rows_of(batch))
    logps = [plain_logps(policy, *row).tolist() for row in rows]
    values = [plain_values(critic, head, *row).tolist() for row in rows]
    rewards = []
    for row, own in zip(rows, logps, strict=True):
        kl = kl_of(own, plain_logps(reference, *row).tolist(), args.kl_estimator)
        rewards.append([-args.kl_coef * nats for nats in kl])
        rewards[-1][-1] += score_of(row[1], args.missing_eos_penalty)
    if args.whiten_rewards:
        rewards = whitened(rewards, shift_mean=False)
    advantages = [advantages_of(*pair, args.gamma, args.lam) for pair in zip(rewards, values, strict=True)]
    returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
    if args.whiten_advantages:
        advantages = whitened(advantages, shift_mean=True)
    return {"old_per_token_logps": logps, "old_values": values, "advantages": advantages, "returns": returns}


def test_rollout_has_the_numbers_of_the_formulas(run):
    trainer, untouched = run
    for place, batch in enumerate(trainer.batches):
        expected = expected_rollout(trainer, untouched, place)
        lengths = sorted(len(row) for row in expected["returns"])
        assert lengths == [1, 1, 2, 2, 3, 4, 6, 6]
        for name, rows in expected.items():
            for row, numbers in enumerate(rows):
                found = batch[name][row]
                assert found[: len(numbers)].tolist() == pytest.approx(numbers, abs=1e-5), f"batch {place}, {name}, row {row}"
                if name in ("advantages", "returns"):
                    assert not found[len(numbers) :].any(), f"{name} of padding"
    # the answers are not the policy's own, so the estimate may be negative, but the penalty was not all zeros
    assert abs(logged(trainer, "kl")[-1]) > 0.1


def test_another_advantage_estimator_is_one_method(tmp_path):
    class MonteCarlo(Remembering):
        """Advantages and returns are the reward still to come; the critic is no baseline."""

        def compute_advantages(self, rewards, values, mask):
            to_come = rewards.flip(1).cumsum(1).flip(1) * mask
            return to_come, to_come

    options = {"init": {"rollout_func": answers_of()}, "whiten_advantages": False, "kl_coef": 0.0, "critic": "shared"}
    trainer = make_trainer(tmp_path, with_adapter(make_model()), kind=MonteCarlo, **options)
    trainer.train()
    batch = trainer.batches[0]
    for row, (_, ids) in enumerate(rows_of(batch)):
        expected = [pytest.approx(score_of(ids, None), abs=1e-5)] * len(ids)
        assert batch["advantages"][row, : len(ids)].tolist() == batch["returns"][row, : len(ids)].tolist() == expected


def plain_losses(trainer, untouched, place):
    """Return sums over the tokens of a micro-batch: losses of policy and critic, KL from the policy that sampled.

    And policy, critic, head, and the number of tokens with a clipped ratio.
    """
    args, inputs = trainer.args, trainer.inputs[place]
    policy, critic, head = plain_roles(trainer, untouched, trainer.at_update[place])
    policy_loss, value_loss, kl, clipped = 0.0, 0.0, 0.0, 0
    for row, (prompt, completion) in enumerate(rows_of(inputs)):
        logps = plain_logps(policy, prompt, completion)
        values = plain_values(critic, head, prompt, completion)
        for t in range(len(completion)):
            advantage, old = inputs["advantages"][row, t], inputs["old_per_token_logps"][row, t]
            ratio = (logps[t] - old).exp()
            kl += (ratio - 1 - (logps[t] - old)).item()
            limited = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
            policy_loss = policy_loss - torch.minimum(ratio * advantage, limited * advantage)
            clipped += bool(limited * advantage < ratio * advantage)
            old_value, target = inputs["old_values"][row, t], inputs["returns"][row, t]
            error = (values[t] - target) ** 2
            if args.cliprange_value is not None:
                near = values[t].clamp(old_value - args.cliprange_value, old_value + args.cliprange_value)
                error = torch.maximum(error, (near - target) ** 2)
            value_loss = value_loss + 0.5 * error
    return policy_loss, value_loss, kl, policy, critic, head, clipped


def test_every_update_has_the_losses_and_gradients_of_the_formulas(run):
    trainer, untouched = run
    args = trainer.args
    window, clipped = args.gradient_accumulation_steps, 0
    assert len(trainer.gradients) == len(trainer.critic_gradients) == args.max_steps
    for step in range(len(trainer.gradients)):
        policy_gradient, critic_gradient, shown, kls, count = {}, {}, [], 0.0, 0
        for place in range(step * window, (step + 1) * window):
            inputs = trainer.inputs[place]
            # the mean over the tokens of an optimizer step, if the batch has as many in each of its parts
            tokens = inputs["num_items_in_batch"].item() * window / args.steps_per_generation
            assert tokens == 25 * window / 2
            policy_loss, value_loss, kl, policy, critic, head, more = plain_losses(trainer, untouched, place)
            clipped, kls, count = clipped + more, kls + kl, count + inputs["completion_mask"].sum().item()
            assert trainer.losses[place] == pytest.approx(policy_loss.item() / tokens, abs=1e-5)
            shown.append(value_loss.item() / inputs["completion_mask"].sum().item())
            (policy_loss / tokens).backward()
            add(policy_gradient, gradients(policy))
            _, value_loss, _, _, critic, head, _ = plain_losses(trainer, untouched, place)  # `shared`: the policy is its trunk
            (args.vf_coef * value_loss / tokens).backward()
            own = {f"head.{name}": weight for name, weight in gradients(head).items()}
            if args.critic != "shared":
                own |= {name.replace(".default.", ".critic."): weight for name, weight in gradients(critic).items()}
            add(critic_gradient, own)
        found = trainer.gradients[step]
        assert found.keys() <= policy_gradient.keys()
        for gradient, plain in ((found, policy_gradient), (trainer.critic_gradients[step], critic_gradient)):
            for name, value in gradient.items():
                torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-4)
        assert trainer.state.log_history[step]["value/loss"] == pytest.approx(sum(shown) / window, abs=1e-5)
        assert trainer.state.log_history[step]["approx_kl"] == pytest.approx(kls / count, abs=1e-5)
    if args.num_iterations > 1:
        assert clipped > 5, "the clipping was hardly tried"


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def add(total, more):
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


# --- What is trained, and what is not ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reward_folder(base, tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("reward") / "reward", base)


def state_of(model):
    """Copy all weights and buffers, with the scales of quantised weights."""
    return copies(model.state_dict())


def in_adapter(names, adapter):
    return {name for name in names if f".{adapter}." in name}


@pytest.mark.parametrize("bits", ["fp32", "4bit"])
@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_frozen_roles_on_one_base_do_not_move_by_one_bit(base, reward_folder, tmp_path, critic, bits):
    model = with_adapter(in_4_bits(base) if bits == "4bit" else AutoModelForCausalLM.from_pretrained(base))
    first = state_of(model)
    rewards = [str(reward_folder), count_words]
    trainer = make_trainer(tmp_path, model, rewards, critic=critic, max_steps=4, eval_strategy="steps", eval_steps=2,
                           init={"eval_dataset": prompts(2)})  # fmt: skip
    before, head = state_of(model), copies(trainer.critic.trainable())
    (reward,) = [r.reward for r in trainer.reward_funcs if hasattr(r, "reward") and hasattr(r.reward, "head")]
    reward_head = reward.head.weight.clone()
    assert set(model.peft_config) == {"default", "reference", "reward", *(["critic"] if critic == "adapter" else [])}
    assert all(torch.equal(before[name], weight) for name, weight in first.items()), "making the trainer changed the model"
    trainer.train()
    changed = moved(before, state_of(model))
    assert torch.equal(reward.head.weight, reward_head)
    trained = in_adapter(before, "default") | in_adapter(before, "critic")
    assert changed <= trained, f"frozen, and moved: {sorted(changed - trained)[:3]}"
    assert changed == trained, f"to be trained, and did not move: {sorted(trained - changed)[:3]}"
    assert moved(head, copies(trainer.critic.trainable())) == head.keys()
    for name, weight in in_pairs(before, "default", "reference"):
        assert torch.equal(before[name], before[weight]), "the reference is not a copy of the policy"


def in_pairs(names, one, other):
    return [(name, name.replace(f".{one}.", f".{other}.")) for name in in_adapter(names, one)]


@pytest.mark.parametrize("critic", ["shared", "model"])
def test_full_training_leaves_reference_and_reward_unchanged(base, tmp_path, critic):
    judge = classifier()
    before, reference = copies(judge.state_dict()), state_of(make_model())
    trainer = make_trainer(
        tmp_path, make_model(), [judge], critic=critic, max_steps=4, init={"reward_processing_classes": [make_tokenizer()]}
    )
    value = copies(trainer.critic.trainable())
    trainer.train()
    assert not moved(before, copies(judge.state_dict()))
    assert not moved(reference, state_of(trainer.ref_model)), "the reference moved"
    policy = moved(reference, state_of(trainer.model))
    assert {name for name in policy if name.startswith("lm_head") or "_proj" in name} == {
        name for name in reference if name.startswith("lm_head") or "_proj" in name
    }
    unused = {name for name in value if name.startswith("embed_tokens")}  # rows of words that nobody said stay
    assert moved(value, copies(trainer.critic.trainable())) | unused == value.keys()
    assert (critic == "model") == any(name.startswith("layers") for name in value)


def classifier(fill=None):
    torch.manual_seed(4)
    model = LlamaForSequenceClassification(copy.deepcopy(make_model().config))
    model.config.num_labels = 1
    model.score = torch.nn.Linear(32, 1, bias=False)
    if fill is not None:
        model.score.weight.data.fill_(fill)
    return model


def test_base_of_a_fresh_adapter_is_the_reference(tmp_path):
    model, plain = make_model(), make_model()
    trainer = make_trainer(tmp_path, model, peft=lora(), kind=Remembering, max_steps=4, init={"rollout_func": answers_of()})
    trainer.train()
    assert not moved(state_of(plain), {n.replace("base_layer.", ""): w for n, w in state_of(model).items() if "lora" not in n})
    second = trainer.batches[1]
    reference = [plain_logps(plain, *row).sum().item() for row in rows_of(second)]
    policy = (second["old_per_token_logps"] * second["completion_mask"]).sum(1)
    assert logged(trainer, "kl")[-1] == pytest.approx(policy.mean().item() - sum(reference) / 4, abs=1e-4)


# --- Gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapted", "bits", "critic"),
    [(True, "fp32", "shared"), (True, "fp32", "adapter"), (True, "4bit", "adapter"), (False, "fp32", "model"),
     (False, "fp32", "shared")],
)  # fmt: skip
def test_gradient_checkpointing_changes_no_gradient(base, tmp_path, adapted, bits, critic):
    runs = []
    for checkpointing in (False, True):
        model = in_4_bits(base) if bits == "4bit" else AutoModelForCausalLM.from_pretrained(base)
        trainer = make_trainer(
            tmp_path,
            with_adapter(model) if adapted else model,
            kind=Remembering,
            critic=critic,
            gradient_checkpointing=checkpointing,
            learning_rate=1e-3,
            value_learning_rate=1e-2,
            max_steps=3,
            init={"rollout_func": answers_of()},
        )
        trainer.train()
        runs.append(trainer)
        assert trainer.model.is_gradient_checkpointing == checkpointing
        if critic == "model":
            assert trainer.critic.model.is_gradient_checkpointing == checkpointing
    plain, checkpointed = runs
    for step in range(3):
        for name in ("gradients", "critic_gradients"):
            one, other = getattr(plain, name)[step], getattr(checkpointed, name)[step]
            assert one.keys() == other.keys()
            # the head predicts 0 at first, and lets no gradient through
            assert max(gradient.abs().max() for gradient in one.values()) > 1e-3
            for key in one:
                torch.testing.assert_close(other[key], one[key], atol=1e-6, rtol=1e-4)
    assert plain.gradients[0], "the policy has no gradient"
    if critic != "shared":
        assert any("lora_A" in name or "_proj" in name for name in plain.critic_gradients[0])


# --- The start of a run, and of each iteration ------------------------------------------------------------


@pytest.mark.parametrize("model", [make_model, lambda: with_adapter(make_model())], ids=["whole", "adapter"])
@pytest.mark.parametrize("critic", ["shared", None])
def test_kl_is_0_at_the_start_and_the_ratio_1_in_every_iteration(tmp_path, model, critic):
    """With sampled answers, at a temperature, and in passes without gradients of another size than the updates."""
    model = model()
    critic = critic or ("adapter" if hasattr(model, "peft_config") else "model")
    trainer = make_trainer(
        tmp_path, model, kind=Remembering, critic=critic, max_steps=6, temperature=0.7, local_rollout_forward_batch_size=3
    )
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "approx_kl")[::2] == [pytest.approx(0, abs=1e-8)] * 3
    assert logged(trainer, "clip_ratio/region_mean")[::2] == [0] * 3
    assert min(logged(trainer, "approx_kl")[1::2]) > 1e-5


@pytest.mark.parametrize("types", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "bf16 base"])
@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_rounding_to_bf16_does_not_stop_the_run(tmp_path, types, critic):
    model = make_model().to(types.get("dtype", torch.float32))
    options = {"critic": critic, "max_steps": 4, "bf16": types.get("bf16", False)}
    trainer = make_trainer(tmp_path, with_adapter(model), **options)
    trainer.train()
    assert {w.dtype for w in trainer.critic.trainable().values()} == {torch.float32}
    assert logged(trainer, "approx_kl")[0] < 1e-3


@pytest.mark.parametrize(
    ("kl_coef", "message"), [(0.05, "step 0: policy and reference differ by "), (0.0, "step 0: the ratio of PPO is not 1")]
)
def test_dropout_stops_the_run(tmp_path, kl_coef, message):
    """Without a reference, the ratio shows it."""
    model = with_adapter(make_model(), lora_dropout=0.5)
    with pytest.raises(RecipeError, match=f"{message}.*dropout"):
        make_trainer(tmp_path, model, disable_dropout=False, kl_coef=kl_coef).train()


@pytest.mark.parametrize("rates", [{}, {"attention_dropout": 0.5}], ids=["lora", "configuration"])
def test_dropout_is_off_by_default(tmp_path, rates):
    make_trainer(tmp_path, with_adapter(make_model(**rates), lora_dropout=0.5), max_steps=4).train()


def test_reference_that_differs_from_the_policy_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path, with_adapter(make_model()), kl_estimator="k3")
    for name, weight in trainer.model.named_parameters():
        if "lora_B.reference" in name:
            weight.data.add_(5e-3)
    with pytest.raises(RecipeError, match=r"step 0: policy and reference differ by 0\.0"):
        trainer.train()


def test_policy_changed_between_rollout_and_update_stops_the_run(tmp_path):
    class Meddling(Remembering):
        def _compute_loss(self, model, inputs):
            if self.state.global_step == 2:
                for name, weight in self.model.named_parameters():
                    if "lora_B.default" in name:
                        weight.data.add_(0.05)
            return super()._compute_loss(model, inputs)

    with pytest.raises(RecipeError, match="step 2: the ratio of PPO is not 1"):
        make_trainer(tmp_path, with_adapter(make_model()), kind=Meddling, max_steps=4).train()


# --- Schedules --------------------------------------------------------------------------------------------


class Snapshots(TrainerCallback):
    """The weights before training and after each optimizer step."""

    def __init__(self):
        self.policy, self.critic = [], []

    def take(self, trainer):
        named = dict(trainer.model.named_parameters())
        self.policy.append(copies({name: weight for name, weight in named.items() if weight.requires_grad}))
        self.critic.append(copies(trainer.critic.trainable()))

    def follow(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        self.take(trainer)
        trainer.train()
        return [bool(moved(*pair)) for pair in pairwise(self.policy)], [bool(moved(*pair)) for pair in pairwise(self.critic)]

    def on_step_end(self, args, state, control, **kwargs):
        self.take(self.trainer)


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_policy_does_not_change_during_value_warmup(tmp_path, critic):
    runs = {}
    for warmup in (0, 4):
        model = make_model() if critic == "model" else with_adapter(make_model())
        options = {"critic": critic, "value_warmup_steps": warmup, "max_steps": 6, "weight_decay": 0.1, "max_grad_norm": 1e9}
        runs[warmup] = make_trainer(tmp_path, model, kind=Remembering, init={"rollout_func": answers_of()}, **options)
        policy, value = Snapshots().follow(runs[warmup])
        assert policy == [False] * warmup + [True] * (6 - warmup)
        assert value == [True] * 6
    # the critic learns the same in its warm-up, though it reads the policy's states in another way
    for name, gradient in runs[0].critic_gradients[0].items():
        torch.testing.assert_close(runs[4].critic_gradients[0][name], gradient, atol=1e-6, rtol=1e-5)
    assert logged(runs[4], "kl")[:2] == [pytest.approx(0, abs=1e-5)] * 2  # the policy is still the reference
    assert logged(runs[4], "kl")[2] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_target_kl_ends_the_iteration(tmp_path, critic):
    """The KL is 0 before the first step of an iteration and above the target after it: the second step is the last."""
    model = with_adapter(make_model())
    options = {"critic": critic, "target_kl": 1e-7, "num_iterations": 4, "max_steps": 8, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, model, **options)
    policy, value = Snapshots().follow(trainer)
    assert policy == [True, True, False, False] * 2
    assert value == [True, True, False, False] * 2
    assert logged(trainer, "early_stopped") == [0, 1, 1, 1] * 2


def test_kl_coef_adapts_to_kl_target(tmp_path):
    target, horizon = 0.05, 40
    options = {"kl_target": target, "kl_horizon": horizon, "kl_coef": 0.2, "max_steps": 8, "kl_estimator": "k3"}
    trainer = make_trainer(tmp_path, with_adapter(make_model()), kind=Remembering, **options)
    trainer.train()
    kl, used = logged(trainer, "kl"), logged(trainer, "kl_coef")
    expected = [0.2]
    for nats in kl:
        expected.append(expected[-1] * (1 + min(max(nats / target - 1, -0.2), 0.2) * 4 / horizon))
    assert len(kl) == 4
    assert kl[-1] > target
    assert used == pytest.approx(expected[:-1])
    assert used[1] < used[0], "no KL at first, so the coefficient falls"
    assert trainer.kl.coefficient == pytest.approx(expected[-1])


def test_scores_are_scaled_by_running_moments_and_clipped(tmp_path):
    """With gamma and lambda 1 and no KL, the return of every token is the score of its completion."""
    options = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 1.0, "missing_eos_penalty": 0.7}
    options |= {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0, "max_steps": 6, "critic": "shared"}
    trainer = make_trainer(tmp_path, kind=Remembering, init={"rollout_func": answers_of()}, **options)
    trainer.train()
    seen, clipped = [], 0
    for batch in trainer.batches:
        raw = [score_of(ids, 0.7) for _, ids in rows_of(batch)]
        seen += raw
        mean = sum(seen) / len(seen)
        std = math.sqrt(sum((score - mean) ** 2 for score in seen) / (len(seen) - 1))
        for row, score in enumerate(raw):
            scaled = (score - mean) / std
            clipped += abs(scaled) > 1
            count = int(batch["completion_mask"][row].sum())
            assert batch["returns"][row, :count].tolist() == pytest.approx([min(max(scaled, -1), 1)] * count, abs=1e-5)
    assert 0 < clipped < len(seen)


@pytest.mark.parametrize("size", [1, 4])
def test_score_scaling_of_equal_scores(tmp_path, size):
    options = {"use_score_scaling": True, "per_device_train_batch_size": size, "max_steps": 2, "kl_coef": 0.0, "lam": 0.9}
    trainer = make_trainer(tmp_path, reward=lambda prompts, **columns: [-1.0] * len(prompts), kind=Remembering, **options)
    trainer.train()
    assert trainer.batches[0]["returns"].abs().max() == pytest.approx(1)


def test_weight_decay_of_the_critic(tmp_path):
    """Without a gradient nothing else moves them."""
    for decay in (0.0, 0.1):
        trainer = make_trainer(tmp_path, vf_coef=0.0, weight_decay=decay, value_learning_rate=0.5, max_steps=1)
        trainer.critic.head.weight.data.fill_(2.0)
        trainer.critic.head.bias.data.fill_(3.0)
        trainer.train()
        assert trainer.critic.head.weight.unique().item() == pytest.approx(2.0 * (1 - 0.5 * decay))
        assert trainer.critic.head.bias.item() == 3.0


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1, "num_train_epochs": 1},
        {"max_steps": -1, "num_train_epochs": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_run_of_nothing_but_value_warmup_is_refused(tmp_path, options):
    trainer = make_trainer(tmp_path, with_adapter(make_model()), value_warmup_steps=4, **options)
    with pytest.raises(RecipeError, match="value_warmup_steps: 4: "):
        trainer.train()
    assert trainer.state.global_step == 0


def test_unchanged_policy_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"4 steps have not changed .*`learning_rate` \(0\)"):
        make_trainer(tmp_path, with_adapter(make_model()), learning_rate=0.0, value_learning_rate=0.1, max_steps=4).train()


# --- Padding ----------------------------------------------------------------------------------------------


def gpt2():
    """A model with absolute positions, which must be counted from the first token of a padded prompt."""
    return make_family("gpt2")


def opt():
    """A model that goes around its backbone's `forward`, with narrow states below the LM head."""
    return make_family("opt")


class Around(LlamaForCausalLM):
    """A model that calls its backbone past the hooks, as code that comes with models may."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, position_ids=None, **options):
        outputs = self.model.forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=True)
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


def around():
    model = make_model()
    model.__class__ = Around
    return model


@pytest.mark.parametrize(("make", "critic"), [(make_model, "shared"), (gpt2, "shared"), (gpt2, "adapter"), (gpt2, "model")])
def test_numbers_of_a_row_do_not_depend_on_its_batch(tmp_path, make, critic):
    untouched = make()
    peft = {} if critic == "model" else {"peft": lora(init_lora_weights=True)}
    batches = []
    for options in (
        {"local_rollout_forward_batch_size": 1},
        {"local_rollout_forward_batch_size": 3, "pad_to_multiple_of": 16},
        {"per_device_train_batch_size": 2, "steps_per_generation": 4},
    ):
        options = {"per_device_train_batch_size": 8, "critic": critic, "shuffle_dataset": False, **options}
        init = {"rollout_func": answers_of()}
        trainer = make_trainer(tmp_path, make(), kind=Remembering, max_steps=1, init=init, **peft, **options)
        trainer.critic.head.weight.data = torch.linspace(-1, 1, 32)[None]
        trainer.train()
        batches.append(trainer.batches[0])
        assert len(trainer.gradients) == 1
    _, trunk, head = plain_roles(trainer, with_fresh_adapter(untouched, peft), trainer.at_rollout[0])
    with torch.no_grad():
        for row, (prompt, completion) in enumerate(rows_of(batches[0])):
            logps = plain_logps(untouched, prompt, completion)
            values = plain_values(trunk, head, prompt, completion)
            for batch in batches:
                torch.testing.assert_close(batch["old_per_token_logps"][row, : len(completion)], logps, atol=1e-5, rtol=0)
                torch.testing.assert_close(batch["old_values"][row, : len(completion)], values, atol=1e-5, rtol=0)
                assert not batch["old_per_token_logps"][row, len(completion) :].any()


def ending_soon(model):
    """Make EOS likely."""
    head = torch.nn.Linear(model.lm_head.in_features, 32, bias=True)
    head.weight = model.lm_head.weight
    head.bias = torch.nn.Parameter(2.5 * torch.eye(32)[EOS], requires_grad=False)
    model.lm_head = head
    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_model, {"critic": "shared"}),
        (gpt2, {"critic": "shared", "steps_per_generation": 2, "pad_to_multiple_of": 16}),
        (make_model, {"critic": "adapter", "steps_per_generation": 2}),
        (gpt2, {"critic": "shared", "num_generations": 2}),
        (opt, {"critic": "shared"}),
        (around, {"critic": "shared", "steps_per_generation": 2}),
        (opt, {"critic": "adapter"}),
    ],
)
def test_recorded_logps_and_values_are_those_of_another_pass(tmp_path, make, options):
    """For answers of all lengths, at a temperature other than 1."""
    batches = {}
    for recorded in (None, False):
        untouched = with_adapter(ending_soon(make()))
        options = {"temperature": 0.8, "max_steps": 3, "learning_rate": 3e-3, **options}
        options |= {"per_device_train_batch_size": 8 // options.get("steps_per_generation", 1), "num_iterations": 2}
        trainer = make_trainer(tmp_path, copy.deepcopy(untouched), kind=Remembering, sampler_logps=recorded, **options)
        trainer.train()
        batches[recorded] = trainer.batches
    lengths = {len(completion) for batch in batches[None] for _, completion in rows_of(batch)}
    assert {1, 8} < lengths, "answers should end at once, late, and in between"
    assert len(batches[None]) == len(batches[False]) == 2 - (options.get("steps_per_generation", 1) - 1)
    for batch, again in zip(batches[None], batches[False], strict=True):
        mask = batch["completion_mask"].bool()
        assert torch.equal(batch["completion_ids"], again["completion_ids"])
        for name in ("old_per_token_logps", "old_values"):
            torch.testing.assert_close(batch[name][mask], again[name][mask], atol=1e-5, rtol=1e-5)
    first = batches[None][0]
    for row, (prompt, completion) in enumerate(rows_of(first)):
        with torch.no_grad():
            logits = untouched(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.8
        logps = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(first["old_per_token_logps"][row, : len(completion)], logps, atol=1e-5, rtol=0)


def with_fresh_adapter(model, peft):
    return get_peft_model(copy.deepcopy(model), peft["peft"]) if peft else model


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_gradients_do_not_depend_on_padding(tmp_path, critic):
    gradients = []
    for options in ({}, {"pad_to_multiple_of": 16}):
        trainer = make_trainer(
            tmp_path, gpt2(), peft=lora(), kind=Remembering, critic=critic, max_steps=2, max_grad_norm=1e9, learning_rate=1e-3,
            init={"rollout_func": answers_of()}, **options,
        )  # fmt: skip
        trainer.train()
        gradients.append([*trainer.gradients, *trainer.critic_gradients])
    for one, other in zip(*gradients, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=1e-4)


def test_critic_model_has_no_dropout(tmp_path):
    """TRL's PPO had none in any of its models."""
    trainer = make_trainer(tmp_path, gpt2(), critic="model")
    assert {module.p for module in trainer.critic.model.modules() if isinstance(module, torch.nn.Dropout)} == {0}


def test_tokens_of_the_environment_are_skipped(tmp_path):
    """In a rollout of several turns, `env_mask` is 0 on them."""
    said = [[7, 8, 9, 10, EOS], [11, 12, 13, EOS, 14]]
    masks = [[1, 1, 0, 0, 1], [1, 1, 1, 1, 0]]
    table = {prompt: place % 2 for place, prompt in enumerate(PROMPTS)}

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        own = [table[prompt] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [said[place] for place in own], "logprobs": None,
                "env_mask": [masks[place] for place in own]}  # fmt: skip

    options = {"kl_coef": 0.2, "max_steps": 4, "gamma": 0.9, "lam": 0.8, "whiten_advantages": False, "critic": "shared"}
    untouched = with_adapter(make_model())
    trainer = make_trainer(
        tmp_path, copy.deepcopy(untouched), kind=Remembering, init={"rollout_func": rollout}, learning_rate=5e-3, **options
    )
    trainer.train()
    batch = trainer.batches[1]
    policy, critic, head = plain_roles(trainer, untouched, trainer.at_rollout[1])
    for row, (prompt, completion) in enumerate(rows_of(batch)):
        own = [place for place, kept in enumerate(masks[said.index(completion)]) if kept]
        with torch.no_grad():
            logps = plain_logps(policy, prompt, completion)[own].tolist()
            ref_logps = plain_logps(untouched, prompt, completion)[own].tolist()
            values = plain_values(critic, head, prompt, completion)[own].tolist()
        rewards = [-0.2 * nats for nats in kl_of(logps, ref_logps, "k1")]
        rewards[-1] += score_of(completion, 0)
        expected = advantages_of(rewards, values, 0.9, 0.8)
        assert batch["advantages"][row, own].tolist() == pytest.approx(expected, abs=1e-5)
        others = [place for place in range(5) if place not in own]
        assert not batch["advantages"][row, others].any()


# --- Rewards that do not apply ----------------------------------------------------------------------------


def test_unscored_completion_is_left_out_of_everything(tmp_path):
    def some(prompts, completion_ids, **columns):
        return [None if prompt == PROMPTS[2] else score_of(ids, 0) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    options = {"whiten_rewards": True, "per_device_train_batch_size": 8, "max_grad_norm": 1e9, "max_steps": 2, "kl_coef": 0.3}
    options |= {"shuffle_dataset": False, "critic": "shared", "kl_target": 1.0, "use_score_scaling": True}
    init = {"rollout_func": answers_of()}
    with_it = make_trainer(tmp_path, with_adapter(make_model()), some, Remembering, init=init, **options)
    with_it.train()
    without = make_trainer(
        tmp_path, with_adapter(make_model()), some, Remembering,
        data=prompts().select([0, 1, 3, 4, 5, 6, 7]), init=init, **options | {"per_device_train_batch_size": 7},
    )  # fmt: skip
    without.train()
    assert not with_it.batches[0]["advantages"][2].any()
    rows = [0, 1, 3, 4, 5, 6, 7]
    for name in ("advantages", "returns"):
        torch.testing.assert_close(with_it.batches[0][name][rows], without.batches[0][name], atol=1e-6, rtol=0)
    for name in ("gradients", "critic_gradients"):
        for key, gradient in getattr(without, name)[0].items():
            torch.testing.assert_close(getattr(with_it, name)[0][key], gradient, atol=1e-6, rtol=1e-4, msg=f"{name} {key}")
    for key in ("score", "kl", "kl_coef", "value/mean", "loss"):
        assert logged(with_it, key) == pytest.approx(logged(without, key), abs=1e-6), key
    assert with_it.kl.coefficient == pytest.approx(without.kl.coefficient)
    assert with_it.score_scaling.moments.count == 7


@pytest.mark.parametrize("loss_type", LOSSES)
def test_unscored_batch_teaches_nothing(tmp_path, loss_type, caplog):
    calls = []

    def second_time(prompts, **columns):
        calls.append(len(prompts))
        return [None if len(calls) == 1 else float(row) for row in range(len(prompts))]

    trainer = make_trainer(tmp_path, with_adapter(make_model()), second_time, max_steps=4, loss_type=loss_type)
    policy, value = Snapshots().follow(trainer)
    assert policy == value == [False, False, True, True]
    assert "step 0: every reward returned None for all 4 completions" in caplog.text
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


# --- Pretraining text -------------------------------------------------------------------------------------

TEXTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13 w14", "w15 w16 w17 w18 w19 w20 w21", "w22", "w23 w24 w25 w26 <eos>"]


def plain_text_loss(model, ids, mask, temperature=1.0):
    """Return the mean over the tokens of a micro-batch, row by row."""
    losses = []
    for row, kept in zip(ids, mask, strict=True):
        tokens = row[kept.bool()].tolist()
        losses += [-logp for logp in plain_logps(model, tokens[:1], tokens[1:])] if len(tokens) > 1 else []
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("adapted", "options"),
    [
        (True, {}),
        (True, {"temperature": 0.6, "critic": "adapter"}),
        (False, {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "per_device_train_batch_size": 2}),
        (True, {"gradient_checkpointing": True, "ptx_max_length": 4}),
    ],
)
def test_gradient_of_pretraining_text_is_that_of_the_plain_loss(tmp_path, adapted, options):
    make = (lambda: with_adapter(make_model())) if adapted else make_model
    data, runs = Dataset.from_dict({"text": TEXTS}), []
    for extra in ({}, {"ptx_coef": 0.7, "ptx_batch_size": 3}):
        options = {"max_steps": 1, "max_grad_norm": 1e9, **options}
        init = {"rollout_func": answers_of(), "ptx_dataset": data}
        runs.append(make_trainer(tmp_path, make(), kind=Remembering, init=init, **options, **extra))
        runs[-1].train()
    without, with_text = runs
    plain, window = make(), with_text.args.gradient_accumulation_steps
    batches = [
        PretrainingText(data, make_tokenizer(), with_text.args).batch(step, with_text.accelerator) for step in range(window)
    ]
    loss = sum(plain_text_loss(plain, *batch) for batch in batches) / window
    (0.7 * loss).backward()
    assert logged(with_text, "ptx_loss") == [pytest.approx(loss.item(), abs=1e-5)]
    for name, gradient in gradients(plain).items():
        expected = without.gradients[0][name] + gradient
        torch.testing.assert_close(with_text.gradients[0][name], expected, atol=1e-5, rtol=1e-4)
    for name, gradient in without.critic_gradients[0].items():
        torch.testing.assert_close(with_text.critic_gradients[0][name], gradient, atol=1e-6, rtol=1e-5)


def test_order_of_pretraining_text(tmp_path):
    """Each text once an epoch, with one EOS, cut, and the same in a resumed run and with two processes."""
    args = make_args(tmp_path, ptx_coef=1.0, ptx_batch_size=2, ptx_max_length=5, seed=3)
    data, tokenizer = Dataset.from_dict({"text": TEXTS}), make_tokenizer()

    def rows(texts, step, index=0, count=1):
        ids, mask = texts.batch(step, SimpleNamespace(process_index=index, num_processes=count))
        return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]

    texts = PretrainingText(data, tokenizer, args)
    order = [row for step in range(12) for row in rows(texts, step)]
    whole = [[*tokenizer(text)["input_ids"], EOS][:5] for text in TEXTS]
    whole[-1] = tokenizer(TEXTS[-1])["input_ids"]  # ended by EOS already
    laps = [order[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(lap) == sorted(whole) for lap in laps)
    assert len({str(lap) for lap in laps}) > 1, "every lap has the same order"
    resumed = PretrainingText(data, tokenizer, args)
    assert [row for step in range(7, 12) for row in rows(resumed, step)] == order[14:]
    pair = [row for step in range(6) for index in range(2) for row in rows(texts, step, index, 2)]
    assert pair == order, "two processes read other texts than one with twice the batch"


@pytest.mark.parametrize("data", [None, Dataset.from_dict({"text": []}), Dataset.from_dict({"prompt": ["w5"]})])
def test_ptx_coef_needs_pretraining_text(tmp_path, data):
    with pytest.raises(RecipeError, match=r"ptx_coef: .*`ptx_dataset`"):
        make_trainer(tmp_path, ptx_coef=0.5, init={"ptx_dataset": data})
