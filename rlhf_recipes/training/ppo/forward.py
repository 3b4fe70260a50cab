"""Forward passes of policy and critic over a batch of completions.

TRL pads a batch to its longest prompt and its longest completion. Here each pass is cut to its own longest row, and the LM head
sees the tokens of completions alone: logits are the largest tensors of PPO.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_recipes.models.backbone import backbone, forward_backbone
from rlhf_recipes.training.ppo.critic import Critic, positions, shift_hidden_states

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
    """Run a language model over prompts and completions.

    Args:
        model: the policy or the reference, with TRL's fused LM head, prepared by `accelerator`.
        input_ids: (B, P + T).
        attention_mask: (B, P + T).
        length: T, the number of tokens of the completions.
        accelerator: of the trainer.
        critic: gives values where it shares the policy's backbone.
        batch_size: rows a pass; by default all.
        entropy: whether to compute entropies.
        aux_loss: whether to compute the load-balancing loss.
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
    return PolicyOutput(
        torch.cat(logps)[order],
        torch.cat(entropies)[order] if entropy else None,
        torch.cat(values)[order] if critic.shares_backbone else None,
        torch.stack(aux_losses).mean() if aux_loss else None,
    )


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

    Args:
        critic: if it shares the policy's backbone, the backbone runs without gradients.
        policy: the policy, as prepared by `accelerator`.
        input_ids: (B, P + T).
        attention_mask: (B, P + T).
        length: T, the number of tokens of the completions.
        accelerator: of the trainer.
        batch_size: rows a pass; by default all.
    """
    chunks, order = split_by_length(attention_mask, batch_size or len(input_ids))
    values = []
    for rows in chunks:
        ids, mask, kept = trim_padding(input_ids[rows], attention_mask[rows], length)
        hidden = None
        with accelerator.autocast():
            if critic.shares_backbone:
                with torch.no_grad():
                    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
                    outputs = forward_backbone(accelerator.unwrap_model(policy), **inputs, use_cache=False)
                hidden = shift_hidden_states(outputs.last_hidden_state, kept)
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
