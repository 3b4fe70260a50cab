"""Reward models on a base in memory: equal scores everywhere, no side effects, and refusals."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.files import REWARD, read_json, write_json
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.models.tokenizer import PLAIN_CHAT_TEMPLATE, encode, load_tokenizer
from rlhf_recipes.rewards import saved
from rlhf_recipes.rewards.classifier import load_reward_model
from rlhf_recipes.rewards.reward_funcs import load_rewards
from rlhf_recipes.rewards.reward_json import store_normalisation, write_ensemble_record
from rlhf_recipes.rewards.reward_models import Ensemble
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter, load_saved_reward
from rlhf_recipes.tiny import splits
from rlhf_recipes.training.reward import RankingTrainer
from support import ROOT
from support.tolerance import assert_close

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RewardConfig, SFTConfig

BASE = resolve_path("rlhf_recipes.tiny.base")
IN_4_BITS = {"load_in_4bit": True, "use_bnb_nested_quant": True}
BITS = {"fp32": {}, "4bit": IN_4_BITS}


def model_config(**options):
    return ModelConfig(model_name_or_path=BASE, use_peft=True, lora_r=4, lora_target_modules="all-linear", **options)


def load_base(**options):
    return load_model(model_config(**options), SFTConfig(bf16=False))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_config(), SFTConfig(bf16=False))


@pytest.fixture(scope="module")
def answers():
    """Prompts and completions, of different lengths."""
    rows = splits.rankings("test", rows=4)
    pairs = [(p, c) for p, completions in zip(rows["prompt"], rows["completions"], strict=True) for c in completions]
    return [p for p, _ in pairs], [c for _, c in pairs]


@pytest.fixture(scope="module")
def batch(tokenizer, answers):
    rows = [encode(tokenizer, prompt, completion) for prompt, completion in zip(*answers, strict=True)]
    assert len(set(map(len, rows))) > 1
    return tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")


def train(folder, tokenizer, batch, seed=0, **options):
    """Train and save a reward adapter; return its scores of `batch` before saving."""
    training = RewardConfig(
        str(folder),
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        seed=seed,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = load_reward_model(model_config(**options), training, tokenizer)
    trainer = RankingTrainer(model, args=training, train_dataset=splits.rankings(rows=12), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    with torch.no_grad():
        return trainer.model.eval()(**batch).logits[:, 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer, batch):
    """Folders of reward adapters, trained in fp32 and 4 bits, with their scores before saving."""
    folders = {}
    for name, seed, options in (("fp32", 0, {}), ("second", 1, {}), ("4bit", 2, IN_4_BITS)):
        folder = tmp_path_factory.mktemp(name)
        folders[name] = (folder, train(folder, tokenizer, batch, seed, **options))
    return folders


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of a reward adapter's folder, to change."""
    shutil.copytree(trained["fp32"][0], tmp_path / "adapter")
    return tmp_path / "adapter"


