"""Stages in order: whether each of them was done already, and the command that does it."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.core.files import LOG, METRICS, read_json, write_json, write_text
from rlhf_recipes.core.yaml import to_yaml
from rlhf_recipes.data import Kind, check_source
from rlhf_recipes.evaluation.report.html import PAGE
from rlhf_recipes.evaluation.report.seeds import write_summary
from rlhf_recipes.feedback.sampling import delete_samples
from rlhf_recipes.memory.autofit import as_yaml
from rlhf_recipes.pipeline.reading import Stage, read_stages
from rlhf_recipes.stages import STAGES, parse_values
from rlhf_recipes.training.resume import checkpoints_in, remove_checkpoint

import torch

STATE, LOCK = "pipeline.json", "pipeline.lock"
LOG_TAIL = 30  # lines of a failed stage's output that are shown
PULSE = 30  # seconds after which stages that run side by side are said to be at work


@dataclass
class Pipeline:
    """The stages of a YAML file, and the folder that remembers how far they have come.

    Parameters:
        folder: of the whole; each stage has one of its name in it, unless its `arguments` name another `output_dir`.
        stages: in order.
        recipes: the folder of the recipes.
        accelerate_config: a file of `accelerate config` that every stage is launched with, or None.
        jobs: how many stages may run side by side, if none of them reads another's result.
        unselected: stages of the file that are not to be run.
    """

    folder: Path
    stages: list[Stage]
    recipes: Path
    accelerate_config: str | None = None
    jobs: int = 1
    unselected: tuple[Stage, ...] = ()
    _state: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        self._state = self._remembered()

    def _remembered(self) -> dict[str, dict[str, Any]]:
        state = read_json(self.folder / STATE)
        if not all(isinstance(stage, dict) for stage in state.values()):
            raise RecipeError(f"{self.folder / STATE}: was not written by a pipeline: delete it to run all stages again")
        return state

    def status(self, stage: Stage) -> str:
        """`done`, `begun` (it will go on from its newest checkpoint) or `to do`."""
        known = self._state.get(stage.name, {}) if stage.folder.is_dir() else {}
        if known.get("done") == stage.fingerprint and known.get("result") == stage.result():
            return "done"
        return "begun" if known.get("begun") == stage.fingerprint else "to do"

    def plan(self) -> Iterator[str]:
        """A line for each stage: what it is, where it goes, what it reads, how far it is; and what `gpu_memory` chose."""
        for number, stage in enumerate(self.stages, start=1):
            reads = f", reads {', '.join(stage.inputs)}" if stage.inputs else ""
            yield f"{number}. {stage.name}: recipes/{stage.recipe}.py -> {stage.folder}{reads}: {self.status(stage)}"
            if stage.picked:
                yield f"   gpu_memory sets {as_yaml(stage.picked)}; {stage.predicted:.1f} GiB at the peak (predicted)"

    def run(self) -> None:
        """Runs what is not done, in order; what is done is said to be.

        Side by side (`jobs`), stages write their output to `logs/` in `folder`; alone, and last of all, to the terminal.

        Raises:
            RecipeError: where a stage fails (what runs beside it is let finish), the folder cannot be written to, or another
                pipeline is at work in it.
        """
        try:
            with self._alone() as lock:
                self._state = self._remembered()  # another pipeline may have been at work since
                self._check_unselected()
                self._run(self._to_do(), lock)
        except OSError as error:
            raise RecipeError(
                f"output_dir: {self.folder}: cannot be written to ({error.strerror}): make room, or name another"
            ) from error
        except KeyboardInterrupt:
            print("\nRun the pipeline again to resume it", file=sys.stderr)
            raise

    def _check_unselected(self) -> None:
        """Refuses to run a stage on what a stage that is left out did for other arguments, or did not do."""
        lacking = {stage.name for stage in self.unselected if self.status(stage) != "done"}
        for stage in self.stages:
            for name in stage.inputs:
                if name in lacking:
                    raise RecipeError(
                        f"--stages: {stage.name} reads {name}, which is not done with its present arguments and inputs: add it"
                    )

    def _run(self, waiting: list[Stage], lock: int) -> None:
        running: dict[Future[None], Stage] = {}
        logged: set[str] = set()  # whose output goes to files
        with ThreadPoolExecutor(self.jobs) as pool:
            failed: RecipeError | None = None
            while running or (waiting and not failed):
                while len(running) < self.jobs and not failed and (stage := self._next(waiting, running.values())):
                    waiting.remove(stage)
                    beside = self.jobs > 1 and bool(running or waiting)
                    logged |= {stage.name} if beside else set()
                    command = self._begin(stage)
                    running[pool.submit(self._launch, stage, command, beside, lock)] = stage
                finished, _ = wait(running, timeout=PULSE, return_when=FIRST_COMPLETED)
                silent = [progress(stage) for stage in running.values() if stage.name in logged and not finished]
                if silent:
                    print(f"      {'; '.join(silent)}", flush=True)
                for future in finished:
                    stage = running.pop(future)
                    try:
                        future.result()
                        self._remember(stage, done=stage.fingerprint, result=stage.result())
                    except RecipeError as error:
                        failed = error
        if failed:
            raise failed

    def _to_do(self) -> list[Stage]:
        """The stages that are not done."""
        waiting = [stage for stage in self.stages if self.status(stage) != "done"]
        for stage in self.stages:
            if stage not in waiting:
                report = f"; its report is {stage.folder / PAGE}" if stage.recipe == "evaluate" else ""
                print(f"{self._head(stage)}: done already, with these arguments and inputs: skipped{report}", flush=True)
        return waiting

    @staticmethod
    def _next(waiting: list[Stage], running: Iterable[Stage]) -> Stage | None:
        """The first that reads nothing that is still to come."""
        unfinished = {stage.name for stage in (*waiting, *running)}
        return next((stage for stage in waiting if unfinished.isdisjoint(stage.inputs)), None)

    def _head(self, stage: Stage) -> str:
        return f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage.name}"

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Holds the folder's lock; its file descriptor.

        Stages inherit it: one whose pipeline was killed may still be writing, and must not be written over.
        """
        path = self.folder / LOCK
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(
                    f"output_dir: {self.folder}: another pipeline, or a stage of one that was killed, still runs in it: wait "
                    f"for its end, or end it (`fuser {path}` says which process it is)"
                ) from error
            yield file.fileno()

    def _launch(self, stage: Stage, command: list[str], beside: bool, lock: int) -> None:
        """One stage, to its end."""
        started = time.monotonic()
        goes_on = ", goes on from its newest checkpoint" if "--resume_from_checkpoint" in command else ""
        if beside:
            log = self.folder / "logs" / f"{stage.name}.log"
            log.parent.mkdir(exist_ok=True)
            print(f"{self._head(stage)}: {stage.folder}{goes_on} (output: {log})", flush=True)
            with log.open("w", encoding="utf-8") as file:
                shared = {"stdout": file, "stderr": subprocess.STDOUT, "env": self._environment()}
                code = subprocess.run(command, pass_fds=(lock,), **shared).returncode
            if code:
                with log.open(encoding="utf-8", errors="replace") as file:
                    print(*deque(file, LOG_TAIL), sep="", flush=True)
        else:
            print(f"{self._head(stage)}: {stage.folder}{goes_on}", flush=True)
            code = subprocess.run(command, pass_fds=(lock,)).returncode
        if code:
            raise RecipeError(f"stages: {stage.name} did not finish; its own message is above. Run again to go on from there")
        print(f"{self._head(stage)}: took {time.monotonic() - started:.0f} s", flush=True)

    def _environment(self) -> dict[str, str]:
        """Stages side by side share the cores: two that each take all of them get less done than one after the other."""
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs)), **os.environ}

    def write_summaries(self) -> Iterator[str]:
        """Writes what the evaluations under all seeds say together, `NAME-over-seeds.*` in `folder`; yields each as text."""
        names = dict.fromkeys(stage.unseeded for stage in self.stages if stage.recipe == "evaluate")
        for name in names:
            folders = [stage.folder for stage in self.stages if stage.unseeded == name]
            if len(folders) > 1:
                stem = self.folder / f"{name}-over-seeds"
                text = write_summary([read_json(folder / METRICS) for folder in folders], stem)
                yield f"\nMean over {len(folders)} seeds (least to greatest), also in {stem}.md:\n\n{text}"

    def _begin(self, stage: Stage) -> list[str]:
        """The command of a stage, whose arguments are written out; it goes on with what these arguments have begun."""
        goes_on = self.status(stage) == "begun"
        if not goes_on:
            _forget(stage)
        config = self.folder / "configs" / f"{stage.name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        text = f"# Written by recipes/pipeline.py\n{to_yaml(stage.values)}"
        write_text(config, text)
        self._remember(stage, begun=stage.fingerprint)
        command = [sys.executable, *self._launcher()]
        command += [str(self.recipes / f"{stage.recipe}.py"), "--config", str(config)]
        return [*command, "--resume_from_checkpoint", "true"] if goes_on and STAGES[stage.recipe].trains else command

    def _launcher(self) -> list[str]:
        """Accelerate's, where there is anything to launch: a configuration, or several GPUs; a Ctrl-C is a traceback there."""
        if not self.accelerate_config and torch.accelerator.device_count() < 2:
            return []
        config = ["--config_file", self.accelerate_config] if self.accelerate_config else []
        return ["-m", "accelerate.commands.launch", "--quiet", *config]

    def _remember(self, stage: Stage, **what: Any) -> None:
        """In place of what was known: a stage that has begun anew is no longer done."""
        self._state[stage.name] = what
        write_json(self.folder / STATE, self._state)


