"""The interface of PPOTrainer: inputs, arguments, errors, and what it saves."""

import asyncio
import contextlib
import json
import math
import shutil
from pathlib import Path

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.rewards.reward_funcs import SavedReward
from rlhf_recipes.rewards.reward_json import write_ensemble_record
from rlhf_recipes.rewards.reward_models import Ensemble
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter
from rlhf_recipes.training.ppo.diagnostics import check_ratio
from support.small_ppo import (
    ANSWERS,
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
    prompts,
    rows_of,
    save_base,
    save_reward,
    with_adapter,
)
from support.tolerance import assert_close

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)
from trl import GRPOTrainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def rewards(base, tmp_path_factory):
    """Folders of two reward adapters, the first of them normalised."""
    folder = tmp_path_factory.mktemp("rewards")
    return [save_reward(folder / f"reward-{seed}", base, seed, normalised=seed == 0) for seed in (0, 1)]


@pytest.fixture
def sft(base):
    """An SFT policy on the base in the folder, as `recipes/ppo.py` loads it."""
    return with_adapter(AutoModelForCausalLM.from_pretrained(base))


def finite(trainer):
    """Whether all logged values and weights are finite."""
    entries = [value for entry in trainer.state.log_history for value in entry.values() if isinstance(value, float)]
    return all(map(math.isfinite, entries)) and all(weight.isfinite().all() for weight in trainer.model.parameters())


# --- Models -----------------------------------------------------------------------------------------------


def test_model_by_folder(base, tmp_path):
    args = make_args(tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    trainer = PPOTrainer(str(base), count_words, args, train_dataset=prompts())
    assert isinstance(trainer, GRPOTrainer)
    assert trainer.processing_class.get_vocab() == make_tokenizer().get_vocab()
    assert trainer.model.config._attn_implementation == "eager"
    trainer.train()
    assert not moved(copies(make_model().state_dict()), copies(trainer.ref_model.state_dict()))


def test_model_by_folder_with_fresh_adapter_in_4_bits(base, tmp_path):
    config = in_4_bits(base).config.quantization_config
    trainer = PPOTrainer(str(base), count_words, make_args(tmp_path), prompts(), quantization_config=config, peft_config=lora())
    trainer.train()
    assert trainer.model.is_loaded_in_4bit
    assert trainer.ref_model is None
    assert {w.dtype for w in trainer.model.parameters() if w.requires_grad} == {torch.float32}
    assert_close(logged(trainer, "kl")[0], 0, torch.float32)


def renamed_policy():
    model = with_adapter(make_model())
    model.add_adapter("other", lora())
    model.set_adapter("other")
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: with_adapter(make_model()), {"peft": lora()}, "peft_config: "),
        (renamed_policy, {}, r"model: active adapters \['other'\].*'default'"),
        (
            lambda: with_adapter(make_model()).requires_grad_(False),
            {},
            "model: the adapter is frozen.*is_trainable=True",
        ),
        (make_model, {"critic": "adapter"}, "critic: adapter: .*`use_peft: true`"),
        (lambda: with_adapter(make_model()), {"critic": "model"}, "critic: model: "),
        (make_model, {"data": prompts(0)}, "train_dataset: no prompts"),
        (lambda: make_family("granitemoe"), {}, "router_aux_loss_coef: .*set it to 0"),
    ],
)
def test_unsuitable_model_or_data_is_refused(tmp_path, make, options, message):
    with pytest.raises(RecipeError, match=message):
        make_trainer(tmp_path, make(), **options)


# --- Prompts, generations, rollouts -----------------------------------------------------------------------


class OwnLoop(LlamaForCausalLM):
    """A model whose `generate` never calls `forward`."""

    def generate(self, input_ids, attention_mask, generation_config, **options):
        for _ in range(generation_config.max_new_tokens):
            logits = self.lm_head(self.model(input_ids, attention_mask=attention_mask).last_hidden_state[:, -1])
            input_ids = torch.cat([input_ids, logits.softmax(-1).multinomial(1)], dim=1)
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        return input_ids


