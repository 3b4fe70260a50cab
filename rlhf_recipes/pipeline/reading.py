"""Read a pipeline's YAML file: its stages for each seed and round, fully resolved."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config.launcher import Launcher, check_launcher_support, check_single_gpu_plan, read_launcher
from rlhf_recipes.config.parser import merge_overrides
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.core.provenance import files_in
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.memory import NoFitError, Plan, StageArguments, autofit
from rlhf_recipes.memory.gpu_arguments import resolve_for_gpu
from rlhf_recipes.memory.planners import has_planner
from rlhf_recipes.pipeline.schema import TRACKER_KEYS, PipelineConfig, StageEntry, parse_pipeline
from rlhf_recipes.stages import STAGES, pipeline_stages

from accelerate.commands.config import default_config_file

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}(.*)", re.DOTALL)


@dataclass(frozen=True)
class PipelineStage:
    """One run of one recipe.

    Parameters:
        name: unique among the stages.
        values: the arguments: those of its YAML file, over them those of the pipeline, with placeholders resolved.
        inputs: names of the stages whose folders it reads.
        fingerprint: changes with its arguments, the files that they name, and the fingerprints of its inputs.
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
    entry: str
    unseeded: str
    autofitted: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

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
    """

    folder: Path
    stages: list[PipelineStage]
    accelerate_config: str | None
    jobs: int
    launcher: Launcher


def read_stages(config: Path, recipes: Path, gpu_memory: float | None = None, must_fit: bool = True) -> PipelineFile:
    """Read a pipeline's YAML file; docs/pipeline.md explains its keys.

    Args:
        config: the file. Files that it names are relative to the current folder, or else to the parent of `recipes`.
        recipes: the folder of the recipes.
        gpu_memory: GB of a card, in place of the file's `gpu_memory`.
        must_fit: whether to reject a stage that does not fit its card; else it gets the arguments that take least memory.

    Raises:
        RecipeError: with the file, and the key or stage.
    """
    values = read_yaml(config)
    with error_context(str(config)):
        settings = parse_pipeline(values if gpu_memory is None else values | {"gpu_memory": gpu_memory})
        accelerate_config = _find_accelerate_config(settings.accelerate_config, recipes)
        launcher = read_launcher(accelerate_config) if accelerate_config else Launcher()
        if settings.gpu_memory is not None:
            check_single_gpu_plan(launcher)
        order = _order(settings)
        with error_context("arguments"):
            _check_shared(settings)
        stages: list[PipelineStage] = []
        for seed in [None] if settings.seeds is None else settings.seeds:
            reader = _SeedReader(settings, recipes, seed, accelerate_config, launcher, must_fit)
            for turn, number in order:
                with error_context(f"stages, entry {number + 1}"):
                    stages.append(reader.read(settings.stages[number], turn))
        owners: dict[Path, str] = {}
        for stage in stages:
            owner = owners.setdefault(stage.folder.absolute(), stage.name)
            if owner != stage.name:
                raise RecipeError(f"stages: {owner} and {stage.name} both write to {stage.folder}. Fix: leave `output_dir` out")
    return PipelineFile(Path(settings.output_dir), stages, accelerate_config, settings.jobs, launcher)


def resolve_config_path(path: str, recipes: Path) -> Path:
    """Return a path in the current folder, else in the checkout of `recipes`."""
    in_checkout = recipes.parent / path
    return in_checkout if in_checkout.exists() and not Path(path).exists() else Path(path)


def _find_accelerate_config(path: str | None, recipes: Path) -> str | None:
    """Return the launcher's configuration: by default that of `accelerate config`."""
    found = Path(default_config_file) if path is None else resolve_config_path(path, recipes)
    if found.is_file():
        return str(found)
    if path is None:
        return None
    raise RecipeError(
        f"accelerate_config: {path!r} is no file. Fix: name one of configs/accelerate/, or write one with `accelerate config`"
    )


def _order(settings: PipelineConfig) -> list[tuple[int | None, int]]:
    """Return the round (or None) and index of each entry, in the order of the run."""
    repeated = [number for number, entry in enumerate(settings.stages) if entry.each_round]
    if (settings.rounds is None) == bool(repeated):
        raise RecipeError("rounds: needs stages with `each_round: true`, and they need `rounds`. Fix: set both, or neither")
    if not repeated:
        return [(None, number) for number in range(len(settings.stages))]
    if repeated != list(range(repeated[0], repeated[-1] + 1)):
        raise RecipeError("stages: those with `each_round: true` must stand next to each other. Fix: move them together")
    before = [(None, number) for number in range(repeated[0])]
    rounds = [(turn, number) for turn in range(1, settings.rounds + 1) for number in repeated]
    return before + rounds + [(None, number) for number in range(repeated[-1] + 1, len(settings.stages))]