def _forget(stage: Stage) -> None:
    """Deletes what the recipe would go on from: the arguments may be the same, and the inputs others.

    Not in a folder of which a checkpoint is named in `resume_from_checkpoint`: who does so wants to go on from it all the same.
    """
    named = stage.values.get("resume_from_checkpoint")
    if isinstance(named, str) and stage.folder.resolve() in Path(named).resolve().parents:
        return
    for folder in (stage.folder, *stage.folder.glob("member-*")):
        for checkpoint in checkpoints_in(folder):
            remove_checkpoint(checkpoint)
    if stage.recipe == "sample":
        delete_samples(stage.folder)


def read_pipeline(config: Path, recipes: Path, only: list[str] | None = None) -> Pipeline:
    """The pipeline in a YAML file.

    Args:
        config: the file, as in `read_stages`.
        recipes: the folder of the recipes.
        only: names of the stages to run; None: all. What they read must be there then.

    Raises:
        RecipeError: as in `read_stages`; for a name that no stage has.
    """
    file = read_stages(config, recipes)
    entries = dict.fromkeys(stage.entry for stage in file.stages)
    for name in only or ():
        if name not in entries:
            raise RecipeError(f"--stages: {name!r} is none of {', '.join(entries)}{did_you_mean(name, entries)}")
    chosen = [stage for stage in file.stages if only is None or stage.entry in only]
    others = tuple(stage for stage in file.stages if stage not in chosen)
    return Pipeline(file.folder, chosen, recipes, file.accelerate_config, file.jobs, others)


