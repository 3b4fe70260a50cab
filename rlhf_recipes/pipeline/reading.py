"""Read a pipeline's YAML file: its stages for each seed and round, fully resolved."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.config.launcher import (
    Launcher,
    check_launcher_support,
    check_single_gpu_plan,
    default_launcher_config,
    read_launcher,
)
from rlhf_recipes.config.origins import Origin
from rlhf_recipes.config.overrides import merge_overrides
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.core.paths import files_in, resolve_config_path
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.pipeline.places import Places
from rlhf_recipes.pipeline.schema import TRACKER_KEYS, PipelineConfig, StageEntry, parse_pipeline
from rlhf_recipes.pipeline.settings import Settings, apply_settings
from rlhf_recipes.stages import STAGES, pipeline_stages

if TYPE_CHECKING:  # it imports PyTorch
    from rlhf_recipes.memory import Plan

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}(.*)", re.DOTALL)


@dataclass(frozen=True)
class PipelineStage:
    """One run of one recipe.

    Parameters:
        name: unique among the stages.
        values: the arguments: those of its YAML file, over them those of the pipeline, with placeholders resolved.
        inputs: names of the stages whose folders it reads.
        fingerprint: changes with its arguments, the files that they name, and the fingerprints of its inputs.
        files: path, size and time of the files that its arguments name.
        origin: where each argument was written.
        fixed: the arguments that the pipeline's file sets.
        entry: its name in the file, which all seeds and rounds share.
        unseeded: its name without the seed.
        autofitted: the arguments that `gpu_memory` chose.
        plan: the memory that it needs with them, or None.
    """

    name: str
    recipe: str
    values: dict[str, Any]
    inputs: tuple[str, ...]
    fingerprint: str
    files: list[tuple[str, int, int]]
    origin: Origin
    fixed: frozenset[str]
    entry: str
    unseeded: str
    autofitted: dict[str, Any] = field(default_factory=dict)
    plan: "Plan | None" = None

    @property
    def folder(self) -> Path:
        """The folder of its result."""
        return Path(self.values["output_dir"])

    def result(self) -> list[int] | None:
        """Return size and time of the recipe's last file, which identify the result."""
        path = self.folder / STAGES[self.recipe].result
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


@dataclass(frozen=True)
class PipelineFile:
    """The contents of a pipeline's YAML file.

    Parameters:
        folder: `output_dir`; each stage has a folder in it.
        stages: in the order in which they run.
        jobs: how many stages may run side by side.
        launcher: that `accelerate_config` describes.
        gpu_memory: GB of the card that the stages are to fit, or None.
    """

    folder: Path
    stages: list[PipelineStage]
    accelerate_config: str | None
    jobs: int
    launcher: Launcher
    gpu_memory: float | None

    def select(self, names: Sequence[str] | None) -> list[PipelineStage]:
        """Return the stages of some entries, or all of them.

        Raises:
            RecipeError: for a name that is no entry's.
        """
        entries = dict.fromkeys(stage.entry for stage in self.stages)
        for name in names or ():
            if name not in entries:
                raise RecipeError(f"--stages: {name!r} is none of {', '.join(entries)}{did_you_mean(name, entries)}")
        return [stage for stage in self.stages if names is None or stage.entry in names]


def read_stages(config: Path, recipes: Path, settings: Settings = ()) -> PipelineFile:
    """Read a pipeline's YAML file; docs/pipeline.md explains its keys.

    It imports no PyTorch: what `gpu_memory` chooses is left to `fit_stages`, and the stages' keys to `check_stage_keys`.

    Args:
        config: the file. Files that it names are relative to the current folder, or else to the parent of `recipes`.
        recipes: the folder of the recipes.
        settings: those of `--set`.

    Raises:
        RecipeError: with the file and its line, and the key or stage.
    """
    values, set_keys = apply_settings(read_yaml(config), settings)
    places = Places(config, set_keys)
    with places.of_file().context():
        content = parse_pipeline(values)
        accelerate_config = _find_accelerate_config(content.accelerate_config, recipes)
        launcher = read_launcher(accelerate_config) if accelerate_config else Launcher()
        if content.gpu_memory is not None:
            check_single_gpu_plan(launcher)
        order = _order(content)
    with places.of_arguments(content).context():
        _check_shared(content)
    stages: list[PipelineStage] = []
    read_file = functools.cache(read_yaml)  # all seeds and rounds read the same files
    for seed in [None] if content.seeds is None else content.seeds:
        reader = _SeedReader(places, content, read_file, recipes, seed, accelerate_config, launcher)
        stages += [reader.read(number, turn) for turn, number in order]
    owners: dict[Path, str] = {}
    for stage in stages:
        owner = owners.setdefault(stage.folder.absolute(), stage.name)
        if owner != stage.name:
            message = f"output_dir: {owner} and {stage.name} both write to {stage.folder}. Fix: leave `output_dir` out"
            raise RecipeError(f"{stage.origin.place(message)}: {message}")
    return PipelineFile(Path(content.output_dir), stages, accelerate_config, content.jobs, launcher, content.gpu_memory)


