"""Options for speed: vLLM, rollouts in parts, continuous batching, compilation, kernels."""

import sys
import types

from rlhf_recipes import PPOConfig
from rlhf_recipes.core.errors import RecipeError, as_recipe_error
from rlhf_recipes.models.loading import load_model, strip_consumed_arguments
from rlhf_recipes.models.roles import copy_adapter
from rlhf_recipes.training.ppo import vllm
from rlhf_recipes.training.reward import RankingTrainer
from support.small_ppo import (
    EOS,
    PAD,
    Remembering,
    copies,
    in_4_bits,
    logged,
    lora,
    make_model,
    make_tokenizer,
    make_trainer,
    moved,
    prompts,
    save_base,
    save_reward,
    with_adapter,
)
from support.tolerance import assert_close, tolerance

import pytest
import requests
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig
from trl import ModelConfig, RewardConfig, SFTConfig
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


# --- Weights for vLLM -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"tie_word_embeddings": True}, {}),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ({"attention_bias": True}, {"lora_bias": True, "target_modules": ["q_proj"]}),
        ({}, {"modules_to_save": ["lm_head"]}),
        ({}, {"use_dora": True, "use_rslora": True}),
    ],
)
def test_weights_for_vllm_are_the_base_with_the_policy_adapter(sizes, options):
    model = with_adapter(make_model(**sizes), **options)
    for name, weight in model.named_parameters():
        if "modules_to_save.default" in name or name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(weight)
    ids = torch.arange(5, 13)[None]
    expected = model(input_ids=ids).logits
    copy_adapter(model, "default", "reference")
    before = copies(model.state_dict())
    other = make_model(seed=7, **sizes)
    sent = dict(vllm.policy_weights(model))
    assert sent.keys() == {name for name, _ in other.named_parameters()}  # of tied weights one, as in checkpoints
    other.load_state_dict(sent, strict=False)
    torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert not moved(before, copies(model.state_dict()))


def test_weights_for_vllm_of_a_quantised_base_are_dequantised(base):
    model = with_adapter(in_4_bits(base))
    before, ids = copies(model.state_dict()), torch.arange(5, 13)[None]
    other = make_model(seed=7)
    assert not other.load_state_dict(dict(vllm.policy_weights(model))).missing_keys
    assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, torch.float32)
    assert not moved(before, copies(model.state_dict()))


def test_adapters_that_vllm_cannot_get_are_refused():
    model = get_peft_model(make_model(), lora(trainable_token_indices={"embed_tokens": [5]}))
    with pytest.raises(RecipeError, match=r"use_vllm: model\.embed_tokens: TrainableTokensWrapper"):
        dict(vllm.policy_weights(model))
    model = get_peft_model(make_model(tie_word_embeddings=True), lora(target_modules=["embed_tokens"]))
    with pytest.raises(RecipeError, match="use_vllm: an adapter on tied embeddings"):
        dict(vllm.policy_weights(model))


