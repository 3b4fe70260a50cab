"""Direct preference optimisation (Rafailov et al., 2023), on TRL's `DPOTrainer`.

    accelerate launch recipes/dpo.py                          # configs/tiny/dpo.yaml: the tiny world, on a CPU
    accelerate launch recipes/dpo.py --config my.yaml --loss_type ipo --beta 0.05

Learns from the same preferences as a reward model; rankings become pairs. The policy starts as the SFT adapter. A copy of it is
the frozen reference, on the same base (in 4 bits with `load_in_4bit: true`), so there is no second model.
"""

from rlhf_recipes.cli import check_early, exit_on_recipe_error

if __name__ == "__main__":
    check_early(__file__)  # a misspelt key or path, before the seconds that the imports below take

from rlhf_recipes.data import load_data
from rlhf_recipes.models.loading import load_policy
from rlhf_recipes.models.positions import position_limit
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.run import Run
from rlhf_recipes.training.trainers import DPOTrainer

from accelerate import PartialState
from trl import get_peft_config


def main() -> None:
    """Train the policy, after the stages that it needs."""
    policy_args, data_args, training_args, model_args = parse_arguments(__file__)
    with Run(__file__, policy_args, data_args, training_args, model_args, inputs=[policy_args.start_from]) as run:
        # Data: pairs, and rankings as all of their pairs
        data = load_data(data_args, "preference", evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
        tokenizer = load_tokenizer(model_args, training_args, policy_args, start_from=policy_args.start_from)
        data = data.check_rendered(tokenizer, training_args.max_length, data_args.long_rows)
        data.check_positions(tokenizer, training_args.max_length, position_limit(model_args))
        PartialState().print(f"{len(data.train)} pairs to train on, {len(data.eval or ())} to evaluate on")

        # Roles: the policy from the SFT adapter; the trainer adds its copy as reference
        model = load_policy(model_args, training_args, policy_args.start_from, tokenizer)
        trainer = DPOTrainer(
            model,
            args=run.trainer_args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=None if policy_args.start_from else get_peft_config(model_args),
        )

        run.fit(trainer, data.report)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
