"""PPO, the third stage of InstructGPT (Ouyang et al., 2022), by `PPOTrainer`.

    accelerate launch recipes/ppo.py                          # configs/tiny/ppo.yaml: the tiny world, on a CPU
    accelerate launch recipes/ppo.py --config my.yaml --kl_coef 0.1

The policy starts as the SFT adapter, and a frozen copy of it is the reference. Reward models and critic are adapters on the
same base, in 4 bits with `load_in_4bit: true`. Saves the policy's adapter with its tokenizer, the critic, and `recipe.json`.
"""

from rlhf_recipes.cli import check_early, exit_on_recipe_error

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.data import check_positions, drop_overlong_mode, load_data, load_texts
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.reward_funcs import load_rewards, reward_paths
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.ppo import PPOTrainer
from rlhf_recipes.training.run import Run

from accelerate import PartialState
from trl import get_peft_config


def main() -> None:
    """Train the policy, after the stages that it needs."""
    ppo_args, data_args, training_args, model_args = parse_arguments(__file__)
    inputs = [ppo_args.start_from, *reward_paths(ppo_args.reward_funcs)]
    with Run(__file__, ppo_args, data_args, training_args, model_args, inputs=inputs) as run:
        # Data: prompts, and the columns that reward functions read
        data = load_data(data_args, "prompt", evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
        tokenizer = load_tokenizer(model_args, training_args, ppo_args, start_from=ppo_args.start_from)
        data = data.check_rendered(tokenizer, ppo_args.max_prompt_length, drop_overlong_mode(data_args.long_rows))
        limit = position_limit(model_args)
        data.check_positions(tokenizer, ppo_args.max_prompt_length, limit, training_args.max_completion_length)
        texts = load_texts(ppo_args.ptx_dataset, data_args.bad_rows, tokenizer) if training_args.ptx_coef else None
        if texts is not None:
            check_positions(texts, "sft", tokenizer, training_args.ptx_max_length, "ptx_dataset", limit, key="ptx_max_length")
        PartialState().print(f"{len(data.train)} prompts to train on, {len(data.eval or ())} to evaluate on")

        # Roles: policy and reference from the SFT adapter; reward models and critic join them in the trainer
        rewards, run.trainer_args.reward_weights = load_rewards(ppo_args.reward_funcs, data.train, data.eval)
        model = load_policy(model_args, training_args, ppo_args.start_from, tokenizer)
        trainer = PPOTrainer(
            model,
            rewards,
            args=run.trainer_args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=None if ppo_args.start_from else get_peft_config(model_args),
            ptx_dataset=texts,
        )

        run.fit(trainer, data.report)
        trainer.print_samples()


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
