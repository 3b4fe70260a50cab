"""Run a pipeline's stages: skip finished ones, resume or launch the others."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.config.origins import WRITTEN_FOR
from rlhf_recipes.core.errors import LabelsMissingError, RecipeError
from rlhf_recipes.core.files import LOG, METRICS, read_json, write_json, write_text
from rlhf_recipes.core.warning_log import relay_warnings, warnings_so_far
from rlhf_recipes.core.yaml import to_yaml
from rlhf_recipes.evaluation.report.html import PAGE
from rlhf_recipes.evaluation.report.seeds import write_summary
from rlhf_recipes.evaluation.types import read_results
from rlhf_recipes.feedback.sampling import delete_samples
from rlhf_recipes.memory.autofit import as_yaml
from rlhf_recipes.memory.plan import GIB
from rlhf_recipes.pipeline.fitting import fit_stages
from rlhf_recipes.pipeline.reading import PipelineFile, PipelineStage, read_stages
from rlhf_recipes.pipeline.settings import Settings
from rlhf_recipes.stages import STAGES
from rlhf_recipes.training.resume import checkpoints_in, remove_checkpoint

import torch

logger = logging.getLogger(__name__)
STATE, LOCK = "pipeline.json", "pipeline.lock"
LOG_TAIL = 30  # lines of a failed stage's output that are shown
PROGRESS_INTERVAL = 30  # seconds between lines about stages that run side by side


@dataclass
class Pipeline:
    """The stages of a YAML file, and their status in its folder.

    Parameters:
        file: what it says.
        stages: to run, in order.
        recipes: the folder of the recipes.
        unselected: the other stages of the file.
    """

    file: PipelineFile
    stages: list[PipelineStage]
    recipes: Path
    unselected: tuple[PipelineStage, ...] = ()

    def __post_init__(self):
        self.folder = self.file.folder
        self._state = _read_state(self.folder / STATE)

    def status(self, stage: PipelineStage) -> str:
        """Return `done`, `begun` (its newest checkpoint will be resumed) or `to do`."""
        known = self._state.get(stage.name, {}) if stage.folder.is_dir() else {}
        if known.get("done") == stage.fingerprint and known.get("result") == stage.result():
            return "done"
        return "begun" if known.get("begun") == stage.fingerprint else "to do"

    def describe(self) -> Iterator[str]:
        """Yield each stage's recipe, folder, inputs, status, and autofitted arguments."""
        for number, stage in enumerate(self.stages, start=1):
            reads = f", reads {', '.join(stage.inputs)}" if stage.inputs else ""
            yield f"{number}. {stage.name}: recipes/{stage.recipe}.py -> {stage.folder}{reads}: {self.status(stage)}"
            if stage.autofitted:
                chosen = as_yaml(stage.autofitted)
                yield f"   gpu_memory sets {chosen}; {stage.plan.allocated / GIB:.1f} GiB at the peak (predicted)"

    def run(self) -> None:
        """Run the stages that are not done.

        Stages side by side (`jobs`) write their output to `logs/` in `folder`; a stage alone writes to the terminal.

        Raises:
            RecipeError: if a stage fails, after those beside it have ended; if the folder cannot be used.
        """
        try:
            with self._locked() as lock:
                self._state = _read_state(self.folder / STATE)  # another pipeline may have run since
                self._check_unselected()
                self._run(self._waiting(), lock)
        except OSError as error:
            raise RecipeError(
                f"output_dir: {self.folder}: cannot be written to ({error.strerror}). Fix: make room, or name another folder"
            ) from error
        except KeyboardInterrupt:
            print("\nRun the pipeline again to resume it", file=sys.stderr)
            raise

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the folder's lock, and yield its file descriptor.

        Stages inherit the descriptor: one that outlives a killed pipeline may still be writing.
        """
        path = self.folder / LOCK
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(
                    f"output_dir: {self.folder}: another pipeline, or a stage of a killed one, still runs in it. Fix: wait for "
                    f"its end, or stop it (`fuser {path}` shows its process)"
                ) from error
            yield file.fileno()

    def _check_unselected(self) -> None:
        """Reject a stage whose input was left out, and is missing or out of date."""
        missing = {stage.name for stage in self.unselected if self.status(stage) != "done"}
        for stage in self.stages:
            for name in missing.intersection(stage.inputs):
                raise RecipeError(
                    f"--stages: {stage.name} reads {name}, which is not done with its current arguments. Fix: add it"
                )

    def _waiting(self) -> list[PipelineStage]:
        """Return the stages that are not done; print the others, with their warnings."""
        waiting = [stage for stage in self.stages if self.status(stage) != "done"]
        for stage in self.stages:
            if stage not in waiting:
                report = f"; its report is {stage.folder / PAGE}" if stage.recipe == "evaluate" else ""
                print(f"{self._head(stage)}: skipped, done with the same arguments and inputs{report}", flush=True)
                for text in self._state[stage.name].get("warnings", ()):
                    logger.warning("%s", text)
        return waiting

    def _run(self, waiting: list[PipelineStage], lock: int) -> None:
        running: dict[Future[None], PipelineStage] = {}
        logged: set[str] = set()  # stages whose output goes to files
        failure: RecipeError | None = None
        with ThreadPoolExecutor(self.file.jobs) as pool:
            while running or (waiting and not failure):
                while len(running) < self.file.jobs and not failure and (stage := _next_stage(waiting, running.values())):
                    waiting.remove(stage)
                    to_file = self.file.jobs > 1 and bool(running or waiting)
                    logged |= {stage.name} if to_file else set()
                    running[pool.submit(self._launch, stage, self._prepare(stage), to_file, lock)] = stage
                finished, _ = wait(running, timeout=PROGRESS_INTERVAL, return_when=FIRST_COMPLETED)
                silent = [_progress(stage) for stage in running.values() if stage.name in logged and not finished]
                if silent:
                    print(f"      {'; '.join(silent)}", flush=True)
                for future in finished:
                    stage = running.pop(future)
                    try:
                        future.result()
                        warnings = [text for text in warnings_so_far() if text.startswith(f"{stage.name}: ")]
                        self._remember(stage, done=stage.fingerprint, result=stage.result(), warnings=warnings)
                    except RecipeError as error:
                        failure = error
        if failure:
            raise failure

    def _prepare(self, stage: PipelineStage) -> list[str]:
        """Write a stage's arguments, and return its command, which resumes if it can."""
        resumes = self.status(stage) == "begun"
        if not resumes:
            _discard_partial_result(stage)
        config = self.folder / "configs" / f"{stage.name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, "\n".join(_commented(stage)))
        self._remember(stage, begun=stage.fingerprint)
        command = [sys.executable, *self._launcher(), str(self.recipes / f"{stage.recipe}.py"), "--config", str(config)]
        return [*command, "--resume_from_checkpoint", "true"] if resumes and STAGES[stage.recipe].trains else command

    def _launcher(self) -> list[str]:
        """Return `accelerate launch` where needed; plain Python ends better at Ctrl-C."""
        if not self.file.accelerate_config and torch.accelerator.device_count() < 2:
            return []
        config = ["--config_file", self.file.accelerate_config] if self.file.accelerate_config else []
        return ["-m", "accelerate.commands.launch", "--quiet", *config]

    def _launch(self, stage: PipelineStage, command: list[str], to_file: bool, lock: int) -> None:
        with relay_warnings(stage.name, on_terminal=not to_file) as environment:
            self._run_command(stage, command, to_file, environment, lock)

    def _run_command(
        self, stage: PipelineStage, command: list[str], to_file: bool, environment: dict[str, str], lock: int
    ) -> None:
        started = time.monotonic()
        head = f"{self._head(stage)}: {stage.folder}"
        head += ", resumes from its newest checkpoint" if "--resume_from_checkpoint" in command else ""
        if to_file:
            log = self.folder / "logs" / f"{stage.name}.log"
            log.parent.mkdir(exist_ok=True)
            print(f"{head} (output: {log})", flush=True)
            # Stages share the cores: two that each take all of them finish later than one after the other
            environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.file.jobs)), **environment}
            with log.open("w", encoding="utf-8") as file:
                output = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment}
                code = subprocess.run(command, pass_fds=(lock,), **output).returncode
            if code:
                with log.open(encoding="utf-8", errors="replace") as file:
                    print(*deque(file, LOG_TAIL), sep="", flush=True)
        else:
            print(head, flush=True)
            code = subprocess.run(command, pass_fds=(lock,), env=environment).returncode
        if code == LabelsMissingError.STATUS:
            raise LabelsMissingError(
                f"stages: {stage.name} needs labels of people. Next: do as it says above, and run this again"
            )
        if code:
            raise RecipeError(f"stages: {stage.name} failed. Fix: see its own message above, and run again to resume")
        print(f"{self._head(stage)}: took {time.monotonic() - started:.0f} s", flush=True)

    def _remember(self, stage: PipelineStage, **state: Any) -> None:
        self._state[stage.name] = state
        write_json(self.folder / STATE, self._state)

    def _head(self, stage: PipelineStage) -> str:
        return f"[{self.stages.index(stage) + 1}/{len(self.stages)}] {stage.name}"

    def write_summaries(self) -> Iterator[str]:
        """Write and yield `NAME-over-seeds.*` for each evaluation with several seeds."""
        for name in dict.fromkeys(stage.unseeded for stage in self.stages if stage.recipe == "evaluate"):
            folders = [stage.folder for stage in self.stages if stage.unseeded == name]
            if len(folders) > 1:
                stem = self.folder / f"{name}-over-seeds"
                text = write_summary([read_results(folder / METRICS) for folder in folders], stem)
                yield f"\nMean over {len(folders)} seeds (least to greatest), also in {stem}.md:\n\n{text}"