def own_loop():
    model = make_model()
    model.__class__ = OwnLoop
    return model


def with_generation(**options):
    """Make a model whose `generation_config.json` has these options."""
    model = make_model()
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"no_repeat_ngram_size": 1}, {"guidance_scale": 9.0}, {"typical_p": 0.1}]
)
def test_generation_config_of_the_model_does_not_change_what_is_sampled(tmp_path, options):
    completions = []
    for model in (make_model(), with_generation(**options)):
        trainer = make_trainer(tmp_path, model, kind=Remembering, max_steps=2)
        trainer.train()
        completions.append(trainer.batches[0]["completion_ids"].tolist())
    assert completions[0] == completions[1]


@pytest.mark.parametrize("make", [own_loop, lambda: with_generation(prefill_chunk_size=2)])
@pytest.mark.parametrize("critic", ["shared", "model"])
def test_generation_around_forward_is_refused_with_the_option_that_helps(tmp_path, make, critic):
    with pytest.raises(RecipeError, match=r"sampler_logps: .*`sampler_logps: false`"):
        make_trainer(tmp_path, make(), critic=critic).train()
    make_trainer(tmp_path, make(), critic=critic, sampler_logps=False).train()


def test_lm_head_of_more_than_one_layer_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="step 0: model_name_or_path: TRL computes other log-probabilities"):
        make_trainer(tmp_path, make_family("modernbert-decoder"), sampler_logps=False).train()


@pytest.mark.parametrize(("critic", "checkpointing"), [("shared", True), ("adapter", False)])
def test_mixture_of_experts_balances_its_load(tmp_path, critic, checkpointing):
    model = with_adapter(make_family("qwen3_moe"))
    trainer = make_trainer(tmp_path, model, critic=critic, gradient_checkpointing=checkpointing, max_steps=4)
    trainer.train()
    assert min(logged(trainer, "aux_loss")) > 1
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)


