"""Launchers of stages in several processes, and their limits: docs/distributed.md."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.yaml import read_yaml

_DDP = "configs/accelerate/ddp.yaml"
_FSDP = "configs/accelerate/fsdp.yaml"
_MALFORMED = (OSError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Launcher:
    """How a run is launched: one process or DDP by default, each with all weights.

    Parameters:
        fsdp: version of FSDP; 0 without it.
        zero: stage of DeepSpeed's ZeRO; None without DeepSpeed.
    """

    fsdp: int = 0
    zero: int | None = None

    @property
    def shards(self) -> bool:
        """Whether each process holds only a part of the weights or optimizer states."""
        return bool(self.fsdp) or self.zero is not None

    def __str__(self) -> str:
        if self.zero is not None:
            return f"DeepSpeed ZeRO-{self.zero}"
        return "FSDP" if self.fsdp else "one process or DDP"


def read_launcher(path: str | Path) -> Launcher:
    """Return the launcher of a file of `accelerate config`.

    Raises:
        RecipeError: if the file cannot be read.
    """
    values = read_yaml(Path(path))
    with error_context(str(path), *_MALFORMED):
        kind = str(values.get("distributed_type", "NO")).upper()
        if kind == "FSDP":
            return Launcher(fsdp=int((values.get("fsdp_config") or {}).get("fsdp_version", 1)))
        if kind != "DEEPSPEED":
            return Launcher()
        config = values.get("deepspeed_config") or {}
        if file := config.get("deepspeed_config_file"):
            return Launcher(zero=_zero_stage(file, "deepspeed_config_file"))
        return Launcher(zero=int(config.get("zero_stage", 2)))


def default_launcher_config() -> Path:
    """Return the file of `accelerate config`: where accelerate would look for it."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.path.expanduser(home), "accelerate", "default_config.yaml")


def current_launcher() -> Launcher:
    """Return the launcher of this process, from the variables of `accelerate launch`."""
    from accelerate.utils import parse_flag_from_env  # it imports PyTorch

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file != "none":
            return Launcher(zero=_zero_stage(file, "ACCELERATE_DEEPSPEED_CONFIG_FILE"))
        return Launcher(zero=int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)))
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return Launcher(fsdp=int(os.environ.get("FSDP_VERSION", 1)))
    return Launcher()


def check_launcher_support(recipe: str, values: Mapping[str, Any], launcher: Launcher) -> None:
    """Reject arguments of a training stage that its launcher does not support.

    Args:
        recipe: name of the stage's recipe.
        values: its arguments, written or parsed; any may be absent. `deepspeed` and `fsdp` take precedence over `launcher`.
        launcher: launcher of the stage.

    Raises:
        RecipeError: with the key and the fix.
    """
    launcher = _launcher_of(values) or launcher
    for message in (*_unsupported_by_fsdp(recipe, values, launcher), *_unsupported_by_deepspeed(recipe, values, launcher)):
        raise RecipeError(message)


def check_single_gpu_plan(launcher: Launcher) -> None:
    """Reject `gpu_memory` with a launcher that shards: plans are for whole weights.

    Raises:
        RecipeError: with the fix.
    """
    if launcher.shards:
        raise RecipeError(f"gpu_memory: predicts one GPU, or each under DDP, not {launcher}. Fix: leave it out, or use {_DDP}")


def plain(value: Any) -> Any:
    """Return the value of an enum, and any other value unchanged."""
    return getattr(value, "value", value)


def uses_bitsandbytes(optimizer: Any) -> bool:
    """Return whether Transformers takes an optimizer from bitsandbytes."""
    name = str(plain(optimizer))
    if name.startswith(("galore", "apollo", "adamw_torch")):  # their 8-bit variants come from other packages
        return False
    return name.endswith(("_8bit", "_32bit", "_bnb")) or name.startswith(("paged_", "ademamix"))


def _unsupported_by_fsdp(recipe: str, values: Mapping[str, Any], launcher: Launcher) -> Iterator[str]:
    if not launcher.fsdp:
        return
    if recipe == "ppo" and values.get("critic") == "adapter":
        yield "critic: adapter: FSDP shards the weights of one optimizer, and the critic has its own. Fix: set `critic: shared`"
    optimizer = values.get("optim")
    if launcher.fsdp > 1 and optimizer is not None and uses_bitsandbytes(optimizer):  # version 1 has ordinary tensors
        yield f"optim: {plain(optimizer)}: bitsandbytes cannot step the shards of FSDP 2. Fix: set `optim: adamw_torch`"


def _unsupported_by_deepspeed(recipe: str, values: Mapping[str, Any], launcher: Launcher) -> Iterator[str]:
    if launcher.zero is None:
        return
    if launcher.zero == 3 and recipe == "ppo":
        yield f"PPO does not run under DeepSpeed ZeRO-3. Fix: use {_FSDP} with `critic: shared`"
    for key in ("load_in_4bit", "load_in_8bit"):
        if launcher.zero == 3 and values.get(key):
            yield f"{key}: DeepSpeed ZeRO-3 cannot shard quantized weights. Fix: use {_FSDP}"
    if recipe == "reward" and values.get("ensemble_size", 1) != 1:
        yield "ensemble_size: DeepSpeed trains one model a launch. Fix: use DDP or FSDP (configs/accelerate/)"
    for key in ("ptx_coef", "value_warmup_steps", "target_kl"):
        if recipe == "ppo" and values.get(key):
            yield f"{key}: DeepSpeed needs exactly one backward pass a micro-batch. Fix: use DDP or FSDP"


def _launcher_of(values: Mapping[str, Any]) -> Launcher | None:
    """Return the launcher that a stage's own arguments set in Transformers, if any."""
    if values.get("deepspeed"):
        return Launcher(zero=_zero_stage(values["deepspeed"], "deepspeed"))
    if not values.get("fsdp"):
        return None
    with error_context("fsdp_config", *_MALFORMED):
        config = _read_mapping(values.get("fsdp_config") or {})
        return Launcher(fsdp=int(config.get("version", config.get("fsdp_version", 2))))


def _zero_stage(config: Any, key: str) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration: a mapping, or a JSON file."""
    with error_context(key, *_MALFORMED):
        return int(_read_mapping(config).get("zero_optimization", {}).get("stage", 0))


def _read_mapping(config: Any) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else json.loads(Path(config).read_text(encoding="utf-8"))
