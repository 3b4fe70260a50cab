"""What the keys that are there for speed bring: tokens a second and peak memory of each stage, on a model with random weights.

    python benchmarks/speed.py                             # on a GPU 1B and 8B in 4 bits, else 28M
    python benchmarks/speed.py --sizes 8B --stages ppo --options "use_vllm: true, vllm_mode: colocate"
    python benchmarks/speed.py --roles                     # PPO's passes without gradients: a role a pass, or mixed
    python benchmarks/speed.py --merging                   # what is left of a base after adapters were merged and unmerged

The stages themselves, each run in a process of its own, one key of its YAML file changed. Of 12 steps the first 4 are not
counted, on a CPU of 3 the first, in which compilation is not done. Tokens are those of prompts and answers, each counted once a
step, of PPO once an iteration. Seconds are those of a clock on a GPU, and of the CPU elsewhere. Memory is
`torch.cuda.max_memory_allocated`, elsewhere the most that the process ever had. What cannot be had is said with its reason.
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.memory.plan import GIB
from rlhf_recipes.models.backbone import backbone
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.models.roles import copy_adapter, use_adapter
from rlhf_recipes.training.trainers import TrainerMixin

import bitsandbytes
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from plan_vs_measured import CPU_SIZES, GPU_SIZES, INPUTS, ROOT, STAGES, arguments, variants, write_inputs
from ppo_vs_trl import peak_memory
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TrainerCallback

STEPS, UNCOUNTED = (12, 4) if torch.cuda.is_available() else (3, 1)
PLAIN = "as it is"
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    PLAIN: ({}, STAGES),
    "attn_implementation: eager": ({"attn_implementation": "eager"}, STAGES),
    "attn_implementation: flex_attention": ({"attn_implementation": "flex_attention"}, STAGES),
    "attn_implementation: flash_attention_2": ({"attn_implementation": "flash_attention_2"}, STAGES),
    "attn_implementation: kernels-community/flash-attn2": ({"attn_implementation": "kernels-community/flash-attn2"}, STAGES),
    "use_liger_kernel: true": ({"use_liger_kernel": True}, STAGES),
    "model_init_kwargs: {use_kernels: true}": ({"model_init_kwargs": {"use_kernels": True}}, STAGES),
    "torch_compile: true": ({"torch_compile": True}, STAGES),
    "optim: paged_adamw_8bit": ({"optim": "paged_adamw_8bit"}, STAGES),
    "gradient_checkpointing: true": ({"gradient_checkpointing": True}, STAGES),
    "cache_implementation: static": ({"cache_implementation": "static"}, ("ppo",)),
    "rollout_batch_size: 2": ({"rollout_batch_size": 2}, ("ppo",)),
    "local_rollout_forward_batch_size: 8": ({"local_rollout_forward_batch_size": 8}, ("ppo",)),
    "use_transformers_continuous_batching: true": ({"use_transformers_continuous_batching": True}, ("ppo",)),
    "use_vllm: true, vllm_mode: colocate": ({"use_vllm": True, "vllm_mode": "colocate"}, ("ppo",)),
}
"""What is changed, and in which stages."""


# --- A stage ---------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, of the clock where a GPU is at work, else of the CPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """When each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """Another step."""
        self.times.append(now())


def measure(recipe: str, config: str) -> dict[str, float]:
    """Run a recipe; return seconds of its counted steps and its peak in bytes."""
    clock, train = Clock(), TrainerMixin.train

    def timed(trainer: TrainerMixin, *arguments: Any, **options: Any) -> Any:
        trainer.add_callback(clock)
        return train(trainer, *arguments, **options)

    TrainerMixin.train = timed
    sys.argv = [f"{recipe}.py", "--config", config]
    runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
    return {"seconds": clock.times[-1] - clock.times[UNCOUNTED - 1], "memory": peak}