def test_rewards_receive_conversations(sft, rewards, tmp_path):
    seen = []

    def look(prompts, completions, completion_ids, answer, **columns):
        seen.extend(zip(prompts, completions, completion_ids, answer, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    rows = [{"prompt": [{"role": "user", "content": prompt.strip()}], "answer": prompt[:2]} for prompt in PROMPTS]
    trainer = make_trainer(tmp_path, sft, [look, str(rewards[0])], Remembering, Dataset.from_list(rows), critic="adapter")
    trainer.train()
    for prompt, completion, ids, answer in seen:
        assert prompt[0]["content"].startswith(answer)
        assert completion == [{"role": "assistant", "content": make_tokenizer().decode(ids, skip_special_tokens=True)}]
    tokenizer = make_tokenizer()
    for (prompt, *_), (ids, _) in zip(seen, rows_of(trainer.batches[0]), strict=False):
        assert ids == tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert finite(trainer)


def test_num_generations_samples_each_prompt_several_times(tmp_path):
    trainer = make_trainer(tmp_path, kind=Remembering, num_generations=2, max_steps=4)
    trainer.train()
    for batch in trainer.batches:
        drawn = [tuple(prompt) for prompt, _ in rows_of(batch)]
        assert drawn[0::2] == drawn[1::2]
        assert len(set(drawn)) == 2
        whole = batch["advantages"][batch["completion_mask"].bool()]
        assert (whole.mean().item(), whole.std().item()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_epoch_answers_every_prompt_once(tmp_path):
    trainer = make_trainer(tmp_path, kind=Remembering, max_steps=-1, num_train_epochs=2, num_iterations=3)
    trainer.train()
    drawn = [tuple(prompt) for batch in trainer.batches for prompt, _ in rows_of(batch)]
    all_prompts = sorted(tuple(ids) for ids in make_tokenizer()(PROMPTS)["input_ids"])
    assert trainer.state.global_step == 2 * 2 * 3
    assert sorted(drawn[:8]) == sorted(drawn[8:]) == all_prompts
    assert drawn[:8] != drawn[8:], "both epochs have one order"


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_prompts_for_a_batch_are_repeated(tmp_path, count):
    """TRL's sampler drops what fills no batch: it would train on nothing."""
    trainer = make_trainer(tmp_path, kind=Remembering, data=prompts(count), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    expected = {tuple(ids) for ids in make_tokenizer()(PROMPTS[:count])["input_ids"]}
    assert {tuple(prompt) for batch in trainer.batches for prompt, _ in rows_of(batch)} == expected
    assert finite(trainer)


def test_streamed_prompts(tmp_path):
    data = IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in PROMPTS))
    trainer = make_trainer(tmp_path, data=data, kind=Remembering, max_steps=6)
    trainer.train()
    assert len(trainer.batches) == 3
    assert finite(trainer)


# --- Rewards ----------------------------------------------------------------------------------------------


def test_asynchronous_and_weighted_rewards(tmp_path):
    async def slowly(completion_ids, **columns):
        await asyncio.sleep(0.01)
        return [float(len(ids)) for ids in completion_ids]

    options = {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0, "reward_weights": [0.5, -2.0]}
    init = {"rollout_func": answers_of()}
    trainer = make_trainer(tmp_path, reward=[slowly, count_words], kind=Remembering, init=init, **options)
    trainer.train()
    assert {"rewards/slowly/mean", "rewards/count_words/mean"} <= trainer.state.log_history[0].keys()
    batch = trainer.batches[0]
    for row, (_, ids) in enumerate(rows_of(batch)):
        score = 0.5 * len(ids) - 2 * count_words([ids])[0]
        assert batch["returns"][row, 0].item() == pytest.approx(score, abs=1e-5)


def test_reward_adapter_in_a_folder_scores_completions(sft, rewards, base, tmp_path):
    """By a folder, its scores are those that the role gives elsewhere, and the policy is active again afterwards."""
    options = {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0}
    init = {"rollout_func": answers_of()}
    trainer = make_trainer(tmp_path, sft, str(rewards[0]), Remembering, init=init, **options)
    trainer.train()
    assert sft.active_adapters == ["default"]
    elsewhere = load_reward_adapter(AutoModelForCausalLM.from_pretrained(base), rewards[0], "any", make_tokenizer())
    check_scores(trainer.batches[0], elsewhere)


def check_scores(batch, reward):
    """With gamma and lambda 1 and no KL, the return at the first token is the score."""
    tokenizer = make_tokenizer()
    for row, (prompt, ids) in enumerate(rows_of(batch)):
        text = tokenizer.decode(prompt) + " ", tokenizer.decode(ids, skip_special_tokens=True)
        assert batch["returns"][row, 0].item() == pytest.approx(reward([text[0]], [text[1]])[0], abs=1e-5)


@pytest.mark.parametrize("combine", [None, "min", "uncertainty"])
def test_ensemble_in_a_folder_is_one_reward(sft, rewards, base, tmp_path, combine):
    folder = tmp_path / "ensemble"
    for place, reward in enumerate(rewards, start=1):
        shutil.copytree(reward, folder / f"member-{place}")
    write_ensemble_record(folder, ["member-1", "member-2"], "mean", 0.5)
    options = {"gamma": 1.0, "lam": 1.0, "kl_coef": 0.0, "critic": "adapter"}
    init = {"rollout_func": answers_of()}
    trainer = make_trainer(tmp_path, sft, SavedReward(str(folder), combine), Remembering, init=init, **options)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(base)
    members = [load_reward_adapter(model, reward, f"member-{place}", make_tokenizer()) for place, reward in enumerate(rewards)]
    check_scores(trainer.batches[0], Ensemble(members, combine or "mean", 0.5))
    assert "rewards/ensemble/mean" in trainer.state.log_history[0]


@pytest.mark.parametrize(("key", "size"), [("local_rollout_forward_batch_size", 3), ("per_device_train_batch_size", 2)])
def test_batch_size_of_reward_models(sft, rewards, tmp_path, key, size):
    trainer = make_trainer(tmp_path, sft, str(rewards[0]), **{key: size})
    assert trainer.reward_funcs[0].reward.batch_size == size


@pytest.mark.parametrize(("first", "name"), [([], str), ([count_words], SavedReward), ([count_words], Path)])
def test_tokenizer_of_a_reward_by_name_is_refused(sft, rewards, tmp_path, first, name):
    init = {"reward_processing_classes": [None] * len(first) + [make_tokenizer()]}
    with pytest.raises(RecipeError, match=r"reward_processing_classes: the reward .*reward-0.* Fix: None"):
        make_trainer(tmp_path, sft, [*first, name(str(rewards[0]))], init=init)


def test_reward_adapter_needs_a_frozen_base(rewards, tmp_path):
    with pytest.raises(RecipeError, match=r"is an adapter.*`use_peft: true`"):
        make_trainer(tmp_path, make_model(), str(rewards[0]))


# --- The start of the critic ------------------------------------------------------------------------------


def values_at_rollout(trainer):
    """Of each row of the first batch: the prompt with what was written before each token, and the value there."""
    batch = trainer.batches[0]
    for row, (prompt, completion) in enumerate(rows_of(batch)):
        for place in range(len(completion)):
            yield prompt + completion[:place], batch["old_values"][row, place].item()


def assert_values_are_scores(trainer, reward):
    """The value before a token is the score of the text up to there."""
    scores = []
    for ids, value in values_at_rollout(trainer):
        scores.append(reward.score(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).item())
        assert value == pytest.approx(scores[-1], abs=1e-5)
    assert max(scores) - min(scores) > 0.1


@pytest.mark.parametrize("which", [0, 1], ids=["normalised", "raw"])
def test_critic_adapter_starts_as_the_reward_adapter(sft, rewards, tmp_path, which):
    judges, init = [count_words, str(rewards[which])], {"rollout_func": answers_of()}
    trainer = make_trainer(tmp_path, sft, judges, Remembering, critic="adapter", init=init)
    trainer.train()
    assert_values_are_scores(trainer, trainer.reward_funcs[1].reward)


def full_reward_model(folder, **options):
    """A normalised reward model without adapters."""
    model = make_model(seed=9, **options)
    torch.manual_seed(9)
    model.save_pretrained(folder)
    judge = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    judge.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    record = {"normalisation": {"mean": 0.3, "std": 2.0, "samples": 4}}
    (folder / "reward.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("width", [32, 64])
def test_critic_model_starts_as_the_reward_model_of_any_size(tmp_path, width):
    folder = full_reward_model(tmp_path / "judge", hidden_size=width)
    init = {"rollout_func": answers_of()}
    trainer = make_trainer(tmp_path, make_model(), [str(folder)], Remembering, critic="model", init=init)
    trainer.train()
    assert trainer.critic.model is not trainer.reward_funcs[0].reward.model
    assert_values_are_scores(trainer, load_full_reward(folder, "judge", make_tokenizer()))


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_critic_without_reward_model_predicts_0_at_first(sft, tmp_path, critic):
    model = make_model() if critic == "model" else sft
    trainer = make_trainer(tmp_path, model, kind=Remembering, critic=critic)
    trainer.train()
    assert not trainer.batches[0]["old_values"].any()


# --- Evaluation -------------------------------------------------------------------------------------------


class ForkedEvaluation(Remembering):
    """Trainer with evaluations that leave the random state of training alone."""

    def evaluate(self, *arguments, **options):
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*arguments, **options)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_evaluation_leaves_training_state_unchanged(base, tmp_path, critic):
    options = {"use_score_scaling": True, "kl_target": 0.1, "kl_horizon": 50, "max_steps": 6, "critic": critic}
    options |= {"num_iterations": 4, "target_kl": 10.0}
    runs = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        model = with_adapter(AutoModelForCausalLM.from_pretrained(base))
        init = {"eval_dataset": prompts(3)}
        runs.append(make_trainer(tmp_path, model, kind=ForkedEvaluation, init=init, **options, **evaluation))
        runs[-1].train()
    without, with_it = runs
    assert not moved(copies(without.model.state_dict()), copies(with_it.model.state_dict()))
    assert not moved(copies(without.critic.trainable()), copies(with_it.critic.trainable()))
    for state in ("kl", "score_scaling"):
        assert getattr(without, state) == getattr(with_it, state)
    for key in ("loss", "kl_coef", "score", "value/loss", "approx_kl"):
        assert logged(without, key) == logged(with_it, key)
    evaluations = [entry for entry in with_it.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == list(range(7))
    keys = {"eval_score", "eval_kl", "eval_reward", "eval_entropy", "eval_value/explained_variance"}
    assert all(keys <= entry.keys() for entry in evaluations)
    assert all(math.isfinite(entry["eval_score"]) and abs(entry["eval_score"]) < 100 for entry in evaluations)


def test_evaluate_before_training(sft, tmp_path):
    trainer = make_trainer(tmp_path, sft, init={"eval_dataset": prompts(3), "rollout_func": answers_of()})
    metrics = trainer.evaluate()
    expected = sum(count_words(ANSWERS[:3])) / 3
    assert metrics["eval_score"] == pytest.approx(expected, abs=1e-5)
    assert metrics["eval_kl"] == pytest.approx(0, abs=1e-5)


# --- Errors in training -------------------------------------------------------------------------------


def fail_later(failure):
    """A reward that scores the first rollout, and fails on the second."""
    calls = []

    def judge(prompts, **columns):
        calls.append(1)
        scores = [float(row) for row in range(len(prompts))]
        return scores if len(calls) == 1 else failure(scores)

    return judge


def return_nan(scores):
    return [*scores[:2], math.nan, *scores[3:]]


def raise_error(scores):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (return_nan, r"step 2: the reward judge returned nan for completion 2 .*'w\d"),
        (raise_error, r"step 2: the reward judge failed: KeyError\('no such thing'\) \(.*test_interface\.py, line \d+\)"),
    ],
)
def test_bad_reward_function_stops_the_run_with_step_and_sample(tmp_path, failure, message):
    """`tests/rewards` has the other values that a reward function may not return."""
    trainer = make_trainer(tmp_path, reward=[count_words, fail_later(failure)], max_steps=4)
    with pytest.raises(RecipeError, match=message):
        trainer.train()
    assert trainer.state.global_step == 2


def test_reward_model_without_finite_score_stops_the_run(base, tmp_path):
    judge = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    judge.config.pad_token_id = 0
    judge.score.weight.data.fill_(math.nan)
    trainer = make_trainer(tmp_path, reward=[judge], init={"reward_processing_classes": [make_tokenizer()]})
    with pytest.raises(RecipeError, match=r"step 0: the reward .* returned nan for completion 0 .* prompt 'w"):
        trainer.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: answers["completion_ids"].pop(), "completion_ids: 3 for 4 prompts"),
        (lambda answers: answers["completion_ids"][2].clear(), r"completion_ids: no token for prompt 'w\d"),
        (lambda answers: answers["prompt_ids"][1].clear(), r"prompt_ids: no token for prompt 'w\d"),
    ],
)
def test_rollout_without_tokens_stops_the_run_with_step_and_sample(tmp_path, change, message):
    def rollout(prompts, trainer):
        answers = answers_of([[*answer] for answer in ANSWERS])(prompts, trainer)
        change(answers)
        return answers

    with pytest.raises(RecipeError, match=f"step 0: rollout_func: {message}"):
        make_trainer(tmp_path, init={"rollout_func": rollout}).train()


