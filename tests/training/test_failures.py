"""Out of memory, an unreachable Hub, an old GPU, a wrong base: one message with a remedy, and no traceback.

Errors of a GPU or a network are raised where the libraries would raise them.
"""

import json
import logging
from types import SimpleNamespace

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.config.checks import set_machine_defaults
from rlhf_recipes.core.errors import RecipeError, lack_of_memory
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.core.machine import check_bitsandbytes
from rlhf_recipes.memory.model_shape import load_config
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.loading import load_model
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.stages import parse_arguments
from support import NO_EVALUATION
from support.small_ppo import make_tokenizer, save_base, with_adapter

import bitsandbytes
import pytest
import torch
import yaml
from huggingface_hub import errors
from transformers import AutoModelForCausalLM, Trainer
from trl import ModelConfig, SFTConfig

NAME = "nobody/none"
ON_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3.94 GiB of which 1.10 GiB is free. Process "
    "7 has 2.8 GiB memory in use."
)
ON_CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes."
)
SMALL = ("--dataset_arguments", '{"rows": 160}', *NO_EVALUATION, "--max_steps", 2, "--warmup_steps", 0)


# --- Memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def fails_at(monkeypatch):
    """Return a function that makes a training step fail after so many others."""

    def install(done, error):
        original = Trainer.training_step

        def step(self, *arguments, **options):
            if self.state.global_step == done:
                raise error
            return original(self, *arguments, **options)

        monkeypatch.setattr(Trainer, "training_step", step)

    return install


@pytest.fixture
def card(monkeypatch):
    """Return a function that pretends a GPU of this many GiB."""

    def install(size):
        monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=size * 2**30))

    return install


def message(status, printed):
    """Return the line of the message, between progress bars."""
    assert status == 2, printed
    assert "Traceback" not in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("error: "))
    return line


def test_full_gpu_names_step_plan_and_checkpoint(launch, fails_at, card, tmp_path):
    card(1.2)
    fails_at(1, torch.OutOfMemoryError(ON_GPU))
    options = ("--save_strategy", "steps", "--save_steps", 1, "--output_dir", tmp_path, "--max_length", 512)
    error_line = message(*launch("sft", *SMALL, *options))
    for part in (
        "sft: the GPU's memory of 1.2 GiB was not enough after 1 of 2 steps (requested: 2.00 GiB, free: 1.10 GiB)",
        "The plan predicts ",
        "Fix: set `",
        "`per_device_train_batch_size: 4`, `gradient_accumulation_steps: 32`",
        "plan.py --config",
        "--recipe sft",
        f"{tmp_path}/checkpoint-1 is kept: resume from it with `resume_from_checkpoint: {tmp_path}/checkpoint-1`",
    ):
        assert part in error_line


def test_full_gpu_that_should_be_large_enough(launch, fails_at, card, tmp_path):
    card(80)
    fails_at(0, torch.OutOfMemoryError("CUDA out of memory."))
    error_line = message(*launch("sft", *SMALL, "--output_dir", tmp_path))
    assert "after 0 of 2 steps (CUDA out of memory.)" in error_line
    assert "which should fit. Fix: " in error_line
    assert "is kept" not in error_line


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ON_CPU)], ids=["python", "torch"])
def test_full_machine_memory(launch, fails_at, tmp_path, error):
    fails_at(0, error)
    error_line = message(*launch("sft", *SMALL, "--output_dir", tmp_path))
    assert "sft: this machine's memory (RAM) of " in error_line
    assert "The plan predicts " in error_line


def test_lack_of_memory_is_found_as_a_cause(capsys):
    """PyTorch's error is a RuntimeError, which other messages may wrap."""
    error = RecipeError("start_from: runs/sft does not fit")
    error.__cause__ = torch.OutOfMemoryError(ON_GPU)
    with pytest.raises(SystemExit) as stop, exit_on_recipe_error():
        raise error
    error_line = capsys.readouterr().err
    assert stop.value.code == 2
    assert "the GPU's memory" in error_line
    assert "does not fit" not in error_line


