"""Stages in order, from one YAML file."""

from rlhf_recipes.pipeline.checks import check_arguments
from rlhf_recipes.pipeline.reading import PipelineStage, read_stages
from rlhf_recipes.pipeline.running import Pipeline, read_pipeline

__all__ = ["Pipeline", "PipelineStage", "check_arguments", "read_pipeline", "read_stages"]