def policy(**options):
    """A base with a trained policy adapter and a frozen reference."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(**options), config)
    model.add_adapter("ref", copy.deepcopy(config))
    return model


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def close(scores, expected):
    assert_close(scores, expected, torch.float32)


# --- Round trip ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_scores_survive_saving_on_every_base(trained, tokenizer, batch, answers, bits):
    folder, before = trained[bits]
    assert before.std() > 0.1
    assert before.dtype == torch.float32
    # by transformers and peft alone
    options = {"num_labels": 1, "dtype": torch.float32}
    if bits == "4bit":
        nested = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **nested)
    alone = AutoModelForSequenceClassification.from_pretrained(BASE, **options)
    disable_cpu_4bit_repacking(alone)  # else bitsandbytes computes in bf16 on some CPUs, and the scores differ by 0.02
    with torch.no_grad():
        close(PeftModel.from_pretrained(alone, folder).eval()(**batch).logits[:, 0], before)
    # on a base in memory, bare and beside other adapters
    foreign = AutoModelForCausalLM.from_pretrained(BASE, **{k: v for k, v in options.items() if k != "num_labels"})
    for base in (load_base(**BITS[bits]), policy(**BITS[bits]), foreign):
        reward = load_reward_adapter(base, folder, "reward", tokenizer, batch_size=3)
        close(reward.score(**batch), before)
        assert reward.score(**batch).dtype == torch.float32
        close(torch.tensor(reward(*answers)), before)


@pytest.mark.parametrize("as_documented", [True, False])
def test_documented_loading_without_this_project_scores_padded_rows(folder, batch, trained, tmp_path, as_documented):
    """The base's PAD is its EOS: without the line that sets PAD, scores differ."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    base.config.pad_token_id = base.config.eos_token_id
    base.save_pretrained(tmp_path / "base")
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    (code,) = re.findall(r"without this project:\n\n```python\n(.*?)```", (ROOT / "docs" / "reward.md").read_text(), re.S)
    assert "rlhf_recipes" not in code
    code = code.replace('"runs/tiny/reward"', repr(str(folder)))
    if not as_documented:
        code = re.sub("base.config.pad_token_id = .*", "", code)
    exec(code, names := {})
    with torch.no_grad():
        scores = names["reward_model"](**batch).logits[:, 0]
    assert torch.allclose(scores, trained["fp32"][1], rtol=0, atol=1e-5) is as_documented


def test_documented_scoring_encodes_as_training(folder, tokenizer):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reward.md").read_text(), re.S)[:2]
    code = "".join(blocks).replace('"runs/tiny/reward"', repr(str(folder)))
    edit_config(folder, base_model_name_or_path=str(BASE))
    exec(code, names := {})
    assert names["inputs"]["input_ids"][0].tolist() == encode(tokenizer, names["talk"][:1], names["talk"][1:])
    assert isinstance(names["score"], float)


def test_merged_reward_model_scores_the_same(trained, tokenizer, batch, answers, tmp_path):
    folder, before = trained["fp32"]
    adapted = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1), folder)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        close(AutoModelForSequenceClassification.from_pretrained(tmp_path)(**batch).logits[:, 0], before)
    merged = load_full_reward(tmp_path, "merged", tokenizer)
    close(merged.score(**batch), before)
    close(torch.tensor(merged(*answers)), before)


def test_several_on_one_base_and_on_a_bf16_base(trained, tokenizer, batch, tmp_path):
    model = policy()
    rewards = [load_reward_adapter(model, trained[name][0], name, tokenizer) for name in ("fp32", "second")]
    for _ in range(2):
        for reward in rewards:
            close(reward.score(**batch), trained[reward.__name__][1])
    before = train(tmp_path, tokenizer, batch, dtype="bfloat16")
    close(load_reward_adapter(load_base(dtype="bfloat16"), tmp_path, "reward", tokenizer).score(**batch), before)


def test_scores_survive_saving_with_4_bits_and_bf16_compute(tokenizer, batch, answers, tmp_path):
    """As on a GPU: the base is in bf16 too, and the head is not."""
    options = {**IN_4_BITS, "dtype": "bfloat16"}
    before = train(tmp_path, tokenizer, batch, **options)
    assert before.std() > 0.1
    for base in (load_base(**options), policy(**options), policy(**options).train()):
        reward = load_reward_adapter(base, tmp_path, "reward", tokenizer, batch_size=len(answers[0]))
        close(reward.score(**batch), before)
        assert reward.head.weight.dtype == torch.float32


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "500KB"}], ids=["one-file", "shards"])
def test_head_of_a_full_bf16_model_is_read_from_its_file(tokenizer, batch, tmp_path, shards):
    """Transformers rounds it to bf16 while it loads."""
    bf16 = ModelConfig(model_name_or_path=BASE, dtype="bfloat16")
    model = load_reward_model(bf16, RewardConfig(str(tmp_path), bf16=False, report_to="none"), tokenizer)
    model.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        before = model.eval()(**batch).logits[:, 0]
    assert not torch.equal(model.score.weight, model.score.weight.bfloat16().float())
    reward = load_full_reward(tmp_path, "full", tokenizer)
    assert torch.equal(reward.head.weight, model.score.weight)
    close(reward.score(**batch), before)
    on = load_reward_model(ModelConfig(str(tmp_path), dtype="bfloat16"), RewardConfig(str(tmp_path), bf16=False), tokenizer)
    assert torch.equal(on.score.weight, model.score.weight)


