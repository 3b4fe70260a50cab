"""Loading: exact 4-bit gradients, tokenizers that teach to stop, the start from an adapter, refusals."""

import shutil
import sys
from dataclasses import replace

from rlhf_recipes.core.errors import RecipeError, as_recipe_error
from rlhf_recipes.core.files import RECIPE, write_json
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.models import loading
from rlhf_recipes.models.adapters import add_adapter, read_adapter_config
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import load_model, load_policy
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.models.weights import check_finite
from rlhf_recipes.rewards.classifier import load_reward_model
from support.small_ppo import make_model, make_tokenizer, with_adapter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FalconConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, Qwen3MoeConfig
from trl import ModelConfig, RewardConfig, SFTConfig, get_peft_config

BASE = "rlhf_recipes.tiny.base"


def sft_config(**options):
    return SFTConfig(bf16=False, report_to="none", **options)


def load_adapted(dtype="float32", **options):
    """A 4-bit base with a random adapter."""
    arguments = ModelConfig(model_name_or_path=BASE, dtype=dtype, load_in_4bit=True, use_bnb_nested_quant=True, **options)
    model = load_model(arguments, sft_config())
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def gradient(model):
    tokens = torch.arange(10, 34).reshape(2, 12)
    model.train().zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return torch.cat([weight.grad.flatten().float() for weight in model.parameters() if weight.requires_grad])


@torch.no_grad()
def evaluate(model):
    model.eval()(input_ids=torch.arange(10, 34).reshape(2, 12))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4bit_gradients_are_the_same_after_an_evaluation(dtype):
    model = load_adapted(dtype)
    before = gradient(model)
    evaluate(model)
    assert before.norm() > 0
    assert torch.equal(gradient(model), before)


def test_repacking_of_bitsandbytes_changes_gradients(monkeypatch):
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    monkeypatch.setattr(loading, "disable_cpu_4bit_repacking", lambda model: None)
    model = load_adapted()
    before = gradient(model)
    evaluate(model)
    assert torch.nn.functional.cosine_similarity(gradient(model), before, dim=0) < 0.9


def test_4bit_weights_are_nf4_with_double_quantisation():
    layer = load_adapted().base_model.model.model.layers[0].mlp.up_proj.base_layer
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.weight.dtype) == ("nf4", True, torch.uint8)


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype(name, dtype):
    arguments = ModelConfig(model_name_or_path=BASE, dtype=name)
    assert load_model(arguments, sft_config()).dtype == dtype


def test_auto_dtype_goes_with_4_bits():
    arguments = ModelConfig(model_name_or_path=BASE, dtype="auto", load_in_4bit=True)
    layer = load_model(arguments, sft_config()).model.layers[0].mlp.up_proj
    assert layer.compute_dtype == torch.float32


def test_dotted_path_is_a_folder_of_the_package():
    assert resolve_path(BASE).endswith("rlhf_recipes/tiny/base")
    for name in (
        "Qwen/Qwen3-0.6B",
        "gpt2",
        "no.such.package",
        "rlhf_recipes.tiny.nothing",
        "rlhf_recipes.models.loading.x",
        "antigravity.x.y",
    ):
        assert resolve_path(name) == name
    assert "this" not in sys.modules, "an adapter may name any base"


def test_4bit_sides_are_checked_on_a_cpu(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"self_attn\.q_proj is 48 x 48, and on a CPU bitsandbytes needs"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path), load_in_4bit=True), sft_config())


SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=64, num_key_value_heads=4),
    "qwen3": Qwen3MoeConfig(**SIZES, intermediate_size=64, moe_intermediate_size=64, num_experts=8, head_dim=16),
    "falcon": FalconConfig(**SIZES),  # with a linear layer of its own
}


