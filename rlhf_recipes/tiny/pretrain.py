"""Pretrain the base model of the tiny world from random weights.

The weights in `rlhf_recipes/tiny/base` come from

    python -m rlhf_recipes.tiny.pretrain --output rlhf_recipes/tiny/base

on one core of an AMD EPYC (OMP_NUM_THREADS=1). `pretraining.json` beside them records versions, time and loss. The same command
on such a machine makes the same weights, bit for bit.
"""

import argparse
import hashlib
from pathlib import Path

from rlhf_recipes.core.files import write_json
from rlhf_recipes.core.provenance import versions
from rlhf_recipes.tiny.text import pretraining_text
from rlhf_recipes.tiny.tokenizer import build_tokenizer
from rlhf_recipes.tiny.world import World
from rlhf_recipes.training.result import RunRecorder
from rlhf_recipes.training.trainers import SFTTrainer

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of 0.9M random parameters; sides are multiples of 64, for 4 bits."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )


def main() -> None:
    """Train and save the model with its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="Output folder.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exposures", type=int, default=260, help="How often the text states each fact of a known person.")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    options = parser.parse_args()

    set_seed(options.seed)
    tokenizer = build_tokenizer()
    world = World()
    recorder = RunRecorder()
    trainer = SFTTrainer(
        build_model(tokenizer),
        args=SFTConfig(
            output_dir=options.output,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=1,  # a second epoch would repeat the facts that must occur once
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            seed=options.seed,
        ),
        callbacks=[recorder],
        train_dataset=Dataset.from_dict({"text": list(pretraining_text(world, options.exposures, options.seed))}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.model.save_pretrained(options.output)  # `save_model` would add training_args.bin, a pickle
    tokenizer.save_pretrained(options.output)
    record = {"arguments": {**vars(options), "output": None}, "versions": versions(), "run": recorder.measurements(trainer)}
    loss = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    weights = hashlib.sha256((Path(options.output) / "model.safetensors").read_bytes()).hexdigest()
    write_json(Path(options.output) / "pretraining.json", {**record, "last_loss": loss, "sha256": weights})


if __name__ == "__main__":
    main()
