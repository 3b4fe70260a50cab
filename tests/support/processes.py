"""Stages in one process and in two, by the engines of `configs/accelerate/`, on CPUs.

Run as a script by each of two processes: the engine, and a JSON file of ports and of what to run, one stage after the other.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from support import ROOT, ppo_cases, run_recipe

import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, prepare_multi_gpu_env
from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401 - imported where they are first asked for


def in_two_processes(engine, stages, folder):
    """Runs stages, each `[recipe, option, ...]` or of `ppo_cases`, by `configs/accelerate/{engine}.yaml`."""
    file = folder / f"{engine}.json"
    file.write_text(json.dumps(list(zip(free_ports(len(stages)), stages, strict=True))))
    config = ("--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml"), "--num_processes", "2", __file__)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__]
    environment = prepare_multi_gpu_env(arguments) | {"ACCELERATE_USE_CPU": str(engine == "ddp").lower()}
    result = subprocess.run([*command, engine, str(file)], env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-20000:]


def free_ports(count):
    """Ports that nobody listens on, and that the system gives to none that asks for any."""
    with contextlib.ExitStack() as open_:  # all at once, so that they are different ones
        ports = []
        while len(ports) < count:
            with contextlib.suppress(OSError):
                port = random.SystemRandom().randrange(20_000, 32_000)
                open_.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def run_stages(stages):
    """Runs stages in this process."""
    for recipe, *options in stages:
        if recipe == "ppo_cases":
            folder, case, others = options
            ppo_cases.run(Path(folder), case, 2, **others)
        else:
            run_recipe(recipe, *options)


def run_each_alone(stages):
    """Runs each stage in a process of its own, as users do, without starting Python and importing all that it needs anew."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # which is for one group of processes
    for port, stage in stages:
        os.environ["MASTER_PORT"] = str(port)
        if not os.fork():
            try:
                run_stages([stage])
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)  # no more of Python: what waits in Gloo's threads would abort it, and hide what went wrong
            os._exit(0)
        _, status = os.wait()
        if status:
            sys.exit(f"{stage[0]}: {os.waitstatus_to_exitcode(status)}")


def on_cpus():
    """Lets Accelerate, which has FSDP for accelerators only, take CPUs for them: PyTorch has it there as well."""
    PartialState._prepare_backend = lambda self, cpu, sagemaker_dp, backend: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    if sys.argv[1] != "ddp":
        os.environ.pop("ACCELERATE_USE_CPU")
        on_cpus()
    run_each_alone(json.loads(Path(sys.argv[2]).read_text()))