def save_random(folder, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return ModelConfig(str(folder), use_peft=True, lora_target_modules="all-linear", dtype="float32")


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_models_that_stay_in_full_precision_are_refused(tmp_path, family, key):
    arguments = save_random(tmp_path, MIXTURES[family])
    load_model(arguments, sft_config())
    message = rf"{key}: {tmp_path}: \d+% of its layers' weights are quantised, and the others \(.*(experts|mlp)"
    with pytest.raises(RecipeError, match=f"{message}.*Fix: set `{key}: false`"):
        load_model(replace(arguments, **{key: True}), sft_config())


def test_share_that_is_quantised_is_said(tmp_path, caplog):
    sizes = SIZES | {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 4}
    load_model(replace(save_random(tmp_path / "mixture", MixtralConfig(**sizes)), load_in_4bit=True), sft_config())
    assert f"load_in_4bit: {tmp_path / 'mixture'}: 57% of its layers' weights are quantised" in caplog.text
    caplog.clear()
    wide = SIZES | {"vocab_size": 4096, "intermediate_size": 64}  # most weights are embeddings, as in small models
    load_model(replace(save_random(tmp_path / "dense", LlamaConfig(**wide)), load_in_4bit=True), sft_config())
    assert not caplog.text


@pytest.mark.parametrize("options", [{"lora_dropout": 0.05}, {"lora_dropout": 0.0, "use_dora": True}])
def test_options_of_lora_that_experts_cannot_have_are_named(tmp_path, options):
    arguments = replace(save_random(tmp_path, MIXTURES["mixtral"]), **options)
    fix = f"Fix: set `{[*options][-1]}: {'false' if len(options) > 1 else 0}`"
    with pytest.raises(RecipeError, match=fix), as_recipe_error("sft"):
        get_peft_model(load_model(arguments, sft_config()), get_peft_config(arguments))
    with pytest.raises(RecipeError, match=fix):
        load_reward_model(arguments, RewardConfig(bf16=False, report_to="none"), make_tokenizer())


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "a/b/c"])
def test_missing_folder_is_named(path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(RecipeError, match=f"model_name_or_path: {path}: no such folder"):
            load(ModelConfig(model_name_or_path=path), sft_config())


def test_unreachable_hub_name_says_what_to_do():
    with pytest.raises(RecipeError, match=r"somebody/some-model: .*hf download somebody/some-model --local-dir FOLDER"):
        load_model(ModelConfig(model_name_or_path="somebody/some-model"), sft_config())


def test_missing_model_name():
    with pytest.raises(RecipeError, match="model_name_or_path: is not set"):
        load_model(ModelConfig(), sft_config())


def test_folder_without_tokenizer_or_weights_and_adapter_folder(tmp_path):
    shutil.copy(f"{resolve_path(BASE)}/config.json", tmp_path)
    arguments = ModelConfig(model_name_or_path=str(tmp_path))
    with pytest.raises(RecipeError, match="no usable tokenizer there"):
        load_tokenizer(arguments, sft_config())
    with pytest.raises(RecipeError, match=r"model\.safetensors"):
        load_model(arguments, sft_config())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="holds an adapter, not a model"):
        load_model(arguments, sft_config())


def test_model_with_missing_weights_is_refused(tmp_path):
    weights = load_file(f"{resolve_path(BASE)}/model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{resolve_path(BASE)}/config.json", tmp_path)
    with pytest.raises(RecipeError, match=r"1 weights are missing .*lm_head\.weight"):
        load_model(ModelConfig(model_name_or_path=str(tmp_path)), sft_config())


@pytest.fixture
def adapter(tmp_path):
    """An adapter of the tiny base, as an earlier stage saves it."""
    base = load_model(ModelConfig(model_name_or_path=BASE), sft_config())
    identity = {"name": resolve_path(BASE), "fingerprint": fingerprint(base)}
    folder = tmp_path / "sft"
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    write_json(folder / RECIPE, {"base_model": identity})
    return folder


def load_started(folder, base):
    arguments = ModelConfig(model_name_or_path=str(base), use_peft=True)
    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=BASE), sft_config())
    return load_policy(arguments, sft_config(), folder, tokenizer)


def test_policy_starts_from_an_adapter_of_its_own_base(adapter, tmp_path):
    shutil.copytree(resolve_path(BASE), tmp_path / "moved")
    for base in (BASE, tmp_path / "moved"):
        policy = load_started(adapter, base)
        assert [name for name, weight in policy.named_parameters() if weight.requires_grad and "lora_B" in name]


def test_policy_does_not_start_from_an_adapter_of_another_base(adapter, tmp_path):
    """Even if shapes fit: the reference would be wrong in the same way, and KL 0."""
    other = load_model(ModelConfig(model_name_or_path=BASE), sft_config())
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    both = (
        f"start_from: {adapter}: was trained on {resolve_path(BASE)}, and the base in memory, {tmp_path / 'other'}, is another"
    )
    with pytest.raises(RecipeError, match=both):
        load_started(adapter, tmp_path / "other")


def test_4_bit_weights_stored_as_floats_are_not_checked():
    """As under FSDP, which shards floats only: read as bf16, some are NaN."""
    arguments = ModelConfig("rlhf_recipes.tiny.base", load_in_4bit=True, bnb_4bit_quant_storage="bfloat16", dtype="float32")
    model = load_model(arguments, SFTConfig(bf16=False, use_cpu=True))
    packed = [weight for weight in model.parameters() if hasattr(weight, "quant_state")]
    assert {weight.dtype for weight in packed} == {torch.bfloat16}
    assert not all(weight.isfinite().all() for weight in packed)


def test_adapter_on_the_lm_head_round_trip(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    policy = with_adapter(make_model(), target_modules=["q_proj", "lm_head"])
    policy.save_pretrained(tmp_path / "adapter")
    assert any(".base_layer." in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = add_adapter(make_model(), read_adapter_config(tmp_path / "adapter"), weights, "default", "start_from").eval()
    ids = torch.arange(4, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, policy.eval()(ids).logits)


def test_weights_that_are_not_finite_are_found():
    weight = torch.zeros(10_000, 3)
    check_finite({"w": weight, "large": torch.full((3,), 3e38)}, "here")
    weight[9_999, 2] = torch.nan
    with pytest.raises(RecipeError, match=r"here: w holds numbers that are not finite .*: do this"):
        check_finite({"w": weight}, "here", "do this")
