"""State of PPO in a checkpoint: rollout, critic's optimizer, running figures."""

from dataclasses import asdict
from pathlib import Path

from rlhf_recipes.core.files import read_json, write_json
from rlhf_recipes.training.ppo.maths import Moments

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl import GRPOTrainer

STATE, OPTIMIZER, ROLLOUT = "ppo_state.json", "critic_optimizer.pt", "rollout-{}.safetensors"


def save_ppo_state(trainer: GRPOTrainer, folder: str | Path) -> None:
    """Save PPO's state in a checkpoint; each process saves its part of the rollout."""
    folder = Path(folder)
    if trainer._buffered_inputs is not None:
        tensors = {
            f"{place}/{name}": value.detach().cpu().clone()  # safetensors refuses slices of one tensor
            for place, micro_batch in enumerate(trainer._buffered_inputs)
            for name, value in micro_batch.items()
        }
        save_file(tensors, folder / ROLLOUT.format(trainer.accelerator.process_index))
    if trainer.accelerator.is_main_process:
        torch.save(trainer.critic_optimizer.optimizer.state_dict(), folder / OPTIMIZER)
        state = {
            "step": trainer._step,
            "stopped": trainer.progress.stopped,
            "updated": trainer.progress.updated,
            "kl_coef": trainer.kl.coefficient,
            "scores": asdict(trainer.score_scaling.moments),
        }
        write_json(folder / STATE, state)


def load_ppo_state(trainer: GRPOTrainer, folder: str | Path) -> None:
    """Load what `save_ppo_state` wrote."""
    folder = Path(folder)
    optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    trainer.critic_optimizer.optimizer.load_state_dict(optimizer)  # moves it to where the weights are
    state = read_json(folder / STATE)
    trainer._step = state["step"]
    trainer.progress.stopped, trainer.progress.updated = state["stopped"], state["updated"]
    trainer.kl.coefficient, trainer.score_scaling.moments = state["kl_coef"], Moments(**state["scores"])
    rollout = folder / ROLLOUT.format(trainer.accelerator.process_index)
    if rollout.exists():
        micro_batches: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(rollout).items():
            place, _, key = name.partition("/")
            micro_batches.setdefault(int(place), {})[key] = value.to(trainer.accelerator.device)
        trainer._buffered_inputs = [micro_batches[place] for place in sorted(micro_batches)]
