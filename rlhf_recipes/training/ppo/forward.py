"""Log-probabilities and values, by forward passes or recorded while sampling.

TRL pads a batch to its longest prompt and its longest completion. Here each pass is cut to its own longest row, and the LM head
sees the tokens of completions alone: logits are the largest tensors of PPO.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.models.backbone import backbone, base_of
from rlhf_recipes.training.ppo.critic import Critic, completion_states, positions, shift_hidden_states

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class PolicyOutput:
    """Results of a forward pass at each of the T tokens of B completions.

    Attributes:
        logps: (B, T), log-probabilities of the tokens.
        entropies: (B, T), in nats, or None.
        values: (B, T), from a critic that shares the policy's backbone, or None.
        aux_loss: (), load-balancing loss of a mixture of experts, or None.
    """

    logps: Tensor
    entropies: Tensor | None = None
    values: Tensor | None = None
    aux_loss: Tensor | None = None


def forward_policy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    length: int,
    *,
    accelerator: Accelerator,
    critic: Critic,
    batch_size: int | None = None,
    entropy: bool = False,
    aux_loss: bool = False,
) -> PolicyOutput:
    """Run a language model with TRL's fused head over prompts and completions.

    Args:
        model: the policy or the reference, prepared by `accelerator`.
        input_ids: (B, P + T).
        attention_mask: (B, P + T).
        length: T, the number of tokens of the completions.
        accelerator: of the trainer.
        critic: gives values where it shares the policy's backbone.
        batch_size: rows a pass; by default all.
        entropy: compute entropies, too.
        aux_loss: compute the load-balancing loss, too.
    """
    chunks, order = split_by_length(attention_mask, batch_size or len(input_ids))
    options = {"output_router_logits": True} if aux_loss else {}
    logps, entropies, values, aux_losses = [], [], [], []
    for rows in chunks:
        ids, mask, kept = trim_padding(input_ids[rows], attention_mask[rows], length)
        with _completion_states_only(accelerator.unwrap_model(model), kept) as states, accelerator.autocast():
            outputs = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                shift_labels=ids[:, -kept:].masked_fill(mask[:, -kept:] == 0, -100),  # one for each state that is left
                fused_lm_head=True,
                **options,
            )
        logps.append(pad_right(outputs.log_probs, length))
        if entropy:
            entropies.append(pad_right(outputs.entropy, length))
        if critic.shares_backbone:
            values.append(pad_right(critic(states[0], ids, mask, kept), length))
        if aux_loss:
            aux_losses.append(outputs.aux_loss)
    in_order = [torch.cat(parts)[order] if parts else None for parts in (logps, entropies, values)]
    return PolicyOutput(*in_order, torch.stack(aux_losses).mean() if aux_loss else None)


@contextlib.contextmanager
def _completion_states_only(model: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """Cut the backbone's output to the states of the last `count` tokens, and list it."""
    states: list[Tensor] = []

    def cut(module: nn.Module, arguments: tuple, outputs: dict) -> dict:
        outputs.last_hidden_state = shift_hidden_states(outputs.last_hidden_state, count)
        states.append(outputs.last_hidden_state)
        return outputs

    handle = backbone(model).register_forward_hook(cut)
    try:
        yield states
    finally:
        handle.remove()


def forward_critic(
    critic: Critic,
    policy: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    length: int,
    *,
    accelerator: Accelerator,
    batch_size: int | None = None,
) -> Tensor:
    """Return values (B, T) by a pass of the critic, which must be active.

    If it shares the backbone of the policy, that runs without gradients. The other arguments are those of `forward_policy`.
    """
    chunks, order = split_by_length(attention_mask, batch_size or len(input_ids))
    values = []
    for rows in chunks:
        ids, mask, kept = trim_padding(input_ids[rows], attention_mask[rows], length)
        hidden = None
        with accelerator.autocast():
            if critic.shares_backbone:
                with torch.no_grad():
                    hidden = completion_states(accelerator.unwrap_model(policy), ids, mask, kept)
            values.append(pad_right(critic(hidden, ids, mask, kept), length))
    return torch.cat(values)[order]


# --- Padding ---------------------------------------------------------------------------------------------