class FakeVLLM(VLLMGeneration):
    """TRL's client over a Transformers model, which has only the weights that it is sent."""

    def _init_vllm(self):
        self.sampler = make_model(seed=7)
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self.load))
        worker = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        self.llm = types.SimpleNamespace(
            llm_engine=types.SimpleNamespace(model_executor=worker), reset_prefix_cache=lambda: None
        )
        self.vllm_client = types.SimpleNamespace(
            update_named_params=self.receive,
            reset_prefix_cache=lambda: None,
            get_server_info=lambda: {"model_config": {"logprobs_mode": "processed_logprobs"}},
        )

    def load(self, weights):
        for name, weight in weights:
            self.sampler.state_dict()[name].copy_(weight)  # a name that vLLM would not know is a KeyError

    def receive(self, metadata, weights):
        sent = list(weights)
        assert metadata == [(name, str(weight.dtype).removeprefix("torch."), list(weight.shape)) for name, weight in sent]
        self.load(sent)

    def generate(self, prompts, images, num_generations, profiler=None):
        config = GenerationConfig(
            max_new_tokens=self.max_completion_length, do_sample=True, pad_token_id=PAD, eos_token_id=EOS, top_k=0
        )
        completions, logps = [], []
        for prompt in prompts:
            ids = self.sampler.generate(torch.tensor([prompt]), generation_config=config)[0]
            completion = ids[len(prompt) :]
            logits = self.sampler(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            completions.append(completion.tolist())
            logps.append([[logp] for logp in logits.gather(1, completion[:, None])[:, 0].tolist()])
        return prompts, completions, logps, None


@pytest.fixture
def fake_vllm(monkeypatch):
    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", FakeVLLM)
    monkeypatch.setattr("rlhf_recipes.models.kernels.is_vllm_available", lambda: True)


@pytest.mark.parametrize(
    ("mode", "bits", "options"),
    [
        ("colocate", 32, {"critic": "adapter"}),
        ("server", 4, {"critic": "adapter", "eval_strategy": "steps", "eval_steps": 2}),
        ("colocate", 32, {"vllm_importance_sampling_correction": False}),
    ],
)
def test_rollouts_by_vllm_are_sampled_from_the_policy(fake_vllm, base, tmp_path, mode, bits, options):
    """vLLM's log-probabilities equal ours in each iteration; frozen roles and base do not change."""
    model = with_adapter(in_4_bits(base) if bits == 4 else AutoModelForCausalLM.from_pretrained(base))
    reward = save_reward(tmp_path / "reward", base)
    trainer = make_trainer(
        tmp_path / "run",
        model,
        str(reward),
        kind=Remembering,
        init={"eval_dataset": prompts(4)},
        max_steps=4,
        use_vllm=True,
        vllm_mode=mode,
        **options,
    )
    frozen = {name: weight.clone() for name, weight in trainer.model.state_dict().items() if ".default." not in name}
    trainer.train()
    assert len(trainer.batches) == 2
    for batch in trainer.batches:
        here = batch["completion_mask"].bool()
        gaps = (batch["sampling_per_token_logps"] - batch["old_per_token_logps"])[here].abs()
        assert gaps.max() < tolerance(torch.float32)
    if "vllm_importance_sampling_correction" not in options:
        assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < tolerance(torch.float32)
        assert logged(trainer, "sampling/importance_sampling_ratio/mean") == pytest.approx([1.0] * 2, abs=1e-3)
    after = {name: weight for name, weight in trainer.model.state_dict().items() if name in frozen}
    assert all(".critic." in name for name in moved(frozen, after))
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)


def test_missing_or_unsuitable_vllm_is_refused_before_loading(base, tmp_path, monkeypatch):
    def load(mode, **options):
        args = PPOConfig(str(tmp_path), bf16=False, use_cpu=True, use_vllm=True, vllm_mode=mode)
        return load_model(ModelConfig(model_name_or_path=str(base), **options), args)

    with pytest.raises(RecipeError, match=r"use_vllm: .*'\.\[vllm\]'"):
        load("server")
    monkeypatch.setattr("rlhf_recipes.models.kernels.is_vllm_available", lambda: True)
    with pytest.raises(RecipeError, match=r"vllm_mode: colocate: .*`vllm_mode: server`"):
        load("colocate", load_in_4bit=True)
    with pytest.raises(RecipeError, match="vllm_mode: colocate"):
        make_trainer(tmp_path, with_adapter(in_4_bits(base)), use_vllm=True, vllm_mode="colocate")
    assert load("colocate").dtype == torch.float32


def test_missing_vllm_server_is_one_message():
    client = object.__new__(VLLMClient)
    client.base_url, client.session = "http://127.0.0.1:9", requests.Session()
    with (
        pytest.raises(RecipeError, match=r"^ppo: The vLLM server can't be reached at http://127\.0\.0\.1:9"),
        as_recipe_error("ppo"),
    ):
        client.check_server(total_timeout=0)


# --- Rollouts by Transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("critic", "sampler_logps"), [("shared", None), ("adapter", None), ("shared", False)])
def test_rollout_in_parts_equals_the_rollout_at_once(tmp_path, critic, sampler_logps):
    """Greedily, in which parts of different lengths the sampler's own log-probabilities and values are put together."""
    batches = []
    for size in (None, 3):
        trainer = make_trainer(
            tmp_path,
            with_adapter(make_model()),
            kind=Remembering,
            critic=critic,
            sampler_logps=sampler_logps,
            per_device_train_batch_size=8,
            num_iterations=1,
            max_steps=1,
            rollout_batch_size=size,
            top_k=1,
        )
        trainer.train()
        batches.append(trainer.batches[0])
    assert len({int(mask.sum()) for mask in batches[0]["completion_mask"]}) > 1
    here = batches[0]["completion_mask"].bool()
    assert torch.equal(here, batches[1]["completion_mask"].bool())
    for key in ("completion_ids", "old_per_token_logps", "old_values", "advantages"):
        torch.testing.assert_close(batches[1][key][here], batches[0][key][here], rtol=1e-4, atol=1e-4)


