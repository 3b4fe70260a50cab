"""The keys of a pipeline's YAML file."""

from typing import Annotated, Any

from rlhf_recipes.core.errors import RecipeError, did_you_mean

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
TRACKER_KEYS = ("report_to", "project")
"""Keys that go to every stage that trains, and change nothing of its result."""


def _without_repeats(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed may stand once")
    return seeds


GpuMemory = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
"""The memory of a card in GB."""


class StageEntry(BaseModel):
    """One stage. `recipe` defaults to `name`; `arguments` go over the YAML file."""

    model_config = _STRICT
    name: str = Field(pattern=r"^[^\W\d][\w-]*$")
    config: str
    recipe: str | None = None
    arguments: dict[str, Any] = {}
    each_round: bool = False


class PipelineConfig(BaseModel):
    """The whole file; docs/pipeline.md explains the keys."""

    model_config = _STRICT
    output_dir: str
    stages: list[StageEntry] = Field(min_length=1)
    arguments: dict[str, Any] = {}
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(_without_repeats)] | None = None
    rounds: PositiveInt | None = None
    jobs: PositiveInt = 1
    gpu_memory: GpuMemory | None = None
    accelerate_config: str | None = None
    report_to: Any = None
    project: Any = None

    def tracker_arguments(self) -> dict[str, Any]:
        """Return the keys of `TRACKER_KEYS` that the file has."""
        return {key: getattr(self, key) for key in TRACKER_KEYS if key in self.model_fields_set}


def parse_pipeline(values: dict[str, Any]) -> PipelineConfig:
    """Return the keys of a pipeline's file, checked."""
    if "model_name_or_path" in values and "stages" not in values:
        raise RecipeError(
            "model_name_or_path: this is the file of one recipe. Fix: launch it with that recipe, or name a pipeline's"
        )
    try:
        return PipelineConfig.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_first_problem(error)) from None


def check_gpu_memory(value: Any) -> float:
    """Return the memory of a card in GB, a positive number."""
    try:
        return TypeAdapter(GpuMemory).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"gpu_memory: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key, if there is one
    place, text = problem["loc"], problem["msg"]
    if problem["type"] == "extra_forbidden":
        *place, key = place
        text = f"unknown key '{key}'{did_you_mean(str(key), (StageEntry if place else PipelineConfig).model_fields)}"
    elif problem["type"] != "missing":
        text = f"{repr(problem['input'])[:100]}: {text}"
    if problem["loc"] in ((), ("gpu_memory",)):
        text += ". Fix: write the GB of your card, as a number such as 12 or 22.5"
    names = "".join(f", entry {part + 1}" if isinstance(part, int) else f": {part}" for part in place)
    return f"{names}: {text}".removeprefix(": ")