@pytest.mark.parametrize("answer", [[EOS], [7, 8, EOS], [7, 8, 9, 10]])
def test_identical_completions_give_finite_advantages(tmp_path, answer):
    """Whitening divides by no 0: what nothing tells apart has no advantage, until the critic tells its prompts apart."""
    init = {"rollout_func": answers_of([answer] * 8)}
    options = {"max_steps": 4, "whiten_rewards": True, "use_score_scaling": True, "missing_eos_penalty": 1.0}
    trainer = make_trainer(tmp_path, with_adapter(make_model()), init=init, kind=Remembering, critic="adapter", **options)
    trainer.train()
    assert len(answer) > 1 or not trainer.batches[0]["advantages"].any()
    for batch in trainer.batches:
        assert batch["advantages"].isfinite().all()
        assert batch["advantages"].abs().max() < 10
    assert finite(trainer)


def test_prompts_with_images_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(RecipeError, match="reads text only"):
        trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.tensor([[5, 6]]), torch.ones(1, 2), 1, pixel_values=torch.zeros(1)
        )


# --- Arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.04}, "beta: 0.04: .*`kl_coef`"),
        ({"fp16": True, "bf16": False}, "fp16: True: "),
        ({"critic": "attached"}, "critic: 'attached' .* shared, adapter, model"),
        ({"kl_estimator": "k2"}, "kl_estimator: 'k2' .* k1, k3"),
        ({"loss_type": "cispo"}, "loss_type: 'cispo' .* dapo, bnpo, grpo, dr_grpo"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation: normalize_then_sum: "),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: sequence: "),
        ({"scale_rewards": "none"}, "scale_rewards: none: .*`use_score_scaling`"),
        ({"sync_ref_model": True}, "sync_ref_model: True: "),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target: "),
        ({"use_score_norm": True}, "use_score_norm: .*`use_score_scaling: true`"),
        ({"num_generations": 3, "per_device_train_batch_size": 4}, "must be divisible by num_generations"),
        *(({name: -0.1}, f"{name}: -0.1 ") for name in ("kl_coef", "vf_coef", "ptx_coef", "lam", "score_clip")),
        *(({name: 0.0}, f"{name}: 0.0 ") for name in ("kl_target", "kl_horizon", "cliprange_value", "target_kl")),
        ({"value_learning_rate": 0.0}, "value_learning_rate: 0.0 "),
        ({"num_iterations": 0}, "num_iterations: 0 "),
        ({"kl_coef": math.nan}, "kl_coef: nan "),
        ({"steps_per_generation": 0}, "steps_per_generation: 0 "),
        *(({name: 0}, f"{name}: 0 ") for name in ("rollout_batch_size", "local_rollout_forward_batch_size", "ptx_batch_size")),
        ({"ptx_max_length": 1}, "ptx_max_length: 1 "),
        *(({"temperature": value}, f"temperature: {value} .*above 0") for value in (0.0, -1.0, math.nan, math.inf)),
        *(({name: value}, f"{name}: {value} ") for name, value in (("top_p", 0.0), ("top_k", -1), ("min_p", 2.0))),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 "),
        ({"gamma": 1.1}, "gamma: 1.1 "),
        ({"use_vllm": True, "rollout_batch_size": 4}, "rollout_batch_size: "),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(str(tmp_path), **{"bf16": False, **options})