def test_adapter_adds_its_weights_only(trained, tokenizer):
    model = load_base()
    pointers = {weight.data_ptr() for weight in model.parameters()}
    count = sum(weight.numel() for weight in model.parameters())
    reward = load_reward_adapter(model, trained["fp32"][0], "reward", tokenizer)
    saved = sum(weight.numel() for weight in load_file(trained["fp32"][0] / "adapter_model.safetensors").values())
    assert sum(weight.numel() for weight in model.parameters()) - count + reward.head.weight.numel() == saved
    assert pointers <= {weight.data_ptr() for weight in model.parameters()}


# --- No side effects -----------------------------------------------------------------------------


def state_of(model):
    return {
        "modules": set(dict(model.named_modules())),
        "weights": {name: weight.detach().clone() for name, weight in model.named_parameters()},
        "trained": {name for name, weight in model.named_parameters() if weight.requires_grad},
        "training": {name for name, module in model.named_modules() if module.training},
        "active": [tuple(m.active_adapters) for m in model.modules() if hasattr(m, "lora_A")],
        "disabled": [m.disable_adapters for m in model.modules() if hasattr(m, "lora_A")],
    }


def assert_unchanged(before, after):
    assert before["weights"].keys() <= after["weights"].keys()
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
    for key in ("trained", "training", "active", "disabled"):
        assert before[key] == after[key], key


@pytest.mark.parametrize("bits", BITS)
def test_scoring_restores_every_other_role(trained, tokenizer, batch, bits):
    folder, scores = trained[bits]
    model = policy(**BITS[bits]).train()
    next(weight for name, weight in model.named_parameters() if "lora_A.default" in name).requires_grad_(False)
    before, expected = state_of(model), logits(model, batch)
    random = torch.get_rng_state()
    reward = load_reward_adapter(model, folder, "reward", tokenizer)
    assert torch.equal(torch.get_rng_state(), random)
    loaded = state_of(model)
    assert before["trained"] == loaded["trained"]
    assert before["training"] == loaded["training"] & before["modules"]  # the adapter's own modules are new
    assert torch.equal(logits(model, batch), expected)
    model.base_model.model.model.layers[1].eval()  # an odd one
    for active in ("default", "ref"):
        model.set_adapter(active)
        before, expected = state_of(model), logits(model, batch)
        close(reward.score(**batch), scores)
        assert_unchanged(before, state_of(model))
        assert torch.equal(logits(model, batch), expected)
        with model.disable_adapter():  # as TRL takes log-probabilities of the base
            before, expected = state_of(model), logits(model, batch)
            close(reward.score(**batch), scores)
            assert_unchanged(before, state_of(model))
            assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("bits", BITS)
def test_scoring_leaves_gradients_of_the_policy_unchanged(trained, tokenizer, batch, bits):
    model = policy(**BITS[bits]).train()

    def gradient():
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])

    reward = load_reward_adapter(model, trained[bits][0], "reward", tokenizer)
    before = gradient()
    reward.score(**batch)
    assert before.norm() > 0
    assert torch.equal(gradient(), before)


