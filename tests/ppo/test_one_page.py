"""The loop on docs/ppo_in_one_page.md: it learns, and computes what `PPOTrainer` computes."""

import re
import types

from rlhf_recipes.training.ppo.rollout import Rollout
from support import ROOT
from support.small_ppo import Remembering, logged, make_args, plain_roles

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The home of Bademo is in",
    "You can find Rozupa in",
    "Question: Where does Polevi live?\nAnswer:",
    "Gonuze works as a",
]


@pytest.fixture
def page(monkeypatch):
    """The functions of the page."""
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ppo_in_one_page.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 120
    module = types.ModuleType("page")
    exec(compile(code, "ppo_in_one_page.md", "exec"), vars(module))
    return module


@pytest.mark.slow
def test_reward_rises(page, capsys):
    page.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    rewards, kls = ([float(re.search(rf"{name} (-?[0-9.]+)", line)[1]) for line in lines] for name in ("reward", "KL"))
    assert kls[0] == 0
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert max(kls) < 5


def test_page_and_trainer_compute_the_same(page, tmp_path):
    untouched, model = (AutoModelForCausalLM.from_pretrained(page.BASE) for _ in range(2))
    options = {"kl_coef": page.KL_COEF, "gamma": page.GAMMA, "lam": page.LAMBDA, "epsilon": page.CLIP}
    options |= {"vf_coef": page.VALUE_COEF, "cliprange_value": page.CLIP_VALUE, "max_completion_length": page.LENGTH}
    args = make_args(tmp_path, **options, per_device_train_batch_size=8, num_iterations=3, max_steps=6, learning_rate=1e-3)

    def reward(completions, **columns):
        return [page.reward(text) for text in completions]

    data, tokenizer = Dataset.from_dict({"prompt": PROMPTS * 2}), AutoTokenizer.from_pretrained(page.BASE)
    trainer = Remembering(model, reward, args, data, processing_class=tokenizer)
    trainer.train()
    assert len({int(count) for count in trainer.inputs[0]["prompt_mask"].sum(1)}) > 1, "there should be padding"
    for step, inputs in enumerate(trainer.inputs):
        batch = vars(Rollout.from_trl(inputs))
        mask, old = batch["completion_mask"], (batch["old_logps"], batch["old_values"])
        policy, _, head = plain_roles(trainer, untouched, trainer.at_update[step])
        if step % trainer.args.num_iterations == 0:
            for ours, theirs in zip(page.forward(policy, head, batch), old, strict=True):
                torch.testing.assert_close(ours * mask, theirs * mask, atol=1e-5, rtol=1e-4)
        rewards = page.token_rewards(batch["scores"], batch["old_logps"], batch["ref_logps"], mask)
        advantages, returns = page.gae(rewards, batch["old_values"], mask)
        torch.testing.assert_close(returns, batch["returns"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(page.whiten(advantages, mask), batch["advantages"], atol=1e-5, rtol=1e-5)

        policy_loss, value_loss = page.losses(policy, head, batch)
        (policy_loss + page.VALUE_COEF * value_loss).backward()
        assert policy_loss.item() == pytest.approx(trainer.losses[step], abs=1e-6)
        assert value_loss.item() == pytest.approx(logged(trainer, "value/loss")[step], rel=1e-5)
        gradients = [trainer.gradients[step], trainer.critic_gradients[step]]
        for module, expected in zip((policy, head), gradients, strict=True):
            ours = {name: weight.grad for name, weight in module.named_parameters()}
            for name, gradient in expected.items():
                torch.testing.assert_close(ours[name.removeprefix("head.")], gradient, atol=1e-6, rtol=1e-4)
    assert max(logged(trainer, "clip_ratio/region_mean")) > 0, "no ratio was clipped"
