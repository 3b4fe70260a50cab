"""Policies as adapters on one base."""

from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.generation.answers import log_probs, sample
from rlhf_recipes.generation.policies import load_policy_bank, read_policies
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.tiny import splits
from support.evaluations import BASE, log_prob_by_hand, save_adapter, several_turns
from support.tolerance import assert_close

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import ModelConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {"base": None, "sft": save_adapter(folder / "sft", 1), "ppo": save_adapter(folder / "ppo", 2)}


def load_bank(policies, tokenizer, **options):
    arguments = ModelConfig(model_name_or_path=BASE, dtype="float32", **options)
    return load_policy_bank(arguments, EvaluateArguments(), read_policies(policies), tokenizer)


def test_policies_on_one_base_equal_policies_loaded_alone(folders, tiny):
    bank = load_bank(folders, tiny[1])
    prompts = list(splits.evaluation(rows=6)["prompt"])
    answers = sample(*tiny, prompts, max_new_tokens=4, seed=1)
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(BASE)
        alone = PeftModel.from_pretrained(model, folder) if folder else model
        with bank.use_policy(name) as shared:
            logps = log_probs(shared, tiny[1], prompts, answers)
        assert logps == pytest.approx(log_probs(alone.eval(), tiny[1], prompts, answers), abs=1e-4)


def test_names_that_differ_by_a_dot_are_two_policies(folders, tiny):
    prompts = list(splits.evaluation(rows=4)["prompt"])
    answers = sample(*tiny, prompts, max_new_tokens=4, seed=1)
    logps = {}
    for names in (("lr1.5", "lr1_5"), ("one", "two")):
        bank = load_bank(dict(zip(names, (folders["sft"], folders["ppo"]), strict=True)), tiny[1])
        for name in names:
            with bank.use_policy(name) as model:
                logps[name] = log_probs(model, tiny[1], prompts, answers)
    assert logps["lr1.5"] == pytest.approx(logps["one"], abs=1e-4)
    assert logps["lr1_5"] == pytest.approx(logps["two"], abs=1e-4)
    assert np.abs(logps["one"] - logps["two"]).max() > 0.1


def test_log_probs_of_several_turns_on_a_4_bit_base(folders, tiny):
    bank = load_bank(folders, tiny[1], load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert bank.model.is_loaded_in_4bit
    config = bank.model.config.quantization_config
    prompts = several_turns(3)
    with bank.use_policy("ppo") as model:
        answers = sample(model, tiny[1], prompts, max_new_tokens=4, seed=1)
    for name in ("base", "sft"):
        model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=config, dtype=torch.float32).eval()
        alone = PeftModel.from_pretrained(model, folders[name]).eval() if name != "base" else model
        # Else bitsandbytes computes in bf16 on CPUs with AVX512-BF16: log-probabilities differ by 0.04 instead of 1e-6.
        disable_cpu_4bit_repacking(alone)
        expected = [log_prob_by_hand(alone, tiny[1], *pair) for pair in zip(prompts, answers, strict=True)]
        with bank.use_policy(name) as shared:
            assert_close(log_probs(shared, tiny[1], prompts, answers), expected, torch.float32)
        last_turns = [prompt[-1:] for prompt in prompts]
        assert np.abs(log_probs(alone, tiny[1], last_turns, answers) - expected).max() > 0.01
