"""The critic: what predicts, at each token, the reward that is still to come."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone, base_of, forward_backbone
from rlhf_recipes.models.roles import copy_adapter, use_adapter
from rlhf_recipes.models.weights import read_weights
from rlhf_recipes.rewards.reward_models import RewardModel, ScalarHead

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTER = "critic"
"""The name of its adapter on the shared base."""

FILE = "critic.safetensors"


class Critic:
    """A scalar head on hidden states: on the policy's own, on those of an adapter of its own, or of a model of its own.

    Parameters:
        head: hidden state -> value.
        model: what computes its hidden states; None: it reads the policy's, detached, so that its gradient never reaches the
            policy, which it would spoil.
        adapter: the name of its adapter on `model`, or None.
    """

    def __init__(self, head: ScalarHead, model: nn.Module | None = None, adapter: str | None = None):
        self.head, self.model, self.adapter = head, model, adapter

    @property
    def shares_backbone(self) -> bool:
        """Whether it needs the policy's hidden states, and no pass of its own."""
        return self.model is None

    @contextlib.contextmanager
    def active(self, train: bool = False) -> Iterator[None]:
        """Within, its adapter is the active one; a loss on its values must be back-propagated within too."""
        if self.model is None:
            yield
            return
        with use_adapter(self.model, self.adapter, train=train):
            yield

    def __call__(self, hidden: Tensor | None, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
        """Values of the states in which the last `count` tokens were written, fp32 (B, count).

        Args:
            hidden: the policy's hidden states there, (B, count, width); read only by a critic that has no pass of its own.
            input_ids: (B, T), padded on either side.
            attention_mask: (B, T).
            count: number of the tokens at the end whose states are valued.
        """
        if self.model is not None:
            outputs = forward_backbone(
                self.model,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions(attention_mask),
                use_cache=False,
            )
            hidden = shift_hidden_states(outputs.last_hidden_state, count)
        else:
            hidden = hidden.detach()
        return self.head(hidden)[..., 0]

    def trainable(self) -> dict[str, nn.Parameter]:
        """What it learns with, by name."""
        weights = {f"head.{name}": weight for name, weight in self.head.named_parameters()}
        if self.model is not None:
            with self.active(train=True):
                weights |= {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        return weights

    def save(self, folder: str | Path) -> None:
        """Writes `critic.safetensors`: the head, and what else it trained."""
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self.trainable().items()}
        save_file(weights, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Reads what `save` wrote.

        Raises:
            RecipeError: if it was written by a critic of another kind.
        """
        path, weights = Path(folder) / FILE, self.trainable()
        saved = read_weights(path)
        shapes, others = ({name: weight.shape for name, weight in some.items()} for some in (weights, saved))
        if shapes != others:
            name = min(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
            raise RecipeError(f"{path}: comes from a critic of another kind: {name}")
        for name, weight in weights.items():
            weight.data.copy_(saved[name])


def shift_hidden_states(hidden: Tensor, count: int) -> Tensor:
    """Of hidden states (B, T, width) those in which the last `count` tokens were written: each one place earlier."""
    # On a CPU a linear layer of bf16 is ten times slower on a slice that is not contiguous.
    return hidden[:, -count - 1 : -1].contiguous()


def positions(attention_mask: Tensor) -> Tensor:
    """Places of the tokens (B, T), counted from the first that is no padding, as in generation."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def make_critic(kind: str, model: PreTrainedModel | PeftModel, start: RewardModel | None) -> Critic:
    """The critic that `kind` names.

    A critic with a reward model to start from begins with its weights and its head, whose scores are good first guesses of
    values (Ouyang et al., 2022); without one its trunk begins as the policy, and its head predicts 0 everywhere.

    Args:
        kind: `"shared"`, `"adapter"` or `"model"`.
        model: the policy, in which an adapter is put.
        start: the reward model, or None; an adapter on another base cannot be started from.

    Raises:
        RecipeError: if it cannot be had on this model.
    """
    has_adapters = isinstance(model, PeftModel)
    if start is not None and start.adapter is not None and base_of(start.model) is not base_of(model):
        start = None  # it stands on another base
    if kind == "adapter" and not has_adapters:
        raise RecipeError("critic: adapter: the policy has no adapter: set `use_peft: true`, or `critic: shared` or `model`")
    if kind == "model" and has_adapters:
        raise RecipeError("critic: model: is for policies that are trained whole; with LoRA set `critic: adapter` or `shared`")
    if kind == "shared":
        return Critic(_head(model))
    if kind == "model":
        whole = start if start is not None and start.adapter is None else None
        trunk = copy.deepcopy(backbone(whole.model if whole else model))
        return Critic(_head(model, whole), trunk.requires_grad_(True).train())
    start = start if start is not None and start.adapter is not None else None
    copy_adapter(model, start.adapter if start else "default", ADAPTER)
    return Critic(_head(model, start), model, ADAPTER)


def _head(model: nn.Module, start: RewardModel | None = None) -> ScalarHead:
    """A head that predicts 0, or the normalised scores of a reward model."""
    width = base_of(start.model if start else model).config.get_text_config().hidden_size
    head = ScalarHead(width, bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if start is not None:
        mean, std = (start.normalisation.mean, start.normalisation.std) if start.normalisation else (0.0, 1.0)
        head.weight.data.copy_(start.head.weight.data / std)
        head.bias.data.fill_(-mean / std)
    return head.to(backbone(model).get_input_embeddings().weight.device)
