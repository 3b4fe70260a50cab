"""Compare the plan of `recipes/plan.py` with the measured peak, for models with random weights.

    python benchmarks/plan_vs_measured.py                # on a GPU 1B, 8B and 14B in 4 bits, else small models
    python benchmarks/plan_vs_measured.py --sizes 8B --stages ppo

Each stage runs in its own process: two steps of SFT, reward model, PPO or DPO on rows of maximal length, with the arguments of
a consumer card. On a GPU the peak is `torch.cuda.max_memory_allocated`. On a CPU it is the memory of all tensors before
training, and the most that PyTorch's profiler sees allocated on top.
"""

import argparse
import gc
import json
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.memory import Plan, plan_stage
from rlhf_recipes.memory.plan import GIB
from rlhf_recipes.pipeline.estimates import plannable_stages
from rlhf_recipes.training.trainers import TrainerMixin

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "reward", "dpo", "ppo")
INPUTS = {"dpo": {"sft"}, "ppo": {"sft", "reward"}}  # the stages that a stage reads
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def shape(
    kind: type[PretrainedConfig], hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any
) -> PretrainedConfig:
    """Return the configuration of a model."""
    return kind(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **others,
    )


QWEN = {"vocab_size": 151_936, "head_dim": 128, "tie_word_embeddings": False}
GPU_SIZES = {
    "1B": shape(LlamaConfig, 2048, 8192, 16, 32, 8, vocab_size=128_256, tie_word_embeddings=True),
    "8B": shape(Qwen3Config, 4096, 12_288, 36, 32, 8, **QWEN),
    "14B": shape(Qwen3Config, 5120, 17_408, 40, 40, 8, **QWEN),
}
"""The published shapes of Llama-3.2-1B, Qwen3-8B-Base and Qwen3-14B-Base."""
CPU_SIZES = {
    "28M": shape(LlamaConfig, 512, 1408, 6, 8, 4, vocab_size=8192),
    "51M": shape(Qwen3Config, 512, 1536, 10, 8, 2, vocab_size=16_384, head_dim=64, tie_word_embeddings=True),
    "116M": shape(LlamaConfig, 768, 2048, 12, 12, 12, vocab_size=16_384),
}

# --- The runs --------------------------------------------------------------------------------------------


def variants(gpu: bool) -> dict[str, dict[str, Any]]:
    """Return ways to train, by name."""
    lora = {"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear", "lora_dropout": 0.0}
    if gpu:
        shared = {"dtype": "bfloat16", "load_in_4bit": True, "use_bnb_nested_quant": True, "bf16": True, **lora}
        return {
            "4 bits, checkpointing": {**shared, "gradient_checkpointing": True, "optim": "paged_adamw_8bit"},
            "4 bits": {**shared, "gradient_checkpointing": False, "optim": "adamw_torch_fused"},
        }
    shared = {"use_cpu": True, "bf16": False, "optim": "adamw_torch_fused"}
    return {
        "fp32, LoRA": {**shared, "dtype": "float32", "gradient_checkpointing": False, **lora},
        "fp32, LoRA, checkpointing": {**shared, "dtype": "float32", "gradient_checkpointing": True, **lora},
        "bf16, LoRA": {**shared, "dtype": "bfloat16", "bf16": True, "gradient_checkpointing": False, **lora},
        "bf16, LoRA, checkpointing": {**shared, "dtype": "bfloat16", "bf16": True, "gradient_checkpointing": True, **lora},
        "fp32, whole": {**shared, "dtype": "float32", "gradient_checkpointing": False, "use_peft": False},
    }