def test_steps_of_nothing_but_value_warmup_are_refused_when_parsed(tmp_path):
    with pytest.raises(RecipeError, match="value_warmup_steps: 4: only the critic would learn in all 4 steps"):
        PPOConfig(str(tmp_path), bf16=False, max_steps=4, value_warmup_steps=4)


def test_num_generations_is_1_by_default_and_a_plain_int(tmp_path):
    args = PPOConfig(str(tmp_path), bf16=False)
    assert type(args.num_generations) is int
    assert (args.num_generations, args.beta, args.critic) == (1, 0.0, "shared")
    assert json.loads(args.to_json_string())["num_generations"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5},
        {"use_adaptive_entropy": True},
        {"loss_type": "grpo", "entropy_coef": 0.1},
        {"loss_type": "dr_grpo", "delta": 3.0},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 3, "critic": "adapter"},
        {"cache_implementation": "static"},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 1, "critic": "adapter"},
    ],
)
def test_options_of_trl_work_with_token_advantages(tmp_path, options):
    """The check that the ratio is 1 at first is on, and the policy must have changed, else the run stops."""
    trainer = make_trainer(tmp_path, with_adapter(make_model()), max_steps=4, **options)
    trainer.train()
    assert finite(trainer)
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)


# --- Saving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("bits", ["fp32", "4bit"])
def test_saved_policy_loads_with_peft(base, rewards, tmp_path, critic, bits):
    def load():
        return in_4_bits(base) if bits == "4bit" else AutoModelForCausalLM.from_pretrained(base)

    trainer = make_trainer(
        tmp_path / "run", with_adapter(load()), str(rewards[0]), critic=critic, max_steps=4, save_strategy="steps", save_steps=2
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        assert not [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("checkpoint-")]
        names = load_file(folder / "adapter_model.safetensors").keys()
        assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in names), "not the policy's adapter alone"
        assert (folder / "critic.safetensors").exists()
        policy = PeftModel.from_pretrained(load(), folder).eval()
        ids = AutoTokenizer.from_pretrained(folder)(PROMPTS[1], return_tensors="pt")
        with torch.no_grad():
            assert_close(policy(**ids).logits, trainer.model.eval()(**ids).logits, torch.float32)
    saved = load_file(tmp_path / "run" / "critic.safetensors")
    assert not moved(copies(trainer.critic.trainable()), saved)
    assert all(".critic." in name or name.startswith("head.") for name in saved)


