"""Folders that stages read of one another, spoilt: what is loaded is what was saved, or one message says what is wrong.

Whatever lies in them, nothing of it is run: weights are safetensors, and pickles of a checkpoint are read for tensors only.
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
from rlhf_recipes.core.files import RECIPE, REWARD
from rlhf_recipes.export.merge import adapter_and_base, merge_policy, merge_reward
from rlhf_recipes.generation.policies import PolicyBank
from rlhf_recipes.memory.model_shape import load_config
from rlhf_recipes.models.compatibility import check_tokenizer
from rlhf_recipes.models.loading import load_model, load_policy
from rlhf_recipes.models.tokenizer import load_tokenizer
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
    """A pickle that leaves a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


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
    """The weights of an adapter as a recipe that trains loads it."""
    model = ModelConfig(str(base), dtype="float32", use_peft=True)
    tokenizer = load_tokenizer(model, training(folder), start_from=stage)
    return get_peft_model_state_dict(load_policy(model, training(folder), str(stage), tokenizer))


def scores_of(stage: Path) -> list[float]:
    """What a reward model says on a base that has an adapter already."""
    return load_saved_reward(stage, with_adapter(make_model()), make_tokenizer())(PROMPTS, ANSWERS)


def judge(folder: Path, base: Path, stage: Path) -> str | None:
    """Loads a folder as it is meant; the message, or None where what was loaded is what the file holds."""
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
@hostile.examples(12)
@given(data=st.data())
def test_bytes_of_weights(folder, base, stages, stage, data):
    copy = copied(folder, stages[stage])
    path = copy / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = whole[:400] if data.draw(st.booleans()) else whole
    path.write_bytes(data.draw(hostile.spoilt_bytes(header)) + whole[len(header) :])
    message = judge(folder, base, copy)
    assert message is None or str(copy) in message


SPOILT_WEIGHTS = ["nan", "infinity", "shape", "transposed", "lacking", "other", "type", "double", "none", "flat", "integers"]


def spoil(weights: dict[str, torch.Tensor], name: str, how: str) -> None:
    weight = weights[name]
    if how in ("nan", "infinity"):
        weight.view(-1)[-1] = float(how)
    elif how == "shape":
        weights[name] = torch.cat([weight, weight])
    elif how == "transposed":
        weights[name] = weight.T.contiguous()
    elif how == "lacking":
        del weights[name]
    elif how == "other":
        weights[name.replace("layers", "layerz") + ".x"] = weight.clone()
    elif how == "type":
        weights[name] = weight.to(torch.bfloat16)
    elif how == "double":
        weights[name] = weight.double() * 1e200  # infinite in fp32
    elif how == "none":
        weights.clear()
    elif how == "flat":
        weights[name] = weight.reshape(-1)
    else:
        weights[name] = weight.int()


@pytest.mark.parametrize("how", SPOILT_WEIGHTS)
@pytest.mark.parametrize("stage", ["sft", "reward"])
@hostile.examples(3)
@given(data=st.data())
def test_weights(folder, base, stages, stage, how, data):
    copy = copied(folder, stages[stage])
    weights = load_file(copy / "adapter_model.safetensors")
    name = data.draw(st.sampled_from(sorted(weights)))
    spoil(weights, name, how)
    save_file(weights, copy / "adapter_model.safetensors", {"format": "pt"})
    message = judge(folder, base, copy)
    if how not in ("type", "integers", "transposed"):
        assert message is not None
    assert message is None or str(copy) in message


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_pickle_in_the_place_of_weights(folder, base, stages, stage):
    copy, mark = copied(folder, stages[stage]), folder / "executed"
    (copy / "adapter_model.safetensors").unlink()
    (copy / "adapter_model.bin").write_bytes(pickle.dumps(Executed(mark)))
    message = judge(folder, base, copy)
    assert "adapter_model.bin is a pickle, which is not read" in message
    (copy / "adapter_model.safetensors").symlink_to(copy / "adapter_model.bin")
    assert "cannot be read" in judge(folder, base, copy)
    assert not mark.exists()


def test_a_pickle_in_the_place_of_a_base(folder, base):
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


def one_of(stages, file):
    """The folder of a stage that has such a file."""
    return stages["sft" if (stages["sft"] / file).exists() and file != "reward.json" else "reward"]


@pytest.mark.parametrize("file", [file for file in JSON_FILES if file not in (RECIPE, REWARD)])
@hostile.examples(10)
@given(data=st.data())
def test_json(folder, base, stages, file, data):
    """One value is another. The adapter is as it was saved, or it is not loaded."""
    copy = copied(folder, one_of(stages, file))
    content = json.loads((copy / file).read_text())
    content.pop("model", None)  # of a tokenizer: a vocabulary of a hundred words
    path = data.draw(st.sampled_from(hostile.places(content)))
    spoilt = hostile.replaced(json.loads((copy / file).read_text()), path, data.draw(hostile.values))
    (copy / file).write_text(json.dumps(spoilt))
    judge(folder, base, copy)


@pytest.mark.parametrize("file", JSON_FILES)
@hostile.examples(6)
@given(data=st.data())
def test_bytes_of_json(folder, base, stages, file, data):
    copy = copied(folder, one_of(stages, file))
    (copy / file).write_bytes(data.draw(hostile.spoilt_bytes((copy / file).read_bytes())))
    judge(folder, base, copy)


