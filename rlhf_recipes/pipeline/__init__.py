"""Stages in order, from one YAML file: `reading` says what they are, `running` does them."""

from rlhf_recipes.pipeline.reading import Stage, read_stages
from rlhf_recipes.pipeline.running import Pipeline, check_arguments, read_pipeline

__all__ = ["Pipeline", "Stage", "check_arguments", "read_pipeline", "read_stages"]
