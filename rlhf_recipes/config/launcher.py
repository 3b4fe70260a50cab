"""The engines that share a run out among processes, and what each cannot do: docs/distributed.md."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.yaml import read_yaml

from accelerate.utils import parse_flag_from_env

_DDP = "configs/accelerate/ddp.yaml"
_FSDP = "configs/accelerate/fsdp.yaml"


@dataclass(frozen=True)
class Launcher:
    """By what a run is launched; by default, one process or DDP, which leave each process a whole of everything.

    Parameters:
        fsdp: the version of FSDP, 0 without it.
        zero: the stage of DeepSpeed's ZeRO, None without DeepSpeed.
    """

    fsdp: int = 0
    zero: int | None = None

    @property
    def shares_memory(self) -> bool:
        """Whether a process holds less, or more, than it would on one GPU alone."""
        return bool(self.fsdp) or self.zero is not None

    def __str__(self) -> str:
        if self.zero is not None:
            return f"DeepSpeed ZeRO-{self.zero}"
        return "FSDP" if self.fsdp else "one process or DDP"


def read_launcher(path: str | Path) -> Launcher:
    """The engine that a file of `accelerate config` names.

    Raises:
        RecipeError: if it cannot be read.
    """
    path = Path(path)
    values = read_yaml(path)
    kind, where = str(values.get("distributed_type", "NO")).upper(), f"{path}: "
    if kind == "FSDP":
        return Launcher(fsdp=_number(_mapping(values.get("fsdp_config")).get("fsdp_version", 1), f"{where}fsdp_version"))
    if kind != "DEEPSPEED":
        return Launcher()
    own = _mapping(values.get("deepspeed_config"))
    if named := own.get("deepspeed_config_file"):
        return Launcher(zero=_zero_stage(named, f"{where}deepspeed_config_file"))
    return Launcher(zero=_number(own.get("zero_stage", 2), f"{where}zero_stage"))


def current_launcher() -> Launcher:
    """The engine that `accelerate launch` has told this process of, by its environment."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if named != "none":
            return Launcher(zero=_zero_stage(named, "ACCELERATE_DEEPSPEED_CONFIG_FILE"))
        key = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
        return Launcher(zero=_number(os.environ.get(key, 2), key))
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return Launcher(fsdp=_number(os.environ.get("FSDP_VERSION", 1), "FSDP_VERSION"))
    return Launcher()


def check_launcher_support(recipe: str, values: Mapping[str, Any], engine: Launcher) -> None:
    """Refuses arguments that the engine of a stage would fail on, or get wrong, once it runs.

    Args:
        recipe: of the stage, which trains.
        values: its arguments as they are written or parsed; any may be absent. Their own `deepspeed` and `fsdp` are heeded.
        engine: that launches it.

    Raises:
        RecipeError: with the key, and what to take instead.
    """
    engine = _own_engine(values) or engine
    for message in (*_not_under_fsdp(recipe, values, engine), *_not_under_deepspeed(recipe, values, engine)):
        raise RecipeError(message)


def plain(value: Any) -> Any:
    """A value, and of an enum what a file has for it."""
    return getattr(value, "value", value)


def uses_bitsandbytes(optimizer: Any) -> bool:
    """Whether Transformers takes an optimizer from bitsandbytes."""
    name = str(plain(optimizer))
    if name.startswith(("galore", "apollo", "adamw_torch")):  # those in 8 bits or fewer are of other packages
        return False
    return name.endswith(("_8bit", "_32bit", "_bnb")) or name.startswith(("paged_", "ademamix"))


def _not_under_fsdp(recipe: str, values: Mapping[str, Any], engine: Launcher) -> Iterator[str]:
    if not engine.fsdp:
        return
    if recipe == "ppo" and values.get("critic") == "adapter":
        yield "critic: adapter: FSDP shares out one optimizer's weights, and these are another's: set `shared`"
    optimizer = values.get("optim")
    if engine.fsdp > 1 and optimizer is not None and uses_bitsandbytes(optimizer):  # version 1 has ordinary tensors
        yield f"optim: {plain(optimizer)}: bitsandbytes cannot step the shares that FSDP 2 makes: set `adamw_torch`"


def _not_under_deepspeed(recipe: str, values: Mapping[str, Any], engine: Launcher) -> Iterator[str]:
    if engine.zero is None:
        return
    if engine.zero == 3 and recipe == "ppo":
        yield f"PPO does not run under DeepSpeed ZeRO-3: use {_FSDP} with `critic: shared`"
    for key in ("load_in_4bit", "load_in_8bit"):
        if engine.zero == 3 and values.get(key):
            yield f"{key}: DeepSpeed ZeRO-3 cannot share out such weights: use {_FSDP}"
    if recipe == "reward" and values.get("ensemble_size", 1) != 1:
        yield "ensemble_size: DeepSpeed trains one model a launch: use DDP or FSDP (configs/accelerate/)"
    for key in ("ptx_coef", "value_warmup_steps", "target_kl"):
        if recipe == "ppo" and values.get(key):
            yield f"{key}: DeepSpeed wants one backward pass a micro-batch, no more and no less: use DDP or FSDP"


def refuse_one_gpus_arithmetic(engine: Launcher) -> None:
    """Refuses `gpu_memory` beside an engine under which a card holds another share than the plan's.

    Raises:
        RecipeError: with what to take instead.
    """
    if engine.shares_memory:
        raise RecipeError(
            f"gpu_memory: its arithmetic is that of one GPU, or of each under DDP, and not that of {engine}: leave it out, or "
            f"use {_DDP}"
        )


def _own_engine(values: Mapping[str, Any]) -> Launcher | None:
    """The engine that a stage's own arguments ask Transformers for, beside that of the launch."""
    if values.get("deepspeed"):
        return Launcher(zero=_zero_stage(values["deepspeed"], "deepspeed"))
    if values.get("fsdp"):
        config = values.get("fsdp_config")
        config = _json(config, "fsdp_config") if isinstance(config, str) else _mapping(config)
        return Launcher(fsdp=_number(config.get("version", config.get("fsdp_version", 2)), "fsdp_config: version"))
    return None


def _zero_stage(config: Any, where: str) -> int:
    """Of DeepSpeed's own configuration: a mapping, or the JSON file that holds it."""
    config = _mapping(config) if isinstance(config, Mapping) else _json(config, where)
    return _number(_mapping(config.get("zero_optimization")).get("stage", 0), f"{where}: zero_optimization: stage")


def _json(path: Any, where: str) -> Mapping[str, Any]:
    try:
        return _mapping(json.loads(Path(str(path)).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: {path}: cannot be read as JSON ({error})") from error


def _number(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise RecipeError(f"{where}: {value!r} is not a whole number") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
