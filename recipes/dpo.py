"""Direct preference optimisation (Rafailov et al., 2023), on TRL's `DPOTrainer`: the alternative to a reward model and PPO.

    accelerate launch recipes/dpo.py                          # configs/tiny/dpo.yaml: the tiny world, on a CPU
    accelerate launch recipes/dpo.py --config my.yaml --loss_type ipo --beta 0.05

Learns from the preferences that a reward model learns from; rankings become pairs. The policy starts as the SFT adapter, whose
frozen copy on the same base is the reference, in 4 bits with `load_in_4bit: true`; there is no second model.
"""

from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import as_recipe_error
from rlhf_recipes.data import load_data
from rlhf_recipes.export.upload import publish
from rlhf_recipes.models.loading import load_policy, strip_consumed_arguments
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.dpo import DPOTrainer
from rlhf_recipes.training.record import RunRecorder, write_record
from rlhf_recipes.training.result import evaluate_at_end, save_policy
from rlhf_recipes.training.resume import checkpoint_to_resume
from rlhf_recipes.training.run import run_dependencies, shutdown_distributed, train

from accelerate import PartialState
from trl import get_peft_config


def main() -> None:
    """Runs the stage, after those that it needs."""
    policy_args, data_args, training_args, model_args = parse_arguments(__file__)
    checkpoint = checkpoint_to_resume(training_args, policy_args, data_args, model_args)
    run_dependencies(policy_args.needs, Path(__file__).parent, inputs=[policy_args.start_from])

    # Data: pairs, and rankings as all of their pairs
    data = load_data(data_args, "preference", evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
    tokenizer = load_tokenizer(model_args, training_args, policy_args, start_from=policy_args.start_from)
    data = data.filter_by_length(tokenizer, training_args.max_length, data_args.long_rows)
    PartialState().print(f"{len(data.train)} pairs to train on, {len(data.eval or ())} to evaluate on")

    # Roles: the policy from the SFT adapter; the trainer adds its copy as reference
    model = load_policy(model_args, training_args, policy_args.start_from, tokenizer)
    meter = RunRecorder(training_args, policy_args, data_args, model_args)
    with as_recipe_error("dpo"):
        trainer = DPOTrainer(
            model,
            args=strip_consumed_arguments(training_args),
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=None if policy_args.start_from else get_peft_config(model_args),
            callbacks=[meter],
        )

    train(trainer, checkpoint)
    evaluate_at_end(trainer)
    save_policy(trainer)
    parents = [policy_args.start_from] if policy_args.start_from else []
    groups = (model_args, training_args, policy_args, data_args)
    write_record(trainer, meter, *groups, data=data.report, recipe="dpo", parents=parents)
    trainer.accelerator.print(f"The policy is in {training_args.output_dir}")
    shutdown_distributed(trainer)
    publish(training_args)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