def check_arguments(pipeline: Pipeline, config: Path) -> None:
    """Parses the arguments of every stage as its recipe will, and reads the local data of those that are not done.

    So a misspelt key or an empty file of the last stage is not found after hours of the others.

    Args:
        pipeline: the pipeline.
        config: its file, for the message.

    Raises:
        RecipeError: what the recipe would say, with the stage.
    """
    folders, seen = [stage.folder for stage in (*pipeline.stages, *pipeline.unselected)], set()
    for stage in pipeline.stages:
        with error_context(f"{config}: stages: {stage.name} (its YAML file with its `arguments`)"):
            groups = parse_values(stage.recipe, stage.values)
            if pipeline.status(stage) != "done":
                _check_data(stage.recipe, groups, folders, seen)


def progress(stage: Stage) -> str:
    """How far a stage is that trains, by the last line of its log; of others, that it is at work."""
    try:
        *_, last = (stage.folder / LOG).read_text(encoding="utf-8").splitlines()
        return f"{stage.name}: step {json.loads(last)['step']}"
    except (OSError, ValueError, KeyError):  # nothing yet, or a line that is being written
        return f"{stage.name}: at work"


def _check_data(recipe: str, groups: Sequence[Any], folders: Sequence[Path], seen: set[str]) -> None:
    """Refuses files of data that are not there, or of which a stage can make nothing, but for what others will write."""
    for group in groups:
        for source, kind in _sources_of(group, STAGES[recipe].data):
            written = any(Path(source.path).absolute().is_relative_to(folder.absolute()) for folder in folders)
            if not written and (known := f"{source} {kind}") not in seen:
                check_source(source, kind)
                seen.add(known)


def _sources_of(group: Any, kind: Kind | None) -> Iterator[tuple[DatasetSource, Kind | None]]:
    """The data that a dataclass of arguments names; `kind` of those that the stage is for."""
    for name, value in vars(group).items():
        if name == "dataset_name" and value:
            yield DatasetSource(path=value, column_mapping=group.column_mapping), kind
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, DatasetSource):
                yield entry, kind if name in ("datasets", "eval_datasets") else None