def _find_accelerate_config(path: str | None, recipes: Path) -> str | None:
    """Return the launcher's configuration: by default that of `accelerate config`."""
    found = default_launcher_config() if path is None else resolve_config_path(path, recipes)
    if found.is_file():
        return str(found)
    if path is None:
        return None
    raise RecipeError(
        f"accelerate_config: {path!r} is no file. Fix: name one of configs/accelerate/, or write one with `accelerate config`"
    )


def _order(content: PipelineConfig) -> list[tuple[int | None, int]]:
    """Return the round (or None) and index of each entry, in the order of the run."""
    repeated = [number for number, entry in enumerate(content.stages) if entry.each_round]
    if (content.rounds is None) == bool(repeated):
        raise RecipeError("rounds: needs stages with `each_round: true`, and they need `rounds`. Fix: set both, or neither")
    if not repeated:
        return [(None, number) for number in range(len(content.stages))]
    if repeated != list(range(repeated[0], repeated[-1] + 1)):
        raise RecipeError("stages: those with `each_round: true` must stand next to each other. Fix: move them together")
    before = [(None, number) for number in range(repeated[0])]
    rounds = [(turn, number) for turn in range(1, content.rounds + 1) for number in repeated]
    return before + rounds + [(None, number) for number in range(repeated[-1] + 1, len(content.stages))]


def _check_shared(content: PipelineConfig) -> None:
    """Reject shared arguments that no stage has, or that each stage has its own of."""
    recipes = {entry.recipe or entry.name for entry in content.stages}
    if not recipes <= STAGES.keys():
        return  # the message about that stage comes first
    known = {name for recipe in recipes for name in STAGES[recipe].argument_types()}
    for key in content.arguments:
        if key == "output_dir":
            raise RecipeError("output_dir: each stage has its own. Fix: write it beside `arguments`, for all folders")
        if key == "seed" and content.seeds is not None:
            raise RecipeError("seed: `seeds` sets it. Fix: leave one of the two out")
        if key not in known:
            raise RecipeError(f"no stage has the key '{key}'{did_you_mean(key, known)}")


@dataclass
class _SeedReader:
    """Reads the entries of one seed, in the order in which they run."""

    places: Places
    content: PipelineConfig
    read_file: Callable[[Path], dict[str, Any]]
    recipes: Path
    seed: int | None
    accelerate_config: str | None
    launcher: Launcher
    stages: dict[str, list[PipelineStage]] = field(default_factory=dict)  # entry -> its stages so far, one a round

    def read(self, number: int, turn: int | None) -> PipelineStage:
        """Return the stage of an entry in a round."""
        entry = self.content.stages[number]
        recipe = entry.recipe or entry.name
        with self.places.of_entry(number, entry).context():
            if len(self.stages.get(entry.name, ())) >= (turn or 1):
                raise RecipeError(f"name: '{entry.name}' is taken. Fix: give each stage its own name, and set `recipe`")
            if recipe not in pipeline_stages():
                known = pipeline_stages()
                raise RecipeError(f"recipe: {recipe!r} is none of {', '.join(known)}{did_you_mean(recipe, known)}")
            with error_context("config"):
                file = None if isinstance(entry.config, dict) else resolve_config_path(entry.config, self.recipes)
                written = entry.config if file is None else self.read_file(file)
        types = STAGES[recipe].argument_types()
        shared = {key: value for key, value in self.content.arguments.items() if key in types}
        if not STAGES[recipe].trains and "eval_datasets" in {*written, *entry.arguments}:
            shared.pop("test_split_size", None)  # of the rows of trainings; it would take the place of those
        if self.seed is not None and "seed" in entry.arguments:
            raise RecipeError(f"stages: {entry.name}: seed: `seeds` sets it. Fix: leave one of the two out")
        own = self._own(entry, recipe, turn)
        origin = self.places.of_stage(number, self.content, [*own], file, [*written])
        with origin.context():
            below, above = (written, shared) if file else (shared, written)
            values = merge_overrides(merge_overrides(below, above), own | entry.arguments)
            values.pop("needs", None)  # the pipeline's order takes its place
            stage = self._stage(entry, recipe, turn, values, origin, frozenset({*shared, *entry.arguments}))
        self.stages.setdefault(entry.name, []).append(stage)
        return stage

    def _stage(
        self,
        entry: StageEntry,
        recipe: str,
        turn: int | None,
        values: dict[str, Any],
        origin: Origin,
        fixed: frozenset[str],
    ) -> PipelineStage:
        """Return a stage from its arguments, whose placeholders it replaces."""
        named = {key: value for key, value in values.items() if key != "output_dir"}
        # A store of labels is no input, or every new label would repeat all rounds; for other stages their fingerprints stand
        earlier = [stage.folder for stages in self.stages.values() for stage in stages]
        earlier += [folder.absolute() for folder in earlier]
        files = files_in(
            named | {"accelerate_config": self.accelerate_config},
            exclude=(Path(values["output_dir"]), _label_store(values), *earlier),
        )
        resolver = PlaceholderResolver(self.stages, {"seed": self.seed or 0, "round": turn})
        values = {key: resolver.resolve(value, key) for key, value in values.items()}
        if STAGES[recipe].trains:
            check_launcher_support(recipe, values, self.launcher)
        unseeded = entry.name if turn is None else f"{entry.name}-round-{turn}"
        return PipelineStage(
            name=unseeded if self.seed is None else f"{unseeded}-{self.seed}",
            recipe=recipe,
            values=values,
            inputs=tuple(dict.fromkeys(stage.name for stage in resolver.inputs)),
            fingerprint=fingerprint(recipe, values, files, [stage.fingerprint for stage in resolver.inputs]),
            files=files,
            origin=origin,
            fixed=fixed,
            entry=entry.name,
            unseeded=unseeded,
        )

    def _own(self, entry: StageEntry, recipe: str, turn: int | None) -> dict[str, Any]:
        """Return the arguments that the pipeline sets for one stage."""
        output = Path(self.content.output_dir)
        output = output if self.seed is None else output / f"seed-{self.seed}"
        output = output if turn is None else output / f"round-{turn}"
        own: dict[str, Any] = {"output_dir": str(output / entry.name)}
        if self.seed is not None:
            own["seed"] = self.seed
        if STAGES[recipe].trains:
            own |= self.content.tracker_arguments()
        return own


