"""Merging: turn the adapter of a policy or a reward model into a full model.

    python recipes/merge.py                                   # configs/tiny/merge.yaml: the tiny world, on a CPU
    python recipes/merge.py --adapter runs/ppo --output_dir runs/merged --dtype bfloat16

The base is loaded at full precision, even if the adapter was trained on 4 bits. The saved model is read again, and its logits
or scores are compared with the adapter's before it is in `output_dir`. With it go the tokenizer, the chat template, the
normalisation of a reward model, `recipe.json` and a model card. It runs on the CPU, in one process.
"""

try:
    from rlhf_recipes.cli import check_early, exit_on_recipe_error
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}. Fix: run `source .venv/bin/activate` first") from None

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.core.files import atomic_directory
from rlhf_recipes.export.merge import check_merged, merge_policy, merge_reward, push, resolve_base, write_merge_record
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.stages import parse_arguments

from accelerate import PartialState


def main() -> None:
    """Merge, check, and move the result into its place."""
    merge_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    is_reward, model_args = resolve_base(merge_args, model_args)

    with atomic_directory(merge_args.output_dir) as folder:
        # Record the adapter's outputs on its base, then merge and save
        tokenizer = load_tokenizer(model_args, merge_args, start_from=merge_args.adapter)
        merge = merge_reward if is_reward else merge_policy
        outputs = merge(merge_args, model_args, tokenizer, folder)

        # Compare the saved model with the adapter; if they differ, the folder is deleted
        check = check_merged(outputs, is_reward, merge_args, tokenizer, folder)
        write_merge_record(folder, merge_args, model_args, check)
    print(check)
    print(f"The merged model is in {merge_args.output_dir}")
    if merge_args.push_to_hub:
        print(f"Uploaded to {push(merge_args)}")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
