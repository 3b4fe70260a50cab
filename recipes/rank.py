"""Ranking of sampled groups, by people, a chat model, or a simulated labeller.

    accelerate launch recipes/rank.py                         # configs/tiny/rank.yaml, after recipes/sample.py
    accelerate launch recipes/rank.py --config my.yaml --num_groups 500

Writes `rankings.jsonl` for recipes/reward.py and recipes/dpo.py; each row names its labeller. If labels of people are missing,
it prints how many: run it again when they are there. Runs in one process.
"""

from pathlib import Path

from rlhf_recipes.cli import check_early, exit_on_recipe_error

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.core.files import check_writable
from rlhf_recipes.feedback.groups import read_groups
from rlhf_recipes.feedback.ranking import choose_groups, load_ensemble, read_labeler, write_rankings
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.dependencies import run_dependencies

from accelerate import PartialState


def main() -> None:
    """Choose groups, rank them, and write the rankings."""
    rank_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    run_dependencies(__file__, (rank_args, model_args))
    if rank_args.choose == "disagreement":
        model_path(model_args)  # checked in the first round, though only the second needs a base
    check_writable(Path(rank_args.output_dir))
    rank = read_labeler(rank_args.labeller, rank_args.seed)
    groups = read_groups(rank_args.groups)

    # Which groups: by an ensemble, if there is one already
    ensemble = load_ensemble(model_args, rank_args) if rank_args.choose == "disagreement" and rank_args.reward else None
    chosen = choose_groups(groups, rank_args.num_groups, rank_args.seed, ensemble)

    # The labeller's rankings of them
    rows = rank(chosen)
    print(write_rankings(rank_args.output_dir, rows, len(chosen)))


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
