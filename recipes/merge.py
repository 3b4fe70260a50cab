"""Merging: the adapter of a policy or a reward model becomes a full model, in safetensors.

    python recipes/merge.py                                   # configs/tiny/merge.yaml: the tiny world, on a CPU
    python recipes/merge.py --adapter runs/ppo --output_dir runs/merged --dtype bfloat16

Loads the base at full precision, even if the adapter was trained in 4 bits. Reads the saved model again, and compares its
logits or scores with the adapter's, before it is moved to `output_dir`. Adds the tokenizer, the chat template, the scale of a
reward model, `recipe.json` and a model card. Runs on the CPU, in one process.
"""

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.export.merge import (
    adapter_and_base,
    atomic_directory,
    check,
    describe,
    merge_policy,
    merge_reward,
    push,
)
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.stages import parse_arguments

from accelerate import PartialState


def main() -> None:
    """Merge, check, and move the result to its place."""
    merge_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    is_reward, model_args = adapter_and_base(merge_args, model_args)

    with atomic_directory(merge_args.output_dir) as folder:
        # The adapter on its base, its outputs there, and the merged model
        tokenizer = load_tokenizer(model_args, merge_args, start_from=merge_args.adapter)
        merge = merge_reward if is_reward else merge_policy
        said = merge(merge_args, model_args, tokenizer, folder)

        # The saved model must give the same outputs
        found = check(said, is_reward, merge_args, tokenizer, folder)
        describe(folder, merge_args, model_args, found)
    print(found)
    print(f"The merged model is in {merge_args.output_dir}")
    if merge_args.push_to_hub:
        print(f"Uploaded to {push(merge_args)}")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