def run_alone(recipe: str, config: Path, limit: int) -> dict[str, float] | str:
    """Return what `measure` returns in a process of its own, or why it failed."""
    command = [sys.executable, __file__, "--measure", recipe, str(config)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done in {limit} s"
    lines = result.stderr.strip().splitlines() or [""]
    if result.returncode:
        return "not available: " + lines[-1].removeprefix("error: ").replace(f"{config}: ", "").replace("|", "/")
    return json.loads(result.stdout.splitlines()[-1])


def changed(plain: dict[str, Any], option: dict[str, Any], gpu: bool) -> dict[str, Any]:
    """Return the configuration of a stage with an option."""
    quantised = {} if not option.get("use_vllm") or not gpu else {"load_in_4bit": False, "use_bnb_nested_quant": False}
    return {**plain, **option, **quantised}  # vLLM beside 4 bits is refused


def tokens_of(recipe: str, values: dict[str, Any], gpu: bool) -> int:
    """Of the steps that are counted."""
    rows = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    return (STEPS - UNCOUNTED) * rows * (512 if gpu else 128) * (2 if recipe in ("reward", "dpo") else 1)


def table(size: str, stages: list[str], options: list[str], gpu: bool, limit: int) -> Iterator[str]:
    """Yield a line for each option of each stage."""
    variant = next(value for name, value in variants(gpu).items() if "checkpointing" not in name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, (GPU_SIZES if gpu else CPU_SIZES)[size], gpu)
        for recipe in filter({*stages}.union(*(INPUTS.get(stage, ()) for stage in stages)).__contains__, STAGES):
            plain = {**arguments(recipe, folder, variant, gpu), "max_steps": STEPS}
            for option, (keys, where) in OPTIONS.items():
                # What later stages read is the result without an option
                wanted = recipe in stages and recipe in where and option in options
                if not wanted and option != PLAIN:
                    continue
                path = folder / "stage.yaml"
                own = {} if option == PLAIN else {"output_dir": str(folder / "tried")}
                values = {**changed(plain, keys, gpu), **own}
                path.write_text(yaml.safe_dump(values))
                result = run_alone(recipe, path, limit)
                if wanted:
                    yield f"| {size} | {recipe} | {option} | {' | '.join(cells(result, tokens_of(recipe, values, gpu)))} |"


def cells(result: dict[str, float] | str, tokens: int) -> tuple[str, str]:
    """Tokens a second, and GiB; or why there are none."""
    if isinstance(result, str):
        return result, ""
    return f"{tokens / result['seconds']:,.0f}", f"{result['memory'] / GIB:.2f}"


# --- PPO's roles in passes without gradients -------------------------------------------------------------

ROLES = ("default", "reference", "critic", "reward")


def make_roles(folder: Path, size: str, gpu: bool) -> PeftModel:
    """Return a base in 4 bits with one adapter for each role."""
    write_inputs(folder, (GPU_SIZES if gpu else CPU_SIZES)[size], gpu)
    dtype = torch.bfloat16 if gpu else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config, dtype=dtype)
    disable_cpu_4bit_repacking(base)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    for role in ROLES[1:]:
        copy_adapter(model, "default", role)
        for name, weight in model.named_parameters():
            if f"lora_B.{role}." in name:
                torch.nn.init.normal_(weight, std=0.02)
    return model.eval()


def one_role_a_pass(model: PeftModel, ids: Tensor, rows: int) -> Tensor:
    """Hidden states (roles, rows, T, width), the last tokens' alone."""
    states = []
    for role in ROLES:
        with use_adapter(model, role):
            states.append(torch.cat([backbone(model)(input_ids=chunk).last_hidden_state[:, -1] for chunk in ids.split(rows)]))
    return torch.stack(states)


def mixed(model: PeftModel, ids: Tensor, rows: int) -> Tensor:
    """Score by PEFT's mixed batches, with rows of all roles in each pass."""
    turned = ids.repeat_interleave(len(ROLES), 0)
    trunk, names, states = backbone(model), list(ROLES) * len(ids), []
    for start in range(0, len(names), rows):
        with model.base_model._enable_peft_forward_hooks(adapter_names=names[start : start + rows]):
            states.append(trunk(input_ids=turned[start : start + rows]).last_hidden_state[:, -1])
    return torch.cat(states).unflatten(0, (len(ids), len(ROLES))).transpose(0, 1)


