"""Stages in order: what each of them is to run with, whether that was done already, and the command that does it."""

import contextvars
import fcntl
import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.arguments import nearest, parse_arguments, read_yaml
from rlhf_recipes.errors import RecipeError
from rlhf_recipes.evaluation.report import METRICS
from rlhf_recipes.evaluation.seeds import write_summary
from rlhf_recipes.models import resolve_path
from rlhf_recipes.records import RECIPE, read_json, write_json
from rlhf_recipes.runs import checkpoints_in

import yaml

STATE, LOCK = "pipeline.json", "pipeline.lock"
RECIPES = ("sft", "reward", "ppo", "dpo", "evaluate")
LOG_TAIL = 30  # lines of a failed stage's output that are shown
_KEYS = {"output_dir", "stages", "seeds", "jobs", "accelerate_config"}
_STAGE_KEYS = {"name", "recipe", "config", "arguments"}


@dataclass(frozen=True)
class Stage:
    """One run of one recipe.

    Parameters:
        name: its own among the stages.
        recipe: the name of a file in `recipes/`.
        values: the arguments, those of its YAML file with those of the pipeline over them and every `{name}` filled in.
        inputs: names of the stages whose folders it reads.
        fingerprint: changes with its arguments, with the files that they name, and with the fingerprints of its inputs.
        entry: its name in the file, which the stages of all seeds have in common.
    """

    name: str
    recipe: str
    values: dict[str, Any]
    inputs: tuple[str, ...]
    fingerprint: str
    entry: str

    @property
    def folder(self) -> Path:
        """Where its result is."""
        return Path(self.values["output_dir"])

    def result(self) -> list[int] | None:
        """Size and time of the file that the recipe writes last: another run in the folder leaves another one."""
        path = self.folder / (METRICS if self.recipe == "evaluate" else RECIPE)
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


