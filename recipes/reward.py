"""Reward models, stage two of InstructGPT (Ouyang et al., 2022), by TRL's trainer.

    accelerate launch recipes/reward.py                       # configs/tiny/reward.yaml: the tiny world, on a CPU
    accelerate launch recipes/reward.py --config my.yaml --start_from runs/sft --ensemble_size 3

Learns from rankings of K answers (all comparisons of a prompt as one element of the batch, each answer through the model once)
or from pairs. Saves a LoRA adapter with its scalar head (several for an ensemble), the scale on which demonstrations score 0 on
average with deviation 1, and its results on held-out comparisons: `evaluation.json` and pictures.
"""

from rlhf_recipes.cli import check_early, exit_on_recipe_error

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.data import load_demonstrations
from rlhf_recipes.evaluation.reward_evaluation import measure_and_scale, summary, write_evaluation
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.rewards.classifier import load_reward_model
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.ensemble import EnsembleRun, load_comparisons
from rlhf_recipes.training.reward import RankingTrainer

from accelerate import PartialState


def main() -> None:
    """Train the ensemble's members, put them on one base, scale and evaluate them."""
    reward_args, data_args, training_args, model_args = parse_arguments(__file__)
    with EnsembleRun(__file__, reward_args, data_args, training_args, model_args, inputs=[reward_args.start_from]) as run:
        # Data: comparisons, and the demonstrations on which scores are scaled
        data, tokenizer = load_comparisons(reward_args, data_args, training_args, model_args)
        limits = {"tokenizer": tokenizer, "max_length": training_args.max_length, "positions": position_limit(model_args)}
        demonstrations, data.report["demonstrations"] = load_demonstrations(
            data_args, reward_args.demonstrations, training_args.seed, data.eval, **limits
        )
        PartialState().print(f"{len(data.train)} rows to train on, {len(data.eval or ())} to evaluate on")

        # Training: one adapter after the other, each with a seed and perhaps rows of its own
        for member in run.members(data.train):
            model = load_reward_model(model_args, member.training_args, tokenizer, reward_args.start_from)
            trainer = RankingTrainer(
                model,
                args=member.trainer_args,
                train_dataset=member.rows,
                eval_dataset=data.eval,
                processing_class=tokenizer,
            )
            member.fit(trainer, data.report)
            del model, trainer  # one base in memory at a time
        if not PartialState().is_main_process:
            return

        # The members as they will be used: adapters on one base. A scale for PPO, and results on held-out comparisons
        rewards = run.load_members(tokenizer)
        combination = reward_args.ensemble_combine, reward_args.uncertainty_coef
        results = measure_and_scale(rewards, demonstrations, data.eval, *combination)
        write_evaluation(training_args.output_dir, results)
        print(*(summary(name, result) for name, result in results.items()), sep="\n")


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
