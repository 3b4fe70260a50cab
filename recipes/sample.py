"""Sampling: several completions of each prompt, from one or more policies.

    accelerate launch recipes/sample.py                       # configs/tiny/sample.yaml: the tiny world, on a CPU
    accelerate launch recipes/sample.py --config my.yaml --num_completions 6

Writes groups of unranked completions to `groups.jsonl`. The same command resumes an interrupted run. Runs in one process.
"""

from dataclasses import asdict

from rlhf_recipes.cli import check_early, exit_on_recipe_error

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.data import check_positions, check_rendered, drop_overlong_mode, load_data
from rlhf_recipes.feedback.sampling import GroupFile, reject_best_of, sample_groups
from rlhf_recipes.generation.policies import load_policy_bank, load_policy_tokenizer, read_policies
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.dependencies import run_dependencies

from accelerate import PartialState
from tqdm import tqdm


def main() -> None:
    """Sample groups of completions, after the stages that it needs."""
    sample_args, data_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    run_dependencies(__file__, (sample_args, data_args, model_args))
    policies = read_policies(sample_args.policies)
    reject_best_of(policies)

    # Data: prompts
    rows = load_data(data_args, "prompt", evaluate=False, seed=sample_args.seed).train
    tokenizer = load_policy_tokenizer(policies, model_args, sample_args)
    rows, _ = check_rendered(
        rows, "prompt", tokenizer, sample_args.max_prompt_length, drop_overlong_mode(data_args.long_rows), "train"
    )
    limits = position_limit(model_args), sample_args.max_completion_length
    check_positions(rows, "prompt", tokenizer, sample_args.max_prompt_length, "train", *limits)
    arguments = asdict(sample_args) | asdict(data_args) | asdict(model_args) | {"rows": len(rows)}
    arguments.pop("needs")
    file = GroupFile(arguments.pop("output_dir"), arguments)

    # Roles: every policy as an adapter on one base; they take turns
    bank = load_policy_bank(model_args, sample_args, policies, tokenizer)
    with tqdm(total=len(rows), initial=file.prompts, unit="prompt") as bar:
        for part, ended in sample_groups(bank, list(policies), rows, sample_args, done=file.prompts):
            file.append(part, ended)
            bar.update(len(part))
    print(file.summary())


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
