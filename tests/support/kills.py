"""Kill stages at random moments and resume them until they finish.

Each attempt is a fork of a process that has imported everything, which saves eight seconds. Subprocesses of a pipeline are
forked likewise. The tests run this file as a script, since their own threads would not survive a fork. Its arguments are the
folder, a JSON file of stages, the number of kills and a seed.
"""

import contextlib
import errno
import fcntl
import gc
import io
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from rlhf_recipes.core.files import RECIPE
from rlhf_recipes.pipeline.running import LOCK
from rlhf_recipes.stages import pipeline_stages, training_stages
from support import ROOT, run_recipe

# Imported before forking
import datasets
import peft  # noqa: F401
from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

RECIPES = (*pipeline_stages(), "merge")
LIMIT = 120.0  # seconds; no stage here takes as long


def forked(action, log):
    """Run `action` in a forked process that leads a process group and writes to `log`; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        with contextlib.suppress(OSError):  # parent and child both set it, since either may run first
            os.setpgid(process, process)
        return process
    os.setpgid(0, 0)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run_and_exit(action)


def run_and_exit(action):
    """Run `action` and end this forked process with its exit status, without Python's shutdown."""
    code = 1
    try:
        action()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_or_kill(process, seconds):
    """Wait for a process, kill it after `seconds`, and return its exit code or minus its signal."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            break
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)  # the group has the stages of a pipeline
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def full_disk(recipe, folder):
    """Make the disk of this process full: large files, or where there are none all files, fail."""
    if recipe in training_stages():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    else:
        io.open = fail_in_folder(io.open, errno.ENOSPC, folder, in_writing)


def read_only(folder):
    """Make a folder read-only for this process."""
    for name in ("mkdir", "replace", "unlink"):
        setattr(os, name, fail_in_folder(getattr(os, name), errno.EROFS, folder))
    os.open = fail_in_folder(
        os.open, errno.EROFS, folder, lambda flags=0, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    io.open = fail_in_folder(io.open, errno.EROFS, folder, in_writing)


def in_writing(mode="r", *_, **__):
    """Whether a mode opens a file for writing."""
    return set(mode) & set("wax+")


def fail_in_folder(function, code, folder, writes=lambda *_, **__: True):
    """Return a function that fails for paths in a folder if it writes."""

    def refuse(path, *arguments, **options):
        if str(path).startswith(f"{folder}/") and writes(*arguments, **options):
            raise OSError(code, os.strerror(code), str(path))
        return function(path, *arguments, **options)

    return refuse


def unwritable(folder, name, stage):
    """Run a stage on a full disk and on a read-only one, and store its exit codes."""
    recipe, output, log = stage[0], folder / "full" / name, folder / "full" / f"{name}.log"
    output.parent.mkdir(exist_ok=True)
    if recipe not in ("sample", "merge", "pipeline"):
        leave_out = ("checkpoint-*",) if recipe == "ppo" else ()  # PPO starts anew, the others resume at their end
        shutil.copytree(folder / "whole" / name, output, ignore=shutil.ignore_patterns(*leave_out))
    codes = {"full": wait_or_kill(start(stage, output, log, lambda: full_disk(recipe, output.parent)), LIMIT)}
    elsewhere = folder / "read-only" / name
    elsewhere.parent.mkdir(exist_ok=True)
    stage = [str(word).replace("OUT.yaml", str(folder / "whole" / "pipeline.yaml")) for word in stage]
    forbidden = folder / "whole" / name if recipe == "pipeline" else elsewhere.parent
    codes["read-only"] = wait_or_kill(
        start(stage, elsewhere, elsewhere.with_suffix(".log"), lambda: read_only(forbidden)), LIMIT
    )
    (folder / f"{name}.codes.json").write_text(json.dumps(codes))


def pipeline(*options):
    """Run `recipes/pipeline.py` with forked stages in its process group."""

    def run(command, **_):
        place = next(number for number, word in enumerate(command) if word.endswith(".py"))
        process = os.fork()
        if not process:
            run_and_exit(lambda: run_recipe(Path(command[place]).stem, *command[place + 1 :]))
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))

    subprocess.run = run
    run_recipe("pipeline", *options)


def start(stage, output, log, first=lambda: None):
    """Start a stage in a folder of its own, after `first` in the same process."""
    recipe, *options = [str(word).replace("OUT", str(output)) for word in stage]
    run = pipeline if recipe == "pipeline" else lambda *words: run_recipe(recipe, *words)
    return forked(lambda: (first(), run(*options)), log)


def wait_for_lock(path):
    """Wait until the stages of a killed pipeline have ended."""
    if path.exists():
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def killed_until_done(stage, output, log, kills, seconds, rng):
    """Kill a stage up to `kills` times, then let it finish; return the number of kills.

    Moments are random shares of the unbroken run's time, or of half of it, since a resumed run has less to do.
    """
    count = 0
    for _ in range(kills):
        if stage[0] == "merge" and (output / RECIPE).exists():  # it refuses to start again
            return count
        delay = rng.uniform(0, seconds * rng.choice([1.0, 1.0, 0.5]))
        code = wait_or_kill(start(stage, output, log), delay)
        wait_for_lock(output / LOCK)
        if code != -signal.SIGKILL:
            if code:
                raise AssertionError(f"{stage[0]}: exit status {code} of a resumed run:\n{Path(log).read_text()[-6000:]}")
            return count
        count += 1
    code = 0 if stage[0] == "merge" and (output / RECIPE).exists() else wait_or_kill(start(stage, output, log), LIMIT)
    if code:
        raise AssertionError(f"{stage[0]}: exit status {code} of the last run:\n{Path(log).read_text()[-6000:]}")
    return count


def main(folder, stages, kills, seed):
    """Run each stage unbroken in `whole/NAME` and killed in `killed-N/NAME`; print how often."""
    for recipe in RECIPES:
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="imported")
    datasets.disable_progress_bars()
    gc.freeze()  # garbage collections of stages need not look at imports
    for name, stage in stages.items():
        rng = random.Random(f"{seed}/{name}")
        log = folder / f"{name}.log"
        started = time.monotonic()
        if code := wait_or_kill(start(stage, folder / "whole" / name, log), LIMIT):
            raise AssertionError(f"{name}: exit status {code}:\n{log.read_text()[-6000:]}")
        seconds = time.monotonic() - started
        unwritable(folder, name, stage)
        left, rounds = kills, 0
        while left > 0:  # a run that finished before its kills starts again elsewhere
            rounds += 1
            left -= max(1, killed_until_done(stage, folder / f"killed-{rounds}" / name, log, left, seconds, rng))
        print(
            f"{name}: {kills} kills, {rounds} runs, {seconds:.1f} s unbroken, {time.monotonic() - started:.1f} s in all",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]), int(sys.argv[4]))
