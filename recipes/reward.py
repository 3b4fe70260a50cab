"""Reward models: the second stage of InstructGPT (Ouyang et al., 2022), on TRL's `RewardTrainer`.

    accelerate launch recipes/reward.py                       # configs/tiny/reward.yaml: the tiny world, on a CPU
    accelerate launch recipes/reward.py --config my.yaml --start_from runs/sft --ensemble_size 3

Learns from rankings of K answers (all comparisons of a prompt as one element of the batch, each answer through the model once)
or from pairs. Saves a LoRA adapter with its scalar head (several for an ensemble), the scale on which demonstrations score 0 on
average with deviation 1, and what held-out comparisons say of it: `evaluation.json` and pictures.
"""

from rlhf_recipes.arguments import DataArguments, RewardArguments, explained, parse_arguments, user_errors
from rlhf_recipes.data import demonstrations_of, load_data
from rlhf_recipes.evaluation.rewards import measure_reward, summary, write_evaluation
from rlhf_recipes.models import load_tokenizer, release_memory, without_what_is_done
from rlhf_recipes.reward import RankingTrainer, ensemble_members, load_reward_model
from rlhf_recipes.roles import Ensemble, load_reward, load_whole_reward
from rlhf_recipes.runs import RunMeter, checkpoint_to_resume, evaluate_at_end, train, write_record

from trl import ModelConfig, RewardConfig

ARGUMENTS = (RewardArguments, DataArguments, RewardConfig, ModelConfig)


def main() -> None:
    """Trains every member of the ensemble, then puts them on one base, measures and scales them."""
    reward_args, data_args, training_args, model_args = parse_arguments(__file__, *ARGUMENTS)

    # Data: comparisons, and the demonstrations on which scores are scaled
    kind = "ranking" if reward_args.train_on == "rankings" else "preference"
    data = load_data(data_args, kind, evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
    demonstrations = demonstrations_of(data_args, reward_args.demonstrations, training_args.seed, held_out=data.eval)
    tokenizer = load_tokenizer(model_args, training_args)
    # TRL's trainer leaves out what is longer than `max_length`: half an answer cannot be judged
    long_rows = "error" if data_args.long_rows == "error" else "drop"
    data = data.fitted(tokenizer, training_args.max_length, long_rows)
    print(f"{len(data.train)} rows to train on, {len(data.eval or ())} to evaluate on")

    # Training: one adapter after the other, each with a seed and perhaps rows of its own
    size, shards = reward_args.ensemble_size, reward_args.ensemble_shards
    members = ensemble_members(training_args, size, len(data.train), shards)
    checkpoints = [checkpoint_to_resume(member, reward_args, data_args, model_args) for member in members]
    for number, (member, checkpoint) in enumerate(zip(members, checkpoints, strict=True)):
        trainer = model = None  # of the member before: one base at a time
        release_memory()
        rows = data.train.shard(size, number, contiguous=False) if shards else data.train
        model = load_reward_model(model_args, member, tokenizer, reward_args.start_from)
        meter = RunMeter(member, reward_args, data_args, model_args)
        with explained("reward"):
            trainer = RankingTrainer(
                model,
                args=without_what_is_done(member),
                train_dataset=rows,
                eval_dataset=data.eval,
                processing_class=tokenizer,
                callbacks=[meter],
            )
        train(trainer, checkpoint)
        evaluate_at_end(trainer)
        trainer.save_model()
        report = data.report | {"train": data.report["train"] | {"rows": len(rows)}}
        parents = [reward_args.start_from] if reward_args.start_from else []
        groups = (model_args, member, reward_args, data_args)
        write_record(trainer, meter, *groups, data=report, recipe="reward", parents=parents)
        trainer.end()
    if not trainer.is_world_process_zero():
        return

    # The members as they will be used: adapters on one base. What held-out comparisons say of them, and a scale for PPO
    folders = {f"member-{number}" if size > 1 else "reward": member.output_dir for number, member in enumerate(members)}
    if model_args.use_peft:
        base = trainer.model.unload()
        rewards = [load_reward(base, folder, name, tokenizer) for name, folder in folders.items()]
    else:
        place = {"device_map": {"": training_args.device}}
        rewards = [load_whole_reward(folder, name, tokenizer, **place) for name, folder in folders.items()]
    results = {}
    for reward in rewards:
        if data.eval is not None:
            results[reward.__name__] = measure_reward(reward, data.eval)
        reward.calibrate(demonstrations["prompt"], demonstrations["completion"])
    if data.eval is not None and size > 1:
        ensemble = Ensemble(rewards, reward_args.ensemble_combine, reward_args.uncertainty_coef)
        results["ensemble"] = measure_reward(ensemble, data.eval, scale=ensemble.scale)
    if results:
        write_evaluation(training_args.output_dir, results)
        print(*(summary(name, result) for name, result in results.items()), sep="\n")
    print(f"The reward model is in {training_args.output_dir}")


if __name__ == "__main__":
    with user_errors():
        main()
