"""Damaged and hostile result folders: what is loaded was saved, or one message names the file.

Nothing in them is run: weights are safetensors, and pickles of a checkpoint are read for tensors only.
"""

import ast
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

from rlhf_recipes.config.merge import MergeArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.export.merge import merge_policy, merge_reward, resolve_base
from rlhf_recipes.generation.policies import PolicyBank
from rlhf_recipes.memory.model_shape import load_config
from rlhf_recipes.models.loading import load_model, load_policy
from rlhf_recipes.models.tokenizer import check_tokenizer, load_tokenizer
from rlhf_recipes.rewards.classifier import load_reward_model
from rlhf_recipes.rewards.saved import load_full_reward, load_saved_reward
from rlhf_recipes.rewards.similarity import Similarity
from rlhf_recipes.stages import STAGES, parse_arguments
from rlhf_recipes.training.ppo.critic import FILE as CRITIC
from rlhf_recipes.training.resume import checkpoint_to_resume
from support import ROOT, hostile
from support.small_ppo import make_args, make_model, make_tokenizer, make_trainer, save_base, save_reward, with_adapter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from trl import ModelConfig, RewardConfig, SFTConfig

PROMPTS, ANSWERS = ["w1 w2", "w3"], [" w4 w5", " w6"]


class Executed:
    """A pickle that creates a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


class Unknown:
    """A class that PyTorch does not know."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def base(folder) -> Path:
    return save_base(folder / "base")


@pytest.fixture(scope="module")
def stages(folder, base) -> dict[str, Path]:
    """Folders of an SFT adapter and of a reward model."""
    policy = with_adapter(load_model(ModelConfig(str(base), dtype="float32"), training(folder)))
    policy.peft_config["default"].base_model_name_or_path = str(base)
    policy.save_pretrained(folder / "sft")
    make_tokenizer().save_pretrained(folder / "sft")
    record = {"recipe": "sft", "base_model": {"name": str(base)}, "parents": [], "data": {"train": {"conversational": False}}}
    (folder / "sft" / "recipe.json").write_text(json.dumps(record))
    return {"sft": folder / "sft", "reward": save_reward(folder / "reward", base)}


def training(folder: Path, kind: type = SFTConfig):
    return kind(str(folder / "out"), use_cpu=True, bf16=False, report_to="none")


def copied(folder: Path, source: Path) -> Path:
    copy = folder / "copy" / source.name
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(source, copy))


def policy_of(folder: Path, base: Path, stage: Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter as a training recipe loads it."""
    model = ModelConfig(str(base), dtype="float32", use_peft=True)
    tokenizer = load_tokenizer(model, training(folder), start_from=stage)
    return get_peft_model_state_dict(load_policy(model, training(folder), str(stage), tokenizer))


def scores_of(stage: Path) -> list[float]:
    """The scores of a reward model on a base with an adapter."""
    return load_saved_reward(stage, with_adapter(make_model()), make_tokenizer())(PROMPTS, ANSWERS)


def judge(folder: Path, base: Path, stage: Path) -> str | None:
    """Load a stage's folder; return the message, or None if what was loaded equals the file."""
    if stage.name == "reward":
        scores, message = hostile.outcome(lambda: scores_of(stage))
        assert message is not None or all(torch.tensor(scores).isfinite()), scores
        return message
    loaded, message = hostile.outcome(lambda: policy_of(folder, base, stage))
    if message is None:
        stored = load_file(stage / "adapter_model.safetensors")
        assert loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[name], stored[name].to(loaded[name].dtype)) for name in stored)
        assert all(weight.isfinite().all() for weight in loaded.values())
    return message


# --- Weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.fuzz
@hostile.examples(12)
@given(data=st.data())
def test_random_bytes_in_weights(folder, base, stages, stage, data):
    copy = copied(folder, stages[stage])
    path = copy / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = whole[:400] if data.draw(st.booleans()) else whole
    path.write_bytes(data.draw(hostile.spoilt_bytes(header)) + whole[len(header) :])
    message = judge(folder, base, copy)
    assert message is None or str(copy) in message


def spoil(weights: dict[str, torch.Tensor], how: str) -> None:
    name = min(weights)
    if how in ("nan", "inf"):
        weights[name].view(-1)[-1] = float(how)
    elif how == "shape":
        weights[name] = torch.cat([weights[name], weights[name]])
    elif how == "missing":
        del weights[name]
    else:
        weights[name.replace("layers", "layerz") + ".x"] = weights[name].clone()