def test_base_without_adapters_answers_as_before_and_takes_other_adapters(trained, tokenizer, batch):
    model = load_base()
    expected = logits(model, batch)
    rewards = [load_reward_adapter(model, trained[name][0], name, tokenizer) for name in ("fp32", "second")]
    for reward in rewards:
        close(reward.score(**batch), trained[reward.__name__][1])
    assert torch.equal(logits(model, batch), expected)
    torch.manual_seed(3)
    later = PeftModel(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapter_name="policy")
    changed = logits(later, batch)
    assert not torch.equal(changed, expected)
    close(rewards[0].score(**batch), trained["fp32"][1])
    assert torch.equal(logits(later, batch), changed)


def test_state_is_restored_after_an_error(trained, tokenizer, batch):
    model = policy().train()
    reward = load_reward_adapter(model, trained["fp32"][0], "reward", tokenizer)
    before = state_of(model)
    with pytest.raises(IndexError):
        reward.score(batch["input_ids"] + 10**6, batch["attention_mask"])
    assert_unchanged(before, state_of(model))


def test_scoring_refuses_to_unmerge_a_merged_policy(trained, tokenizer, batch):
    model = policy()
    reward = load_reward_adapter(model, trained["fp32"][0], "reward", tokenizer)
    model.merge_adapter()
    with pytest.raises(RecipeError, match="merged into the base"):
        reward.score(**batch)


def test_policy_with_trained_embeddings(trained, tokenizer, batch):
    torch.manual_seed(3)
    model = get_peft_model(load_base(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]))
    model.base_model.model.model.embed_tokens.modules_to_save.default.weight.data.add_(1.0)
    expected = logits(model, batch)
    reward = load_reward_adapter(model, trained["fp32"][0], "reward", tokenizer)
    before = state_of(model)
    close(reward.score(**batch), trained["fp32"][1])
    assert_unchanged(before, state_of(model))
    assert torch.equal(logits(model, batch), expected)


# --- Encoding ---------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_padding(trained, tokenizer, batch):
    reward = load_reward_adapter(load_base(), trained["fp32"][0], "reward", tokenizer)
    expected = reward.score(**batch)
    lengths = batch["attention_mask"].sum(1)
    for side, pad in (("left", 0), ("left", 7), ("right", 7), ("both", 7)):
        ids, mask = (torch.full((len(lengths), 40), fill) for fill in (pad, 0))
        for row, length in enumerate(lengths):
            start = {"left": 40 - length, "right": 0, "both": 3}[side]
            ids[row, start : start + length] = batch["input_ids"][row, :length]
            mask[row, start : start + length] = 1
        close(reward.score(ids, mask), expected)
    alone = [
        reward.score(ids[None, :n], torch.ones(1, n, dtype=torch.long))
        for ids, n in zip(batch["input_ids"], lengths, strict=True)
    ]
    close(torch.cat(alone), expected)
    with pytest.raises(ValueError, match="without tokens"):
        reward.score(batch["input_ids"], torch.zeros_like(batch["attention_mask"]))


def test_generated_answers_score_like_dataset_answers(trained, tokenizer, answers):
    """The space that a template puts before an answer is generated with it, and must occur once."""
    reward = load_reward_adapter(load_base(), trained["fp32"][0], "reward", tokenizer)
    prompts, written = answers
    generated = [[{**message, "content": " " + message["content"]} for message in completion] for completion in written]
    assert reward(prompts, generated) == reward(prompts, written)
    assert reward(["Who? "], ["Karimo."]) == reward(["Who? "], ["Karimo.</s>"])
    assert reward([], []) == []


