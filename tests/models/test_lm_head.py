"""Log-probabilities of the wanted tokens alone, against the whole logits of several families."""

from rlhf_recipes.generation.policies import Placement
from rlhf_recipes.models import lm_head
from rlhf_recipes.models.lm_head import token_log_probs
from rlhf_recipes.models.loading import load_model

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)
from trl import ModelConfig

VOCABULARY = 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
WIDE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "llama, tied": LlamaConfig(**WIDE, tie_word_embeddings=True),
    "gemma2, capped logits": Gemma2Config(**WIDE, head_dim=16, final_logit_softcapping=0.5),
    "cohere2, scaled logits": Cohere2Config(**WIDE, logit_scale=0.3),
    "granite, scaled logits": GraniteConfig(**WIDE, logits_scaling=3.0),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2),
    "opt, projected widths": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    "falcon": FalconConfig(**SIZES),
}


def random_model(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.3)
    return model


def batch():
    """Return ids, attention mask and wanted tokens of three rows, the second of which wants none."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    mask, wanted = torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 7:] = 0
    wanted[0, 4:7] = wanted[2, 1] = wanted[2, 8] = True
    return ids, mask, wanted


def from_whole_logits(model, ids, mask, wanted, temperature):
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float() / temperature
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logps[wanted[:, 1:]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_those_of_whole_logits(name, temperature, monkeypatch):
    model, inputs = random_model(name), batch()
    expected = from_whole_logits(model, *inputs, temperature)
    assert torch.allclose(token_log_probs(model, *inputs, temperature), expected, atol=1e-5)
    monkeypatch.setattr(lm_head, "MOST_LOGITS", VOCABULARY)  # a row a pass
    assert torch.allclose(token_log_probs(model, *inputs, temperature), expected, atol=1e-5)


def test_an_adapter_on_the_head_counts():
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(random_model("llama"), config).eval()
    logps = token_log_probs(model, *batch())
    assert torch.allclose(logps, from_whole_logits(model, *batch(), 1.0), atol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(logps, token_log_probs(model, *batch()), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_reads_contiguous_states_of_wanted_tokens_only(dtype):
    model, seen = random_model("llama", dtype), []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logps = token_log_probs(model, *batch())
    assert (logps.dtype, logps.shape) == (torch.float32, (5,))
    assert (seen[0].shape, seen[0].is_contiguous()) == ((1, 5, 32), True)


@pytest.mark.parametrize(("large", "contiguous"), [(1, True), (2**20, False)])
def test_sampling_gives_a_large_head_no_slices(large, contiguous, monkeypatch):
    """On a CPU a frozen head would be copied once for each row; a small one is not worth it."""
    monkeypatch.setattr(lm_head, "_LARGE", large)
    model = load_model(ModelConfig(model_name_or_path="rlhf_recipes.tiny.base", dtype="float32"), Placement(False))
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    model.generate(batch()[0], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert seen == [contiguous, True]  # the prompt, and a token