@torch.no_grad()
def roles(size: str, gpu: bool, rounds: int) -> Iterator[str]:
    """Yield a line for each way to read the same 16 rows by four roles."""
    with tempfile.TemporaryDirectory() as name:
        model = make_roles(Path(name), size, gpu)
    length = 512 if gpu else 128
    ids = torch.randint(3, model.config.vocab_size, (16, length), device=model.device)
    calls, product = [0], bitsandbytes.matmul_4bit

    def counted(*given: Any, **options: Any) -> Tensor:
        calls[0] += 1
        return product(*given, **options)

    bitsandbytes.matmul_4bit = counted
    ways: dict[str, tuple[Callable[[PeftModel, Tensor, int], Tensor], int]] = {
        "a role a pass, 4 rows": (one_role_a_pass, 4),
        "roles mixed, 4 rows": (mixed, 4),
        "a role a pass, 16 rows": (one_role_a_pass, 16),
        "roles mixed, 16 rows": (mixed, 16),
    }
    expected = one_role_a_pass(model, ids, 1)
    times: dict[str, list[float]] = {name: [] for name in ways}
    counts, gaps = {}, {}
    for _ in range(rounds):  # in turns
        for name, (way, rows) in ways.items():
            calls[0], start = 0, now()
            states = way(model, ids, rows)
            times[name].append(now() - start)
            counts[name], gaps[name] = calls[0], (states - expected).abs().max() / expected.std()
    for name in ways:
        yield f"| {size} | {name} | {counts[name]} | {min(times[name]):.2f} | {gaps[name]:.1e} |"


# --- Weights for vLLM ------------------------------------------------------------------------------------


@torch.no_grad()
def merging(quantised: bool, times: tuple[int, ...]) -> Iterator[str]:
    """How far a base is moved by merging an adapter of 5% of its norm and unmerging it again, as shares of its norm."""
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        options = {"quantization_config": bits} if quantised else {}
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        share = layer.get_delta_weight("default").norm() / dequantize_module_weight(layer.get_base_layer()).norm()
        layer.lora_B["default"].weight.mul_(0.05 / share)

    def weights() -> Tensor:
        return torch.cat([dequantize_module_weight(layer.get_base_layer()).float().flatten() for layer in layers])

    before = weights()
    adapter = torch.cat([layer.get_delta_weight("default").float().flatten() for layer in layers])
    for count in range(1, max(times) + 1):
        model.merge_adapter()
        if count == 1:
            yield f"what is merged is off by {(weights() - before - adapter).norm() / adapter.norm():.0%} of the adapter"
        model.unmerge_adapter()
        if count in times:
            yield f"after {count}: the base is off by {(weights() - before).norm() / before.norm():.2%}"


# --- The tables ------------------------------------------------------------------------------------------


def main() -> None:
    """Print a table."""
    gpu = torch.cuda.is_available()
    known = GPU_SIZES if gpu else CPU_SIZES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=known, default=["1B", "8B"] if gpu else ["28M"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS), metavar="OPTION")
    parser.add_argument("--limit", type=int, default=900, help="seconds of a run, after which it is given up")
    parser.add_argument("--roles", action="store_true", help="PPO's passes without gradients")
    parser.add_argument("--merging", action="store_true", help="what merging adapters leaves of their base")
    parser.add_argument("--rounds", type=int, default=3, help="with --roles; the fastest counts")
    parser.add_argument("--measure", nargs=2, metavar=("RECIPE", "CONFIG"), help="for the process of one run")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    if options.merging:
        lines = (f"{kind}: {line}" for kind in ("bf16", "4 bits") for line in merging(kind == "4 bits", (1, 10, 100)))
    elif options.roles:
        print("| size | passes | matrices dequantised | s | largest difference, of the deviation |\n|---|---|---|---|---|")
        lines = (line for size in options.sizes for line in roles(size, gpu, options.rounds))
    else:
        print("| size | stage | key | tokens/s | GiB |\n|---|---|---|---|---|")
        given = (options.stages, options.options, gpu, options.limit)
        lines = (line for size in options.sizes for line in table(size, *given))
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