def test_stage_without_a_plan_gets_general_advice(launch, monkeypatch, tmp_path):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError(ON_GPU)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", exhausted)
    folder = tmp_path / "adapter"
    base = save_base(tmp_path / "base")
    with_adapter(AutoModelForCausalLM.from_config(load_config(str(base)))).save_pretrained(folder)
    options = ("--adapter", folder, "--model_name_or_path", base, "--output_dir", tmp_path / "out")
    error_line = message(*launch("merge", *options))
    assert "merge: the GPU's memory" in error_line
    assert "Fix: a smaller base" in error_line


def test_other_errors_are_not_lack_of_memory():
    assert lack_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lack_of_memory(ValueError("out of memory")) is None
    with pytest.raises(RuntimeError, match="shapes"), exit_on_recipe_error():
        raise RuntimeError("shapes")


# --- The Hub ---------------------------------------------------------------------------------------------


def http_error(kind, status):
    """Return one of the client's errors with its response."""
    response = errors.Response(status, request=None, headers={})
    response._request = SimpleNamespace(url="https://huggingface.co")
    return kind(f"{status} Client Error.\n\nMore of it.", response=response)


HUB = {
    "gated": (
        lambda: http_error(errors.GatedRepoError, 403),
        "it is gated. Fix: accept its licence at https://huggingface.co/{place}, and log in with `hf auth login`",
    ),
    "missing": (
        lambda: http_error(errors.RepositoryNotFoundError, 404),
        "there is no {kind} of this name on the Hub, or it is private. Fix: correct it, or log in with `hf auth login`",
    ),
    "revision": (lambda: http_error(errors.RevisionNotFoundError, 404), "it has no such revision. "),
    "offline": (lambda: errors.LocalEntryNotFoundError("Cannot find it."), "the Hub could not be reached"),
    "refused": (lambda: http_error(errors.HfHubHTTPError, 503), "the Hub refused: 503 Client Error. Fix: try again later"),
}


@pytest.mark.parametrize("case", HUB)
def test_unavailable_model_names_reason_and_remedy(monkeypatch, case):
    make, reason = HUB[case]

    def fail(*arguments, **options):
        raise make()

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", fail)
    monkeypatch.setattr("transformers.utils.hub.snapshot_download", fail)
    training = SFTConfig(bf16=False, use_cpu=True)
    for load in (
        lambda: load_model(ModelConfig(NAME), training),
        lambda: load_tokenizer(ModelConfig(NAME), training),
        lambda: load_config(NAME),
    ):
        with pytest.raises(RecipeError) as raised:
            load()
        assert f"model_name_or_path: {NAME}: " in str(raised.value)
        assert reason.format(place=NAME, kind="model") in str(raised.value)
        assert "\n" not in str(raised.value)
        assert (f"there is no folder {NAME} here, and {reason[:10]}" in str(raised.value)) == (case in ("missing", "offline"))
        assert (f"`hf download {NAME} --local-dir FOLDER` on a machine" in str(raised.value)) == (case == "offline")


@pytest.mark.parametrize("case", ["gated", "missing", "offline"])
def test_unavailable_data_name_reason_and_remedy(launch, monkeypatch, case):
    make, reason = HUB[case]

    def fail(*arguments, **options):
        raise make()

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", fail)
    error_line = message(*launch("sft", "--dataset_name", NAME, "--dataset_arguments", "none"))
    assert f"{NAME}: not a local file" in error_line
    assert reason.format(place=f"datasets/{NAME}", kind="dataset") in error_line
    if case == "offline":
        assert f"`hf download --repo-type dataset {NAME} --local-dir FOLDER`" in error_line


def test_errors_of_folders_are_not_blamed_on_the_hub(tmp_path):
    assert "there is no such folder (looked in " in explain_load_error("./mine", OSError())
    assert "there is no such folder" in explain_load_error("runs/mine/sft", OSError())
    assert explain_load_error(str(tmp_path), OSError("no config.json\nmore")) == "no config.json"


# --- The GPU ---------------------------------------------------------------------------------------------


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.parametrize("values", [{"bf16": True}, {"dtype": "bfloat16"}])
def test_bf16_on_a_gpu_without_it_is_refused(tmp_path, old_gpu, values):
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as raised:
        parse_arguments("sft.py", argv=["--config", str(config)])
    for part in ("my.yaml", next(iter(values)), "(Tesla T4) has no bf16", "`bf16: false`", "`fp16: true`", "`dtype: float32`"):
        assert part in str(raised.value)