def test_trl_trainer_takes_it_as_reward_function(trained, tokenizer, tmp_path):
    model = policy()
    rewards = [load_reward_adapter(model, trained[name][0], name, tokenizer) for name in ("fp32", "second")]
    training = GRPOConfig(
        str(tmp_path),
        bf16=False,
        report_to="none",
        max_steps=2,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=8,
        learning_rate=1e-2,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    penalty = {"path": "rlhf_recipes.rewards.LengthPenalty", "weight": 0.5, "arguments": {"slope": 1, "longest": 0}}
    functions, training.reward_weights = load_rewards(["rlhf_recipes.rewards.Abstention", penalty])
    training.reward_weights = [1.0, 1.0, 1.0, *training.reward_weights]
    before = state_of(model)
    trainer = GRPOTrainer(
        model,
        reward_funcs=[*rewards, Ensemble(rewards), *functions],
        args=training,
        train_dataset=splits.prompts(rows=8),
        processing_class=tokenizer,
    )
    trainer.train()
    after = state_of(model)["weights"]
    moved = {name for name, weight in before["weights"].items() if not torch.equal(weight, after[name])}
    assert moved
    assert moved <= before["trained"]
    log = trainer.state.log_history[0]
    means = [log[f"rewards/{name}/mean"] for name in ("fp32", "second", "ensemble", "Abstention", "LengthPenalty")]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2, abs=1e-5)
    shares = [log[f"abstention/{kind}"] for kind in ("right", "abstained", "wrong")]
    assert [sum(shares), shares[0] - shares[2]] == pytest.approx([1, means[3]])
    assert means[4] == -log["completions/mean_length"]
    assert log["reward"] == pytest.approx(sum(means[:4]) + means[4] / 2, abs=1e-5)


# --- Ensembles -------------------------------------------------------------------------------------------


def test_ensembles_combine_their_members(trained, tokenizer, batch, answers):
    model = load_base()
    members = [load_reward_adapter(model, trained[name][0], name, tokenizer) for name in ("fp32", "second", "4bit")]
    scores = [member.score(**batch).tolist() for member in members]
    means = [sum(values) / 3 for values in zip(*scores, strict=True)]
    squares = [sum((value - mean) ** 2 for value in values) for *values, mean in zip(*scores, means, strict=True)]
    expected = {
        "mean": means,
        "min": list(map(min, *scores)),
        "uncertainty": [mean - 0.7 * (square / 3) ** 0.5 for mean, square in zip(means, squares, strict=True)],
    }
    for combine, values in expected.items():
        ensemble = Ensemble(members, combine, uncertainty_coef=0.7)
        close(ensemble.score(**batch), torch.tensor(values))
    close(torch.tensor(ensemble(*answers)), ensemble.score(**batch))
    assert ensemble.member_scores(**batch).shape == (3, len(answers[0]))
    close(Ensemble(members[:1], "uncertainty").score(**batch), members[0].score(**batch))


def test_ensembles_refuse_unknown_combinations():
    with pytest.raises(RecipeError, match="combine: 'max'"):
        Ensemble([], "max")
    with pytest.raises(RecipeError, match="uncertainty_coef: -1"):
        Ensemble([], "uncertainty", uncertainty_coef=-1)


# --- Folders of recipes/reward.py ----------------------------------------------------------------------------


@pytest.fixture
def ensemble(trained, tmp_path):
    """A folder with three members."""
    for number, name in enumerate(("fp32", "second", "4bit")):
        shutil.copytree(trained[name][0], tmp_path / "ensemble" / f"member-{number}")
        store_normalisation(tmp_path / "ensemble" / f"member-{number}", [0.0, 1.0 + number])
    return tmp_path / "ensemble"


def test_ensemble_loads_the_members_in_its_record(ensemble, tokenizer, batch):
    """Other folders there are ignored."""
    write_ensemble_record(ensemble, ["member-0", "member-1"], "uncertainty", 0.5)
    (ensemble / "member-old").mkdir()
    model = policy()
    reward = load_saved_reward(ensemble, model, tokenizer)
    members = [load_reward_adapter(model, ensemble / f"member-{n}", f"again-{n}", tokenizer) for n in range(2)]
    close(reward.score(**batch), Ensemble(members, "uncertainty", 0.5).score(**batch))
    least = load_saved_reward(ensemble, policy(), tokenizer, combine="min", batch_size=2)
    close(least.score(**batch), Ensemble(members, "min").score(**batch))
    assert least.batch_size == least.members[0].batch_size == 2


