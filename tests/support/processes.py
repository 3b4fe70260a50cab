"""Run stages in two processes on CPUs, with the launchers of `configs/accelerate/`.

Each of the two processes runs this file as a script. Its arguments are the launcher and a JSON file of ports and stages.
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
from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401 - imported before forking


def in_two_processes(launcher, stages, folder):
    """Run stages, `[recipe, option, ...]` or cases of `ppo_cases`, with `configs/accelerate/{launcher}.yaml`."""
    file = folder / f"{launcher}.json"
    file.write_text(json.dumps(list(zip(free_ports(len(stages)), stages, strict=True))))
    config = ("--config_file", str(ROOT / f"configs/accelerate/{launcher}.yaml"), "--num_processes", "2", __file__)
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", __file__]
    environment = prepare_multi_gpu_env(arguments) | {"ACCELERATE_USE_CPU": str(launcher == "ddp").lower()}
    result = subprocess.run([*command, launcher, str(file)], env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, (result.stdout + result.stderr)[-20000:]


def free_ports(count):
    """Return free ports outside the range from which the system gives ephemeral ones."""
    with contextlib.ExitStack() as open_:  # open at the same time, so that they differ
        ports = []
        while len(ports) < count:
            with contextlib.suppress(OSError):
                port = random.SystemRandom().randrange(20_000, 32_000)
                open_.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


def run_stages(stages):
    """Run stages in this process."""
    for recipe, *options in stages:
        if recipe == "ppo_cases":
            folder, case, others = options
            ppo_cases.run(Path(folder), case, 2, **others)
        else:
            run_recipe(recipe, *options)


def run_each_forked(stages):
    """Run each stage in a forked process; a new one would spend eight seconds on imports."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # a store that only one group of processes can use
    for port, stage in stages:
        os.environ["MASTER_PORT"] = str(port)
        if not os.fork():
            try:
                run_stages([stage])
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)  # Gloo's threads would abort Python's shutdown, and hide the traceback
            os._exit(0)
        _, status = os.wait()
        if status:
            sys.exit(f"{stage[0]}: {os.waitstatus_to_exitcode(status)}")


def allow_fsdp_on_cpu():
    """Let Accelerate take CPUs for accelerators, since it allows FSDP on those only."""
    PartialState._prepare_backend = lambda self, cpu, sagemaker_dp, backend: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    if sys.argv[1] != "ddp":
        os.environ.pop("ACCELERATE_USE_CPU")
        allow_fsdp_on_cpu()
    run_each_forked(json.loads(Path(sys.argv[2]).read_text()))