def test_bf16_is_off_by_default_on_an_old_gpu(old_gpu):
    values = {"dtype": "float32"}
    set_machine_defaults(values)
    assert values["bf16"] is False


@pytest.mark.parametrize(
    ("quantised", "optim", "parts"),
    [
        (True, "adamw_torch_fused", ("load_in_4bit", "`load_in_4bit: false`")),
        (False, "paged_adamw_8bit", ("optim: paged_adamw_8bit", "`optim: adamw_torch`")),
    ],
)
def test_bitsandbytes_without_a_gpu_library_is_refused(monkeypatch, quantised, optim, parts):
    mock = bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary(
        "No compatible CUDA binary found at libbitsandbytes_cuda130.so"
    )
    monkeypatch.setattr("bitsandbytes.cextension.lib", mock)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(RecipeError) as raised:
        check_bitsandbytes(quantised, SimpleNamespace(optim=optim, use_cpu=False))
    for part in (*parts, "has no library for this GPU", "libbitsandbytes_cuda130.so", "`pip install --upgrade bitsandbytes`"):
        assert part in str(raised.value)
    check_bitsandbytes(quantised, SimpleNamespace(optim=optim, use_cpu=True))
    check_bitsandbytes(False, SimpleNamespace(optim="adamw_torch", use_cpu=False))


def test_paged_optimizer_trains_on_a_cpu_with_a_warning(launch, tmp_path, caplog, recwarn):
    with caplog.at_level(logging.WARNING, "rlhf_recipes.core.machine"):
        options = ("--per_device_train_batch_size", 16, "--optim", "paged_adamw_8bit", "--save_strategy", "no")
        status, error = launch("sft", *SMALL, *options, "--output_dir", tmp_path)
    assert status == 0, error
    assert "optim: paged_adamw_8bit: on a CPU nothing is paged" in caplog.text
    assert json.loads((tmp_path / "recipe.json").read_text())["metrics"]["train_loss"] > 0
    assert not [warning for warning in recwarn if "Paged optimizers" in str(warning.message)]


# --- Another base ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a folder with two bases, and an adapter trained on the first."""
    folder = tmp_path_factory.mktemp("bases")
    save_base(folder / "one")
    save_base(folder / "two", seed=1)
    adapted = with_adapter(AutoModelForCausalLM.from_pretrained(folder / "one"))
    adapted.save_pretrained(folder / "adapter")
    make_tokenizer().save_pretrained(folder / "adapter")
    record = {"base_model": {"name": str(folder / "one"), "fingerprint": fingerprint(adapted)}}
    (folder / "adapter" / "recipe.json").write_text(json.dumps(record))
    rows = [{"prompt": f"w{number} ", "chosen": "w6", "rejected": "w8"} for number in range(5, 13)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


START = {"start_from": "{}/adapter", "use_peft": True, "dataset_name": "{}/pairs.jsonl"}
POLICY = {"policies": {"sft": "{}/adapter"}}
OTHER_BASE = {
    "dpo": START,
    "ppo": START | {"reward_funcs": ["rlhf_recipes.rewards.RepetitionPenalty"]},
    "reward": START,
    "merge": {"adapter": "{}/adapter"},
    "chat": POLICY,
    "sample": POLICY | {"dataset_name": "{}/pairs.jsonl"},
    "evaluate": POLICY | {"dataset_name": "{}/pairs.jsonl", "test_split_size": 4},
}


@pytest.mark.parametrize("recipe", OTHER_BASE)
def test_adapter_of_another_base_is_refused(launch, bases, tmp_path, recipe):
    values = json.loads(json.dumps(OTHER_BASE[recipe]).replace("{}", str(bases)))
    values |= {"model_name_or_path": str(bases / "two"), "dtype": "float32"}
    values |= {"output_dir": str(tmp_path / "out")} if recipe != "chat" else {}
    config = tmp_path / f"{recipe}.yaml"
    config.write_text(yaml.safe_dump(values))
    error_line = message(*launch(recipe, "--config", config))
    assert f"{bases}/adapter: was trained on {bases}/one, and the base in memory, {bases}/two, is another" in error_line
