"""Merging: equal outputs, complete results or none, model cards and uploads."""

import errno
import json
import os
import shutil
from unittest.mock import Mock

from rlhf_recipes.core.files import REWARD, write_json
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.export import merge as merging
from rlhf_recipes.export.model_card import lineage, write_card
from rlhf_recipes.export.upload import redact
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.rewards.reward_json import write_reward_record
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter
from rlhf_recipes.tiny import splits
from support.tolerance import assert_close

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)
from trl import ModelConfig, SFTConfig

NAME = "rlhf_recipes.tiny.base"
BASE = resolve_path(NAME)
PEOPLE = splits.rankings("test", rows=4)


def make(folder, base=BASE, model=None, size=0.1, task="CAUSAL_LM", **options):
    """Save a LoRA adapter that changes its base, with tokenizer and the record of a stage."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base) if model is None else model
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": task} | options))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data += torch.randn_like(weight) * size
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    record = {"recipe": "sft", "base_model": {"name": str(base), "fingerprint": fingerprint(adapted)}, "parents": []}
    data = {"train": {"rows": 7, "sources": [{"source": "/data/secret/mine.csv", "rows": 7}]}}
    arguments = {"ModelConfig": {"use_peft": True, "lora_r": 4}}
    write_json(folder / "recipe.json", record | {"data": data, "metrics": {"eval_loss": 0.25}, "arguments": arguments})
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward adapter with head and normalisation."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=1)
    make(folder, model=base, task="SEQ_CLS", target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    record = json.loads((folder / "recipe.json").read_text()) | {"recipe": "reward"}
    write_json(folder / "recipe.json", record)
    write_reward_record(folder, NAME, record["base_model"]["fingerprint"])
    normalisation = {"mean": 0.25, "std": 0.5, "samples": 9}
    write_json(folder / REWARD, json.loads((folder / REWARD).read_text()) | {"normalisation": normalisation})
    return folder


@pytest.fixture
def merge(launch, tmp_path):
    """Run the recipe; return the exit status, the error, and the output folder."""

    def run(adapter, *options):
        output = tmp_path / "out" / "merged"
        options = ("--adapter", adapter, "--output_dir", output, *options)
        return *launch("merge", *options), output

    return run


def left(output):
    return list(output.parent.iterdir()) if output.parent.is_dir() else []


def logits(model, tokenizer):
    ids = tokenizer.apply_chat_template(PEOPLE["prompt"][0], add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


# --- Equal outputs --------------------------------------------------------------------------------------


def test_merged_policy_has_the_logits_of_the_adapter(merge, policy):
    status, error, output = merge(policy, "--max_shard_size", "1MB")
    assert status == 0, error
    assert len(list(output.glob("*.safetensors"))) > 1
    tokenizer = AutoTokenizer.from_pretrained(output)
    merged = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), policy), tokenizer)
    assert torch.allclose(logits(merged, tokenizer), expected, atol=1e-4)
    assert (logits(base, tokenizer) - expected).abs().max() > 0.1
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(policy).chat_template
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id
    assert left(output) == [output]
    assert {path.suffix for path in output.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}
    assert fingerprint(merged)["weights"] == fingerprint(base)["weights"]
    assert fingerprint(merged)["matrices"] != fingerprint(base)["matrices"]
    generator = pipeline("text-generation", model=str(output), device="cpu")  # as the card says
    assert generator(PEOPLE["prompt"][0], max_new_tokens=4, return_full_text=False)[0]["generated_text"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_reward_model_scores_the_same(merge, reward, dtype):
    status, error, output = merge(reward, "--dtype", dtype)
    assert status == 0, error
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    pairs = [(p, c) for p, group in zip(PEOPLE["prompt"], PEOPLE["completions"], strict=True) for c in group]
    scores = [
        torch.tensor(scorer(*zip(*pairs, strict=True)))
        for scorer in (
            load_reward_adapter(AutoModelForCausalLM.from_pretrained(BASE), reward, "reward", tokenizer),
            load_full_reward(output, "merged", tokenizer),
        )
    ]
    assert_close(scores[1], scores[0], getattr(torch, dtype), scale=scores[0].abs().max().item())
    assert scores[0].std() > 0.01
    weights = load_file(output / "model.safetensors")
    assert weights["score.weight"].dtype == torch.float32  # bf16 has three digits
    assert weights["model.embed_tokens.weight"].dtype == getattr(torch, dtype)
    assert json.loads((output / REWARD).read_text()) == json.loads((reward / REWARD).read_text())


def test_adapter_of_a_4_bit_base_is_merged_into_the_full_base(merge, tmp_path):
    quantised = load_model(ModelConfig(NAME, dtype="float32", load_in_4bit=True), SFTConfig(bf16=False, report_to="none"))
    folder = make(tmp_path / "of-4-bits", model=quantised)
    record = json.loads((folder / "recipe.json").read_text())
    record["arguments"]["ModelConfig"]["load_in_4bit"] = True
    write_json(folder / "recipe.json", record)
    status, error, output = merge(folder, "--model_name_or_path", NAME)
    assert status == 0, error
    assert {weight.dtype for weight in load_file(output / "model.safetensors").values()} == {torch.float32}
    assert "trained on the base in 4 bits" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
)
def test_variants_of_lora_are_merged(merge, tmp_path, options):
    status, error, output = merge(make(tmp_path / "adapter", **options))
    assert status == 0, error
    if "modules_to_save" in options:
        before, after = (load_file(f"{folder}/model.safetensors")["model.embed_tokens.weight"] for folder in (BASE, output))
        assert not torch.equal(before, after)


def test_trained_embedding_is_untied_from_the_head(merge, tmp_path):
    config = LlamaConfig.from_pretrained(BASE, tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "tied")
    folder = make(tmp_path / "adapter", base=tmp_path / "tied", modules_to_save=["embed_tokens"])
    status, error, output = merge(folder, "--model_name_or_path", "none")  # the one that the adapter names
    assert status == 0, error
    merged = AutoModelForCausalLM.from_pretrained(output)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), folder)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert torch.allclose(logits(merged, tokenizer), logits(expected, tokenizer), atol=1e-4)


def test_generation_config_that_transformers_refuses_to_save(merge, policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "adapter")
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 5]})
    status, error, output = merge(folder)
    assert status == 0, error
    stored = json.loads((output / "generation_config.json").read_text())
    assert (stored["temperature"], stored["eos_token_id"]) == (0.6, [2, 5])


# --- Refusals, which leave nothing --------------------------------------------------------------------


def test_model_that_differs_from_the_adapter_is_not_kept(merge, policy, reward, monkeypatch):
    monkeypatch.setattr(merging, "_merge", lambda model, *_: model.unload())
    for adapter, what in ((policy, "logits"), (reward, "scores")):
        status, error, output = merge(adapter)
        assert (status, left(output)) == (2, [])
        assert f"{what} differ from the adapter's by" in error
        assert "it is not kept" in error


def test_lost_normalisation_is_detected(merge, reward, monkeypatch):
    monkeypatch.setattr(merging.shutil, "copy", lambda *_: None)
    status, error, output = merge(reward)
    assert (status, left(output)) == (2, [])
    assert "scores differ" in error


def test_adapter_that_rounding_undoes_is_not_merged(merge, tmp_path):
    folder = make(tmp_path / "faint", size=1e-4)
    status, error, output = merge(folder, "--dtype", "bfloat16")
    assert (status, left(output)) == (2, [])
    assert "half of the adapter's effect is lost" in error
    assert "set `dtype: float32`" in error
    assert merge(folder)[0] == 0


def test_weights_that_are_not_finite_are_refused(merge, policy, tmp_path):
    folder = shutil.copytree(policy, tmp_path / "broken")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight * float("nan") for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    status, error, output = merge(folder)
    assert (status, left(output)) == (2, [])
    assert "not finite" in error


FULL = "No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        (PreTrainedModel, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (PreTrainedModel, SafetensorError(f"I/O error: {FULL}")),
        (PreTrainedTokenizerFast, Exception(FULL)),  # of `tokenizers`
    ],
)
def test_full_disk_leaves_nothing(merge, policy, monkeypatch, writer, error):
    monkeypatch.setattr(writer, "save_pretrained", Mock(side_effect=error))
    status, message, output = merge(policy)
    assert (status, left(output)) == (2, [])
    assert "cannot be written" in message
    assert "No space left on device" in message


def test_remains_of_a_killed_run_are_deleted(merge, policy, tmp_path):
    (tmp_path / "out" / ".merged.partial").mkdir(parents=True)
    (tmp_path / "out" / ".merged.partial" / "half").touch()
    status, error, output = merge(policy)
    assert status == 0, error
    assert left(output) == [output]
    assert not (output / "half").exists()


def test_folder_that_is_not_empty_is_left_alone(merge, policy, tmp_path):
    output = tmp_path / "out" / "merged"
    output.mkdir(parents=True)
    assert merge(policy)[0] == 0  # an empty one will do
    before = sorted(path.stat().st_mtime_ns for path in output.iterdir())
    status, error, _ = merge(policy)
    assert status == 2
    assert "is not empty" in error
    assert before == sorted(path.stat().st_mtime_ns for path in output.iterdir())


def test_folder_that_cannot_be_created(launch, policy, tmp_path):
    (tmp_path / "file").touch()
    status, error = launch("merge", "--adapter", policy, "--output_dir", tmp_path / "file" / "merged")
    assert status == 2
    assert "cannot be written to (" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--load_in_4bit", "true"), "load_in_4bit, load_in_8bit: adapters are merged at full precision"),
        (("--adapter", BASE), "holds a full model"),
        (("--adapter", "runs/nowhere/ppo"), "holds no adapter (adapter_config.json). Fix: train it with recipes/ppo.py"),
        (("--adapter", "none"), "adapter: missing"),
        (("--model_name_or_path", "runs/nowhere/base"), "no such folder"),
        (("--tolerance", "0"), "tolerance: 0.0: must be above 0"),
        (("--hub_model_id", "me/mine"), "hub_model_id: me/mine"),
    ],
)
def test_wrong_arguments_are_one_message(merge, policy, options, message):
    status, error, output = merge(policy, *options)
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()[-1:]) == 1
    assert left(output) == []


def test_adapter_of_another_base_is_refused(merge, policy, tmp_path):
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig.from_pretrained(BASE)).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "other")
    status, error, output = merge(policy, "--model_name_or_path", tmp_path / "other")
    assert (status, left(output)) == (2, [])
    assert "is another: other weights" in error


def test_ensemble_is_refused(merge, tmp_path):
    write_json(tmp_path / REWARD, {"ensemble": {"members": ["member-0", "member-1"], "combine": "mean"}})
    status, error, _ = merge(tmp_path)
    assert status == 2
    assert "is an ensemble" in error


def test_base_stored_in_4_bits_is_refused(merge, policy, tmp_path):
    model = load_model(ModelConfig(NAME, dtype="float32", load_in_4bit=True), SFTConfig(bf16=False, report_to="none"))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    status, error, _ = merge(policy, "--model_name_or_path", tmp_path / "base")
    assert status == 2
    assert "is stored in few bits" in error


# --- The card --------------------------------------------------------------------------------------------


def test_card_lists_stages_data_and_metrics(merge, policy, tmp_path):
    ppo = make(tmp_path / "ppo")
    record = json.loads((ppo / "recipe.json").read_text())
    write_json(ppo / "recipe.json", record | {"recipe": "ppo", "parents": [str(policy)], "metrics": {"eval_kl": 1.5}})
    status, error, output = merge(ppo)
    assert status == 0, error
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None  # it is on no Hub
    text = card.text
    assert text.index("1. **sft**") < text.index("2. **ppo**")
    assert "trained on: 7 rows of mine.csv" in text
    assert "| eval_kl | 1.5 |" in text
    assert "compared with those of the adapter" in text
    assert "None" not in text
    assert "/home" not in text
    merged = json.loads((output / "recipe.json").read_text())
    assert [stage["recipe"] for stage in merged["stages"]] == ["sft", "ppo"]
    assert merged["parents"] == [ppo.name]  # it is for other machines too
    assert merged["check"]["difference"] < 1e-4


def test_merged_model_keeps_the_records_of_deleted_stages(merge, tmp_path):
    folder = make(tmp_path / "adapter")
    _, _, output = merge(folder)
    shutil.rmtree(folder)
    assert [stage["recipe"] for stage in lineage(output)] == ["sft", "merge"]


def test_records_that_name_each_other(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        write_json(tmp_path / one / "recipe.json", {"recipe": "sft", "parents": [str(tmp_path / other)]})
    assert {stage["folder"] for stage in lineage(tmp_path / "a")} == {"a", "b"}


def test_hub_base_is_in_the_metadata(tmp_path):
    record = {"recipe": "sft", "base_model": {"name": "Qwen/Qwen3-0.6B-Base"}, "arguments": {"ModelConfig": {"use_peft": True}}}
    write_json(tmp_path / "recipe.json", record)
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("Qwen/Qwen3-0.6B-Base", "peft")


# --- The Hub ---------------------------------------------------------------------------------------------


def test_checked_folder_is_uploaded(merge, policy, monkeypatch):
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def upload_folder(self, repo_id, folder_path, **options):
        calls.append(("upload_folder", repo_id, sorted(os.listdir(folder_path))))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **_: [".gitattributes", "model.safetensors"])
    status, error, output = merge(policy, "--push_to_hub", "true", "--hub_model_id", "mine", "--hub_private_repo", "true")
    assert status == 0, error
    assert calls == [
        ("create_repo", "mine", {"private": True, "exist_ok": True}),
        ("upload_folder", "someone/mine", sorted(os.listdir(output))),
    ]
    assert 'model="mine"' in (output / "README.md").read_text()


@pytest.mark.parametrize("other", ["adapter_config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_repository_with_other_weights_is_refused(merge, policy, monkeypatch, other):
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: RepoUrl(f"https://huggingface.co/a/{repo_id}"))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, **_: ["README.md", other])
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, *_, **__: pytest.fail("was uploaded"))
    status, error, output = merge(policy, "--push_to_hub", "true", "--hub_model_id", "mine")
    assert status == 2
    assert f"push_to_hub: a/mine holds weights of another model ({other})" in error
    assert (output / "model.safetensors").is_file()


def test_record_has_no_paths_and_tokens(merge, policy):
    output = merge(policy)[2]
    text = (output / "recipe.json").read_text()
    assert str(policy.parent) not in text
    assert resolve_path(NAME) not in text
    assert redact({"model_init_kwargs": {"token": "hf_secret"}, "eos_token": "</s>"}) == {
        "model_init_kwargs": {"token": "<not shown>"},
        "eos_token": "</s>",
    }


def test_damaged_generation_config_is_named(merge, policy, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(policy, broken)
    (broken / "generation_config.json").write_text("{")
    status, error, output = merge(broken)
    assert status == 2
    assert f"adapter: {broken}: generation_config.json: " in error
    assert not left(output)
