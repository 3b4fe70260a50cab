"""PPO on a real model: does `stories3M` learn to tell happy stories, and what does it forget?

    OMP_NUM_THREADS=1 python benchmarks/real_ppo.py --shared ../shared --seeds 0 1 2

`stories3M` (3M parameters, which have read children's stories only) goes on with the openings of stories, and is paid for each
of a handful of cheerful words, once each and three at the most, less a penalty for repetition. The table has, over stories that
begin by openings that were not trained on, the mean reward before and after (in standard deviations of before), the KL from the
reference in nats a story, and the perplexity on other real stories before and after, with and without `ptx_coef`.
"""

import argparse
import gzip
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.evaluation.metrics.perplexity import perplexity
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.rewards.functions import RepetitionPenalty

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig

HAPPY = {"happy", "smiled", "laughed", "love", "loved", "fun", "proud", "excited", "joy", "hugged", "friends", "thankful"}
MOST = 3
OPENING = 8  # words


def cheerfulness(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return the share of `MOST` different cheerful words that each story has."""
    words = [{word.strip(".,!?\"'").lower() for word in text.split()} for text in completions]
    return [min(len(own & HAPPY), MOST) / MOST for own in words]


def read_stories(shared: Path) -> list[str]:
    """Real stories, without those too short to have an opening."""
    with gzip.open(shared / "data" / "tinystories.1000.jsonl.gz", "rt", encoding="utf-8") as lines:
        stories = [json.loads(line)["text"].strip().replace("\n\n", "\n") for line in lines]
    return [story for story in stories if len(story.split()) > 2 * OPENING]


def opening(story: str) -> str:
    """Return the words that a story begins with."""
    return " ".join(story.split()[:OPENING])


@dataclass(frozen=True)
class Result:
    """Of one run; rewards and KL over the same openings, sampled before and after."""

    before: float
    deviation: float
    after: float
    kl: float
    perplexity_before: float
    perplexity_after: float

    @property
    def rise(self) -> float:
        """By how many standard deviations the reward rose."""
        return (self.after - self.before) / self.deviation


def run(shared: Path, seed: int, ptx_coef: float, steps: int, measured: int = 200, **options: Any) -> Result:
    """Trains and measures, perplexity on `measured` stories; `options` go over the arguments."""
    stories = read_stories(shared)
    held_out, test, train = stories[:measured], stories[200:328], stories[328:]
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 128,
            "num_iterations": 2,
            "max_completion_length": 64,
            "max_steps": steps,
            "learning_rate": 3e-4,
            "warmup_steps": 6,  # the first steps are the largest, and the least informed
            "lr_scheduler_type": "linear",
            "value_warmup_steps": 6,
            "kl_coef": 0.05,
            "lam": 1.0,  # one score at the end, and a critic that has not learnt much by then
            "ptx_coef": ptx_coef,
            "ptx_batch_size": 16,
            "ptx_max_length": 128,
            "logging_strategy": "no",
            "seed": seed,
            **options,
        }
        args = PPOConfig(
            folder,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **arguments,
        )
        args.eos_token = "<s>"  # ends a story
        model_args = ModelConfig(model_name_or_path=str(shared / "models" / "stories3M"), dtype="float32")
        tokenizer = load_tokenizer(model_args, args)
        trainer = PPOTrainer(
            load_model(model_args, args),
            [cheerfulness, RepetitionPenalty(n=3)],
            args,
            train_dataset=Dataset.from_dict({"prompt": [opening(story) for story in train]}),
            eval_dataset=Dataset.from_dict({"prompt": [opening(story) for story in test]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            ptx_dataset=Dataset.from_dict({"text": train}),
        )
        trainer.remove_callback(PrinterCallback)
        before, perplexity_before = trainer.evaluate(), perplexity(trainer.model, tokenizer, held_out)
        trainer.train()
        after = trainer.evaluate()
        return Result(
            before=before["eval_score"],
            deviation=before["eval_score_std"],
            after=after["eval_score"],
            kl=after["eval_kl"],
            perplexity_before=perplexity_before,
            perplexity_after=perplexity(trainer.model, tokenizer, held_out),
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with `models` and `data`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ptx_coefs", type=float, nargs="+", default=[0.0, 1.0])
    options = parser.parse_args()
    disable_progress_bars()
    print("| ptx_coef | seed | reward before | after | rise, sd | KL, nats a story | perplexity before | after |")
    print("|---|---|---|---|---|---|---|---|")
    for coefficient in options.ptx_coefs:
        results = []
        for seed in options.seeds:
            result = run(options.shared, seed, coefficient, options.steps)
            results.append(result)
            cells = [f"{result.before:.2f}", f"{result.after:.2f}", f"{result.rise:.1f}", f"{result.kl:.1f}"]
            cells += [f"{result.perplexity_before:.2f}", f"{result.perplexity_after:.2f}"]
            print(f"| {coefficient:g} | {seed} | {' | '.join(cells)} |", flush=True)
        means = [statistics.mean(getattr(result, name) for result in results) for name in ("rise", "kl", "perplexity_after")]
        print(f"| {coefficient:g} | mean | | | {means[0]:.1f} | {means[1]:.1f} | | {means[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
