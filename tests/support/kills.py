"""Stages that are killed at random moments, and gone on with until they end.

Each attempt is a process forked from one that has imported all that a stage needs: it costs the stage alone, and not the eight
seconds in which Python starts and imports. A stage's own subprocesses, those of the pipeline, are forked likewise.

Run as a script by the tests, which have threads that forking would not survive: the folder, a JSON file of stages, how often to
kill each, and a seed.
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
from rlhf_recipes.stages import training_stages
from support import ROOT, run_recipe

# What recipes import where they are first asked for it
import datasets
import peft  # noqa: F401
from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

RECIPES = ("sft", "reward", "dpo", "ppo", "sample", "rank", "evaluate", "merge")
LIMIT = 120.0  # seconds that no stage here takes


def forked(action, log):
    """Starts `action` in a process of its own, which leads a group of processes; its id. It writes to the file `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        with contextlib.suppress(OSError):  # also there, whichever of the two comes first; of one that has ended it fails
            os.setpgid(process, process)
        return process
    os.setpgid(0, 0)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    to_its_end(action)


def to_its_end(action):
    """Does `action`, and ends this process, which was forked, with its exit status and without what Python does at its end."""
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


def ended(process, seconds):
    """Waits for a process; its exit code, or that of the signal that ended it, less than 0. It is killed after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            break
        time.sleep(0.002)
    os.killpg(process, signal.SIGKILL)  # with the stages of a pipeline
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def full_disk(recipe, folder):
    """Lets this process write small files alone, or if it writes no others, none."""
    if recipe in training_stages():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    else:
        io.open = refusing(io.open, errno.ENOSPC, folder, in_writing)


def read_only(folder):
    """Lets this process change nothing in a folder."""
    for name in ("mkdir", "replace", "unlink"):
        setattr(os, name, refusing(getattr(os, name), errno.EROFS, folder))
    os.open = refusing(os.open, errno.EROFS, folder, lambda flags=0, *_, **__: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    io.open = refusing(io.open, errno.EROFS, folder, in_writing)


def in_writing(mode="r", *_, **__):
    """Whether a file that is opened in this mode can be written."""
    return set(mode) & set("wax+")


def refusing(function, code, folder, writes=lambda *_, **__: True):
    """The same function, which fails for paths in a folder if it writes."""

    def refuse(path, *arguments, **options):
        if str(path).startswith(f"{folder}/") and writes(*arguments, **options):
            raise OSError(code, os.strerror(code), str(path))
        return function(path, *arguments, **options)

    return refuse


def unwritable(folder, name, stage):
    """Runs a stage on a full disk, over its own result if it would write it again, and on one that is read-only."""
    recipe, output, log = stage[0], folder / "full" / name, folder / "full" / f"{name}.log"
    output.parent.mkdir(exist_ok=True)
    if recipe not in ("sample", "merge", "pipeline"):
        leave_out = ("checkpoint-*",) if recipe == "ppo" else ()  # this one begins anew, and the others go on from their end
        shutil.copytree(folder / "whole" / name, output, ignore=shutil.ignore_patterns(*leave_out))
    codes = {"full": ended(start(stage, output, log, lambda: full_disk(recipe, output.parent)), LIMIT)}
    elsewhere = folder / "read-only" / name
    elsewhere.parent.mkdir(exist_ok=True)
    stage = [str(word).replace("OUT.yaml", str(folder / "whole" / "pipeline.yaml")) for word in stage]
    forbidden = folder / "whole" / name if recipe == "pipeline" else elsewhere.parent
    codes["read-only"] = ended(start(stage, elsewhere, elsewhere.with_suffix(".log"), lambda: read_only(forbidden)), LIMIT)
    (folder / f"{name}.codes.json").write_text(json.dumps(codes))


def pipeline(*options):
    """`recipes/pipeline.py`, whose stages are forked in its group of processes, and not launched."""

    def run(command, **_):
        place = next(number for number, word in enumerate(command) if word.endswith(".py"))
        process = os.fork()
        if not process:
            to_its_end(lambda: run_recipe(Path(command[place]).stem, *command[place + 1 :]))
        return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))

    subprocess.run = run
    run_recipe("pipeline", *options)


def start(stage, output, log, first=lambda: None):
    """A stage in a folder of its own; `first` is done in its process before."""
    recipe, *options = [str(word).replace("OUT", str(output)) for word in stage]
    run = pipeline if recipe == "pipeline" else lambda *words: run_recipe(recipe, *words)
    return forked(lambda: (first(), run(*options)), log)


def wait_for_lock(path):
    """Waits until the stages of a pipeline that was killed are gone: nobody waits for those."""
    if path.exists():
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def killed_until_done(stage, output, log, kills, seconds, rng):
    """Kills a stage up to `kills` times, each after a random share of the time that the unbroken one took; then lets it end.

    A run that goes on has less to do, so the moments are drawn from what may be left: from all of it, or from its end. Returns
    how often it was killed.
    """
    count = 0
    for _ in range(kills):
        if stage[0] == "merge" and (output / RECIPE).exists():  # it refuses to begin again, and is done
            return count
        delay = rng.uniform(0, seconds * rng.choice([1.0, 1.0, 0.5]))
        code = ended(start(stage, output, log), delay)
        wait_for_lock(output / LOCK)
        if code != -signal.SIGKILL:
            if code:
                raise AssertionError(
                    f"{stage[0]}: exit status {code} when it was gone on with:\n{Path(log).read_text()[-6000:]}"
                )
            return count
        count += 1
    code = 0 if stage[0] == "merge" and (output / RECIPE).exists() else ended(start(stage, output, log), LIMIT)
    if code:
        raise AssertionError(f"{stage[0]}: exit status {code} in the end:\n{Path(log).read_text()[-6000:]}")
    return count


def main(folder, stages, kills, seed):
    """Runs each stage unbroken in `whole/NAME`, and killed again and again in `killed/NAME`; prints how often."""
    for recipe in RECIPES:
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="imported")
    datasets.disable_progress_bars()
    gc.freeze()  # no stage has to look through all that was imported
    for name, stage in stages.items():
        rng = random.Random(f"{seed}/{name}")
        log = folder / f"{name}.log"
        started = time.monotonic()
        if code := ended(start(stage, folder / "whole" / name, log), LIMIT):
            raise AssertionError(f"{name}: exit status {code}:\n{log.read_text()[-6000:]}")
        seconds = time.monotonic() - started
        unwritable(folder, name, stage)
        left, rounds = kills, 0
        while left > 0:  # one that ended too soon begins again, elsewhere
            rounds += 1
            left -= max(1, killed_until_done(stage, folder / f"killed-{rounds}" / name, log, left, seconds, rng))
        print(
            f"{name}: {kills} kills, {rounds} runs, {seconds:.1f} s unbroken, {time.monotonic() - started:.1f} s in all",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3]), int(sys.argv[4]))