@dataclass
class Pipeline:
    """The stages of a YAML file, and the folder that remembers how far they have come.

    Parameters:
        folder: of the whole; a stage without an `output_dir` of the pipeline's gets a folder in it, by its name.
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
        self._state = read_json(self.folder / STATE)

    def status(self, stage: Stage) -> str:
        """`done`, `begun` (it will go on from its newest checkpoint) or `to do`."""
        known = self._state.get(stage.name, {}) if stage.folder.is_dir() else {}
        if known.get("done") == stage.fingerprint and known.get("result") == stage.result():
            return "done"
        return "begun" if known.get("begun") == stage.fingerprint else "to do"

    def plan(self) -> Iterator[str]:
        """A line for each stage: what it is, where it goes, what it reads, how far it is."""
        for number, stage in enumerate(self.stages, start=1):
            reads = f", reads {', '.join(stage.inputs)}" if stage.inputs else ""
            yield f"{number}. {stage.name}: recipes/{stage.recipe}.py -> {stage.folder}{reads}: {self.status(stage)}"

    def run(self) -> None:
        """Runs what is not done, in order; what is done is said to be.

        Side by side (`jobs`), stages write their output to `logs/` in `folder`; alone, and last of all, to the terminal.

        Raises:
            RecipeError: where a stage fails (what runs beside it is let finish), the folder cannot be written to, or another
                pipeline is at work in it.
        """
        with self._alone() as lock:
            self._state = read_json(self.folder / STATE)  # another pipeline may have been at work since
            self._check_unselected()
            self._run(self._to_do(), lock)

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
        with ThreadPoolExecutor(self.jobs) as pool:
            failed: RecipeError | None = None
            while running or (waiting and not failed):
                while len(running) < self.jobs and not failed and (stage := self._next(waiting, running.values())):
                    waiting.remove(stage)
                    beside = self.jobs > 1 and bool(running or waiting)
                    command = self._begin(stage)
                    running[pool.submit(self._launch, stage, command, beside, lock)] = stage
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
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
                print(f"{self._head(stage)}: done already, with these arguments and inputs: skipped", flush=True)
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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(
                    f"output_dir: {self.folder}: another pipeline, or a stage of one that was killed, still runs in it: wait "
                    f"for its end, or end it (`fuser {path}` says which process it is)"
                ) from error
            yield file.fileno()

    def _unwritable(self, error: OSError) -> RecipeError:
        return RecipeError(f"output_dir: {self.folder}: cannot be written to ({error.strerror}): name another")

    def _launch(self, stage: Stage, command: list[str], beside: bool, lock: int) -> None:
        """One stage, to its end."""
        started = time.monotonic()
        if beside:
            log = self.folder / "logs" / f"{stage.name}.log"
            log.parent.mkdir(exist_ok=True)
            print(f"{self._head(stage)}: {stage.folder} (output: {log})", flush=True)
            with log.open("w", encoding="utf-8") as file:
                shared = {"stdout": file, "stderr": subprocess.STDOUT, "env": self._environment()}
                code = subprocess.run(command, pass_fds=(lock,), **shared).returncode
            if code:
                with log.open(encoding="utf-8", errors="replace") as file:
                    print(*deque(file, LOG_TAIL), sep="", flush=True)
        else:
            print(f"{self._head(stage)}: {stage.folder}", flush=True)
            code = subprocess.run(command, pass_fds=(lock,)).returncode
        if code:
            raise RecipeError(f"stages: {stage.name} failed; its own message is above. Run again to go on from there")
        print(f"{self._head(stage)}: took {time.monotonic() - started:.0f} s", flush=True)

    def _environment(self) -> dict[str, str]:
        """Stages side by side share the cores: two that each take all of them get less done than one after the other."""
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs)), **os.environ}

    def write_summaries(self) -> Iterator[str]:
        """Writes what the evaluations under all seeds say together, `NAME-over-seeds.*` in `folder`; yields each as text."""
        entries = dict.fromkeys(stage.entry for stage in self.stages if stage.recipe == "evaluate")
        for entry in entries:
            folders = [stage.folder for stage in self.stages if stage.entry == entry]
            if len(folders) > 1:
                stem = self.folder / f"{entry}-over-seeds"
                text = write_summary([read_json(folder / METRICS) for folder in folders], stem)
                yield f"\nMean over {len(folders)} seeds (least to greatest), also in {stem}.md:\n\n{text}"

    def _begin(self, stage: Stage) -> list[str]:
        """The command of a stage, whose arguments are written out; it goes on with what these arguments have begun."""
        goes_on = self.status(stage) == "begun"
        if not goes_on:
            # The arguments may be the same on other inputs, and the recipe would go on from the old ones' run
            for folder in (stage.folder, *stage.folder.glob("member-*")):
                for checkpoint in checkpoints_in(folder):
                    shutil.rmtree(checkpoint)
        config = self.folder / "configs" / f"{stage.name}.yaml"
        try:
            config.parent.mkdir(parents=True, exist_ok=True)
            text = f"# Written by recipes/pipeline.py\n{yaml.safe_dump(stage.values, sort_keys=False)}"
            config.write_text(text, encoding="utf-8")
            self._remember(stage, begun=stage.fingerprint)
        except OSError as error:
            raise self._unwritable(error) from error
        engine = ["--config_file", self.accelerate_config] if self.accelerate_config else []
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *engine]
        command += [str(self.recipes / f"{stage.recipe}.py"), "--config", str(config)]
        return [*command, "--resume_from_checkpoint", "true"] if goes_on and stage.recipe != "evaluate" else command

    def _remember(self, stage: Stage, **what: Any) -> None:
        """In place of what was known: a stage that has begun anew is no longer done."""
        self._state[stage.name] = what
        write_json(self.folder / STATE, self._state)


def read_pipeline(config: Path, recipes: Path, only: list[str] | None = None) -> Pipeline:
    """The pipeline in a YAML file.

        output_dir: runs/mine
        stages:
          - name: sft
            config: configs/mine/sft.yaml
          - name: ppo
            config: configs/mine/ppo.yaml
            arguments: {start_from: "{sft}"}     # the folder of that stage

    With `seeds: [0, 1, 2]` all of it is done once for each seed, in a folder `seed-0`, ... of its own: `seed` of every stage is
    set, and `"{seed}"` stands for it in the arguments.

    Args:
        config: the file; the files that it names are looked for from the current folder, and from that of `recipes/`.
        recipes: the folder of the recipes.
        only: names of the stages to run; None: all. What they read must be there then.

    Raises:
        RecipeError: with the key or stage, and what would be right.
    """
    values = read_yaml(config)
    _refuse_unknown(values, _KEYS, str(config))
    if not isinstance(values.get("output_dir"), str):
        raise RecipeError(f"{config}: output_dir: name the folder that the stages' results go to")
    entries = values.get("stages")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{config}: stages: must be a list of mappings with `name` and `config`")
    output, seeds = Path(values["output_dir"]), values.get("seeds", [None])
    whole = isinstance(seeds, list) and seeds and all(seed is None or type(seed) is int for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise RecipeError(f"{config}: seeds: must be a list of whole numbers, none of them twice")
    jobs = values.get("jobs", 1)
    if type(jobs) is not int or jobs < 1:
        raise RecipeError(f"{config}: jobs: {jobs!r} is not how many stages may run side by side: 1 or more")
    engine = values.get("accelerate_config")
    if engine is not None and not (isinstance(engine, str) and Path(engine).is_file()):
        raise RecipeError(f"{config}: accelerate_config: {engine!r} is no file: write one with `accelerate config`")
    stages = []
    for seed in seeds:
        place = output if seed is None else output / f"seed-{seed}"
        stages += _read_stages(entries, f"{config}: stages", place, recipes, seed, engine)
    _refuse_shared_folders(stages, f"{config}: stages")
    entries_known = dict.fromkeys(stage.entry for stage in stages)
    for name in only or ():
        if name not in entries_known:
            raise RecipeError(f"--stages: {name!r} is none of {', '.join(entries_known)}{nearest(name, entries_known)}")
    chosen = [stage for stage in stages if only is None or stage.entry in only]
    return Pipeline(output, chosen, recipes, engine, jobs, tuple(stage for stage in stages if stage not in chosen))


def check_arguments(pipeline: Pipeline, config: Path) -> None:
    """Parses the arguments of every stage as its recipe will, so that a misspelt key of the last is not found after the others.

    Args:
        pipeline: the pipeline.
        config: its file, for the message.

    Raises:
        RecipeError: what the recipe would say, with the stage.
    """
    for stage in pipeline.stages:
        recipe = pipeline.recipes / f"{stage.recipe}.py"
        types = runpy.run_path(str(recipe), run_name="stage")["ARGUMENTS"]
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "stage.yaml"
            written.write_text(yaml.safe_dump(stage.values), encoding="utf-8")
            try:
                # In a context of its own: what goes wrong later does not come from this file
                contextvars.copy_context().run(parse_arguments, recipe, *types, argv=["--config", str(written)])
            except RecipeError as error:
                message = str(error).removeprefix(f"{written}: ")
                raise RecipeError(f"{config}: stages: {stage.name} (its YAML file with its `arguments`): {message}") from error


def _read_stages(
    entries: list[dict[str, Any]], where: str, output: Path, recipes: Path, seed: int | None, engine: str | None
) -> list[Stage]:
    """The stages of one seed."""
    stages: dict[str, Stage] = {}
    for number, entry in enumerate(entries, start=1):
        stage = _read_stage(entry, f"{where}, entry {number}", output, recipes, stages, seed, engine)
        stages[stage.entry] = stage
    return list(stages.values())


def _refuse_shared_folders(stages: Iterable[Stage], where: str) -> None:
    owners: dict[Path, str] = {}
    for stage in stages:
        owner = owners.setdefault(stage.folder.absolute(), stage.name)
        if owner != stage.name:
            raise RecipeError(f"{where}: {owner} and {stage.name} both write to {stage.folder}: leave `output_dir` out")


def _read_stage(
    entry: dict[str, Any],
    where: str,
    output: Path,
    recipes: Path,
    earlier: Mapping[str, Stage],
    seed: int | None,
    engine: str | None,
) -> Stage:
    _refuse_unknown(entry, _STAGE_KEYS, where)
    name, recipe = entry.get("name"), entry.get("recipe", entry.get("name"))
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise RecipeError(f"{where}: name: {name!r} is no name: letters, digits, - and _")
    if name in earlier:
        raise RecipeError(f"{where}: name: '{name}' stands twice: give each stage a name, and `recipe` beside it")
    if recipe not in RECIPES:
        raise RecipeError(f"{where}: recipe: {recipe!r} is none of {', '.join(RECIPES)}{nearest(str(recipe), RECIPES)}")
    config, arguments = entry.get("config"), entry.get("arguments", {})
    if not isinstance(config, str):
        raise RecipeError(f"{where}: config: name the YAML file of its recipe, such as configs/tiny/{recipe}.yaml")
    if not isinstance(arguments, dict):
        raise RecipeError(f"{where}: arguments: must be a mapping of keys of {recipe}.py, and is {arguments!r}")
    values = read_yaml(_found(config, recipes))
    own = {"output_dir": str(output / name)} if seed is None else {"output_dir": str(output / name), "seed": seed}
    values = {**values, **own, **arguments}
    values.pop("needs", None)  # the order of the stages says so
    inputs: list[str] = []
    named = {key: value for key, value in values.items() if key != "output_dir"} | {"accelerate_config": engine}
    files = _files_in(named, Path(values["output_dir"]))
    values = {key: _filled(value, earlier, seed, inputs, f"{where}: {key}") for key, value in values.items()}
    identity = {
        "recipe": recipe,
        "values": values,
        "files": files,
        "inputs": [earlier[i].fingerprint for i in inputs],
    }
    digest = hashlib.sha256(json.dumps(_sorted(identity), default=str).encode()).hexdigest()
    reads = tuple(dict.fromkeys(earlier[i].name for i in inputs))
    return Stage(name if seed is None else f"{name}-{seed}", recipe, values, reads, digest, name)


def _filled(value: Any, earlier: Mapping[str, Stage], seed: int | None, inputs: list[str], where: str) -> Any:
    """`value` with the folder of a stage in place of every text `{stage}`; adds the stage to `inputs`."""
    if isinstance(value, dict):
        return {key: _filled(item, earlier, seed, inputs, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, earlier, seed, inputs, where) for item in value]
    if value == "{seed}" and seed is not None:
        return seed
    if not (isinstance(value, str) and value.startswith("{") and "}" in value):
        return value
    name, _, rest = value[1:].partition("}")
    if name not in earlier:
        raise RecipeError(f"{where}: {{{name}}} is no stage before this one{nearest(name, earlier)}")
    inputs.append(name)
    return f"{earlier[name].folder}{rest}"


def _files_in(values: Any, output: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of every file that is named, or lies in a folder that is, but for what the stage itself writes."""
    if isinstance(values, dict | list):
        items = values.values() if isinstance(values, dict) else values
        return [found for item in items for found in _files_in(item, output)]
    if not isinstance(values, str) or len(values) > 1000:
        return []
    try:
        named = Path(resolve_path(values)).expanduser()
        files = [named] if named.is_file() else sorted(named.rglob("*")) if named.is_dir() else []
        stats = [(str(path), path.stat()) for path in files if path.is_file() and output not in path.parents]
    except (OSError, RuntimeError, ValueError):  # a text that is no path
        return []
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _sorted(value: Any) -> Any:
    """The same with the keys of mappings in order, whatever their types."""
    if isinstance(value, dict):
        return sorted(([str(key), _sorted(item)] for key, item in value.items()), key=lambda pair: pair[0])
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value


def _found(path: str, recipes: Path) -> Path:
    own = recipes.parent / path  # of a checkout that the command is not run in
    return own if own.exists() and not Path(path).exists() else Path(path)


def _refuse_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'{nearest(str(key), known)}")