def _check_shared(settings: PipelineConfig) -> None:
    """Reject shared arguments that no stage has, or that each stage has its own of."""
    recipes = {entry.recipe or entry.name for entry in settings.stages}
    if not recipes <= STAGES.keys():
        return  # the message about that stage comes first
    known = {name for recipe in recipes for name in STAGES[recipe].argument_names()}
    for key in settings.arguments:
        if key == "output_dir":
            raise RecipeError("output_dir: each stage has its own. Fix: write it beside `arguments`, for all folders")
        if key == "seed" and settings.seeds is not None:
            raise RecipeError("seed: `seeds` sets it. Fix: leave one of the two out")
        if key not in known:
            raise RecipeError(f"no stage has the key '{key}'{did_you_mean(key, known)}")


@dataclass
class _SeedReader:
    """Reads the entries of one seed, in the order in which they run."""

    settings: PipelineConfig
    recipes: Path
    seed: int | None
    accelerate_config: str | None
    launcher: Launcher
    must_fit: bool
    stages: dict[str, list[PipelineStage]] = field(default_factory=dict)  # entry -> its stages so far, one a round
    producers: dict[str, StageArguments] = field(default_factory=dict)  # folder -> arguments of the stage that writes it

    def read(self, entry: StageEntry, turn: int | None) -> PipelineStage:
        """Return the stage of an entry in a round."""
        recipe = entry.recipe or entry.name
        if len(self.stages.get(entry.name, ())) >= (turn or 1):
            raise RecipeError(f"name: '{entry.name}' is taken. Fix: give each stage its own name, and set `recipe`")
        if recipe not in pipeline_stages():
            known = pipeline_stages()
            raise RecipeError(f"recipe: {recipe!r} is none of {', '.join(known)}{did_you_mean(recipe, known)}")
        values = self._arguments(entry, recipe, turn)
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
        with error_context(entry.name):
            if STAGES[recipe].trains:
                check_launcher_support(recipe, values, self.launcher)
        autofitted, plan = self._autofit(entry, recipe, values)
        values |= autofitted
        unseeded = entry.name if turn is None else f"{entry.name}-round-{turn}"
        stage = PipelineStage(
            name=unseeded if self.seed is None else f"{unseeded}-{self.seed}",
            recipe=recipe,
            values=values,
            inputs=tuple(dict.fromkeys(stage.name for stage in resolver.inputs)),
            fingerprint=_fingerprint(recipe, values, files, resolver.inputs),
            entry=entry.name,
            unseeded=unseeded,
            autofitted=autofitted,
            plan=plan,
        )
        self.stages.setdefault(entry.name, []).append(stage)
        return stage

    def _arguments(self, entry: StageEntry, recipe: str, turn: int | None) -> dict[str, Any]:
        """Return the keys of the recipe's YAML file, and over them the pipeline's."""
        output = Path(self.settings.output_dir)
        output = output if self.seed is None else output / f"seed-{self.seed}"
        output = output if turn is None else output / f"round-{turn}"
        overrides: dict[str, Any] = {"output_dir": str(output / entry.name)}
        if self.seed is not None:
            overrides["seed"] = self.seed
        if STAGES[recipe].trains:
            overrides |= self.settings.tracker_arguments()
        with error_context("config"):
            values = read_yaml(resolve_config_path(entry.config, self.recipes))
        values = merge_overrides(values, self._shared(recipe))
        values = merge_overrides(values, overrides | entry.arguments)
        values.pop("needs", None)  # the pipeline's order takes its place
        return values

    def _shared(self, recipe: str) -> dict[str, Any]:
        """Return those of the pipeline's `arguments` that a recipe has."""
        known = STAGES[recipe].argument_names()
        return {key: value for key, value in self.settings.arguments.items() if key in known}

    def _autofit(self, entry: StageEntry, recipe: str, values: dict[str, Any]) -> tuple[dict[str, Any], Plan | None]:
        """Return the arguments that `gpu_memory` chooses for a stage, and their plan."""
        if self.settings.gpu_memory is None or not has_planner(recipe):
            return {}, None
        arguments = resolve_for_gpu(entry.name, recipe, values, dict(self.producers))
        try:
            chosen, plan = autofit(arguments, self.settings.gpu_memory, fixed={*self._shared(recipe), *entry.arguments})
        except NoFitError as error:
            if self.must_fit:
                raise
            chosen, plan = error.choice, error.plan
        self.producers[values["output_dir"]] = arguments.override(chosen)
        return chosen, plan


def _fingerprint(
    recipe: str, values: Mapping[str, Any], files: list[tuple[str, int, int]], inputs: Iterable[PipelineStage]
) -> str:
    """Return a stage's hash; computed differently, it would rerun finished stages."""
    identity = {
        "recipe": recipe,
        "values": {key: value for key, value in values.items() if key not in TRACKER_KEYS},
        "files": files,
        "inputs": [stage.fingerprint for stage in inputs],
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
        for stage in (stage for stages in self.stages.values() for stage in stages):
            if stage.folder.absolute() in (path, *path.parents):
                yield stage

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
