"""Stages in one process and in two, by the engines of `configs/accelerate/`, on CPUs.

Run as a script by each of two processes: the engine, and a JSON file of what to run, one stage after the other in one process,
since starting takes longest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, prepare_multi_gpu_env
from conftest import ROOT, run_recipe
from test_ppo_distributed import run as run_ppo


def in_two_processes(engine, stages, folder):
    """Runs stages, each `[recipe, option, ...]` or of `test_ppo_distributed`, by `configs/accelerate/{engine}.yaml`."""
    file = folder / f"{engine}.json"
    file.write_text(json.dumps(stages))
    config = ("--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml"), "--num_processes", "2", __file__)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__]
    environment = prepare_multi_gpu_env(arguments) | {"ACCELERATE_USE_CPU": str(engine == "ddp").lower()}
    result = subprocess.run([*command, engine, str(file)], env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def run_stages(stages):
    """Runs them in this process; but for the last, they do not end what processes share."""
    end = Accelerator.end_training
    try:
        for number, (recipe, *options) in enumerate(stages, 1):
            Accelerator.end_training = end if number == len(stages) else lambda self: None
            if recipe == "ppo_maths":
                folder, case, others = options
                run_ppo(Path(folder), case, 2, use_cpu=False, **others)
                continue
            run_recipe(recipe, *options)
    finally:
        Accelerator.end_training = end


def on_cpus():
    """Lets Accelerate, which has FSDP for accelerators only, take CPUs for them: PyTorch has it there as well."""
    PartialState._prepare_backend = lambda self, cpu, sagemaker_dp, backend: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    if sys.argv[1] != "ddp":
        os.environ.pop("ACCELERATE_USE_CPU")
        on_cpus()
    run_stages(json.loads(Path(sys.argv[2]).read_text()))
