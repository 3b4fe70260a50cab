"""Dropout that a model keeps in modules, in numbers, or in its configuration."""

from rlhf_recipes.models.dropout import disable_dropout
from support.small_ppo import lora, make_family

import pytest
import torch
from peft import get_peft_model


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
        ("mixtral", {"router_jitter_noise": 0.5}),
    ],
)
def test_model_in_training_mode_computes_as_in_evaluation(kind, rates):
    model = get_peft_model(
        make_family(kind, **rates), lora(lora_dropout=0.5, target_modules=r".*(q_proj|c_attn|query_key_value)")
    )
    ids = torch.arange(5, 25)[None]
    expected = model.eval()(ids).logits
    assert not torch.allclose(model.train()(ids).logits, expected)
    disable_dropout(model)
    torch.testing.assert_close(model.train()(ids).logits, expected)


def test_configurations_inside_a_configuration():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.5, "vocab_size": 32}
    model = make_family("gemma3", text_config=text, vision_config={**sizes, "attention_dropout": 0.5})
    disable_dropout(model)
    assert model.config.text_config.attention_dropout == model.config.vision_config.attention_dropout == 0
    assert {layer.self_attn.attention_dropout for layer in model.model.language_model.layers} == {0}