ODD_CONFIGS = [
    ({"r": 10**8}, "says r 100000000"),
    ({"r": 10**9}, "r: 1000000000"),
    ({"r": "4"}, "r: '4'"),
    ({"lora_alpha": float("nan")}, "lora_alpha: nan"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"rank_pattern": {"q_proj": 10**9}}, "does not fit its own weights"),
    ({"peft_type": "NONE"}, "adapter_config.json"),
    ({"peft_type": 3}, "adapter_config.json"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ({"base_model_name_or_path": "other"}, "was trained on other"),
    ({"target_modules": ["q_proj"]}, "has no counterpart"),
    ({"target_modules": ["nobody"]}, "does not fit|do not fit"),
    ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
]


@pytest.mark.parametrize(("change", "said"), ODD_CONFIGS, ids=[str(one[0])[:40] for one in ODD_CONFIGS])
def test_odd_configs(folder, base, stages, change, said):
    copy = copied(folder, stages["sft"])
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = judge(folder, base, copy)
    assert re.search(said, message or ""), message
    with pytest.raises(RecipeError):
        PolicyBank(make_model(), make_tokenizer()).add("sft", str(copy), "policies: sft")
    with pytest.raises(RecipeError):
        merged(folder, copy, None if "base_model_name_or_path" in change else base)
    assert "antigravity" not in sys.modules


def merged(folder: Path, adapter: Path, base: Path | None) -> None:
    """Merges an adapter; without a base, into the one that it names."""
    arguments = MergeArguments(adapter=str(adapter), output_dir=str(folder / "merged"))
    is_reward, model = adapter_and_base(arguments, ModelConfig(str(base) if base else None, dtype="float32"))
    (merge_reward if is_reward else merge_policy)(arguments, model, make_tokenizer(), folder / "merged")


@pytest.mark.parametrize("change", [{"target_modules": ["nobody"]}, {"r": 10**6}, {"lora_dropout": "x"}, {"r": 0}])
def test_odd_configs_of_a_reward_model(folder, base, stages, change):
    copy = copied(folder, stages["reward"])
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert str(copy) in (judge(folder, base, copy) or "")
    with pytest.raises(RecipeError, match=str(copy)):
        merged(folder, copy, base)


def test_the_base_that_an_adapter_names_is_not_looked_for_by_importing(folder, stages):
    copy = copied(folder, stages["sft"])
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "antigravity.x.y"}))
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
    """Goes on from a checkpoint for one step; the message, or None where it has."""
    training = make_args(checkpoint.parent, resume_from_checkpoint=str(checkpoint))

    def go_on() -> dict[str, torch.Tensor]:
        trainer = resumed_trainer(checkpoint.parent)
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(training))
        assert trainer.state.global_step == 2
        return get_peft_model_state_dict(trainer.model)

    weights, message = hostile.outcome(go_on)
    assert message is not None or all(weight.isfinite().all() for weight in weights.values())
    assert message is None or str(checkpoint) in message, message
    return message


def test_a_whole_checkpoint(folder, run):
    assert resume(folder, copied(folder, run) / "checkpoint-1") is None


@pytest.mark.parametrize("file", PICKLES)
def test_pickles_in_a_checkpoint(folder, run, file):
    """What PyTorch saves as pickles is read for tensors and numbers; anything else in them is refused, and not run."""
    checkpoint, mark = copied(folder, run) / "checkpoint-1", folder / "executed"
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Executed(mark)))  # which nobody reads
    (checkpoint / file).write_bytes(pickle.dumps(Executed(mark)))
    assert "resume from another checkpoint" in resume(folder, checkpoint)
    torch.save({"state": Executed(mark)}, checkpoint / file)
    assert "resume from another checkpoint" in resume(folder, checkpoint)
    assert not mark.exists()


FILES = (*PICKLES, "trainer_state.json", "ppo_state.json", CRITIC, "adapter_model.safetensors", "rollout-0.safetensors")


@hostile.examples(12)
@given(data=st.data())
def test_bytes_of_a_checkpoint(folder, run, data):
    checkpoint = copied(folder, run) / "checkpoint-1"
    path = checkpoint / data.draw(st.sampled_from([name for name in FILES if (checkpoint / name).exists()]))
    path.write_bytes(data.draw(hostile.spoilt_bytes(path.read_bytes())))
    resume(folder, checkpoint)


@pytest.mark.parametrize("how", ["nan", "shape", "lacking", "other"])
@pytest.mark.parametrize("file", [CRITIC, "adapter_model.safetensors"])
def test_weights_of_a_checkpoint(folder, run, file, how):
    checkpoint = copied(folder, run) / "checkpoint-1"
    weights = load_file(checkpoint / file)
    spoil(weights, sorted(weights)[0], how)
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
    """A base that brings code, and the file that is there once it was run. Nobody answers a question whether to run it."""
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


def test_code_of_a_model_is_run_when_asked_for(folder, with_code):
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
    """In the sources: every class that Transformers chooses is told whether to trust, and pickles are read for tensors only."""
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
