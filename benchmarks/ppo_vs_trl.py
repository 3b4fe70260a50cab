"""PPO's cost beside that of the last PPO in TRL (1.12), and beside the arithmetic that has to be done.

    python benchmarks/ppo_vs_trl.py --rounds 3

Both train the same random Llama of about 120M parameters by LoRA, on the same random prompts: 16 prompts an iteration, 32
tokens each, 48 tokens of completion, 2 passes of one optimizer step, a reward model of the same size, one thread, fp32 against
fp32 and bf16 weights against bf16 weights; every pass of a model sees all 16 rows or, to the same effect, 4 of them at a time.
TRL 1.12 is installed into an environment of its own (`runs/peer`). The runs take turns, each in a process of its own; of each
way the table has the median seconds of CPU an iteration takes for one completion, the peak of the process's memory, and where
the time goes. The floor is the number of floating-point operations of an iteration, divided by what this machine does a second
in a matrix product of that type and of that shape.

TRL trains a copy of the base as value model, whole, and holds a fourth copy as reward model; ours are adapters on one base.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

ROOT = Path(__file__).parent.parent
PEER = ROOT / "runs" / "peer"
PEER_VERSION = "1.12.0"
PROMPTS, PROMPT_LENGTH, COMPLETION_LENGTH, PASSES = 16, 32, 48, 2
HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 768, 2048, 12, 12, 22_000
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("rollout", "reference", "values and log-probabilities", "reward", "update")


# --- What both train -------------------------------------------------------------------------------------


def make_config(**options: Any) -> LlamaConfig:
    """About 120M parameters, with separate embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, so that text and tokens are the same thing."""
    # A special token is found inside of words too: it must be a part of none
    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(2, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_prompts(rows: int) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (rows, PROMPT_LENGTH), generator=generator).tolist()


def lora() -> LoraConfig:
    """As everybody begins."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


class Clock(TrainerCallback):
    """Seconds of CPU between the ends of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.times.append(time.process_time())

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Another step."""
        self.times.append(time.process_time())


class Phases:
    """Seconds of CPU in each phase; what no phase claims is the update."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self.depth = 0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time inside for the outermost phase."""
        self.depth += 1
        start = time.process_time()
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self.seconds[name] += time.process_time() - start

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str | None]) -> None:
        """Count every call of a function; `name` may depend on its arguments."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            phase = name(*args, **kwargs) if callable(name) else name
            if phase is None:
                return function(*args, **kwargs)
            with self.of(phase):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)


def peak_memory() -> int:
    """Of this process, in bytes, by Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def report(clock: Clock, phases: Phases, steps_an_iteration: int) -> None:
    """Print JSON: seconds of iterations but the first, phases, peak of memory."""
    ends = clock.times[::steps_an_iteration]
    iterations = [after - before for before, after in itertools.pairwise(ends)]
    count = len(iterations)
    parts = {name: seconds / count for name, seconds in phases.seconds.items()}
    parts["update"] = sum(iterations) / count - sum(parts.values())
    print(json.dumps({"iterations": iterations[1:], "phases": parts, "memory": peak_memory()}))


# --- The contestants -------------------------------------------------------------------------------------