@pytest.mark.parametrize("critic", ["shared", "model"])
def test_full_training_saves_the_model(tmp_path, critic):
    trainer = make_trainer(tmp_path, critic=critic)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not moved(copies(trainer.model.state_dict()), copies(loaded.state_dict()))
    assert not moved(copies(trainer.critic.trainable()), load_file(tmp_path / "critic.safetensors"))


def test_fp32_lm_head_in_policy_and_reference(tmp_path):
    for tied in (False, True):
        model = make_model(tie_word_embeddings=tied).to(torch.bfloat16)
        trainer = make_trainer(tmp_path, model, cast_lm_head_to_fp32=True, max_steps=4)
        trainer.train()
        assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-3)


# --- Details ------------------------------------------------------------------------------------------


def test_without_kl_coef_no_kl_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, kl_coef=0.0)
    trainer.train()
    assert logged(trainer, "approx_kl")
    assert not logged(trainer, "kl")


def test_train_twice(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    first = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(weight, first[name]) for name, weight in trainer.model.state_dict().items())
    assert finite(trainer)


def test_arguments_of_the_caller_do_not_change(base, tmp_path):
    args = make_args(tmp_path, model_init_kwargs={"dtype": "float32", "revision": "main"})
    PPOTrainer(str(base), count_words, args, train_dataset=prompts())
    assert args.model_init_kwargs == {"dtype": "float32", "revision": "main"}


