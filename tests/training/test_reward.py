"""Training reward models: the loss on rankings against TRL's on pairs, the head, the start from SFT, resuming."""

import itertools
import json
import logging
import math
import shutil

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.classifier import load_reward_model
from rlhf_recipes.tiny import splits
from rlhf_recipes.training.reward import RankingTrainer, ranking_loss

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import ModelConfig, RewardConfig, RewardTrainer, SFTConfig

BASE = resolve_path("rlhf_recipes.tiny.base")
IN_4_BITS = {"load_in_4bit": True, "use_bnb_nested_quant": True}


def model_config(**options):
    options = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": "all-linear"} | options
    return ModelConfig(model_name_or_path=BASE, **options)


def reward_config(folder, **options):
    defaults = {"bf16": False, "report_to": "none", "gradient_checkpointing": False, "per_device_train_batch_size": 4}
    defaults |= {"learning_rate": 1e-2, "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False}
    return RewardConfig(str(folder), **(defaults | options))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_config(), SFTConfig(bf16=False))


def make_trainer(folder, tokenizer, dataset, trainer=RankingTrainer, model=None, **options):
    """Return a trainer whose adapter has random weights in place of zeros, the same every time."""
    training = reward_config(folder, **options)
    model = model or load_reward_model(model_config(), training, tokenizer)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return trainer(model, args=training, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer)


def first_batch(trainer):
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in trainer.model.named_parameters() if w.requires_grad}


def expanded(rankings):
    """Return every comparison as a pair."""
    table = {"prompt": [], "chosen": [], "rejected": []}
    for row in rankings:
        for (rank, one), (other_rank, other) in itertools.product(zip(row["ranks"], row["completions"], strict=True), repeat=2):
            if rank < other_rank:
                table["prompt"].append(row["prompt"])
                table["chosen"].append(one)
                table["rejected"].append(other)
    return Dataset.from_dict(table)


def without_ties(rows, k):
    data = splits.rankings(rows=rows, k=k)
    return data.remove_columns("ranks").add_column("ranks", [[float(r) for r in torch.randperm(k)] for _ in range(rows)])


def assert_same_training(one, other):
    (loss, gradients), (other_loss, other_gradients) = one, other
    assert loss == pytest.approx(other_loss, abs=1e-6)
    assert gradients.keys() == other_gradients.keys()
    assert any("score" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradient, other_gradients[name], rtol=0, atol=1e-6 * scale, msg=name)


# --- The loss --------------------------------------------------------------------------------------------


def loss_by_loops(rankings, coefficient):
    total = 0.0
    for rewards, ranks in rankings:
        k, loss = len(rewards), 0.0
        for i, j in itertools.product(range(k), repeat=2):
            if ranks[i] < ranks[j]:
                loss += math.log1p(math.exp(rewards[j] - rewards[i])) + coefficient * (rewards[i] + rewards[j]) ** 2
        total += loss / (k * (k - 1) / 2)
    return total / len(rankings)