def test_continuous_batching_keeps_types_and_evaluation_mode(tmp_path, monkeypatch):
    """TRL casts all weights to bf16 for it, and sets training mode, in which an evaluation would teach the policy."""
    seen = []

    def generate_batch(model, inputs, **options):
        seen.append({weight.dtype for weight in model.parameters()})
        return {str(row): types.SimpleNamespace(generated_tokens=[5 + row, EOS]) for row in range(len(inputs))}

    monkeypatch.setattr(type(make_model()), "generate_batch", generate_batch)
    options = {"use_transformers_continuous_batching": True, "bf16": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        tmp_path, with_adapter(make_model()), kind=Remembering, init={"eval_dataset": prompts(4)}, max_steps=4, **options
    )
    trainer.train()
    assert seen == [{torch.bfloat16}] * len(seen) != []
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert len(trainer.batches) == 2, "an evaluation was taken for training"
    assert logged(trainer, "eval_score")


# --- Compilation and kernels ------------------------------------------------------------------------------


def test_compiled_policy_has_the_same_losses_and_scores(tmp_path):
    figures = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = with_adapter(make_model(num_hidden_layers=1))
        init = {"eval_dataset": prompts(4)}
        options |= {"critic": "adapter", "eval_strategy": "steps", "eval_steps": 1}
        trainer = make_trainer(tmp_path, model, kind=Remembering, init=init, max_steps=2, **options)
        trainer.train()
        figures.append([*trainer.losses, *logged(trainer, "value/loss"), *logged(trainer, "eval_score")])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(figures[0]) == 6
    assert figures[1] == pytest.approx(figures[0], abs=1e-6)


def test_layers_compile_when_loaded_and_not_with_checkpointing(base, tmp_path):
    def load(checkpointing):
        options = {"bf16": False, "use_cpu": True, "torch_compile": True, "torch_compile_backend": "eager"}
        args = SFTConfig(str(tmp_path), gradient_checkpointing=checkpointing, **options)
        return load_model(ModelConfig(model_name_or_path=str(base)), args), strip_consumed_arguments(args)

    model, rest = load(False)
    assert {name for name, module in model.named_modules() if module._compiled_call_impl} == {
        "model.layers.0",
        "model.layers.1",
    }
    assert not rest.torch_compile
    with pytest.raises(RecipeError, match=r"torch_compile: .*`gradient_checkpointing: false`"):
        load(True)


@pytest.fixture
def fake_liger(monkeypatch):
    """A stand-in for Liger that records its calls and replaces RMSNorm."""
    asked = []

    def patch(model, **options):
        asked.append((type(model).__name__, options))
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = lambda x, module=module: torch.nn.functional.rms_norm(
                    x, module.weight.shape, module.weight, module.variance_epsilon
                )

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance = patch
    for place in ("transformers.integrations.liger", "transformers.training_args"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda: True, raising=False)
    return asked


@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")
def test_liger_replaces_layers_and_not_the_forward_pass(fake_liger, base, tmp_path):
    plain = make_trainer(tmp_path, with_adapter(make_model()), kind=Remembering, critic="adapter")
    plain.train()
    trainer = make_trainer(tmp_path, with_adapter(make_model()), kind=Remembering, critic="adapter", use_liger_kernel=True)
    trainer.train()
    assert trainer.losses == pytest.approx(plain.losses, abs=1e-5)
    args = RewardConfig(
        str(tmp_path), use_liger_kernel=True, max_steps=1, bf16=False, use_cpu=True, report_to="none", save_strategy="no"
    )
    rows = Dataset.from_dict({"prompt": ["w5 "] * 4, "chosen": ["w6 "] * 4, "rejected": ["w7 w8 "] * 4})
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    RankingTrainer(model, args=args, train_dataset=rows, processing_class=make_tokenizer()).train()
    assert fake_liger == [
        ("LlamaForCausalLM", {"fused_linear_cross_entropy": False}),
        ("LlamaForSequenceClassification", {"fused_linear_cross_entropy": False}),
    ]


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({"attn_implementation": "flash_attention_2"}, {}, "^attn_implementation: flash_attention_2: .*leave the key out"),
        ({"attn_implementation": "flex_attention"}, {}, "^attn_implementation: flex_attention "),
        ({"attn_implementation": "sdap"}, {}, "^attn_implementation: sdap: "),
        (
            {"attn_implementation": "kernels-community/flash-attn2"},
            {},
            r"^attn_implementation: kernels-community/flash-attn2: .*'\.\[kernels\]'`",
        ),
        ({}, {"model_init_kwargs": {"use_kernels": True}}, "^model_init_kwargs: use_kernels: "),
    ],
)
def test_missing_package_is_refused_with_its_key(base, tmp_path, model, training, message):
    arguments = ModelConfig(model_name_or_path=str(base), **model)
    with pytest.raises(RecipeError, match=message):
        load_model(arguments, SFTConfig(str(tmp_path), bf16=False, use_cpu=True, **training))
