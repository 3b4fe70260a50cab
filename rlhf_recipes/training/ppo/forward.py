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
    """Results of a forward pass of the policy at each of the T tokens of B completions.

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
    outputs = [
        _forward_policy(model, input_ids[rows], attention_mask[rows], length, accelerator, critic, entropy, aux_loss)
        for rows in chunks
    ]

    def join(name: str) -> Tensor | None:
        parts = [getattr(output, name) for output in outputs]
        return None if parts[0] is None else torch.cat(parts)[order]

    mean_aux_loss = torch.stack([output.aux_loss for output in outputs]).mean() if aux_loss else None
    return PolicyOutput(join("logps"), join("entropies"), join("values"), mean_aux_loss)


def _forward_policy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    length: int,
    accelerator: Accelerator,
    critic: Critic,
    entropy: bool,
    aux_loss: bool,
) -> PolicyOutput:
    ids, mask, kept = trim_padding(input_ids, attention_mask, length)
    options = {"output_router_logits": True} if aux_loss else {}
    with _completion_states_only(accelerator.unwrap_model(model), kept) as states, accelerator.autocast():
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            shift_labels=ids[:, -kept:].masked_fill(mask[:, -kept:] == 0, -100),  # one for each state that the hook leaves
            fused_lm_head=True,
            **options,
        )
    values = critic(states[0], ids, mask, kept) if critic.shares_backbone else None
    return PolicyOutput(
        pad_right(outputs.log_probs, length),
        pad_right(outputs.entropy, length) if entropy else None,
        pad_right(values, length) if values is not None else None,
        outputs.aux_loss if aux_loss else None,
    )


@contextlib.contextmanager
def _completion_states_only(model: nn.Module, count: int) -> Iterator[list[Tensor]]:
    """Have the backbone return only the states in which the last `count` tokens were written, and list them."""
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
    """Return values (B, T) by a pass through the critic's backbone. Call it while the critic is active.

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
    """Group the rows of a mask (B, T) by length, so that passes of `size` rows have little padding.

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
