"""Reward models: the second stage of InstructGPT (Ouyang et al., 2022), on TRL's `RewardTrainer`.

    accelerate launch recipes/reward.py                       # configs/tiny/reward.yaml: the tiny world, on a CPU
    accelerate launch recipes/reward.py --config my.yaml --start_from runs/sft --ensemble_size 3

Learns from rankings of K answers (all comparisons of a prompt as one element of the batch, each answer through the model once)
or from pairs. Saves a LoRA adapter with its scalar head (several for an ensemble), the scale on which demonstrations score 0 on
average with deviation 1, and what held-out comparisons say of it: `evaluation.json` and pictures.
"""

from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import as_recipe_error
from rlhf_recipes.data import load_demonstrations
from rlhf_recipes.evaluation.reward_models import measure_and_scale, summary, write_evaluation
from rlhf_recipes.export.upload import publish
from rlhf_recipes.models.loading import release_memory, strip_consumed_arguments
from rlhf_recipes.rewards.classifier import load_reward_model
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.ensemble import (
    checkpoints_to_resume,
    ensemble_members,
    finish,
    load_comparisons,
    load_members,
    remove_earlier_results,
)
from rlhf_recipes.training.record import RunRecorder, write_record
from rlhf_recipes.training.result import evaluate_at_end, save_result
from rlhf_recipes.training.reward import RankingTrainer
from rlhf_recipes.training.run import run_dependencies, shutdown_distributed, train

from accelerate import PartialState


def main() -> None:
    """Trains every member of the ensemble, then puts them on one base, measures and scales them."""
    reward_args, data_args, training_args, model_args = parse_arguments(__file__)
    run_dependencies(reward_args.needs, Path(__file__).parent, inputs=[reward_args.start_from])

    # Data: comparisons, and the demonstrations on which scores are scaled
    data, tokenizer = load_comparisons(reward_args, data_args, training_args, model_args)
    limits = {"tokenizer": tokenizer, "max_length": training_args.max_length}
    demonstrations, counts = load_demonstrations(data_args, reward_args.demonstrations, training_args.seed, data.eval, **limits)
    PartialState().print(f"{len(data.train)} rows to train on, {len(data.eval or ())} to evaluate on")

    # Training: one adapter after the other, each with a seed and perhaps rows of its own
    size, shards = reward_args.ensemble_size, reward_args.ensemble_shards
    members = ensemble_members(training_args, size, len(data.train), shards)
    checkpoints = checkpoints_to_resume(training_args, members, reward_args, data_args, model_args)
    for number, (member, checkpoint) in enumerate(zip(members, checkpoints, strict=True)):
        trainer = model = None  # of the member before: one base at a time
        release_memory()
        rows = data.train.shard(size, number, contiguous=False) if shards else data.train
        model = load_reward_model(model_args, member, tokenizer, reward_args.start_from)
        meter = RunRecorder(member, reward_args, data_args, model_args)
        with as_recipe_error("reward"):
            trainer = RankingTrainer(
                model,
                args=strip_consumed_arguments(member),
                train_dataset=rows,
                eval_dataset=data.eval,
                processing_class=tokenizer,
                callbacks=[meter],
            )
        if number == 0 and trainer.is_world_process_zero():
            remove_earlier_results(training_args.output_dir, checkpoints)
        train(trainer, checkpoint)
        evaluate_at_end(trainer)
        save_result(trainer)
        report = data.report | {"train": data.report["train"] | {"rows": len(rows)}, "demonstrations": counts}
        parents = [reward_args.start_from] if reward_args.start_from else []
        groups = (model_args, member, reward_args, data_args)
        write_record(trainer, meter, *groups, data=report, recipe="reward", parents=parents, pending=True)
        shutdown_distributed(trainer, last=number == len(members) - 1)
    if not trainer.is_world_process_zero():
        return

    # The members as they will be used: adapters on one base. A scale for PPO, and what held-out comparisons say of them
    rewards = load_members(trainer, members, tokenizer, model_args)
    combination = (reward_args.ensemble_combine, reward_args.uncertainty_coef)
    results = measure_and_scale(rewards, demonstrations, data.eval, *combination)
    write_evaluation(training_args.output_dir, results)
    finish(training_args, members, reward_args)
    print(*(summary(name, result) for name, result in results.items()), sep="\n")
    print(f"The reward model is in {training_args.output_dir}")
    publish(training_args)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