def arguments(stage: str, folder: Path, variant: dict[str, Any], gpu: bool) -> dict[str, Any]:
    """Return the arguments of a stage, with rows of 512 tokens on a GPU and 128 on a CPU."""
    length, rows = (512, 2) if gpu else (128, 4)
    shared = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / ("prompts.jsonl" if stage == "ppo" else "pairs.jsonl")),
        "output_dir": str(folder / stage),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        **variant,
    }
    if stage == "ppo":
        reward = str(folder / "reward") if variant["use_peft"] else "rlhf_recipes.rewards.LengthPenalty"
        rewards = reward if variant["use_peft"] else {"path": reward, "arguments": {"slope": 0.1, "longest": 8}}
        critic = {"critic": "adapter", "start_from": str(folder / "sft")} if variant["use_peft"] else {"critic": "shared"}
        half = {"max_prompt_length": length // 2, "max_completion_length": length // 2}
        return {**shared, **half, **critic, "reward_funcs": [rewards], "num_iterations": 1}
    if stage == "dpo" and variant["use_peft"]:
        shared["start_from"] = str(folder / "sft")
    return {**shared, "max_length": length}


def write_inputs(folder: Path, config: PretrainedConfig, gpu: bool) -> None:
    """Write a model with random weights, its tokenizer, and rows of random words, half of them one token shorter."""
    torch.manual_seed(0)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    dtype = torch.bfloat16 if gpu else torch.float32
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "model")
    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder / "model")
    length, chance = 512 if gpu else 128, random.Random(0)

    def text(count: int) -> str:
        return " ".join(chance.choice(words[2:]) for _ in range(count)) + " "

    half = length // 2
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "prompts.jsonl").open("w") as prompts:
        for row in range(64):
            shorter = row % 2  # or there would be no padding
            pair = {"prompt": text(half - shorter), "chosen": text(half - 1), "rejected": text(half - 1)}
            print(json.dumps(pair), file=pairs)
            print(json.dumps({"prompt": text(half - shorter)}), file=prompts)


# --- Measuring -------------------------------------------------------------------------------------------


def measure(recipe: str, config: str) -> int:
    """Run a recipe in this process, and return the peak of its training in bytes."""
    peaks = []
    train = TrainerMixin.train

    def measured(trainer: TrainerMixin, resume_from_checkpoint: str | None = None) -> None:
        peaks.append(peak_of(lambda: train(trainer, resume_from_checkpoint)))

    TrainerMixin.train = measured
    sys.argv = [f"{recipe}.py", "--config", config]
    runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    return max(peaks)


def peak_of(function: Callable[[], None]) -> int:
    """Return the bytes of tensors at the peak of a function."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    before = allocated_now()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return before + peak


def allocated_now() -> int:
    """Return the bytes of all tensors of this process."""
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def compare(config: PretrainedConfig, variant: dict[str, Any], stages: list[str], gpu: bool) -> Iterator[tuple[str, Plan, int]]:
    """Yield each stage with its plan and its measured peak in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, config, gpu)
        needed = {*stages}.union(*(INPUTS.get(stage, ()) for stage in stages))
        for stage in filter(needed.__contains__, STAGES):
            path = folder / f"{stage}.yaml"
            path.write_text(yaml.safe_dump(arguments(stage, folder, variant, gpu)))
            plan = plan_stage(*plannable_stages(path, ROOT / "recipes", on_gpu=gpu))
            command = [sys.executable, __file__, "--measure", stage, str(path)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"{stage}: {result.stderr}")
            if stage in stages:
                yield stage, plan, int(result.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    gpu = torch.cuda.is_available()
    known = GPU_SIZES if gpu else CPU_SIZES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=known, default=list(known))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--variants", nargs="+", choices=variants(gpu), default=list(variants(gpu)))
    parser.add_argument("--measure", nargs=2, metavar=("RECIPE", "CONFIG"), help="for the process of one stage")
    options = parser.parse_args()
    if options.measure:
        print(measure(*options.measure))
        return
    print("| size | run | stage | phase | planned, GiB | measured, GiB | difference |\n|---|---|---|---|---|---|---|")
    for size in options.sizes:
        for name in options.variants:
            for stage, plan, measured in compare(known[size], variants(gpu)[name], options.stages, gpu):
                cells = (size, name, stage, plan.worst, f"{plan.allocated / GIB:.3f}", f"{measured / GIB:.3f}")
                print(f"| {' | '.join(cells)} | {plan.allocated / measured - 1:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
