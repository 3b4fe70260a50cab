"""The arithmetic of the memory plan, by hand, and the sizes of models that it starts from."""

from dataclasses import replace

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory import arithmetic
from rlhf_recipes.memory.activations import Activations
from rlhf_recipes.memory.arithmetic import Precision
from rlhf_recipes.memory.model_shape import ModelShape, measure_adapter, measure_shape
from support import published

import pytest
from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig, MixtralConfig

ALL = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
# 2 layers of width 8; 2 * (64 + 2 * 32 + 64 + 3 * 128) = 1152 weights in matrices
TOY = ModelShape(
    8, 16, 2, heads=2, kv_heads=1, head_dim=4, vocabulary=10, qk_norm=False, matrices=1152, largest=128, vectors=40, tied=True
)
FP32, BF16 = Precision(4, 4), Precision(2, 2)
SMALL = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def activations(precision, **setup):
    return Activations(TOY, precision, **setup)


def test_4_bit_weights_count_with_their_scales():
    weights = 64 * 256  # 256 blocks of 64, whose scales are one block of 256
    assert arithmetic.quantised_bytes(weights, 4, nested=False) == weights / 2 + 256 * 4
    assert arithmetic.quantised_bytes(weights, 4, nested=True) == weights / 2 + 256 + 4
    assert arithmetic.quantised_bytes(weights, 8, nested=False) == weights


def test_a_tied_head_counts_once():
    assert TOY.parameters() == 1152 + 40 + 80
    untied = replace(TOY, tied=False)
    assert untied.parameters() == 1152 + 40 + 160
    assert untied.parameters(head=False) == 1152 + 40 + 80


@pytest.mark.parametrize(
    ("optimizer", "width", "each"),
    [
        ("adamw_torch_fused", 4, 8),
        ("adamw_torch_fused", 2, 4),  # of a model in bf16
        ("paged_adamw_8bit", 4, 2 * (1 + 4 / 256)),
        ("sgd", 4, 0),
        ("paged_adamw_32bit", 2, 8),  # bitsandbytes keeps fp32 for any weights
        ("lion_32bit", 2, 4),
        ("paged_lion_32bit", 2, 4),
        ("rmsprop_bnb_32bit", 2, 4),
    ],
)
def test_optimizer_state(optimizer, width, each):
    assert arithmetic.optimizer_bytes(optimizer, width) == each


def test_kv_cache():
    # 2 layers and the one that grows, keys and values of width 4, 3 rows of 5 tokens, 2 bytes
    assert arithmetic.kv_cache_bytes(TOY, rows=3, tokens=5, width=2) == 3 * 2 * 4 * 3 * 5 * 2


def test_fused_head_keeps_one_tile():
    few, many = (arithmetic.fused_head_bytes(TOY, BF16, scored, gradients=False) for scored in (5000, 9000))
    assert many - few == 4000 * 8 * 2  # hidden states only: the tile has at most 4,096 tokens
    assert few == 4096 * 32_768 * 2 + 5000 * 8 * 2


def test_layer_in_fp32():
    layer = activations(FP32, adapted=ALL, rank=2, checkpointing=False)
    # the norm's input; gate, act(gate), up; LoRA's inputs: the norm's output for two, the product for one; three bottlenecks
    mlp = 4 * 8 + 3 * 4 * 16 + 4 * 8 + 4 * 16 + 3 * 4 * 2
    # the norm's input and output; queries, repeated keys and values, the result; a number a head; four bottlenecks
    attention = 4 * 8 + 4 * 8 + 4 * (8 + 8 + 8 + 8) + 4 * 2 + 4 * 4 * 2
    assert (layer.mlp_bytes(), layer.attention_bytes(length=5)) == (mlp, attention)
    assert layer.mask_bytes(rows=3, length=5) == 3 * 5 * 5 * 4
    assert layer.layer_bytes(rows=3, length=5) == 3 * 5 * (mlp + attention) + 3 * 5 * 5 * 4


def test_adapters_copy_their_input_on_an_unquantised_bf16_base():
    quantised, plain = (activations(Precision(2, 2, bits), adapted=ALL, rank=2).mlp_bytes() for bits in (4, None))
    assert plain - quantised == 2 * 8  # gate and up have their own copy of the norm's output


def test_checkpointing_keeps_the_inputs_of_layers():
    assert activations(BF16, adapted=ALL, rank=2, checkpointing=True).saved_bytes(rows=3, length=5) == 3 * 5 * 2 * 8 * 2


def test_eager_attention_keeps_its_matrices():
    short, long = (activations(BF16, eager=True).attention_bytes(length) for length in (10, 110))
    assert long - short == 100 * 2 * (4 + 2)


@pytest.mark.parametrize(
    ("name", "millions"), [("Qwen/Qwen3-8B-Base", 8190.7), ("Qwen/Qwen3-0.6B-Base", 596.0), ("meta-llama/Llama-3.2-1B", 1235.8)]
)
def test_parameters_of_published_models(name, millions):
    assert round(measure_shape(published.MODELS[name]).parameters() / 1e6, 1) == millions


def test_matrices_are_what_bitsandbytes_quantises():
    shape = measure_shape(published.MODELS["Qwen/Qwen3-8B-Base"])
    assert shape.matrices == 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288)
    assert (shape.largest, shape.tied, shape.qk_norm) == (4096 * 12_288, False, True)


def test_peft_counts_the_weights_of_an_adapter():
    every_layer = measure_adapter(SMALL, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    assert every_layer.parameters == 8 * 4 * (16 + 16) + 6 * 4 * (16 + 32)  # an (in, r) and an (r, out) for each
    assert (every_layer.parts, every_layer.rank, every_layer.dropout) == (ALL, 4, True)
    assert measure_adapter(SMALL, LoraConfig(r=4)).parts == {"q", "v"}  # PEFT's choice for Llama
    assert measure_adapter(SMALL, LoraConfig(r=4, inference_mode=True)).parameters  # as it is saved
    with pytest.raises(RecipeError, match="lora_target_modules: "):
        measure_adapter(SMALL, LoraConfig(r=4, target_modules=["nothing"]))


def test_every_option_of_an_adapter_counts():
    plain = measure_adapter(SMALL, LoraConfig(r=4))
    assert measure_adapter(SMALL, LoraConfig(r=4, use_dora=True)).parameters == plain.parameters + 4 * 16
    assert measure_adapter(SMALL, LoraConfig(r=4, layers_to_transform=[0])).parameters == plain.parameters / 2
    wider = measure_adapter(SMALL, LoraConfig(r=4, rank_pattern={"q_proj": 8}))
    assert (wider.parameters, wider.rank) == (plain.parameters * 1.5, 8)


@pytest.mark.parametrize(
    "config", [GPT2Config(n_layer=1), MixtralConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64)]
)
def test_layers_unlike_llamas_are_rejected(config):
    with pytest.raises(RecipeError, match=f"model_name_or_path: .* of {config.model_type}"):
        measure_shape(config)