@pytest.mark.parametrize("how", ["nan", "inf", "shape", "missing", "superfluous"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_weights_that_are_not_those_of_the_adapter_are_refused(folder, base, stages, stage, how):
    copy = copied(folder, stages[stage])
    weights = load_file(copy / "adapter_model.safetensors")
    spoil(weights, how)
    save_file(weights, copy / "adapter_model.safetensors", {"format": "pt"})
    assert str(copy) in judge(folder, base, copy)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_pickle_in_place_of_weights_is_not_read(folder, base, stages, stage):
    copy, mark = copied(folder, stages[stage]), folder / "executed"
    (copy / "adapter_model.safetensors").unlink()
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Executed(mark)))
    message = judge(folder, base, copy)
    assert "adapter_model.bin" in message
    (copy / "adapter_model.safetensors").symlink_to(copy / "adapter_model.bin")
    assert "cannot be read" in judge(folder, base, copy)
    assert not mark.exists()


def test_pickle_in_place_of_a_base_is_not_read(folder, base):
    copy, mark = copied(folder, base), folder / "executed"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Executed(mark)))
    for load_it in (
        lambda: load_model(ModelConfig(str(copy)), training(folder)),
        lambda: load_full_reward(copy, "x", make_tokenizer()),
    ):
        _, message = hostile.outcome(load_it)
        assert str(copy) in message
    assert not mark.exists()


# --- Configurations and records --------------------------------------------------------------------------


JSON_FILES = ["adapter_config.json", "recipe.json", "reward.json", "tokenizer_config.json", "tokenizer.json"]


@pytest.mark.fuzz
@pytest.mark.parametrize("file", JSON_FILES)
@hostile.examples(6)
@given(data=st.data())
def test_random_bytes_in_json(folder, base, stages, file, data):
    copy = copied(folder, stages["reward" if file == "reward.json" else "sft"])
    (copy / file).write_bytes(data.draw(hostile.spoilt_bytes((copy / file).read_bytes())))
    judge(folder, base, copy)


def edit_config(folder: Path, change: dict) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize("stage", ["sft", "reward"])
@pytest.mark.parametrize(
    "change",
    [
        {"r": 8},
        {"lora_dropout": "x"},
        {"peft_type": "NONE"},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["nobody"]},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_one_message(folder, base, stages, stage, change):
    copy = copied(folder, stages[stage])
    edit_config(copy, change)
    assert str(copy) in judge(folder, base, copy)
    with pytest.raises(RecipeError):
        PolicyBank(make_model(), make_tokenizer()).add("policy", str(copy), "policies: policy")
    with pytest.raises(RecipeError, match=str(copy)):
        merged(folder, copy, base)
    assert "antigravity" not in sys.modules


def merged(folder: Path, adapter: Path, base: Path | None) -> None:
    """Merge an adapter; by default into the base that it names."""
    arguments = MergeArguments(adapter=str(adapter), output_dir=str(folder / "merged"))
    is_reward, model = resolve_base(arguments, ModelConfig(str(base) if base else None, dtype="float32"))
    (merge_reward if is_reward else merge_policy)(arguments, model, make_tokenizer(), folder / "merged")


def test_base_in_an_adapter_config_is_not_imported(folder, stages):
    copy = copied(folder, stages["sft"])
    edit_config(copy, {"base_model_name_or_path": "antigravity.x.y"})
    with pytest.raises(RecipeError, match=r"model_name_or_path: antigravity\.x\.y"):
        merged(folder, copy, None)
    assert "antigravity" not in sys.modules


# --- Checkpoints -----------------------------------------------------------------------------------------

PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "critic_optimizer.pt")


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A folder with the checkpoint of a first step of two."""
    trainer = resumed_trainer(folder / "run", save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    return folder / "run"


def resumed_trainer(output: Path, **options):
    return make_trainer(output, with_adapter(make_model()), **options)


def resume(folder: Path, checkpoint: Path) -> str | None:
    """Resume a checkpoint for one step; return the message, or None if it resumed."""
    training = make_args(checkpoint.parent, resume_from_checkpoint=str(checkpoint))

    def train_on() -> dict[str, torch.Tensor]:
        trainer = resumed_trainer(checkpoint.parent)
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(training))
        assert trainer.state.global_step == 2
        return get_peft_model_state_dict(trainer.model)

    weights, message = hostile.outcome(train_on)
    assert message is not None or all(weight.isfinite().all() for weight in weights.values())
    assert message is None or str(checkpoint) in message, message
    return message


def test_complete_checkpoint_resumes(folder, run):
    assert resume(folder, copied(folder, run) / "checkpoint-1") is None


@pytest.mark.parametrize("file", PICKLES)
def test_pickles_in_a_checkpoint_are_not_run(folder, run, file):
    """PyTorch's pickles are read for tensors and numbers only."""
    checkpoint, mark = copied(folder, run) / "checkpoint-1", folder / "executed"
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Executed(mark)))  # which nobody reads
    (checkpoint / file).write_bytes(pickle.dumps(Executed(mark)))
    poisoned = [resume(folder, checkpoint)]
    torch.save({"state": Executed(mark)}, checkpoint / file)
    poisoned.append(resume(folder, checkpoint))
    torch.save({"state": Unknown()}, checkpoint / file)
    poisoned.append(resume(folder, checkpoint))
    for message in poisoned:
        assert "resume from another checkpoint" in message
        assert not re.search("weights.only|can still be loaded|trust", message, re.IGNORECASE), "PyTorch's advice"
    assert not mark.exists()


