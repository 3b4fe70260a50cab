"""The arguments with which the stages of a pipeline fit its card."""

from dataclasses import replace

from rlhf_recipes.memory import NoFitError, StageArguments, autofit
from rlhf_recipes.memory.gpu_arguments import resolve_for_gpu
from rlhf_recipes.memory.planners import has_planner
from rlhf_recipes.pipeline.reading import PipelineFile, PipelineStage, fingerprint


def fit_stages(file: PipelineFile, must_fit: bool = True) -> PipelineFile:
    """Return the stages of a file with the arguments that its `gpu_memory` chooses.

    Args:
        file: as read.
        must_fit: whether to reject a stage that does not fit its card; else it gets the arguments that take least memory.

    Raises:
        RecipeError: with the stage.
    """
    if file.gpu_memory is None:
        return file
    producers: dict[str, StageArguments] = {}  # folder -> arguments of the stage that writes it
    fitted: dict[str, PipelineStage] = {}
    for stage in file.stages:
        with stage.origin.context():
            stage = _fit(stage, file.gpu_memory, producers, must_fit)
        inputs = [fitted[name].fingerprint for name in stage.inputs]
        fitted[stage.name] = replace(stage, fingerprint=fingerprint(stage.recipe, stage.values, stage.files, inputs))
    return replace(file, stages=[*fitted.values()])


def _fit(stage: PipelineStage, card: float, producers: dict[str, StageArguments], must_fit: bool) -> PipelineStage:
    if not has_planner(stage.recipe):
        return stage
    arguments = resolve_for_gpu(stage.entry, stage.recipe, stage.values, dict(producers))
    try:
        chosen, plan = autofit(arguments, card, fixed=stage.fixed)
    except NoFitError as error:
        if must_fit:
            raise
        chosen, plan = error.choice, error.plan
    producers[stage.values["output_dir"]] = arguments.override(chosen)
    return replace(stage, values=stage.values | chosen, autofitted=chosen, plan=plan)