def run_peer(dtype: torch.dtype, rows: int, iterations: int) -> None:
    """TRL 1.12's trainer; runs in its own environment."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    torch.manual_seed(0)
    policy = LlamaForCausalLM(make_config()).to(dtype)
    value, reward = (LlamaForSequenceClassification(make_config(num_labels=1)).to(dtype) for _ in range(2))
    phases, clock = Phases(), Clock()

    def by_model(model: Any, *arguments: Any, **kwargs: Any) -> str | None:
        return "reward" if model is reward else "values and log-probabilities"

    phases.wrap(ppo_trainer, "batch_generation", "rollout")
    phases.wrap(ppo_trainer, "forward", lambda *a, **k: None if torch.is_grad_enabled() else "reference")
    phases.wrap(ppo_trainer, "get_reward", by_model)
    args = PPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=PROMPTS // rows,
        num_mini_batches=1,
        num_ppo_epochs=PASSES,
        local_rollout_forward_batch_size=rows,
        response_length=COMPLETION_LENGTH,
        total_episodes=PROMPTS * iterations,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = PPOTrainer(
        args,
        make_tokenizer(),
        policy,
        None,
        reward,
        Dataset.from_dict({"input_ids": make_prompts(PROMPTS * iterations)}),
        value,
        peft_config=lora(),
        callbacks=[clock],
    )
    trainer.train()
    report(clock, phases, 1)


def run_ours(dtype: torch.dtype, rows: int, iterations: int, critic: str) -> None:
    """`PPOTrainer` with all roles on one base."""
    from rlhf_recipes import PPOConfig, PPOTrainer
    from rlhf_recipes.models.roles import copy_adapter
    from rlhf_recipes.rewards.reward_models import RewardModel, ScalarHead

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = get_peft_model(LlamaForCausalLM(make_config()).to(dtype), lora())
    copy_adapter(model, "default", "reward")
    reward = RewardModel(model, "reward", ScalarHead(HIDDEN).requires_grad_(False), tokenizer, None, Path(), "reward", rows)
    clock = Clock()
    args = PPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=PROMPTS // rows,
        num_iterations=PASSES,
        max_completion_length=COMPLETION_LENGTH,
        max_steps=PASSES * iterations,
        critic=critic,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    prompts = [" ".join(f"w{token}" for token in prompt) for prompt in make_prompts(PROMPTS * iterations)]
    trainer = PPOTrainer(
        model,
        reward,
        args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    phases = Phases()
    phases.wrap(trainer, "_generate", "rollout")
    phases.wrap(trainer, "_calculate_rewards", "reward")
    phases.wrap(trainer, "reference_logps", "reference")
    phases.wrap(trainer, "sampling_policy", "values and log-probabilities")
    phases.wrap(trainer, "critic_values", lambda *a, **k: None if torch.is_grad_enabled() else "values and log-probabilities")
    phases.wrap(
        trainer,
        "_get_per_token_logps_and_entropies",
        lambda *a, **k: None if torch.is_grad_enabled() else "values and log-probabilities",
    )
    trainer.train()
    report(clock, phases, PASSES)


# --- The floor -------------------------------------------------------------------------------------------


def matmul_rate(dtype: torch.dtype, rounds: int = 20) -> float:
    """Floating-point operations a second of CPU in the largest matrix product of a layer."""
    tokens = PROMPTS * (PROMPT_LENGTH + COMPLETION_LENGTH)
    left, right = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(HIDDEN, INTERMEDIATE).to(dtype)
    left @ right
    start = time.process_time()
    for _ in range(rounds):
        left @ right
    return rounds * 2 * tokens * HIDDEN * INTERMEDIATE / (time.process_time() - start)


def operations(critic: str) -> float:
    """Those of one iteration: what the roles have to compute, attention's own products left out (a per cent here).

    A forward pass costs two operations a weight and token. The backward pass of LoRA needs the gradient of activations only, as
    much again; weights of the base have none.
    """
    layers = 2 * LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    head = 2 * HIDDEN * VOCABULARY
    all_tokens, completion = PROMPTS * (PROMPT_LENGTH + COMPLETION_LENGTH), PROMPTS * COMPLETION_LENGTH
    logps = all_tokens * layers + completion * head
    # The sampler's own log-probabilities are those of the policy, and the values of a critic on its states come with them
    rollout, reward, reference = logps, all_tokens * layers, logps
    own = all_tokens * layers if critic == "adapter" else 0
    return rollout + reward + reference + own + PASSES * 2 * (logps + own)


# --- The table -------------------------------------------------------------------------------------------


def install_peer() -> None:
    """TRL 1.12 with the versions of everything else that the project is tested with."""
    if (PEER / "installed").exists():
        return
    venv.create(PEER, with_pip=True)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("trl==")]
    constraints = PEER / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    packages = [f"trl=={PEER_VERSION}", "torch", "transformers", "peft", "accelerate", "datasets", "rich"]
    subprocess.run([PEER / "bin" / "pip", "install", "--quiet", "--constraint", constraints, *packages], check=True)
    (PEER / "installed").touch()


def run_alone(who: str, dtype: str, rows: int, iterations: int) -> dict[str, Any]:
    """Return what a contestant reports in a process of its own with one thread."""
    python = PEER / "bin" / "python" if who == "TRL 1.12" else Path(sys.executable)
    single = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    command = [python, __file__, "--alone", who, dtype, str(rows), "--iterations", str(iterations)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **single})
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    """Run the contestants in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3, help="of each run, the first of which is not counted")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--rows", nargs="+", type=int, choices=(1, 2, 4, 8, 16), default=[16, 4], help="of a pass")
    parser.add_argument("--without_peer", action="store_true")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    disable_progress_bars()
    if options.alone:
        who, dtype, rows = options.alone
        if who == "TRL 1.12":
            run_peer(TYPES[dtype], int(rows), options.iterations)
        else:
            run_ours(TYPES[dtype], int(rows), options.iterations, who)
        return

    torch.set_num_threads(1)
    contestants = ["shared", "adapter"]
    if not options.without_peer:
        install_peer()
        contestants.insert(0, "TRL 1.12")
    print(f"| type | way | rows | CPU s a completion | times faster | GiB at peak | floor, s | {' | '.join(PHASES)} |")
    print(f"|---|---|---|---|---|---|---|{'---|' * len(PHASES)}")
    for dtype in options.types:
        results = collections.defaultdict(list)
        rates = []
        for _ in range(options.rounds):
            for way in itertools.product(contestants, options.rows):
                who, rows = way
                results[way].append(run_alone(who, dtype, rows, options.iterations))
            rates.append(matmul_rate(TYPES[dtype]))
        for line in table(dtype, results, statistics.median(rates)):
            print(line, flush=True)


def table(dtype: str, results: dict[tuple[str, int], list[dict[str, Any]]], rate: float) -> Iterator[str]:
    """Yield a line for each way, beside the peer's fastest."""
    seconds = {
        way: statistics.median(time for run in runs for time in run["iterations"]) / PROMPTS for way, runs in results.items()
    }
    peer = min((time for (who, _), time in seconds.items() if who == "TRL 1.12"), default=None)
    for (who, rows), runs in results.items():
        own = seconds[who, rows]
        faster = "" if peer is None else f"{peer / own:.2f}"
        floor = "" if who == "TRL 1.12" else f"{operations(who) / rate / PROMPTS:.2f}"
        memory = statistics.median(run["memory"] for run in runs) / 2**30
        parts = [statistics.median(run["phases"].get(name, 0.0) for run in runs) / PROMPTS for name in PHASES]
        cells = [dtype, who, str(rows), f"{own:.2f}", faster, f"{memory:.2f}", floor, *(f"{part:.2f}" for part in parts)]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
