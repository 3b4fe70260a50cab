"""Merging: an adapter, of a policy or a reward model, becomes a model of its own, in safetensors.

    python recipes/merge.py                                   # configs/tiny/merge.yaml: the tiny world, on a CPU
    python recipes/merge.py --adapter runs/ppo --output_dir runs/merged --dtype bfloat16

The base is loaded at full precision, in 4 bits or not when the adapter was trained. What was saved is read again, and its
logits or scores are compared with the adapter's before it is in `output_dir`. With it go the tokenizer, the chat template, the
scale of a reward model, `recipe.json`, and a model card. It is done on the CPU, by one process.
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
    """Merges, checks, and puts the result into its place."""
    merge_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    is_reward, model_args = adapter_and_base(merge_args, model_args)

    with atomic_directory(merge_args.output_dir) as folder:
        # The adapter on its base, what it says there, and the two as one
        tokenizer = load_tokenizer(model_args, merge_args, start_from=merge_args.adapter)
        merge = merge_reward if is_reward else merge_policy
        said = merge(merge_args, model_args, tokenizer, folder)

        # What is on the disk says the same, or it goes
        found = check(said, is_reward, merge_args, tokenizer, folder)
        describe(folder, merge_args, model_args, found)
    print(found)
    print(f"The merged model is in {merge_args.output_dir}")
    if merge_args.push_to_hub:
        print(f"Uploaded to {push(merge_args)}")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