def _read_state(path: Path) -> dict[str, dict[str, Any]]:
    """Return stage -> its fingerprint under "begun" or "done", and its "result"."""
    state = read_json(path)
    if not all(isinstance(entry, dict) for entry in state.values()):
        raise RecipeError(f"{path}: damaged: not what a pipeline writes. Fix: delete it; every stage then runs again")
    return state


def _next_stage(waiting: Iterable[PipelineStage], running: Iterable[PipelineStage]) -> PipelineStage | None:
    """Return the first stage whose inputs have all ended."""
    unfinished = {stage.name for stage in (*waiting, *running)}
    return next((stage for stage in waiting if unfinished.isdisjoint(stage.inputs)), None)


def _progress(stage: PipelineStage) -> str:
    """Return the step of a training, from the last line of its log."""
    try:
        *_, last = (stage.folder / LOG).read_text(encoding="utf-8").splitlines()
        return f"{stage.name}: step {json.loads(last)['step']}"
    except (OSError, ValueError, KeyError, TypeError):  # no log, or a line that is being written
        return f"{stage.name}: running"


def _commented(stage: PipelineStage) -> Iterator[str]:
    """Yield the lines of a stage's YAML file, and where each key was written."""
    yield f"{WRITTEN_FOR}{stage.origin.default.place()}"
    for key, value in stage.values.items():
        yield f"# {'gpu_memory' if key in stage.autofitted else stage.origin.place(str(key))}"
        yield to_yaml({key: value})


def _discard_partial_result(stage: PipelineStage) -> None:
    """Delete what the recipe would resume: its inputs may have changed.

    A checkpoint that `resume_from_checkpoint` names is kept, with the others in its folder.
    """
    checkpoint = stage.values.get("resume_from_checkpoint")
    if isinstance(checkpoint, str) and stage.folder.resolve() in Path(checkpoint).resolve().parents:
        return
    for folder in (stage.folder, *stage.folder.glob("member-*")):
        for old in checkpoints_in(folder):
            remove_checkpoint(old)
    if stage.recipe == "sample":
        delete_samples(stage.folder)


def read_pipeline(config: Path, recipes: Path, names: list[str] | None = None, settings: Settings = ()) -> Pipeline:
    """Return the pipeline of a YAML file.

    `names` are the entries to run, by default all; the others must be done where these read them. `settings` are those of
    `--set`.
    """
    file = fit_stages(read_stages(config, recipes, settings))
    selected = file.select(names)
    return Pipeline(file, selected, recipes, tuple(stage for stage in file.stages if stage not in selected))
