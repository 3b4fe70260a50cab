"""What would fail late, or train nothing, is one message before training."""

import json
import logging
import re

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.positions import check_packing, position_limit
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.training.trainers import SAMPLING_METRICS
from support.small_ppo import EOS, PAD, WORDS, make_tokenizer, save_base

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SIZES = {
    "llama": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8, "num_key_value_heads": 2},
    "gpt_neox": LLAMA | {"max_position_embeddings": 32},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": GPT2 | {"rotary_dim": 8},
    "codegen": GPT2 | {"rotary_dim": 8},
    "opt": LLAMA | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "max_position_embeddings": 32,
        "window_size": 8,
    },
    "biogpt": LLAMA | {"max_position_embeddings": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "qwen3_5_text": LLAMA | LINEAR | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}
LONG = " ".join(f"w{number}" for number in range(5, 45))


def make(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=WORDS, **SIZES[family])
    config.pad_token_id, config.eos_token_id, config.bos_token_id = PAD, EOS, EOS
    return AutoModelForCausalLM.from_config(config).float().eval()


def save(family, folder):
    make(family).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a Llama, a GPT-2 of 32 positions, and short and long rows of each kind."""
    folder = tmp_path_factory.mktemp("early")
    save_base(folder / "llama")
    save("gpt2", folder / "gpt2")
    for name, text in (("short", "w6 w7"), ("long", LONG)):
        prompts = [f"w{number} " for number in range(10, 18)]
        rows = {
            "sft": [{"prompt": prompt, "completion": text} for prompt in prompts],
            "pairs": [{"prompt": prompt, "chosen": text, "rejected": text + " w9"} for prompt in prompts],
            "prompts": [{"prompt": prompt + text} for prompt in prompts],
            "texts": [{"text": text}],
        }
        for kind, lines in rows.items():
            (folder / f"{kind}-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def length(completions, **columns):
    """A reward function."""
    return [float(len(text)) for text in completions]


@pytest.fixture
def refusal(launch, files, tmp_path):
    """Return a function that runs a recipe and returns its message, or "" if it ends well."""

    def run(recipe, base="llama", data="short", **options):
        kind = {"sft": "sft", "reward": "pairs", "dpo": "pairs"}.get(recipe, "prompts")
        values = {"model_name_or_path": str(files / base), "dtype": "float32", "output_dir": str(tmp_path / "out")}
        values |= {"dataset_name": str(files / f"{kind}-{data}.jsonl")}
        if recipe in ("sft", "reward", "dpo", "ppo"):
            values |= {"use_peft": True, "lora_target_modules": "all-linear", "lora_dropout": 0.0, "max_steps": 2}
            values |= {"per_device_train_batch_size": 4, "save_strategy": "no", "gradient_checkpointing": False}
        if recipe == "ppo":
            values |= {"reward_funcs": [f"{__name__}.length"], "max_completion_length": 8}
        if recipe in ("sample", "evaluate"):
            values |= {"policies": {"base": None}, "max_completion_length": 8}
        if recipe == "evaluate":
            values |= {"compare_with": "base", "rewards": [f"{__name__}.length"], "test_split_size": 4}
        config = tmp_path / f"{recipe}.yaml"
        config.write_text(yaml.safe_dump(values | options))
        status, error = launch(recipe, "--config", config)
        assert "Traceback" not in error
        assert status in (0, 2), error
        (message,) = [line for line in error.splitlines() if line.startswith("error: ")] if status else [""]
        assert not message or not (tmp_path / "out" / "recipe.json").exists()
        return message

    return run


# --- Positions that end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIZES)
def test_limit_is_where_the_model_fails(family, tmp_path):
    """Rotary positions and recurrent models have none."""
    model = make(family)
    model.save_pretrained(tmp_path)
    limit = position_limit(ModelConfig(str(tmp_path)))
    ends = family in ("gpt2", "gpt_bigcode", "gptj", "codegen", "opt", "gpt_neo", "biogpt", "mpt")
    assert limit == (32 if ends else None)
    with torch.no_grad():
        model(input_ids=torch.full((1, 32), 5))
        if ends:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, 33), 5))


def test_no_limit_of_a_base_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert position_limit(ModelConfig(str(tmp_path))) is None


@pytest.mark.parametrize(
    ("recipe", "data", "options", "key"),
    [
        ("sft", "long", {"max_length": 256}, "max_length: 256"),
        ("sft", "long", {"max_length": None}, "max_length: None"),
        ("sft", "short", {"packing": True, "packing_strategy": "wrapped", "max_length": 64}, "max_length: 64"),
        ("reward", "long", {"max_length": 256}, "max_length: 256"),
        ("dpo", "long", {"max_length": 256}, "max_length: 256"),
        ("ppo", "short", {"max_completion_length": 29}, "max_completion_length: 29"),
        ("ppo", "long", {}, "max_completion_length: 8"),
        ("ppo", "short", {"ptx_coef": 1.0, "ptx_dataset": [{"path": "{}/texts-long.jsonl"}]}, "ptx_max_length: 512"),
        ("sample", "short", {"max_completion_length": 40}, "max_completion_length: 40"),
        ("evaluate", "short", {"max_completion_length": 40}, "max_completion_length: 40"),
        ("evaluate", "short", {"ptx_dataset": [{"path": "{}/texts-long.jsonl"}]}, "ptx_max_length: 512"),
    ],
)
def test_rows_beyond_the_positions_are_refused(refusal, files, recipe, data, options, key):
    options = json.loads(json.dumps(options).replace("{}/", f"{files}/"))
    message = refusal(recipe, "gpt2", data, **options)
    assert re.search(rf"{recipe}\.yaml: (line \d+: )?{key}: ", message)
    assert "positions" in message
    assert "32" in message
    assert "Fix: set `" in message


@pytest.mark.parametrize(
    ("recipe", "data", "options"),
    [
        ("sft", "short", {"max_length": 256}),  # no row is longer
        ("sft", "long", {"max_length": 32}),  # cut there
        ("evaluate", "short", {"max_completion_length": 28}),  # 3 of the prompt, EOS
    ],
)
def test_rows_within_the_positions_are_used(refusal, recipe, data, options):
    assert refusal(recipe, "gpt2", data, **options) == ""


# --- Packing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIZES)
def test_packing_is_refused_where_rows_read_each_other(family):
    model, collate = make(family).train(), DataCollatorForLanguageModeling(PAD, padding_free=True)
    if family in ("opt", "biogpt", "bloom", "falcon", "mpt", "mamba"):
        with pytest.raises(RecipeError, match=r"packing: .*read the rows before"):
            check_packing(model, collate, "packing")
    elif family == "qwen3_5_text":  # its convolutions need a package
        with pytest.raises(RecipeError, match=r"packing: .*cannot pack rows: .*causal_conv1d"):
            check_packing(model, collate, "packing")
    else:
        check_packing(model, collate, "packing")
    assert model.training


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}])
def test_recipe_refuses_to_pack(refusal, files, options):
    if not (files / "falcon").exists():
        save("falcon", files / "falcon")
    assert re.search(rf"sft\.yaml: line \d+: {next(iter(options))}: {files}/falcon", refusal("sft", "falcon", **options))


def test_rounding_is_no_leak():
    check_packing(make("qwen3").bfloat16(), DataCollatorForLanguageModeling(PAD, padding_free=True), "packing")


# --- No step, no such metric --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "parts"),
    [
        ("sft", {"dataloader_drop_last": True, "per_device_train_batch_size": 64}, ("dataloader_drop_last: 8 rows", "64")),
        ("reward", {"dataloader_drop_last": True, "per_device_train_batch_size": 9}, ("dataloader_drop_last: 8 rows", "9")),
        ("sft", {"num_train_epochs": 0, "max_steps": -1}, ("num_train_epochs: 0",)),
        ("ppo", {"max_steps": 0}, ("max_steps: 0",)),
        ("sft", {"eval_packing": True}, ("eval_packing: ",)),
        ("sft", {"activation_offloading": True}, ("activation_offloading: ",)),
        ("sft", {"eval_accumulation_steps": 0}, ("eval_accumulation_steps: 0",)),
        ("reward", {"use_liger_kernel": True}, ("reward: ", "liger")),
        ("sft", {"adam_beta1": 2.0}, ("optim: adamw", "beta")),
        ("dpo", {"optim": "lomo"}, ("optim: lomo", "install")),
        ("reward", {"lr_scheduler_kwargs": {"min_lr": 0.1}}, ("lr_scheduler_type: linear", "lr_scheduler_kwargs")),
        ("sft", {"lr_scheduler_type": "warmup_stable_decay"}, ("lr_scheduler_type: warmup_stable_decay", "num_decay_steps")),
        ("dpo", {"sync_ref_model": True}, ("sync_ref_model: ",)),
        ("dpo", {"use_peft": False, "sync_ref_model": True, "precompute_ref_log_probs": True}, ("sync_ref_model",)),
    ],
)
def test_options_that_train_nothing_or_fail_are_refused(refusal, recipe, options, parts):
    message = refusal(recipe, **options)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("recipe", "metric", "guess"),
    [
        ("sft", "accuracy", ""),
        ("sft", "eval_mean_tokn_accuracy", "mean_token_accuracy"),
        ("reward", "eval_acuracy", "accuracy"),
        ("dpo", "rewards/accuracy", "rewards/accuracies"),
        ("ppo", "eval_scores", "score"),
    ],
)
def test_metric_that_no_evaluation_has_is_refused(refusal, recipe, metric, guess):
    options = {"test_split_size": 4, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric}
    options |= {"save_strategy": "best"} if recipe == "dpo" else {}
    message = refusal(recipe, **options)
    assert f"metric_for_best_model: {metric!r} is none of " in message
    assert guess in message


def test_best_checkpoint_of_ppo_by_its_own_metrics(launch, files, tmp_path):
    values = {"model_name_or_path": str(files / "llama"), "dataset_name": str(files / "prompts-short.jsonl"), "use_peft": True}
    values |= {"reward_funcs": [f"{__name__}.length"], "max_completion_length": 4, "per_device_train_batch_size": 4}
    values |= {"test_split_size": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 1}
    values |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/length/mean",
        "output_dir": str(tmp_path / "o"),
    }
    values |= {"lora_target_modules": "all-linear", "gradient_checkpointing": False, "per_device_eval_batch_size": 4}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(values))
    status, error = launch("ppo", "--config", tmp_path / "ppo.yaml")
    assert status == 0, error
    (evaluated,) = (e for e in json.loads((tmp_path / "o" / "recipe.json").read_text())["log"] if "eval_loss" in e)
    times = ("runtime", "per_second")
    names = {name.removeprefix("eval_") for name in evaluated if "/" not in name and not name.endswith(times)}
    assert names - {"loss", "epoch", "step"} <= {*SAMPLING_METRICS}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(values | {"metric_for_best_model": "rewards/lenght/mean"}))
    status, error = launch("ppo", "--config", tmp_path / "ppo.yaml")
    assert status == 2
    assert "did you mean 'rewards/length/mean'" in error
    assert "Traceback" not in error


def test_metric_of_evaluations_chooses_the_best_checkpoint(launch, files, tmp_path):
    """The batch that is tried before changes nothing of the run."""
    logs = []
    for metric in ("loss", "mean_token_accuracy"):
        values = {"model_name_or_path": str(files / "llama"), "dataset_name": str(files / "sft-short.jsonl"), "use_peft": True}
        values |= {"test_split_size": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2}
        values |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "output_dir": str(tmp_path / metric)}
        values |= {
            "lora_dropout": 0.5,
            "lora_target_modules": "all-linear",
            "logging_steps": 1,
            "gradient_checkpointing": False,
        }
        (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
        status, error = launch("sft", "--config", tmp_path / "sft.yaml")
        assert status == 0, error
        log = json.loads((tmp_path / metric / "recipe.json").read_text())["log"]
        logs.append([(e["step"], e.get("loss"), e.get("eval_loss"), e.get("eval_num_tokens")) for e in log])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_evaluation_data_are_measured_at_the_end_without_a_strategy(launch, files, tmp_path, recipe):
    kind = {"sft": "sft", "dpo": "pairs"}[recipe]
    values = {"model_name_or_path": str(files / "llama"), "dataset_name": str(files / f"{kind}-short.jsonl"), "use_peft": True}
    values |= {"eval_datasets": [{"path": str(files / f"{kind}-long.jsonl")}], "eval_strategy": "no", "max_steps": 1}
    values |= {"lora_target_modules": "all-linear", "gradient_checkpointing": False, "output_dir": str(tmp_path / "out")}
    (tmp_path / f"{recipe}.yaml").write_text(yaml.safe_dump(values))
    status, error = launch(recipe, "--config", tmp_path / f"{recipe}.yaml")
    assert status == 0, error
    record = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert [entry["step"] for entry in record["log"] if "eval_loss" in entry] == [1]
    assert record["data"]["eval"]["rows"] == 8


# --- The vocabulary -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_tokenizer_beyond_the_embeddings_is_refused(refusal, files, recipe, caplog):
    base = files / "grown"
    if not base.exists():
        save_base(base)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<|added|>"], special_tokens=True)
        tokenizer.save_pretrained(base)
    with caplog.at_level(logging.ERROR):
        message = refusal(recipe, "grown")
    assert f"{WORDS + 1} tokens" in message
    assert str(base) in message
    assert len(load_tokenizer(ModelConfig(str(base)))) == WORDS + 1