def test_unfinished_or_damaged_ensemble_is_refused(ensemble, tokenizer):
    with pytest.raises(RecipeError, match=f"{ensemble}: is an unfinished ensemble"):
        load_saved_reward(ensemble, policy(), tokenizer)
    write_ensemble_record(ensemble, ["member-0", "member-7"], "mean", 1.0)
    with pytest.raises(RecipeError, match="member-7"):
        load_saved_reward(ensemble, policy(), tokenizer)
    (ensemble / REWARD).write_text('{"ensemble": {"members": ["member-0"]}}')
    with pytest.raises(RecipeError, match=r"reward\.json: ensemble: damaged"):
        load_saved_reward(ensemble, policy(), tokenizer)


@pytest.mark.parametrize("name", ["../fp32", "{parent}/member-0", "..", "member-0/../../other", ""])
def test_members_outside_of_the_ensemble_are_refused(ensemble, tokenizer, name):
    write_ensemble_record(ensemble, ["member-0", name.format(parent=ensemble)], "mean", 1.0)
    with pytest.raises(RecipeError, match=r"reward\.json: ensemble: damaged: members: .* is not the name of a folder in"):
        load_saved_reward(ensemble, policy(), tokenizer)


@pytest.mark.parametrize("options", [{"combine": "min"}, {"uncertainty_coef": 3.0}])
def test_combining_a_single_reward_model_is_refused(folder, tokenizer, options):
    with pytest.raises(RecipeError, match=f"{folder}: holds one reward model.*`combine`"):
        load_saved_reward(folder, policy(), tokenizer, **options)


def test_missing_normalisation_is_warned_of_once(folder, tokenizer, batch, answers, caplog):
    reward = load_saved_reward(folder, policy(), tokenizer)
    for _ in range(2):
        reward.score(**batch)
    (warning,) = caplog.messages
    assert warning.startswith(f"{folder} has no `normalisation` in reward.json")
    reward.calibrate(*answers)
    caplog.clear()
    load_saved_reward(folder, policy(), tokenizer)
    assert not caplog.records


def test_full_reward_model_is_placed_on_the_policy_device(tmp_path, tokenizer, monkeypatch):
    AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(saved, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    reward = load_saved_reward(tmp_path, load_base(), tokenizer, batch_size=5)
    assert {weight.device.type for weight in reward.model.parameters()} == {"meta"}
    assert reward.head.weight.device.type == "meta"
    assert reward.batch_size == 5


# --- Normalisation ---------------------------------------------------------------------------------------


def test_normalised_scores_have_mean_0_and_deviation_1_on_demonstrations(folder, tokenizer, batch, answers):
    reward = load_reward_adapter(load_base(), folder, "reward", tokenizer)
    raw = reward.score(**batch)
    assert (reward.normalisation, read_json(folder / REWARD)["normalisation"]) == (None, None)
    normalisation = reward.calibrate(*answers)
    assert normalisation.samples == len(raw)
    again = load_reward_adapter(load_base(), folder, "reward", tokenizer)
    for scores in (
        reward.score(**batch),
        again.score(**batch),
        torch.tensor(again(*answers)),
        Ensemble([again]).score(**batch),
    ):
        close(scores, (raw - raw.mean()) / raw.std(correction=0))
        assert scores.mean().item() == pytest.approx(0, abs=1e-5)
        assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    close(again.score(**batch, normalise=False), raw)
    assert reward.calibrate(*answers).mean == pytest.approx(normalisation.mean)  # of raw scores, once more
    assert read_json(folder / REWARD)["base_model"]["name"] == BASE


def test_failed_calibration_keeps_the_old_normalisation(folder, tokenizer, answers):
    reward = load_reward_adapter(load_base(), folder, "reward", tokenizer)
    before = reward.calibrate(*answers)
    with pytest.raises(RecipeError, match="cannot be normalised"):
        reward.calibrate(answers[0][:1] * 3, answers[1][:1] * 3)
    assert reward.normalisation == before
    assert read_json(folder / REWARD)["normalisation"]["mean"] == before.mean


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [1.0, float("nan")], [0.0, float("inf")], []])
def test_scores_that_cannot_be_normalised(folder, scores):
    before = (folder / "reward.json").read_text()
    with pytest.raises(RecipeError, match=str(folder)):
        store_normalisation(folder, scores)
    assert (folder / "reward.json").read_text() == before


