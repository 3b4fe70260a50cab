"""Log-probabilities and values, recorded while Transformers generates."""

from typing import Any

from rlhf_recipes.models.backbone import backbone, base_of
from rlhf_recipes.training.ppo.critic import Critic
from rlhf_recipes.training.ppo.forward import PolicyOutput, pad_right

import torch
from torch import Tensor, nn


class GenerationRecorder:
    """Context that records one call of `generate`, keeping the logits of one step.

    Parameters:
        model: the language model that generates, with or without adapters.
        temperature: of sampling.
        critic: a critic that shares the policy's backbone, or None.
    """

    def __init__(self, model: nn.Module, temperature: float, critic: Critic | None):
        self.model, self.temperature, self.critic = model, temperature, critic
        self._hidden: Tensor | None = None
        self._logits: Tensor | None = None
        self._logps: list[Tensor] = []
        self._values: list[Tensor] = []

    def __enter__(self) -> "GenerationRecorder":
        self._handles = [
            backbone(self.model).register_forward_hook(self._keep_states),
            base_of(self.model).register_forward_hook(self._record_step, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep_states(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        self._hidden = outputs.last_hidden_state[:, -1:]

    def _record_step(self, module: nn.Module, arguments: Any, options: dict[str, Any], outputs: Any) -> None:
        if self._logits is not None:  # this step reads the token that was sampled from the logits of the last one
            self._logps.append(self._logps_of(options["input_ids"][:, -1:]))
        self._logits = outputs.logits[:, -1].float() / self.temperature
        if self.critic is not None:
            self._values.append(self.critic(self._hidden, None, None, 1))

    def _logps_of(self, tokens: Tensor) -> Tensor:
        return self._logits.gather(1, tokens) - self._logits.logsumexp(1, keepdim=True)

    @property
    def rows(self) -> int:
        """Number of completions."""
        return len(self._logits)

    def read(self, completion_ids: Tensor) -> PolicyOutput:
        """Return log-probabilities and values, (B, T); those of padding are arbitrary.

        Args:
            completion_ids: the sampled tokens, (B, T), padded on the right.
        """
        steps, length = len(self._logps), completion_ids.size(1)
        logps = torch.cat([*self._logps, self._logps_of(completion_ids[:, steps : steps + 1])], dim=1)
        values = pad_right(torch.cat(self._values, dim=1), length) if self.critic is not None else None
        return PolicyOutput(pad_right(logps, length), values=values)


def read_recorders(recorders: list[GenerationRecorder], completion_ids: Tensor) -> PolicyOutput:
    """Return log-probabilities and values of completions of several calls."""
    parts = completion_ids.split([recorder.rows for recorder in recorders])
    outputs = [recorder.read(ids) for recorder, ids in zip(recorders, parts, strict=True)]
    values = None if outputs[0].values is None else torch.cat([output.values for output in outputs])
    return PolicyOutput(torch.cat([output.logps for output in outputs]), values=values)
