"""Reward models on families of all kinds: without a classifier in Transformers, with narrow states, with tied weights."""

import json

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.rewards.classifier import load_reward_model
from rlhf_recipes.rewards.saved import load_full_reward, load_reward_adapter
from support.small_ppo import WORDS, make_tokenizer
from support.tolerance import assert_close

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)
from trl import ModelConfig, RewardConfig, SFTConfig

SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 1}
OPT = SIZES | {"ffn_dim": 64, "max_position_embeddings": 64}
FAMILIES = {
    # without a classifier in Transformers
    "cohere": CohereConfig(**LLAMA),
    "granite": GraniteConfig(**LLAMA),
    "lfm2": Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba": MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, state_size=8),
    # with one
    "opt": OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-350m": OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    "falcon": FalconConfig(**SIZES, bos_token_id=0, eos_token_id=1),
    "gemma3": Gemma3TextConfig(**LLAMA, head_dim=8),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=2),
}


def save_base(folder, config, **options):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    targets = "all-linear" if config.model_type != "mamba" else ["in_proj", "x_proj"]  # PEFT refuses others
    return ModelConfig(str(folder), dtype="float32", lora_target_modules=targets, lora_dropout=0.0)


@pytest.fixture
def batch():
    """Rows of different lengths."""
    ids = torch.randint(4, WORDS, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [6], [2]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("use_peft", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_reward_models_of_every_family_score_the_same_once_loaded(tmp_path, batch, family, use_peft):
    arguments, tokenizer = save_base(tmp_path / "base", FAMILIES[family]), make_tokenizer()
    arguments.use_peft = use_peft
    model = load_reward_model(arguments, RewardConfig(bf16=False, use_cpu=True, report_to="none"), tokenizer)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        before = model.eval()(**batch, use_cache=False).logits[:, 0]
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "reward")
    if use_peft:
        base = load_model(arguments, SFTConfig(bf16=False, use_cpu=True))
        reward = load_reward_adapter(base, tmp_path / "reward", "reward", tokenizer)
    else:
        reward = load_full_reward(tmp_path / "reward", "reward", tokenizer)
    assert before.std() > 1e-3
    assert_close(reward.score(**batch), before, torch.float32)


def test_family_that_is_no_backbone_with_a_head_is_refused(tmp_path):
    sizes = LLAMA | {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8}
    arguments = save_base(tmp_path, Llama4TextConfig(**sizes))
    with pytest.raises(
        RecipeError, match=r"model_name_or_path: .*Llama4ForCausalLM is not one backbone.*Fix: name a text-only"
    ):
        load_reward_model(arguments, RewardConfig(bf16=False, use_cpu=True, report_to="none"), make_tokenizer())


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}], ids=["one-file", "shards"])
@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**LLAMA, head_dim=8, tie_word_embeddings=True),
        GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
        CohereConfig(**LLAMA),
    ],
    ids=["qwen3", "gpt2", "cohere"],
)
def test_tied_weights_may_be_stored_under_either_name(tmp_path, config, shards):
    """Some tools save `lm_head.weight` and leave out the embeddings."""
    arguments = save_base(tmp_path, config, **shards)
    training = RewardConfig(bf16=False, use_cpu=True, report_to="none")
    expected = load_reward_model(arguments, training, make_tokenizer()).get_input_embeddings().weight
    for path in tmp_path.glob("*.safetensors"):
        weights = load_file(path)
        names = {name: "lm_head.weight" if name.endswith(("embed_tokens.weight", "wte.weight")) else name for name in weights}
        save_file({names[name]: weight for name, weight in weights.items()}, path, {"format": "pt"})
        index = tmp_path / "model.safetensors.index.json"
        if "lm_head.weight" in names.values() and index.exists():
            record = json.loads(index.read_text())
            record["weight_map"] |= {"lm_head.weight": path.name}
            index.write_text(json.dumps(record))
    load_model(arguments, SFTConfig(bf16=False, use_cpu=True))
    assert torch.equal(load_reward_model(arguments, training, make_tokenizer()).get_input_embeddings().weight, expected)


def test_missing_embeddings_that_are_not_tied_are_refused(tmp_path):
    arguments = save_base(tmp_path, LlamaConfig(**LLAMA))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"weights are missing in its files \(model\.embed_tokens\.weight\)"):
        load_reward_model(arguments, RewardConfig(bf16=False, use_cpu=True, report_to="none"), make_tokenizer())