def test_quantization_config_with_a_loaded_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="quantization_config: "):
        make_trainer(tmp_path, init={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})


def test_critic_follows_the_schedule_of_a_passed_optimizer(tmp_path):
    model = with_adapter(make_model())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizers = (torch.optim.AdamW(weights, lr=0.1), None)
    trainer = make_trainer(tmp_path, model, init={"optimizers": optimizers}, value_learning_rate=1e-3, learning_rate=1e-5)
    trainer.train()
    assert [group["lr"] for group in trainer.critic_optimizer.optimizer.param_groups] == [pytest.approx(1e-3)] * 2


def test_critic_does_not_start_from_an_adapter_on_another_base(base, rewards, tmp_path):
    elsewhere = load_reward_adapter(AutoModelForCausalLM.from_pretrained(base), rewards[0], "judge", make_tokenizer())
    trainer = make_trainer(tmp_path, with_adapter(make_model()), reward=elsewhere, critic="adapter")
    trainer.train()
    assert finite(trainer)


@pytest.mark.parametrize(("tokens", "stops"), [(1, False), (400, True)])
def test_ratio_check_allows_rounding_of_few_tokens(tokens, stops):
    """One token of bf16 may be off by 0.1 nats; four hundred may not be on average."""
    with pytest.raises(RecipeError, match="the ratio of PPO is not 1") if stops else contextlib.nullcontext():
        check_ratio(0.1, tokens, step=0, exact=False)


def test_checkpoint_without_ppo_state_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.train()
    with pytest.raises(RecipeError, match=r"checkpoint-2: .*critic_optimizer\.pt"):
        make_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