def fingerprint(recipe: str, values: Mapping[str, Any], files: Sequence[Any], inputs: Sequence[str]) -> str:
    """Return a stage's hash; computed differently, it would rerun finished stages."""
    identity = {
        "recipe": recipe,
        "values": {key: value for key, value in values.items() if key not in TRACKER_KEYS},
        "files": files,
        "inputs": [*inputs],
    }
    return hashlib.sha256(json.dumps(_sort_keys(identity), default=str).encode()).hexdigest()


def _sort_keys(value: Any) -> Any:
    """Return mappings as sorted lists of pairs: YAML keys may differ in type."""
    if isinstance(value, dict):
        return sorted(([str(key), _sort_keys(item)] for key, item in value.items()), key=lambda pair: pair[0])
    return [_sort_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _label_store(values: Mapping[str, Any]) -> Path | None:
    """Return the database of `labeller: {store: FILE}`."""
    labeller = values.get("labeller")
    store = labeller.get("store") if isinstance(labeller, dict) else None
    return Path(store) if isinstance(store, str) else None


@dataclass(frozen=True)
class PlaceholderResolver:
    """Replaces placeholders at the start of texts: docs/pipeline.md ("Rounds").

    Parameters:
        stages: entry -> its stages so far, one a round.
        numbers: of `{seed}` and `{round}`.
        inputs: collects the stages that were named.
    """

    stages: Mapping[str, list[PipelineStage]]
    numbers: Mapping[str, int | None]
    inputs: list[PipelineStage] = field(default_factory=list)

    def resolve(self, value: Any, key: str) -> Any:
        """Return a value with the placeholders in it replaced.

        Raises:
            RecipeError: for a stage that does not come before.
        """
        if isinstance(value, dict):
            return {name: self.resolve(item, key) for name, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(copy, key) for item in value for copy in self._repeat(item, key)]
        match = _PLACEHOLDER.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            self.inputs.extend(self._writers(value))
            return value
        name, rest = match.groups()
        if not rest and self.numbers.get(name) is not None:
            return self.numbers[name]
        if name.endswith("|") and not self.stages.get(name[:-1]):
            return ""
        stage = self._find(name, key)
        self.inputs.append(stage)
        return f"{stage.folder}{rest}"

    def _writers(self, value: Any) -> Iterator[PipelineStage]:
        """Yield the stages whose folder a text names in full."""
        path = Path(value).absolute() if isinstance(value, str) else Path()
        yield from (self._folders[folder] for folder in (path, *path.parents) if folder in self._folders)

    @functools.cached_property
    def _folders(self) -> dict[Path, PipelineStage]:
        return {stage.folder.absolute(): stage for stages in self.stages.values() for stage in stages}

    def _repeat(self, item: Any, key: str) -> list[Any]:
        """Return an item of a list once for each stage that `{name*}` in it stands for."""
        text = json.dumps(item, default=str, ensure_ascii=False)
        starred = re.search(r"\{([^{}]*)\*\}", text)
        if starred is None:
            return [item]
        name = starred[1]
        self._find(name, key)
        turns = range(1, len(self.stages[name]) + 1)
        return [json.loads(text.replace(starred[0], f"{{{name}@{turn}}}")) for turn in turns]

    def _find(self, text: str, key: str) -> PipelineStage:
        for name in text.split("|"):
            name, _, turn = name.partition("@")
            stages = self.stages.get(name, [])
            if turn.isdigit() and 1 <= int(turn) <= len(stages):
                return stages[int(turn) - 1]
            if stages and not turn:
                return stages[-1]
        raise RecipeError(f"{key}: {{{text}}} is no stage before this one{did_you_mean(text, self.stages)}")