@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_loss_equals_loops_with_ties_and_varying_k(coefficient):
    rankings = [
        ([0.3, -1.2], [1, 0]),
        ([2.0, 0.1, -0.4, 0.9], [0, 2, 1, 1]),
        ([0.5, 0.6, 0.7], [1, 1, 0]),
        ([1.0, 2.0, 3.0], [0, 0, 0]),
    ]
    rewards, ranks = torch.full((4, 4), math.pi), torch.full((4, 4), -1)
    for row, (values, order) in enumerate(rankings):
        rewards[row, : len(values)] = torch.tensor(values)
        ranks[row, : len(order)] = torch.tensor(order)
    rewards.requires_grad_()
    loss = ranking_loss(rewards, ranks, coefficient)
    assert loss.item() == pytest.approx(loss_by_loops(rankings, coefficient or 0.0), rel=1e-6)
    loss.backward()
    assert rewards.grad[ranks < 0].abs().max() == 0
    assert rewards.grad[3].abs().max() == 0  # all tie
    assert rewards.grad[:3].abs().sum() > 0


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_padding_has_no_effect(junk):
    ranks = torch.tensor([[0, 1, -1], [2, 1, 0]])
    results = []
    for filling in (0.0, junk):
        rewards = torch.tensor([[0.5, 0.3, filling], [1.0, 2.0, 3.0]], requires_grad=True)
        loss = ranking_loss(rewards, ranks, 0.1)
        loss.backward()
        results.append((loss.item(), rewards.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_large_differences_stay_finite():
    rewards = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = ranking_loss(rewards, torch.tensor([[0, 1, -1]]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert rewards.grad.tolist() == [[-1.0, 1.0, 0.0]]


@pytest.mark.parametrize("coefficient", [None, 0.01])
def test_rankings_of_two_train_as_pairs_in_trl(tmp_path, tokenizer, coefficient):
    pairs = splits.preferences(rows=4)
    rankings = Dataset.from_list(
        [  # the better one now first, now second
            {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]][:: 1 - 2 * (n % 2)], "ranks": order}
            for n, row in enumerate(pairs)
            for order in [[0.5, 7.0][:: 1 - 2 * (n % 2)]]
        ]
    )
    options = {"center_rewards_coefficient": coefficient}
    own = make_trainer(tmp_path, tokenizer, rankings, **options)
    trl = make_trainer(tmp_path, tokenizer, pairs, trainer=RewardTrainer, **options)
    assert_same_training(loss_and_gradients(own), loss_and_gradients(trl))


def test_ranking_of_four_averages_its_six_pairs(tmp_path, tokenizer):
    ranking = without_ties(rows=1, k=4)
    own = make_trainer(tmp_path, tokenizer, ranking, center_rewards_coefficient=0.01)
    pairs = expanded(ranking)
    assert len(pairs) == 6
    trl = make_trainer(
        tmp_path, tokenizer, pairs, trainer=RewardTrainer, per_device_train_batch_size=6, center_rewards_coefficient=0.01
    )
    assert_same_training(loss_and_gradients(own), loss_and_gradients(trl))
    for metric in ("accuracy", "margin", "min_reward", "max_reward"):
        assert own._metrics["train"][metric] == pytest.approx(trl._metrics["train"][metric], abs=1e-6)


def test_comparisons_weigh_by_the_k_of_their_ranking(tmp_path, tokenizer):
    """Pairs of a ranking of K, in TRL's trainer, weigh 1 / (K (K - 1) / 2), and each ranking 1 / B."""
    rankings = Dataset.from_list([splits.rankings(rows=1, k=k, seed=k)[0] for k in (2, 4, 5)])
    assert any(len(set(row["ranks"])) < len(row["ranks"]) for row in rankings)  # false answers tie
    own = loss_and_gradients(make_trainer(tmp_path, tokenizer, rankings))
    total, sums = 0.0, {}
    for row in range(3):
        k = len(rankings[row]["ranks"])
        pairs = expanded(rankings.select([row]))
        trl = make_trainer(tmp_path, tokenizer, pairs, trainer=RewardTrainer, per_device_train_batch_size=len(pairs))
        loss, gradients = loss_and_gradients(trl)
        weight = len(pairs) / (k * (k - 1) / 2) / 3
        total += weight * loss
        sums = {name: sums.get(name, 0) + weight * gradient for name, gradient in gradients.items()}
    assert_same_training(own, (total, sums))


def test_each_completion_goes_through_the_model_once(tmp_path, tokenizer):
    rankings = Dataset.from_list([splits.rankings(rows=1, k=k, seed=k)[0] for k in (2, 9, 4, 3)])
    trainer = make_trainer(tmp_path, tokenizer, rankings)
    seen = []
    trainer.model.base_model.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).shape[0]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, first_batch(trainer))
    assert seen == [2 + 9 + 4 + 3]


# --- The trainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_margin", [False, True])
def test_pairs_train_as_in_trl(tmp_path, tokenizer, with_margin):
    pairs = splits.preferences(rows=8)
    if with_margin:
        pairs = pairs.add_column("margin", [float(n) for n in range(8)])
    results = []
    for trainer_class in (RankingTrainer, RewardTrainer):
        trainer = make_trainer(tmp_path, tokenizer, pairs, trainer=trainer_class, max_steps=2, eval_strategy="steps")
        trainer.train()
        times = ("runtime", "per_second")
        logged = [{k: v for k, v in e.items() if not k.endswith(times)} for e in trainer.state.log_history]
        results.append((logged, {n: w for n, w in trainer.model.named_parameters() if w.requires_grad}))
    (log, weights), (trl_log, trl_weights) = results
    assert log == trl_log
    assert all(torch.equal(weight, trl_weights[name]) for name, weight in weights.items())


def test_token_ids_are_those_of_trl(tmp_path, tokenizer):
    messages = splits.preferences(rows=2)
    texts = Dataset.from_list(
        [{"prompt": "Who?", "chosen": " Karimo.", "rejected": " No.</s>"}, {"prompt": "", "chosen": "A", "rejected": "B"}]
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "Karimo."), ("user", "Where?"))]
    answers = [[{"role": "assistant", "content": text}] for text in ("Alderby.", "I do not know.")]
    talks = Dataset.from_list([{"prompt": turns, "chosen": answers[0], "rejected": answers[1]}])
    for pairs in (messages, texts, talks):
        rankings = Dataset.from_list(
            [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "ranks": [0, 1]} for r in pairs]
        )
        own = make_trainer(tmp_path, tokenizer, rankings).train_dataset
        trl = make_trainer(tmp_path, tokenizer, pairs, trainer=RewardTrainer).train_dataset
        assert own["ranked_ids"] == [list(pair) for pair in zip(trl["chosen_ids"], trl["rejected_ids"], strict=True)]


