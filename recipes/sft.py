"""Supervised fine-tuning: the first stage of InstructGPT (Ouyang et al., 2022), on TRL's `SFTTrainer`.

    accelerate launch recipes/sft.py                          # configs/tiny/sft.yaml: the tiny world, on a CPU in a minute
    accelerate launch recipes/sft.py --config my.yaml --learning_rate 1e-4

Trains a LoRA adapter on the base model (in 4 bits with `load_in_4bit: true`), or all weights with `use_peft: false`, and saves
it with the tokenizer, the chat template and `recipe.json`, which says what was run and what it cost.
"""

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import as_recipe_error
from rlhf_recipes.data import load_data
from rlhf_recipes.export.upload import publish
from rlhf_recipes.models.loading import load_model, strip_consumed_arguments
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.stages import parse_arguments
from rlhf_recipes.training.record import RunRecorder, write_record
from rlhf_recipes.training.result import evaluate_at_end, save_policy
from rlhf_recipes.training.resume import checkpoint_to_resume
from rlhf_recipes.training.run import shutdown_distributed, train
from rlhf_recipes.training.sft import SFTTrainer

from accelerate import PartialState
from trl import get_peft_config


def main() -> None:
    """Runs the stage."""
    data_args, training_args, model_args = parse_arguments(__file__)
    checkpoint = checkpoint_to_resume(training_args, data_args, model_args)

    # Data: demonstrations in any of the shapes of docs/data.md
    data = load_data(data_args, "sft", evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
    tokenizer = load_tokenizer(model_args, training_args)
    cuts = not training_args.packing or training_args.packing_strategy == "bfd"  # the other ways to pack split long rows
    data = data.filter_by_length(tokenizer, training_args.max_length if cuts else None, data_args.long_rows)
    PartialState().print(f"{len(data.train)} rows to train on, {len(data.eval or ())} to evaluate on")
    if "messages" in data.train.column_names and not training_args.assistant_only_loss:
        PartialState().print("Every turn is learnt, the user's too; with `assistant_only_loss: true`, the assistant's alone")

    # Model: the base, and by `use_peft` a fresh adapter on it
    model = load_model(model_args, training_args)
    meter = RunRecorder(training_args, data_args, model_args)
    with as_recipe_error("sft"):
        trainer = SFTTrainer(
            model,
            args=strip_consumed_arguments(training_args),
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
            callbacks=[meter],
        )

    train(trainer, checkpoint)
    evaluate_at_end(trainer)
    save_policy(trainer)
    write_record(trainer, meter, model_args, training_args, data_args, data=data.report, recipe="sft")
    trainer.accelerator.print(f"The model is in {training_args.output_dir}")
    shutdown_distributed(trainer)
    publish(training_args)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
