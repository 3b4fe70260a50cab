"""Rankings, results and adapters for tests of the evaluation."""

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.types import Estimate, EvaluationResults, PolicyResult, RewardInfo
from rlhf_recipes.tiny import splits

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = resolve_path("rlhf_recipes.tiny.base")


def noisy_rankings(sizes, seed=0):
    """Return scores, human ranks and lengths of rankings; scores follow quality and length, with noise."""
    generator = np.random.default_rng(seed)
    scores, ranks, lengths = [], [], []
    for size in sizes:
        quality = generator.normal(size=size)
        length = generator.integers(5, 100, size)
        scores.append((quality + 0.02 * length + generator.normal(size=size)).tolist())
        ranks.append(np.argsort(np.argsort(-quality)).astype(float).tolist())
        lengths.append(length.tolist())
    return scores, ranks, lengths


def exactly(mean, difference=None):
    """Return an estimate of 20 prompts, with an interval of no width."""
    changed = {} if difference is None else {"difference": difference}
    return Estimate(mean=mean, interval=[mean, mean], n=20, **changed)


def policy_result(**fields):
    """Return a policy's results with the least that it must have."""
    defaults = {"adapter": None, "rewards": {}, "kl": None, "entropy": None, "diversity": {}}
    defaults["diversity"] = dict.fromkeys(("distinct_1", "distinct_2", "self_bleu", "self_bleu_within", "repetition"))
    return PolicyResult(**defaults | {"length": exactly(1.0), "ended": exactly(1.0)} | fields)


def evaluation_results(policies, rewards, **fields):
    """Return results of policies, compared with the first of them.

    Args:
        policies: Name -> result.
        rewards: Name -> the policies that were trained against it.
        fields: Other fields of `EvaluationResults`.
    """
    infos = {name: RewardInfo(trained=trained, folder=None, about=None, evaluation=None) for name, trained in rewards.items()}
    baseline = next(iter(policies))
    defaults = {"verdict": [], "compare_with": baseline, "kl_reference": baseline, "prompts": 20, "num_answers": 1}
    defaults |= {"temperature": 1.0, "seed": 0, "has_perplexity": False, "frontier": None, "examples": [], "versions": {}}
    return EvaluationResults(rewards=infos, policies=policies, **defaults | fields)


def save_adapter(folder, seed, size=0.1):
    """Save an adapter on the tiny base that changes its answers, with its tokenizer."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=size)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


def log_prob_by_hand(model, tokenizer, prompt, answer, temperature=1.0):
    """Return the log-probability of one answer, token by token."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = (model(torch.tensor([[*ids, *answer.ids]])).logits[0] / temperature).log_softmax(-1)
    return sum(logps[len(ids) - 1 + place, token].item() for place, token in enumerate(answer.ids))


def several_turns(count):
    """Return prompts of three turns: a question, its answer, and another question."""
    first, *questions = splits.evaluation(rows=count + 1)["prompt"]
    return [[*first, {"role": "assistant", "content": "I do not know."}, *question] for question in questions]
