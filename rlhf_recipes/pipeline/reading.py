"""The YAML file of a pipeline: its stages, once for each seed and round, with what each reads of the others filled in."""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config.launcher import Launcher, check_launcher_support, read_launcher, refuse_one_gpus_arithmetic
from rlhf_recipes.config.parser import merge_overrides
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.core.provenance import files_in
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.memory import NoFitError, Plan, StageArguments, autofit
from rlhf_recipes.memory.gpu_arguments import resolve_for_gpu
from rlhf_recipes.memory.plan import GIB
from rlhf_recipes.memory.planners import has_planner
from rlhf_recipes.stages import STAGES, pipeline_stages

from accelerate.commands.config import default_config_file

_OF_TRACKERS = ("report_to", "project")  # of the pipeline for all stages that train; they decide nothing of a result
_KEYS = {"output_dir", "stages", "seeds", "rounds", "jobs", "accelerate_config", "gpu_memory", *_OF_TRACKERS}
_STAGE_KEYS = {"name", "recipe", "config", "arguments", "each_round"}
_PLACE = re.compile(r"\{([^{}]*)\}(.*)", re.DOTALL)


@dataclass(frozen=True)
class Stage:
    """One run of one recipe.

    Parameters:
        name: its own among the stages.
        recipe: the name of a file in `recipes/`.
        values: the arguments, those of its YAML file with those of the pipeline over them and every `{name}` filled in.
        inputs: names of the stages whose folders it reads.
        fingerprint: changes with its arguments, with the files that they name, and with the fingerprints of its inputs.
        entry: its name in the file, which the stages of all seeds and rounds have in common.
        unseeded: its name without the seed.
        picked: those of the arguments that `gpu_memory` chose.
        predicted: GiB at the peak with them, or None.
        notes: what that prediction takes for granted.
    """

    name: str
    recipe: str
    values: dict[str, Any]
    inputs: tuple[str, ...]
    fingerprint: str
    entry: str
    unseeded: str
    picked: dict[str, Any] = field(default_factory=dict)
    predicted: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its result is."""
        return Path(self.values["output_dir"])

    def result(self) -> list[int] | None:
        """Size and time of the file that the recipe writes last: another run in the folder leaves another one."""
        path = self.folder / STAGES[self.recipe].result
        return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


@dataclass(frozen=True)
class PipelineFile:
    """What a YAML file says.

    Parameters:
        folder: of the whole; a stage gets a folder in it, by its name.
        stages: in order.
        accelerate_config: a file of `accelerate config`, or None.
        jobs: how many stages may run side by side.
        engine: that `accelerate_config` names, or the file that accelerate finds.
    """

    folder: Path
    stages: list[Stage]
    accelerate_config: str | None
    jobs: int
    engine: Launcher


def read_stages(config: Path, recipes: Path, card: float | None = None, must_fit: bool = True) -> PipelineFile:
    """The pipeline in a YAML file.

        output_dir: runs/mine
        stages:
          - name: sft
            config: configs/mine/sft.yaml
          - name: ppo
            config: configs/mine/ppo.yaml
            arguments: {start_from: "{sft}"}     # the folder of that stage

    With `seeds: [0, 1, 2]` all of it is done once for each seed, in a folder `seed-0`, ... of its own: `seed` of every stage
    is set, and `"{seed}"` stands for it in the arguments. With `rounds: 3` the stages with `each_round: true` are done three
    times, in `round-1`, ...; docs/pipeline.md says how they name one another. With `gpu_memory: 12` what makes a stage fit a
    card of 12 GB is chosen, over its file and under its `arguments`. `report_to` and `project` go to every stage that trains.

    Args:
        config: the file; the files that it names are looked for from the current folder, and from that of `recipes/`.
        recipes: the folder of the recipes.
        card: GB, in place of the file's `gpu_memory`.
        must_fit: whether a stage that does not fit its card is refused; else it gets what takes least.

    Raises:
        RecipeError: with the key or stage, and what would be right.
    """
    values = read_yaml(config)
    _refuse_unknown(values, _KEYS, str(config))
    if not isinstance(values.get("output_dir"), str):
        raise RecipeError(f"{config}: output_dir: name the folder that the stages' results go to")
    output, seeds = Path(values["output_dir"]), values.get("seeds", [None])
    whole = isinstance(seeds, list) and seeds and all(seed is None or type(seed) is int for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise RecipeError(f"{config}: seeds: must be a list of whole numbers, none of them twice")
    jobs = _whole(values, "jobs", "how many stages may run side by side", config)
    launch = _accelerate_config(values, config, recipes)
    engine = read_launcher(launch) if launch else Launcher()
    card = checked_card(values.get("gpu_memory") if card is None else card, str(config))
    if card is not None:
        with error_context(str(config)):
            refuse_one_gpus_arithmetic(engine)
    entries = _entries(values, config)
    tracked = {key: values[key] for key in _OF_TRACKERS if key in values}
    stages = []
    for seed in seeds:
        place = output if seed is None else output / f"seed-{seed}"
        reader = _Reader(f"{config}: stages", place, recipes, seed, launch, engine, card, must_fit, tracked)
        stages += reader.read(entries)
    _refuse_shared_folders(stages, f"{config}: stages")
    return PipelineFile(output, stages, launch, jobs, engine)


def checked_card(card: Any, where: str) -> float | None:
    """GB of a card, or None where none is named.

    Raises:
        RecipeError: for what is no size of a card.
    """
    number = isinstance(card, int | float) and not isinstance(card, bool)
    if card is None or (number and math.isfinite(card) and card > 0):
        return card
    raise RecipeError(f"{where}: gpu_memory: {card!r} is not the memory of a card in GB, such as 12")


def _accelerate_config(values: dict[str, Any], config: Path, recipes: Path) -> str | None:
    """The file that stages are launched with: without one, that of `accelerate config`; None where there is neither."""
    named = values.get("accelerate_config")
    if named is None:
        return str(default_config_file) if Path(default_config_file).is_file() else None
    if isinstance(named, str) and (path := found(named, recipes)).is_file():
        return str(path)
    raise RecipeError(
        f"{config}: accelerate_config: {named!r} is no file: name one of configs/accelerate/, or write one with "
        "`accelerate config`"
    )


def _whole(values: dict[str, Any], key: str, meaning: str, config: Path) -> int:
    number = values.get(key, 1)
    if type(number) is not int or number < 1:
        raise RecipeError(f"{config}: {key}: {number!r} is not {meaning}: 1 or more")
    return number


def _entries(values: dict[str, Any], config: Path) -> list[tuple[int | None, int, dict[str, Any]]]:
    """Round (or None), number in the file, and entry, in the order in which they are done."""
    entries = values.get("stages")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise RecipeError(f"{config}: stages: must be a list of mappings with `name` and `config`")
    numbered = list(enumerate(entries, start=1))
    repeated = [number for number, entry in numbered if entry.get("each_round")]
    rounds = _whole(values, "rounds", "how often the stages with `each_round` are done", config)
    if ("rounds" in values) != bool(repeated):
        raise RecipeError(f"{config}: rounds: goes with `each_round: true` at the stages that are done in every round")
    if repeated != list(range(*(repeated[0], repeated[-1] + 1) if repeated else (0,))):
        raise RecipeError(f"{config}: stages: those with `each_round: true` must follow one another")
    plan = [(None, number, entry) for number, entry in numbered if number not in repeated]
    block = [(turn, number, entry) for turn in range(1, rounds + 1) for number, entry in numbered if number in repeated]
    at = repeated[0] - 1 if repeated else 0
    return plan[:at] + block + plan[at:]


def _refuse_shared_folders(stages: Iterable[Stage], where: str) -> None:
    owners: dict[Path, str] = {}
    for stage in stages:
        owner = owners.setdefault(stage.folder.absolute(), stage.name)
        if owner != stage.name:
            raise RecipeError(f"{where}: {owner} and {stage.name} both write to {stage.folder}: leave `output_dir` out")


@dataclass
class _Reader:
    """Reads the entries of one seed, in order."""

    where: str
    output: Path
    recipes: Path
    seed: int | None
    launch: str | None  # the file of `accelerate config`
    engine: Launcher
    card: float | None
    must_fit: bool
    tracked: dict[str, Any]
    stages: dict[str, list[Stage]] = field(default_factory=dict)  # entry -> its stages so far, one of each round
    planned: dict[str, StageArguments] = field(default_factory=dict)  # folder -> the arguments of the stage that writes it

    def read(self, entries: list[tuple[int | None, int, dict[str, Any]]]) -> list[Stage]:
        """The stages."""
        read = []
        for turn, number, entry in entries:
            stage = self._stage(entry, f"{self.where}, entry {number}", turn)
            self.stages.setdefault(stage.entry, []).append(stage)
            read.append(stage)
        return read

    def _stage(self, entry: dict[str, Any], where: str, turn: int | None) -> Stage:
        name, recipe, config, arguments = self._checked(entry, where, turn)
        place = (self.output if turn is None else self.output / f"round-{turn}") / name
        own = {"output_dir": str(place)} if self.seed is None else {"output_dir": str(place), "seed": self.seed}
        own |= self.tracked if STAGES[recipe].trains else {}
        with error_context(f"{where}: config"):
            values = merge_overrides(read_yaml(found(config, self.recipes)), own | arguments)
        values.pop("needs", None)  # the order of the stages says so
        named = {key: value for key, value in values.items() if key != "output_dir"} | {"accelerate_config": self.launch}
        # Not the labels: the rounds of one store would all be done anew with every label that is added
        files = files_in(named, exclude=(Path(values["output_dir"]), _store_of(values)))
        filling = PlaceholderResolver(self.stages, {"seed": self.seed, "round": turn})
        values = {key: filling.fill(value, f"{where}: {key}") for key, value in values.items()}
        with error_context(where):
            with error_context(name):
                if STAGES[recipe].trains:
                    check_launcher_support(recipe, values, self.engine)
            picked, plan = self._pick(name, recipe, values, arguments)
        values |= picked
        predicted, notes = (plan.allocated / GIB, plan.notes) if plan else (None, ())
        identity = {
            "recipe": recipe,
            "values": {key: value for key, value in values.items() if key not in _OF_TRACKERS},
            "files": files,
            "inputs": [stage.fingerprint for stage in filling.inputs],
        }
        digest = hashlib.sha256(json.dumps(_sorted(identity), default=str).encode()).hexdigest()
        reads = tuple(dict.fromkeys(stage.name for stage in filling.inputs))
        unseeded = name if turn is None else f"{name}-round-{turn}"
        full = unseeded if self.seed is None else f"{unseeded}-{self.seed}"
        return Stage(full, recipe, values, reads, digest, name, unseeded, picked, predicted, notes)

    def _pick(
        self, name: str, recipe: str, values: dict[str, Any], arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], Plan | None]:
        """What `gpu_memory` chooses for a stage, and the plan with it."""
        if self.card is None or not has_planner(recipe):
            return {}, None
        stage = resolve_for_gpu(name, recipe, values, dict(self.planned))
        try:
            picked, plan = autofit(stage, self.card, fixed=arguments)
        except NoFitError as error:
            if self.must_fit:
                raise
            picked, plan = error.choice, error.plan
        self.planned[values["output_dir"]] = stage.override(picked)
        return picked, plan

    def _checked(self, entry: dict[str, Any], where: str, turn: int | None) -> tuple[str, str, str, dict[str, Any]]:
        """Name, recipe, config and arguments."""
        _refuse_unknown(entry, _STAGE_KEYS, where)
        name, recipe = entry.get("name"), entry.get("recipe", entry.get("name"))
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise RecipeError(f"{where}: name: {name!r} is no name: letters, digits, - and _")
        if len(self.stages.get(name, ())) >= (turn or 1):
            raise RecipeError(f"{where}: name: '{name}' stands twice: give each stage a name, and `recipe` beside it")
        if not isinstance(recipe, str) or recipe not in pipeline_stages():
            known = pipeline_stages()
            raise RecipeError(f"{where}: recipe: {recipe!r} is none of {', '.join(known)}{did_you_mean(str(recipe), known)}")
        config, arguments = entry.get("config"), entry.get("arguments", {})
        if not isinstance(config, str):
            raise RecipeError(f"{where}: config: name the YAML file of its recipe, such as configs/tiny/{recipe}.yaml")
        if not isinstance(arguments, dict):
            raise RecipeError(f"{where}: arguments: must be a mapping of keys of {recipe}.py, and is {arguments!r}")
        return name, recipe, config, arguments


@dataclass(frozen=True)
class PlaceholderResolver:
    """Puts what they stand for in place of texts that begin with `{...}`.

    `{name}` is the folder of the newest stage of that name, `{name|other}` that of `other` where there is none of `name` yet
    (`{name|}`: an empty text), `{name@2}` that of round 2; a list's item with `{name*}` becomes one for each stage of the name;
    `{seed}` and `{round}` alone are numbers.
    """

    stages: dict[str, list[Stage]]
    numbers: dict[str, int | None]
    inputs: list[Stage] = field(default_factory=list)

    def fill(self, value: Any, where: str) -> Any:
        """`value` with the folders in place; adds the stages to `inputs`."""
        if isinstance(value, dict):
            return {key: self.fill(item, where) for key, item in value.items()}
        if isinstance(value, list):
            return [self.fill(one, where) for item in value for one in self._each(item, where)]
        found = _PLACE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            return value
        if found[2] == "" and self.numbers.get(found[1]) is not None:
            return self.numbers[found[1]]
        if found[1].endswith("|") and not self.stages.get(found[1][:-1]):
            return ""
        stage = self._stage(found[1], where)
        self.inputs.append(stage)
        return f"{stage.folder}{found[2]}"

    def _each(self, item: Any, where: str) -> list[Any]:
        """An item of a list, once for each stage that it names by `{name*}`."""
        starred = re.search(r"\{([^{}]*)\*\}", json.dumps(item, default=str))
        if starred is None:
            return [item]
        self._stage(starred[1], where)
        texts = [f"{{{starred[1]}@{number}}}" for number in range(1, len(self.stages[starred[1]]) + 1)]
        return [_replaced(item, starred[0], text) for text in texts]

    def _stage(self, text: str, where: str) -> Stage:
        for name in text.split("|"):
            name, _, turn = name.partition("@")
            stages = self.stages.get(name, [])
            if turn.isdigit() and 1 <= int(turn) <= len(stages):
                return stages[int(turn) - 1]
            if stages and not turn:
                return stages[-1]
        raise RecipeError(f"{where}: {{{text}}} is no stage before this one{did_you_mean(text, self.stages)}")


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _store_of(values: dict[str, Any]) -> Path | None:
    """The database of labels that `labeller: {store: FILE}` names."""
    labeller = values.get("labeller")
    store = labeller.get("store") if isinstance(labeller, dict) else None
    return Path(store).expanduser() if isinstance(store, str) else None


def _sorted(value: Any) -> Any:
    """The same with the keys of mappings in order, whatever their types."""
    if isinstance(value, dict):
        return sorted(([str(key), _sorted(item)] for key, item in value.items()), key=lambda pair: pair[0])
    return [_sorted(item) for item in value] if isinstance(value, list | tuple) else value


def found(path: str, recipes: Path) -> Path:
    """A file that is named from the current folder, or from that of a checkout."""
    own = recipes.parent / path  # of a checkout that the command is not run in
    return own if own.exists() and not Path(path).exists() else Path(path)


def _refuse_unknown(values: dict[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: unknown key '{key}'{did_you_mean(str(key), known)}")
