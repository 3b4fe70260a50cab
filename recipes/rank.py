"""Ranking: sampled groups become rankings, by people, by a chat model, or by a simulated labeller.

    accelerate launch recipes/rank.py                         # configs/tiny/rank.yaml, after recipes/sample.py
    accelerate launch recipes/rank.py --config my.yaml --num_groups 500

Writes `rankings.jsonl`, which recipes/reward.py and recipes/dpo.py read; each row says who the labeller was. Where people's
labels are lacking, it says how many, and is run again when they are there. One process does it all.
"""

from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.files import check_writable
from rlhf_recipes.feedback.groups import read_groups
from rlhf_recipes.feedback.ranking import read_labeler, write_rankings
from rlhf_recipes.feedback.selection import choose_groups, load_ensemble
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.stages import parse_arguments

from accelerate import PartialState


def main() -> None:
    """Chooses, ranks and writes."""
    rank_args, model_args = parse_arguments(__file__)
    if not PartialState().is_main_process:
        return
    if rank_args.choose == "disagreement":
        model_path(model_args)  # refused in the first round, which has no ensemble yet, and not in the second
    check_writable(Path(rank_args.output_dir))
    labeler = read_labeler(rank_args.labeller, rank_args.seed)
    groups = read_groups(rank_args.groups)

    # Which: by an ensemble, where there is one already
    ensemble = load_ensemble(model_args, rank_args) if rank_args.choose == "disagreement" and rank_args.reward else None
    chosen = choose_groups(groups, rank_args.num_groups, rank_args.seed, ensemble)

    # By whom
    rows = labeler.rank(chosen)
    print(write_rankings(rank_args.output_dir, rows, len(chosen)))


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
