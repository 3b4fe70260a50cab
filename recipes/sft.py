"""Supervised fine-tuning, stage one of InstructGPT (Ouyang et al., 2022), on TRL.

    accelerate launch recipes/sft.py                          # configs/tiny/sft.yaml: the tiny world, on a CPU in a minute
    accelerate launch recipes/sft.py --config my.yaml --learning_rate 1e-4

Trains a LoRA adapter on the base model (in 4 bits with `load_in_4bit: true`), or all weights with `use_peft: false`. Saves it
with the tokenizer, the chat template and `recipe.json`, which holds the arguments, the data and the cost of the run.
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
from rlhf_recipes.training.trainers import SFTTrainer

from accelerate import PartialState
from trl import get_peft_config


def main() -> None:
    """Train the model."""
    data_args, training_args, model_args = parse_arguments(__file__)
    with Run(__file__, data_args, training_args, model_args) as run:
        # Data: demonstrations in any of the shapes of docs/data.md
        data = load_data(data_args, "sft", evaluate=training_args.eval_strategy != "no", seed=training_args.seed)
        tokenizer = load_tokenizer(model_args, training_args)
        splits = training_args.packing and training_args.packing_strategy != "bfd"  # long rows too, so that none is cut
        max_length = None if splits else training_args.max_length
        data = data.check_rendered(tokenizer, max_length, data_args.long_rows, training_args.assistant_only_loss)
        data.check_positions(tokenizer, max_length, position_limit(model_args))
        PartialState().print(f"{len(data.train)} rows to train on, {len(data.eval or ())} to evaluate on")
        if "messages" in data.train.column_names and not training_args.assistant_only_loss:
            PartialState().print(
                "Every turn is learnt, the user's too. With `assistant_only_loss: true`, only the assistant's are"
            )

        # Model: the base, and with `use_peft` a fresh adapter on it
        model = load_policy(model_args, training_args, None, tokenizer)
        trainer = SFTTrainer(
            model,
            args=run.trainer_args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )

        run.fit(trainer, data.report)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