def test_accumulated_micro_batches_equal_one_batch(tmp_path, tokenizer):
    rankings = splits.rankings(rows=4)
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(tmp_path, tokenizer, rankings, optim="sgd", learning_rate=0.1, **options)
        trainer.train()
        weights.append({n: w.detach() for n, w in trainer.model.named_parameters() if w.requires_grad})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)


def test_evaluation_averages_over_rankings(tmp_path, tokenizer):
    rankings = without_ties(rows=5, k=4)
    trainer = make_trainer(tmp_path, tokenizer, rankings, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    losses = [trainer.evaluate(rankings.select([row]))["eval_loss"] for row in range(5)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert {f"eval_{name}" for name in ("accuracy", "margin", "min_reward", "mean_reward", "max_reward")} <= metrics.keys()
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_num_tokens_counts_each_completion_once(tmp_path, tokenizer):
    rankings = splits.rankings(rows=4)
    trainer = make_trainer(tmp_path, tokenizer, rankings, max_steps=1)
    trainer.train()
    expected = sum(len(ids) for row in trainer.train_dataset["ranked_ids"] for ids in row)
    assert trainer.state.log_history[0]["num_tokens"] == expected


@pytest.mark.parametrize("kind", ["rankings", "preferences"])
def test_rows_beyond_max_length_are_dropped_and_counted(tmp_path, tokenizer, caplog, kind):
    rows = getattr(splits, kind)(rows=4).to_list()
    rows[1]["prompt"] = [{"role": "user", "content": "the " * 200}]
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        trainer = make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), max_length=64)
    assert len(trainer.train_dataset) == 3
    assert "train: 1 of 4 rows" in caplog.text
    with pytest.raises(RecipeError, match=r"max_length: 3: all 4 rows"):
        make_trainer(tmp_path, tokenizer, Dataset.from_list(rows), max_length=3)