def trim_padding(input_ids: Tensor, attention_mask: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Drop the columns at both ends in which every row is padding.

    Args:
        input_ids: (B, P + T).
        attention_mask: (B, P + T), which may have holes.
        length: T, the number of tokens of the completions.

    Returns:
        Ids, mask, and how many columns of the completions are left. One column of prompt and one of completion always stay.
    """
    used = attention_mask.any(dim=0)
    prompt = input_ids.size(1) - length
    start = int(used[:prompt].int().argmax()) if used[:prompt].any() else prompt - 1
    completion = used[prompt:].nonzero()
    kept = int(completion[-1]) + 1 if len(completion) else 1
    columns = slice(start, prompt + kept)
    return input_ids[:, columns], attention_mask[:, columns], kept


def split_by_length(mask: Tensor, size: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Group the rows of a mask (B, T) by length into passes of `size` rows.

    Returns:
        The row numbers of each pass, and the index that puts concatenated results back in order.
    """
    rows = torch.arange(len(mask), device=mask.device)
    if size < len(mask):
        rows = mask.sum(1).argsort(stable=True, descending=True)
    return rows.split(size), rows.argsort()


def pad_right(values: Tensor, length: int) -> Tensor:
    """Pad (B, kept) with 0 on the right to (B, length)."""
    return nn.functional.pad(values, (0, length - values.size(1)))


# --- Recorded while sampling -----------------------------------------------------------------------------


class GenerationRecorder:
    """Context that records one call of `generate`, keeping the logits of one step."""

    def __init__(self, model: nn.Module, temperature: float, critic: Critic):
        self.model, self.temperature, self.critic = model, temperature, critic
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._tokens: list[Tensor] = []
        self._logps: list[Tensor] = []
        self._values: list[Tensor] = []

    def __enter__(self) -> "GenerationRecorder":
        base = base_of(self.model)
        self._handles = [
            backbone(base).register_forward_hook(self._keep_states),
            base.get_output_embeddings().register_forward_pre_hook(self._keep_head_input),
            base.register_forward_hook(self._record_step, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_states(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        self._hidden = outputs.last_hidden_state[:, -1:]

    def _keep_head_input(self, module: nn.Module, arguments: tuple) -> None:
        if self._hidden is None:  # OPT and BART call a part of the backbone
            self._hidden = arguments[0][:, -1:]

    def _record_step(self, module: nn.Module, arguments: Any, options: dict[str, Any], outputs: Any) -> None:
        ids = options.get("input_ids")
        if ids is None or (self.critic.shares_backbone and self._hidden is None):
            self._refuse()
        if self._logits is not None:  # this step reads the token that was sampled from the logits of the last one
            self._tokens.append(ids[:, -1:])
            self._logps.append(self._logps_of(ids[:, -1:]))
        self._logits = outputs.logits[:, -1].float() / self.temperature
        if self.critic.shares_backbone:
            self._values.append(self.critic(self._hidden, None, None, 1))
        self._hidden = None

    def _logps_of(self, tokens: Tensor) -> Tensor:
        return self._logits.gather(1, tokens) - self._logits.logsumexp(1, keepdim=True)

    def check(self, completions: list[list[int]]) -> None:
        """Refuse completions that were not sampled token by token from `forward`."""
        rows = torch.cat(self._tokens, dim=1).tolist() if self._tokens else [[]] * len(completions)
        same = (row[: len(ids) - 1] == ids[:-1] for row, ids in zip(rows, completions, strict=False))
        if self._logits is None or len(self._logits) != len(completions) or not all(same):
            self._refuse()

    def _refuse(self) -> None:
        raise RecipeError(
            f"sampler_logps: `generate` of {type(base_of(self.model)).__name__} does not sample token by token from `forward`. "
            "Fix: `sampler_logps: false`"
        )

    def read(self, completion_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return log-probabilities and values, (B, T); those of padding are arbitrary."""
        steps, length = len(self._logps), completion_ids.size(1)
        logps = torch.cat([*self._logps, self._logps_of(completion_ids[:, steps : steps + 1])], dim=1)
        return pad_right(logps, length), pad_right(torch.cat(self._values, dim=1), length) if self._values else None


def read_recorders(recorders: list[GenerationRecorder], completion_ids: Tensor) -> PolicyOutput:
    """Return log-probabilities and values of completions (B, T) of several calls."""
    parts = completion_ids.split([len(recorder._logits) for recorder in recorders])
    logps, values = zip(*(recorder.read(ids) for recorder, ids in zip(recorders, parts, strict=True)), strict=True)
    return PolicyOutput(torch.cat(logps), values=None if values[0] is None else torch.cat(values))
