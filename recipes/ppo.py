"""PPO: the third stage of InstructGPT (Ouyang et al., 2022), by `PPOTrainer`, which stands on TRL's `GRPOTrainer`.

    accelerate launch recipes/ppo.py                          # configs/tiny/ppo.yaml: the tiny world, on a CPU
    accelerate launch recipes/ppo.py --config my.yaml --kl_coef 0.1

The policy starts as the SFT adapter, whose frozen copy is the reference; reward models and critic are adapters on the same
base, in 4 bits with `load_in_4bit: true`. Saves the policy's adapter with its tokenizer, the critic, and `recipe.json`.
"""

from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import as_recipe_error
from rlhf_recipes.data import drop_overlong_mode, load_data, load_texts
from rlhf_recipes.export.upload import publish
from rlhf_recipes.models.loading import load_policy, strip_consumed_arguments
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.reward_funcs import SavedReward, load_rewards, reward_paths
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.ppo import PPOTrainer
from rlhf_recipes.training.record import RunRecorder, write_record
from rlhf_recipes.training.result import evaluate_at_end, save_policy
from rlhf_recipes.training.resume import checkpoint_to_resume
from rlhf_recipes.training.run import run_dependencies, shutdown_distributed, train

from accelerate import PartialState
from trl import get_peft_config


def main() -> None:
    """Runs the stage, after those that it needs."""
    ppo_args, data_args, training_args, model_args = parse_arguments(__file__)
    checkpoint = checkpoint_to_resume(training_args, ppo_args, data_args, model_args)
    run_dependencies(ppo_args.needs, Path(__file__).parent, inputs=[ppo_args.start_from, *reward_paths(ppo_args.reward_funcs)])

    # Data: prompts, and what the reward functions want to know besides
    data = load_data(data_args, "prompt", evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
    tokenizer = load_tokenizer(model_args, training_args, ppo_args, start_from=ppo_args.start_from)
    data = data.filter_by_length(tokenizer, ppo_args.max_prompt_length, drop_overlong_mode(data_args.long_rows))
    texts = load_texts(ppo_args.ptx_dataset, data_args.bad_rows) if training_args.ptx_coef else None
    if ppo_args.ptx_dataset and texts is None:
        PartialState().print("ptx_dataset is not read, since `ptx_coef` is 0")
    PartialState().print(f"{len(data.train)} prompts to train on, {len(data.eval or ())} to evaluate on")

    # Roles: policy and reference from the SFT adapter; reward models and critic join them in the trainer
    rewards, weights = load_rewards(ppo_args.reward_funcs)
    model = load_policy(model_args, training_args, ppo_args.start_from, tokenizer)
    meter = RunRecorder(training_args, ppo_args, data_args, model_args)
    args = strip_consumed_arguments(training_args)
    args.reward_weights = weights  # those that were parsed stay as they are: a resumed run is compared by them
    with as_recipe_error("ppo"):
        trainer = PPOTrainer(
            model,
            rewards,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=None if ppo_args.start_from else get_peft_config(model_args),
            ptx_dataset=texts,
            callbacks=[meter],
        )

    train(trainer, checkpoint)
    evaluate_at_end(trainer)
    save_policy(trainer)
    groups = (model_args, training_args, ppo_args, data_args)
    parents = [ppo_args.start_from, *(reward.folder for reward in rewards if isinstance(reward, SavedReward))]
    write_record(trainer, meter, *groups, data=data.report, recipe="ppo", parents=[*filter(None, parents)])
    trainer.print_samples()
    trainer.accelerator.print(f"The policy is in {training_args.output_dir}")
    shutdown_distributed(trainer)
    publish(training_args)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
