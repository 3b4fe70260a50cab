"""The critic, which predicts at each token the reward still to come."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.config.ppo import PPOConfig
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone, base_of, forward_backbone, hidden_width
from rlhf_recipes.models.dropout import disable_dropout
from rlhf_recipes.models.roles import POLICY, copy_adapter, use_adapter
from rlhf_recipes.models.weights import read_weights
from rlhf_recipes.rewards.reward_models import Ensemble, RewardModel, ScalarHead, Scorer

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

ADAPTER = "critic"
"""Name of the critic's adapter on the shared base."""

FILE = "critic.safetensors"


class Critic:
    """A scalar head on hidden states of the policy, an adapter, or a second model.

    Without `model` it shares the policy's backbone, and reads its states detached: the gradient of the value loss would spoil
    the policy. `adapter` is the name of its adapter on `model`.
    """

    def __init__(self, head: ScalarHead, model: nn.Module | None = None, adapter: str | None = None):
        self.head, self.model, self.adapter = head, model, adapter

    @property
    def shares_backbone(self) -> bool:
        """Whether it reads the policy's hidden states, and needs no pass of its own."""
        return self.model is None

    def place(self, args: PPOConfig, device: torch.device) -> None:
        """Move to the device, and prepare a second model for training."""
        self.head.to(device)
        if self.model is None or self.adapter is not None:
            return
        self.model.to(device)
        if args.disable_dropout:
            disable_dropout(self.model)
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    @contextlib.contextmanager
    def active(self, train: bool = False) -> Iterator[None]:
        """Activate the critic's adapter. Back-propagate a loss on its values within, too."""
        if self.model is None:
            yield
            return
        with use_adapter(self.model, self.adapter, train=train):
            yield

    def __call__(self, hidden: Tensor | None, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
        """Return the values at the last `count` tokens, fp32 (B, count).

        Args:
            hidden: the policy's hidden states there, (B, count, width), for a critic that shares its backbone.
            input_ids: (B, T), padded on either side, for one that does not.
            attention_mask: (B, T).
            count: number of tokens at the end.
        """
        if self.model is not None:
            hidden = completion_states(self.model, input_ids, attention_mask, count)
        return self.head(hidden if self.model is not None else hidden.detach())[..., 0]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained weights by name."""
        weights = {f"head.{name}": weight for name, weight in self.head.named_parameters()}
        if self.model is not None:
            with self.active(train=True):
                weights |= {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        return weights

    def save(self, folder: str | Path) -> None:
        """Save the trained weights to `critic.safetensors`."""
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.trainable().items()}
        save_file(weights, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Load the weights that `save` wrote.

        Raises:
            RecipeError: if they are a critic's of another kind.
        """
        path, weights = Path(folder) / FILE, self.trainable()
        saved = read_weights(path)
        shapes, others = ({name: weight.shape for name, weight in some.items()} for some in (weights, saved))
        if shapes != others:
            name = min(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
            raise RecipeError(f"{path}: {name}: from a critic of another kind. Fix: set `critic` as in the run that saved it")
        for name, weight in weights.items():
            weight.data.copy_(saved[name])


class CriticOptimizer:
    """The critic's optimizer, of the class of the policy's."""

    def __init__(self, critic: Critic, args: PPOConfig, policy: nn.Module):
        self.learning_rate = args.value_learning_rate
        if self.learning_rate is None:
            self.learning_rate = 1e-3 if critic.shares_backbone else args.learning_rate
        self.weights = list(critic.trainable().values())
        matrices, vectors = ([w for w in self.weights if (w.ndim > 1) == matrix] for matrix in (True, False))
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, policy)
        self.optimizer = optimizer(groups, **{**options, "lr": self.learning_rate})

    def step(self, accelerator: Accelerator, max_grad_norm: float, schedule: float) -> float | None:
        """Take a step on the mean gradient of all processes, and clear the gradients.

        Returns:
            The norm of the gradient before clipping, or None where `max_grad_norm` is 0.
        """
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad = accelerator.reduce(weight.grad, reduction="mean")
        norm = nn.utils.clip_grad_norm_(self.weights, max_grad_norm).item() if max_grad_norm > 0 else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def completion_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
    """Run the backbone; return the states that the last `count` tokens came from."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions(attention_mask)}
    return shift_hidden_states(forward_backbone(model, **inputs, use_cache=False).last_hidden_state, count)


def shift_hidden_states(hidden: Tensor, count: int) -> Tensor:
    """Return from (B, T, width) the states that the last `count` tokens came from.

    Each is one place earlier than its token.
    """
    # On a CPU a frozen linear layer of bf16 is ten times slower on a slice that is not contiguous
    return hidden[:, -count - 1 : -1].contiguous()


def positions(attention_mask: Tensor) -> Tensor:
    """Return positions (B, T), counted from the first token that is not padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def make_critic(kind: str, model: PreTrainedModel | PeftModel, rewards: list[Any]) -> Critic:
    """Make the critic that `kind` names: `"shared"`, `"adapter"` or `"model"`.

    An adapter is added to `model`, the policy.
    It starts as the first reward model, whose scores are good first guesses of values (Ouyang et al., 2022). Without one on the
    same base, its backbone starts as the policy's, and its head predicts 0.

    Raises:
        RecipeError: if the kind does not fit the policy.
    """
    has_adapters = isinstance(model, PeftModel)
    if kind == "adapter" and not has_adapters:
        raise RecipeError("critic: adapter: the policy has no adapter. Fix: `use_peft: true`, or `critic: shared` or `model`")
    if kind == "model" and has_adapters:
        raise RecipeError("critic: model: the policy is an adapter. Fix: `critic: adapter` or `shared`")
    if kind == "shared":
        return Critic(_make_head(model))
    start = next((reward for reward in rewards if isinstance(reward, Scorer)), None)
    start = start.members[0] if isinstance(start, Ensemble) else start
    if start is not None and (start.adapter is not None) != has_adapters:
        start = None
    if kind == "model":
        copied = copy.deepcopy(backbone(start.model if start else model))
        return Critic(_make_head(model, start), copied.requires_grad_(True).train())
    if start is not None and base_of(start.model) is not base_of(model):
        start = None
    copy_adapter(model, start.adapter if start else POLICY, ADAPTER)
    return Critic(_make_head(model, start), model, ADAPTER)


def _make_head(model: nn.Module, start: RewardModel | None = None) -> ScalarHead:
    """Make a head that predicts 0, or the normalised scores of a reward model."""
    head = ScalarHead(start.head.in_features if start else hidden_width(model), bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if start is not None:
        mean, std = (start.normalisation.mean, start.normalisation.std) if start.normalisation else (0.0, 1.0)
        head.weight.data.copy_(start.head.weight.data / std)
        head.bias.data.fill_(-mean / std)
    return head.to(base_of(model).get_output_embeddings().weight.device)