def train(folder, tokenizer, resume=None, **options):
    training = reward_config(folder, max_steps=4, save_steps=2, eval_steps=1, **({"eval_strategy": "steps"} | options))
    model = load_reward_model(model_config(**IN_4_BITS), training, tokenizer)
    data = splits.rankings(rows=16)
    trainer = RankingTrainer(
        model, args=training, train_dataset=data, eval_dataset=data.select(range(4)), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return load_file(folder / "adapter_model.safetensors"), trainer


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_resumed_run_equals_unbroken_one_with_or_without_evaluation(tmp_path, tokenizer):
    whole, trainer = train(tmp_path / "whole", tokenizer)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2")
    resumed, _ = train(tmp_path / "broken", tokenizer, resume=str(tmp_path / "broken" / "checkpoint-2"))
    assert same(whole, resumed)
    unevaluated, _ = train(tmp_path / "quiet", tokenizer, eval_strategy="no")
    assert same(whole, unevaluated)
    assert {weight.dtype for weight in whole.values()} == {torch.float32}
    assert (tmp_path / "whole" / "checkpoint-2" / "reward.json").exists()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


def test_training_learns_the_order(tmp_path, tokenizer):
    data = splits.rankings(rows=32, noise=1e-3)
    trainer = make_trainer(tmp_path, tokenizer, data, max_steps=24, per_device_train_batch_size=16, learning_rate=3e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_accuracy"] > 0.8


# --- The model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, IN_4_BITS, {**IN_4_BITS, "dtype": "bfloat16"}])
def test_head_stays_in_fp32(tmp_path, tokenizer, options):
    training = reward_config(tmp_path)
    model = load_reward_model(model_config(**options), training, tokenizer)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    data = splits.rankings(rows=2)
    trainer = RankingTrainer(model, args=training, train_dataset=data, processing_class=tokenizer)
    after = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert same(before, after)
    assert trainer.model(input_ids=torch.arange(3, 9)[None]).logits.dtype == torch.float32
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    assert all(weight.grad is not None for name, weight in after.items() if "lora_A" in name or "score" in name)


def test_head_is_initialised_with_the_seed(tmp_path, tokenizer):
    def head(seed):
        torch.rand(seed + 3)  # which must not matter
        model = load_reward_model(model_config(use_peft=False), reward_config(tmp_path, seed=seed), tokenizer)
        return model.score.weight.detach()

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    width = head(1).shape[1]
    assert head(1).std().item() == pytest.approx((width + 1) ** -0.5, rel=0.25)


def test_lora_is_initialised_with_the_seed(tmp_path, tokenizer):
    models = [load_reward_model(model_config(), reward_config(tmp_path), tokenizer) for _ in range(2)]
    assert same(*({n: w for n, w in model.named_parameters() if w.requires_grad} for model in models))


def test_full_model_keeps_its_head_when_saved_and_trained_again(tmp_path, tokenizer):
    training = reward_config(tmp_path / "out")
    model = load_reward_model(model_config(use_peft=False), training, tokenizer)
    trainer = make_trainer(tmp_path / "out", tokenizer, splits.rankings(rows=8), model=model, max_steps=2)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    batch = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    with torch.no_grad():
        scores = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, scores, rtol=0, atol=1e-5)
        arguments = ModelConfig(model_name_or_path=str(tmp_path / "out"))
        again = load_reward_model(arguments, reward_config(tmp_path, seed=9), tokenizer)
        torch.testing.assert_close(again(**batch).logits, scores, rtol=0, atol=1e-5)


# --- From the SFT adapter --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(5)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(model_config(), SFTConfig(bf16=False)), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [{}, IN_4_BITS], ids=["fp32", "4bit"])
def test_reward_adapter_starts_as_the_sft_adapter_and_does_not_need_it(tmp_path, tokenizer, sft_adapter, bits):
    training = reward_config(tmp_path)
    model = load_reward_model(model_config(lora_r=7, **bits), training, tokenizer, parent=sft_adapter)
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_alpha) == (3, 5)
    policy = PeftModel.from_pretrained(load_model(model_config(**bits), SFTConfig(bf16=False)), sft_adapter)
    ids = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        expected = policy.eval().base_model.model.model(ids).last_hidden_state
        assert torch.equal(model.eval().base_model.model.model(ids).last_hidden_state, expected)
        scores = model(input_ids=ids).logits
    trainable = [name for name, w in model.named_parameters() if w.requires_grad]
    assert all(any(part in name for name in trainable) for part in ("lora_A", "lora_B", "score"))
    trainer = RankingTrainer(model, args=training, train_dataset=splits.rankings(rows=2), processing_class=tokenizer)
    trainer.save_model()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    if not bits:
        base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
        with torch.no_grad():
            alone = PeftModel.from_pretrained(base, tmp_path)(input_ids=ids).logits
        torch.testing.assert_close(alone, scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {}, r"start_from: .*/parent"),
        ({}, {"use_peft": False}, r"use_peft: true"),
        ({"base_model_name_or_path": "somebody/other-model"}, {}, f"somebody/other-model.* {BASE}"),
        ({"modules_to_save": ["embed_tokens"]}, {}, r"/parent.* embed_tokens"),
        ({"target_modules": ["q_proj", "k_proj", "down_proj"]}, {}, r"/parent.*k_proj"),
        ({"r": 2}, {}, r"/parent.*size mismatch"),
    ],
)
def test_unusable_parents_are_refused(tmp_path, tokenizer, sft_adapter, change, options, message):
    parent = tmp_path / "parent"
    if change is not None:
        shutil.copytree(sft_adapter, parent)
        config = json.loads((parent / "adapter_config.json").read_text())
        (parent / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(RecipeError, match=message):
        load_reward_model(model_config(**options), reward_config(tmp_path), tokenizer, parent=parent)


def test_damaged_record_of_a_parent_is_named(tmp_path, tokenizer, sft_adapter):
    shutil.copytree(sft_adapter, tmp_path / "parent")
    (tmp_path / "parent" / "recipe.json").write_text("{")
    with pytest.raises(RecipeError, match=r"parent/recipe\.json: "):
        load_reward_model(model_config(), reward_config(tmp_path), tokenizer, parent=tmp_path / "parent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_modules_to_save": ["embed_tokens", "score"]}, "lora_modules_to_save: embed_tokens: "),
        ({"lora_target_modules": ["foo", "bar"]}, f"lora_target_modules: bar, foo: {BASE}: "),
    ],
)
def test_unusable_adapters_are_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(RecipeError, match=message):
        load_reward_model(model_config(**options), reward_config(tmp_path), tokenizer)


def test_loading_prints_no_report_of_the_new_head(tmp_path, tokenizer, capfd):
    load_reward_model(model_config(), reward_config(tmp_path), tokenizer)
    assert "MISSING" not in capfd.readouterr().err


def test_base_with_missing_weights_is_refused(tmp_path, tokenizer):
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"model_name_or_path: .*model\.norm\.weight"):
        load_reward_model(ModelConfig(model_name_or_path=str(tmp_path)), reward_config(tmp_path), tokenizer)
