"""Ranking: sampled groups become rankings, by people, by a chat model, or by a simulated labeller.

    accelerate launch recipes/rank.py                         # configs/tiny/rank.yaml, after recipes/sample.py
    accelerate launch recipes/rank.py --config my.yaml --num_groups 500

Writes `rankings.jsonl`, which recipes/reward.py and recipes/dpo.py read; each row says who the labeller was. Where people's
labels are lacking, it says how many, and is run again when they are there. One process does it all.
"""

import json
from pathlib import Path

from rlhf_recipes.arguments import RankArguments, parse_arguments, user_errors
from rlhf_recipes.errors import RecipeError
from rlhf_recipes.evaluation.policies import load_bench
from rlhf_recipes.models import load_tokenizer
from rlhf_recipes.ranking import RANKED, RANKINGS, choose, read_labeller, read_sampled
from rlhf_recipes.records import write_json
from rlhf_recipes.roles import Ensemble, load_saved_rewards

from accelerate import PartialState
from trl import ModelConfig

ARGUMENTS = (RankArguments, ModelConfig)


def main() -> None:
    """Chooses, ranks and writes."""
    rank_args, model_args = parse_arguments(__file__, *ARGUMENTS)
    if not PartialState().is_main_process:
        return
    labeller = read_labeller(rank_args.labeller, rank_args.seed)
    groups = read_sampled(rank_args.groups)

    # Which
    ensemble = load_ensemble(rank_args, model_args) if rank_args.choose == "disagreement" else None
    chosen = choose(groups, rank_args.num_groups, rank_args.seed, ensemble)

    # By whom
    rows = labeller(chosen)
    folder = Path(rank_args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RANKINGS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        names = sorted({row["labeller"] for row in rows})
        write_json(folder / RANKED, {"labellers": names, "groups": len(groups), "chosen": len(chosen), "ranked": len(rows)})
    except OSError as error:
        raise RecipeError(f"output_dir: {folder}: cannot be written to ({error.strerror}): name another folder") from error
    print(f"{len(rows)} rankings of {len(chosen)} groups are in {folder / 'rankings.jsonl'}, by {', '.join(names)}")


def load_ensemble(rank_args: RankArguments, model_args: ModelConfig) -> Ensemble:
    """The ensemble in `reward`, on its base."""
    tokenizer = load_tokenizer(model_args, rank_args, start_from=rank_args.reward)
    bench = load_bench(model_args, rank_args, {}, tokenizer)
    reward = load_saved_rewards(rank_args.reward, bench.model, tokenizer)
    if not isinstance(reward, Ensemble):
        raise RecipeError(
            f"reward: {rank_args.reward} holds one reward model, which cannot disagree: train an `ensemble_size` of 3"
        )
    return reward


if __name__ == "__main__":
    with user_errors():
        main()