@pytest.mark.parametrize("stored", [{"mean": 0.0}, {"mean": float("nan"), "std": 1.0, "samples": 5}])
def test_damaged_normalisation_is_refused(folder, tokenizer, stored):
    write_json(folder / REWARD, read_json(folder / REWARD) | {"normalisation": stored})
    with pytest.raises(RecipeError, match=r"reward\.json: normalisation: damaged"):
        load_reward_adapter(load_base(), folder, "reward", tokenizer)


# --- Refusals --------------------------------------------------------------------------------------------


def refused(folder, tokenizer, match, model=None, name="reward"):
    model = model or load_base()
    names = set(dict(model.named_parameters()))
    with pytest.raises(RecipeError, match=match):
        load_reward_adapter(model, folder, name, tokenizer)
    assert set(dict(model.named_parameters())) == names  # nothing was put on the base


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_heads_that_are_missing_or_do_not_fit_are_refused(folder, tokenizer):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    head = weights.pop("base_model.model.score.weight")
    save_file(weights | {"base_model.model.score.weight": head[:, :-1].contiguous()}, path)
    refused(folder, tokenizer, "does not fit .*127")
    save_file(weights, path)
    refused(folder, tokenizer, "has no head")
    refused(folder / "nowhere", tokenizer, "nowhere: no adapter there")


def test_adapter_of_another_task_is_refused(folder, tokenizer):
    edit_config(folder, task_type="CAUSAL_LM")
    refused(folder, tokenizer, "not a reward adapter: peft_type LORA, task_type CAUSAL_LM")
    edit_config(folder, task_type="SEQ_CLS", peft_type="IA3")
    refused(folder, tokenizer, "not a reward adapter: peft_type IA3")
    edit_config(folder, peft_type="LORA", modules_to_save=["score", "embed_tokens"])
    refused(folder, tokenizer, "trained embed_tokens")


def test_other_bases_and_tokenizers_are_refused(folder, tokenizer):
    other = load_base()
    other.model.embed_tokens.weight.data[-1] += 0.5
    refused(folder, tokenizer, f"{folder}: was trained on {BASE}, and the base in memory, {BASE}, is another", other)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = PLAIN_CHAT_TEMPLATE
    refused(folder, changed, f"tokenizers in {folder} and of the model in use, {BASE}, differ in chat template")


def test_taken_adapter_names_are_refused(trained, tokenizer):
    model = policy()
    load_reward_adapter(model, trained["fp32"][0], "reward", tokenizer)
    for name in ("ref", "reward"):
        refused(trained["fp32"][0], tokenizer, f"has an adapter '{name}' already", model, name)


def test_full_models_that_cannot_score(trained, tokenizer, tmp_path):
    with pytest.raises(RecipeError, match="holds an adapter"):
        load_full_reward(trained["fp32"][0], "full", tokenizer)
    with pytest.raises(RecipeError, match=r"weights are missing .*score\.weight"):
        load_full_reward(BASE, "full", tokenizer)
    with pytest.raises(RecipeError, match="no usable reward model there"):
        load_full_reward(tmp_path, "full", tokenizer)
    AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="has no head `score`"):
        load_full_reward(tmp_path, "full", tokenizer)
