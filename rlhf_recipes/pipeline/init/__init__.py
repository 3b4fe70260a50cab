"""Write a pipeline's YAML file for a model and data: `recipes/pipeline.py --init`."""

from rlhf_recipes.pipeline.init.writing import init_pipeline

__all__ = ["init_pipeline"]