FILES = (*PICKLES, "trainer_state.json", "ppo_state.json", CRITIC, "adapter_model.safetensors", "rollout-0.safetensors")


@pytest.mark.fuzz
@hostile.examples(12)
@given(data=st.data())
def test_random_bytes_in_a_checkpoint(folder, run, data):
    checkpoint = copied(folder, run) / "checkpoint-1"
    path = checkpoint / data.draw(st.sampled_from([name for name in FILES if (checkpoint / name).exists()]))
    path.write_bytes(data.draw(hostile.spoilt_bytes(path.read_bytes())))
    resume(folder, checkpoint)


@pytest.mark.parametrize("how", ["nan", "shape", "missing", "superfluous"])
@pytest.mark.parametrize("file", [CRITIC, "adapter_model.safetensors"])
def test_wrong_weights_in_a_checkpoint_are_refused(folder, run, file, how):
    checkpoint = copied(folder, run) / "checkpoint-1"
    weights = load_file(checkpoint / file)
    spoil(weights, how)
    save_file(weights, checkpoint / file, {"format": "pt"})
    assert resume(folder, checkpoint) is not None


# --- Code that comes with a model ------------------------------------------------------------------------

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import {parents}
class Config(LlamaConfig):
    pass
class Model(LlamaForCausalLM):
    config_class = Config
class Scorer(LlamaForSequenceClassification):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(folder, base, monkeypatch) -> tuple[Path, Path]:
    """A base with code, and the file that the code creates. Nobody answers a question whether to run it."""
    copy, mark = copied(folder, base), folder / "ran"
    parents = "LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast"
    (copy / "code.py").write_text(CODE.format(mark=str(mark), parents=parents))
    classes = {"Config": "Config", "ModelForCausalLM": "Model", "ModelForSequenceClassification": "Scorer"}
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "brought", "auto_map": {f"Auto{key}": f"code.{value}" for key, value in classes.items()}}
    (copy / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Brought", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    mark.unlink(missing_ok=True)
    return copy, mark


def test_code_of_a_model_is_not_run(folder, with_code):
    copy, mark = with_code
    model = ModelConfig(str(copy))
    for action in (
        lambda: load_model(model, training(folder)),
        lambda: load_tokenizer(model, training(folder)),
        lambda: load_tokenizer(
            ModelConfig(str(copy.parents[1] / "base")), SFTConfig("x", chat_template_path=str(copy), bf16=False)
        ),
        lambda: load_full_reward(copy, "x", make_tokenizer()),
        lambda: load_reward_model(model, training(folder, RewardConfig), make_tokenizer(), None),
        lambda: Similarity(str(copy), "cross-encoder")(["a"], ["b"]),
        lambda: check_tokenizer(copy, make_tokenizer()),
        lambda: load_config(str(copy)),
    ):
        hostile.outcome(action)
        assert not mark.exists()


def test_code_of_a_model_is_run_if_trusted(folder, with_code):
    copy, mark = with_code
    trusting = SFTConfig(str(folder / "out"), use_cpu=True, bf16=False, report_to="none", trust_remote_code=True)
    hostile.outcome(lambda: load_model(ModelConfig(str(copy)), trusting))
    assert mark.exists()


@pytest.mark.parametrize("recipe", STAGES)
def test_trust_remote_code_is_off(recipe):
    groups = parse_arguments(ROOT / "recipes" / f"{recipe}.py", argv=[])
    values = {key: value for group in groups for key, value in vars(group).items()}
    assert values.get("trust_remote_code", False) is False
    assert not (values.get("model_init_kwargs") or {}).get("trust_remote_code")


def test_no_configuration_switches_it_on():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "trust_remote_code" not in path.read_text(), path


CALLS = [
    (path, node)
    for folder in ("rlhf_recipes", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Call)
]


def test_nothing_is_loaded_with_code_or_as_a_pickle():
    """In our sources, every Auto class gets `trust_remote_code`, and `torch.load` reads tensors only."""
    for path, call in CALLS:
        text, given = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
        where = f"{path}:{call.lineno}: {text}"
        if text.startswith("Auto") and text.endswith(".from_pretrained"):
            assert "trust_remote_code" in given or None in given, where
        if text.startswith("AutoModel") and text.endswith(".from_pretrained"):
            assert "use_safetensors" in given or None in given, where
        assert ast.unparse(given.get("trust_remote_code", ast.Constant(False))) != "True", where
        if text.endswith("torch.load"):
            assert ast.unparse(given["weights_only"]) == "True", where
        assert text not in ("pickle.load", "pickle.loads", "joblib.load", "np.load", "load_peft_weights", "yaml.unsafe_load"), (
            where
        )
