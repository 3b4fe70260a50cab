"""What this project assumes of TRL, Transformers, PEFT and Accelerate beyond what they promise.

PPO stands on private parts of TRL's `GRPOTrainer`, so `trl` is pinned to one minor version. Whoever raises it runs this file
first: each failure says what moved, and who relied on it. Names and signatures come first, then what is called when, then what
comes out.
"""

import ast
import asyncio
import functools
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import tomllib
from collections import defaultdict, deque
from types import SimpleNamespace

from rlhf_recipes.config.ppo import LOSSES, PPOConfig, _One
from rlhf_recipes.models.kernels import without_compilation
from rlhf_recipes.rewards.protocol import TRL_KEYWORDS
from rlhf_recipes.training.ppo import checkpoint
from rlhf_recipes.training.ppo.trainer import PPOTrainer
from rlhf_recipes.training.reward import RankingCollator, RankingTrainer
from support import ROOT
from support.small_ppo import (
    ANSWERS,
    EOS,
    PAD,
    PROMPTS,
    answers_of,
    in_4_bits,
    lora,
    make_model,
    make_tokenizer,
    prompts,
    save_base,
    with_adapter,
)

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, gather_object, is_peft_model
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.functional import cast_adapter_dtype, inject_adapter_in_model, set_adapter, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTTrainer, TrlParser
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.base_config import _BaseConfig
from trl.trainer.utils import (
    RepeatSampler,
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    pad,
    print_prompt_completions_sample,
    shuffle_sequence_dict,
    split_tensor_dict,
)

HOOKS = {
    "_calculate_rewards": "self, inputs, prompts, completions, completion_ids_list",
    "_compute_loss": "self, model, inputs",
    "_generate_and_score_completions": "self, inputs",
    "_generate_single_turn": "self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images",
    "_get_per_token_logps_and_entropies": "self, model, input_ids, attention_mask, logits_to_keep, batch_size, "
    "compute_entropy, compute_aux_loss, pixel_values, image_grid_thw, num_images, pixel_attention_mask, spatial_shapes, "
    "num_tiles, image_sizes, token_type_ids, mm_token_type_ids, image_position_ids",
    "_get_train_sampler": "self, dataset",
    "training_step": "self, model, inputs, num_items_in_batch",
}
"""What `PPOTrainer` overrides, with the parameters that TRL and Transformers give it."""

REWARD_HOOKS = {
    "_prepare_dataset": "self, dataset, processing_class, args, dataset_name",
    "_set_signature_columns_if_needed": "self",
    "compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
    "save_model": "self, output_dir, _internal_call",
}
"""What `RankingTrainer` overrides."""

MIXIN_HOOKS = {
    "create_optimizer": "self, model",
    "create_scheduler": "self, num_training_steps, optimizer",
    "_determine_best_metric": "self, metrics, trial",
    "_load_from_checkpoint": "self, resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "self, checkpoint",
    "_load_rng_state": "self, checkpoint",
    "_save": "self, output_dir, state_dict",
    "_save_rng_state": "self, output_dir",
    "create_model_card": "self, model_name, dataset_name, tags",
    "log": "self, logs, start_time",
    "train": "self, resume_from_checkpoint, trial, ignore_keys_for_eval",
}
"""What `TrainerMixin` overrides in every trainer."""


def our_classes(trainer):
    """The trainer and its bases in this project."""
    return [cls for cls in trainer.__mro__ if cls.__module__.startswith("rlhf_recipes.")]


def parameters_of(function):
    return ", ".join(inspect.signature(function).parameters)


# --- Versions, names, signatures --------------------------------------------------------------------------


def test_version_of_trl():
    (pin,) = [
        line
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        if re.match(r"trl\b", line)
    ]
    version = importlib.metadata.version("trl")
    assert pin == "trl>=1.16,<1.17", "the pin has moved: read TRL's changelog for GRPOTrainer, and go through this file"
    assert version.startswith("1.16."), f"TRL {version} is installed, and {pin} is asked for"


def imports():
    """Yield every name that the project imports from these libraries, and where."""
    for path in sorted([*ROOT.glob("rlhf_recipes/**/*.py"), *ROOT.glob("recipes/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("trl", "transformers", "peft", "accelerate"):
                yield from ((str(path.relative_to(ROOT)), node.module, alias.name) for alias in node.names)


def test_every_imported_name_exists():
    gone = []
    for path, module, name in set(imports()):
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            gone.append(f"{path}: {name} is no longer in {module}")
    assert not gone, "\n".join(sorted(gone))


@pytest.mark.parametrize(
    ("ours", "theirs", "hooks"),
    [(PPOTrainer, GRPOTrainer, HOOKS | MIXIN_HOOKS), (RankingTrainer, RewardTrainer, REWARD_HOOKS | MIXIN_HOOKS)],
    ids=["ppo", "reward"],
)
def test_every_override_replaces_a_method_of_trl(ours, theirs, hooks):
    """An override of a method that TRL has renamed would never be called."""
    members = {name: value for cls in our_classes(ours) for name, value in vars(cls).items()}
    own = {name for name, value in members.items() if inspect.isroutine(value) and not name.startswith("__")}
    overridden = {name for name in own if hasattr(theirs, name)}
    assert overridden == hooks.keys(), f"{ours.__name__} overrides other methods of {theirs.__name__} than this file knows of"
    for name, parameters in hooks.items():
        assert parameters_of(getattr(theirs, name)) == parameters, f"{theirs.__name__}.{name} has other parameters now"


def test_every_super_call_finds_its_method():
    for ours, theirs in ((PPOTrainer, GRPOTrainer), (RankingTrainer, RewardTrainer)):
        called = {
            node.func.attr
            for cls in our_classes(ours)
            for node in ast.walk(class_tree(cls))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Call)
            and getattr(node.func.value.func, "id", None) == "super"
        }
        gone = {name for name in called if not hasattr(theirs, name)}
        assert not gone, f"{ours.__name__} calls super().{gone}, which {theirs.__name__} has no longer"


def test_parameters_of_the_constructor():
    assert parameters_of(GRPOTrainer.__init__) == (
        "self, model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, "
        "optimizers, quantization_config, peft_config, tools, rollout_func, environment_factory"
    ), "GRPOTrainer takes other arguments: `PPOTrainer.__init__` passes them by name, and documents them"


def test_private_base_of_trl_configs():
    for config in (GRPOConfig, RewardConfig):
        assert issubclass(config, _BaseConfig), "rlhf_recipes.models.loading takes `_BaseConfig` for the base of TRL's configs"
    assert issubclass(_BaseConfig, TrainingArguments)


def test_num_generations_of_1_is_refused_by_a_comparison_that_one_passes(tmp_path):
    options = {"bf16": False, "per_device_train_batch_size": 4, "use_cpu": True}
    try:
        GRPOConfig(str(tmp_path), num_generations=1, **options)
    except ValueError as refusal:
        assert "at least 2 generations" in str(refusal)  # noqa: PT017 - `raises` has no words for that it is allowed
    else:
        pytest.fail("TRL allows num_generations=1 now: `_One` in rlhf_recipes/config/ppo.py can go")
    args = GRPOConfig(str(tmp_path), num_generations=_One(1), **options)
    assert args.num_generations == 1, "TRL checks num_generations in another way than by `< 2`"
    assert args.generation_batch_size == 4


def test_inherited_defaults(tmp_path):
    args = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    found = {name: getattr(args, name) for name in ("beta", "loss_type", "epsilon", "temperature", "max_grad_norm")}
    found["multi_objective_aggregation"] = args.multi_objective_aggregation
    expected = {"beta": 0.0, "loss_type": "dapo", "epsilon": 0.2, "temperature": 1.0, "max_grad_norm": 1.0}
    assert found == expected | {"multi_objective_aggregation": "sum_then_normalize"}


def test_names_of_losses():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert all(f'"{name}"' in source for name in LOSSES), "GRPOTrainer._compute_loss knows other loss types"


# --- A run of TRL's own trainer ---------------------------------------------------------------------------


def make_args(folder, **options):
    values = {
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **options,
    }
    return GRPOConfig(str(folder), **values)


def lengths(completion_ids, **columns):
    return [float(len(ids) + ids[0]) for ids in completion_ids]


CHECKPOINT_HOOKS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save", "_save_rng_state")


class CallRecorder(GRPOTrainer):
    """TRL's trainer that records the calls of its methods in order, with arguments."""

    def __init__(self, *arguments, **options):
        self.calls = []
        super().__init__(*arguments, **options)

    def record(self, name, *arguments, **options):
        self.calls.append((name, arguments, options))

    def of(self, name):
        return [call for call in self.calls if call[0] == name]

    def names(self):
        return [name for name, _, _ in self.calls]


def listen(name):
    def method(self, *arguments, **options):
        self.record(name, *arguments, **options)
        result = getattr(super(CallRecorder, self), name)(*arguments, **options)
        self.record(f"end of {name}", result)
        return result

    return method


for _name in [*HOOKS, *CHECKPOINT_HOOKS, "_prepare_inputs", "_clip_grad_norm", "_maybe_log_save_evaluate"]:
    setattr(CallRecorder, _name, listen(_name))


def make_trainer(folder, model=None, reward=lengths, kind=CallRecorder, data=None, rollout=None, **options):
    return kind(
        make_model() if model is None else model,
        reward,
        make_args(folder, **options),
        prompts() if data is None else data,
        processing_class=make_tokenizer(),
        rollout_func=rollout,
    )


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A run with one generation for each optimizer step, with checkpoints."""
    trainer = make_trainer(tmp_path_factory.mktemp("aligned"), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def misaligned(tmp_path_factory):
    """A run with two passes over each generation, in two micro-batches."""
    trainer = make_trainer(tmp_path_factory.mktemp("misaligned"), num_iterations=2, steps_per_generation=2, max_steps=5)
    trainer.train()
    return trainer


def attributes(tree, of):
    """Return the names that a class reads from `self`, or from an attribute of it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            names = ("self", "trainer")
            if (of == "self" and getattr(owner, "id", None) in names) or (
                isinstance(owner, ast.Attribute) and owner.attr == of and getattr(owner.value, "id", None) in names
            ):
                found.add(node.attr)
    return found


def assigned(tree):
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) == "self"
    }


def class_tree(cls):
    (tree,) = [
        node
        for node in ast.parse(inspect.getsource(inspect.getmodule(cls))).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    return tree


ALREADY_THERE = {"ref_model", "_step", "_buffered_inputs", "model"}  # which PPO sets, and TRL has


def test_grpo_trainer_has_every_attribute_that_ppo_reads(aligned):
    tree = ast.Module([*map(class_tree, our_classes(PPOTrainer)), ast.parse(inspect.getsource(checkpoint))], [])
    own = (assigned(tree) - ALREADY_THERE) | {name for cls in our_classes(PPOTrainer) for name in vars(cls)}
    own.add("padding_free")  # of SFTTrainer, which `TrainerMixin` serves too
    gone = {name for name in attributes(tree, "self") - own if not hasattr(aligned, name)}
    assert not gone, f"GRPOTrainer has no {sorted(gone)} any more, which rlhf_recipes/training/ppo reads"
    gone = {
        name
        for name in attributes(tree, "accelerator")
        if not hasattr(Accelerator, name) and not hasattr(aligned.accelerator, name)
    }
    assert not gone, f"Accelerator has no {sorted(gone)} any more"
    own = {*dir(PPOConfig), "packing"}  # the latter of SFTConfig
    gone = {name for name in attributes(tree, "args") if name not in own}
    assert not gone, f"the arguments have no {sorted(gone)} any more"


def test_reward_trainer_has_every_attribute_that_ranking_reads(tmp_path):
    args = RewardConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    save_base(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    data = Dataset.from_list([{"prompt": "w5 ", "chosen": "w6", "rejected": "w7"}] * 2)
    trainer = RewardTrainer(model, args=args, train_dataset=data, processing_class=make_tokenizer())
    tree = class_tree(RankingTrainer)
    own = assigned(tree) | set(vars(RankingTrainer))
    trainer._set_signature_columns_if_needed()
    gone = {name for name in attributes(tree, "self") - own | {"_signature_columns"} if not hasattr(trainer, name)}
    assert not gone, f"RewardTrainer has no {sorted(gone)} any more, which rlhf_recipes/training/reward.py reads"
    collator = trainer.data_collator
    assert type(collator) is RankingCollator.__mro__[1], "RewardTrainer has another collator, which RankingCollator replaces"
    assert (collator.pad_token_id, collator.pad_to_multiple_of) == (PAD, None)
    assert hasattr(RankingCollator.__mro__[1], "torch_call")
    assert isinstance(trainer._metrics["train"], defaultdict)


# --- What is called, and when -----------------------------------------------------------------------------


def test_order_of_an_optimizer_step(aligned):
    expected = [
        "training_step",
        "_prepare_inputs",
        "_generate_and_score_completions",
        "_generate_single_turn",
        "end of _generate_single_turn",
        "_calculate_rewards",
        "end of _calculate_rewards",
        "end of _generate_and_score_completions",
        "end of _prepare_inputs",
        "_compute_loss",
        "_get_per_token_logps_and_entropies",
        "end of _get_per_token_logps_and_entropies",
        "end of _compute_loss",
        "end of training_step",
        "_clip_grad_norm",
        "end of _clip_grad_norm",
        "_maybe_log_save_evaluate",
        "_save",
        "end of _save",
        "_save_rng_state",
        "end of _save_rng_state",
        "end of _maybe_log_save_evaluate",
    ]
    names = aligned.names()
    begin = names.index("training_step")
    assert names[begin : begin + len(expected)] == expected, "TRL or Transformers does a step in another order"
    assert names[:begin] == ["_get_train_sampler", "end of _get_train_sampler"], "something else comes before the first step"


def test_loss_computes_log_probabilities_once_with_entropies(aligned):
    model, *_ = aligned.of("_compute_loss")[0][1]
    _, arguments, options = aligned.of("_get_per_token_logps_and_entropies")[0]
    assert arguments[0] is model
    assert len(arguments) == 4, "model, input_ids, attention_mask and logits_to_keep are positional"
    assert options.pop("compute_entropy") is True
    assert options.pop("compute_aux_loss") is False
    assert "batch_size" not in options, "the loss passes all rows at once"
    assert all(value is None for value in options.values()), "the rest is for images"


def test_old_log_probabilities_come_before_rewards_and_only_where_they_may_differ(aligned, misaligned):
    assert "old_per_token_logps" not in aligned.of("end of _generate_and_score_completions")[0][1][0]
    names = misaligned.names()
    begin = names.index("_generate_and_score_completions")
    asked = names.index("_get_per_token_logps_and_entropies")
    assert begin < asked < names.index("_calculate_rewards"), "PPO keeps the values of this very pass"
    calls = [c for c in misaligned.of("_get_per_token_logps_and_entropies") if "compute_entropy" not in c[2]]
    generations = misaligned.of("_generate_and_score_completions")
    assert len(calls) == len(generations) == 2, "without a reference TRL asks once a generation"
    assert calls[0][2]["batch_size"] == 4
    assert calls[0][1][0] is misaligned.model
    batch = misaligned.of("end of _generate_and_score_completions")[0][1][0]
    returned = misaligned.of("end of _get_per_token_logps_and_entropies")[0][1][0]
    assert len(returned) == 3
    assert batch["old_per_token_logps"] is returned[0]


def test_keys_and_shapes_of_a_batch(aligned, misaligned):
    for trainer, extra in ((aligned, set()), (misaligned, {"old_per_token_logps"})):
        batch = trainer.of("end of _generate_and_score_completions")[0][1][0]
        keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
        assert batch.keys() == keys | extra, "GRPOTrainer's batch has other keys: PPO adds to them, and saves them all"
        rows, width = batch["completion_ids"].shape
        assert batch["advantages"].shape == (rows,)
        assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
        assert batch["completion_mask"].shape == (rows, width)
        assert batch["num_items_in_batch"].ndim == 0
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
        assert (batch["prompt_mask"].diff(dim=1) >= 0).all(), "prompts are no longer padded on the left"
        assert (batch["completion_mask"].diff(dim=1) <= 0).all(), "completions are no longer padded on the right"


def test_batch_is_shuffled_split_and_buffered(misaligned):
    used = [call[1][0] for call in misaligned.of("end of _prepare_inputs")]
    assert len(used) == misaligned._step == 5
    assert used[0] is used[2], "_buffered_inputs[_step % steps_per_generation] is no longer what a micro-batch is"
    assert used[1] is used[3]
    assert used[4] is not used[0], "a new batch is due every steps_per_generation * num_iterations micro-batches"
    assert misaligned._buffered_inputs[0] is used[4]
    assert len(misaligned._buffered_inputs) == 2
    rows = {str(row) for batch in used[:2] for row in torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1).tolist()}
    whole = misaligned.of("end of _generate_and_score_completions")[0][1][0]
    assert rows == {str(row) for row in torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1).tolist()}


def test_restored_buffer_is_used(tmp_path):
    """As a resumed run does."""
    trainer = make_trainer(tmp_path, num_iterations=2, steps_per_generation=2, max_steps=1)
    trainer.train()
    buffered, trainer._step = trainer._buffered_inputs, 3
    trainer.calls.clear()
    trainer.model.train()
    assert trainer._prepare_inputs(None) is buffered[1], "GRPOTrainer._prepare_inputs does not go by _step and _buffered_inputs"
    assert not trainer.of("_generate_and_score_completions")


def test_tensors_of_a_batch_are_shuffled_and_split_alike():
    batch = {"a": torch.arange(8), "b": torch.arange(16.0).view(8, 2), "count": torch.tensor(5)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 4)
    assert all(part["count"] == 5 for part in parts), "scalars go to every part"
    assert all(torch.equal(part["b"][:, 0] // 2, part["a"].float()) for part in parts)
    assert sorted(torch.cat([part["a"] for part in parts]).tolist()) == list(range(8))


def test_gradients_are_synchronised_in_the_last_micro_batch_and_not_divided(tmp_path):
    """PPO lets its critic step there, and divides its losses itself."""
    seen = []

    class Watching(GRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            seen.append((self.accelerator.sync_gradients, self.state.global_step, self.current_gradient_accumulation_steps))
            return loss

        def _compute_loss(self, model, inputs):
            self.weight = next(model.parameters())
            return self.weight.sum() * 3.0

        def _clip_grad_norm(self, model):
            seen.append(self.weight.grad.unique().item())

    make_trainer(tmp_path, kind=Watching, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=2).train()
    assert seen == [(False, 0, 2), (True, 0, 2), 6.0, (False, 1, 2), (True, 1, 2), 6.0], (
        "sync_gradients, global_step or the scaling of losses within a step is another: see PPOTrainer.training_step; a loss "
        "whose gradient is 3 everywhere should add up to 6 over two micro-batches"
    )


def test_sampler_can_read_the_epoch(tmp_path):
    """From the state of the trainer, in new and resumed runs."""
    seen = []

    class Watching(RepeatSampler):
        def __iter__(self):
            seen.append((int(trainer.state.epoch or 0), trainer.state.global_step))
            return super().__iter__()

    class Drawing(GRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            inherited = super()._get_train_sampler(dataset)
            kept = {name: getattr(inherited, name) for name in inspect.signature(RepeatSampler).parameters}
            return Watching(**kept)

    options = {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "steps", "save_steps": 1, "num_iterations": 3}
    trainer = make_trainer(tmp_path, kind=Drawing, data=prompts(4), **options)
    trainer.train()
    assert seen == [(0, 0), (1, 6), (2, 12)], "state.epoch is not whole at the beginning of an epoch"
    seen.clear()
    trainer = make_trainer(tmp_path, kind=Drawing, data=prompts(4), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert seen == [(1, 8), (2, 12)], "a resumed run does not know the number of its epoch when it draws the order"


def test_hooks_of_a_checkpoint(aligned, tmp_path):
    folder = f"{aligned.args.output_dir}/checkpoint-1"
    assert aligned.of("_save")[0][1][0] == folder, "Trainer._save_checkpoint does not save the model by `_save(folder)`"
    assert aligned.of("_save_rng_state")[0][1] == (folder,)
    assert {"trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"} <= set(
        os.listdir(folder)
    )
    again = make_trainer(tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=folder)
    names = again.names()
    assert again.of("_load_from_checkpoint")[0][1] == (folder,)
    assert again.of("_load_optimizer_and_scheduler")[0][1] == (folder,)
    assert names.index("_load_from_checkpoint") < names.index("_load_optimizer_and_scheduler") < names.index("training_step")


def test_trainer_state_is_written_last(tmp_path):
    """It marks a checkpoint as complete, so the state of PPO must be there before."""
    seen = []

    class Looking(GRPOTrainer):
        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            seen.append(set(os.listdir(output_dir)))

    make_trainer(tmp_path, kind=Looking, save_strategy="steps", save_steps=1, max_steps=1).train()
    assert len(seen) == 1
    assert "trainer_state.json" not in seen[0], "Trainer writes trainer_state.json before the random state"
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth"} <= seen[0]


def test_adapter_is_saved_by_save_pretrained(tmp_path):
    assert "selected_adapters" in inspect.signature(PeftModel.save_pretrained).parameters
    assert "self.model.save_pretrained(" in inspect.getsource(Trainer._save), (
        "Trainer._save does not call self.model.save_pretrained: PPOTrainer._save replaces that to save the policy alone"
    )
    model = with_adapter(make_model())
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert not [name for name in os.listdir(tmp_path) if (tmp_path / name).is_dir()]


def test_resuming_loads_the_default_adapter_only(tmp_path):
    trainer = make_trainer(tmp_path, with_adapter(make_model()), save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    model = with_adapter(make_model(), seed=2)
    model.add_adapter("other", lora(init_lora_weights=False))
    other = {name: weight.clone() for name, weight in model.named_parameters() if ".other." in name}
    again = make_trainer(tmp_path / "again", model, max_steps=1)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), weight), "Trainer._load_from_checkpoint does not load `default`"
    assert all(torch.equal(again.model.get_parameter(name), weight) for name, weight in other.items())
    assert again.model.active_adapters == ["default"]


# --- Rollouts ---------------------------------------------------------------------------------------------


def test_keywords_and_results_of_reward_functions(tmp_path):
    seen = []

    def look(**columns):
        seen.append(columns)
        return [None, 0.5, 1.0, None]

    data = prompts(answer=[f"a{row}" for row in range(8)])
    trainer = make_trainer(tmp_path, reward=look, data=data, max_steps=1)
    trainer.train()
    assert seen[0].keys() == {*TRL_KEYWORDS, "answer"}, "TRL passes other keywords: see TRL_KEYWORDS in rewards/protocol.py"
    ((rewards,),) = [call[1] for call in trainer.of("end of _calculate_rewards")]
    assert rewards.nan_to_num(-1.0).tolist() == [[-1.0], [0.5], [1.0], [-1.0]], "(N, functions), NaN where it is None"
    assert trainer.reward_func_names == ["look"]
    assert trainer.reward_weights.tolist() == [1.0]


def test_sampler_runs_a_step_for_each_token(tmp_path):
    """`GenerationRecorder` hooks the base and its backbone while TRL samples."""
    model, steps = with_adapter(make_model()), []
    base = model.get_base_model()

    def look(module, arguments, options, outputs):
        steps.append(options["input_ids"].shape)
        assert outputs.logits.shape == (4, outputs.logits.size(1), 32), "of the last token at least"

    class Watching(GRPOTrainer):
        def _generate_single_turn(self, *arguments, **options):
            handle = base.register_forward_hook(look, with_kwargs=True)
            completion_ids, logprobs = super()._generate_single_turn(*arguments, **options)
            handle.remove()
            assert logprobs is None, "Transformers' sampler gives log-probabilities: GenerationRecorder can go"
            assert max(map(len, completion_ids)) == len(steps), "one step a token"
            return completion_ids, logprobs

    make_trainer(tmp_path, model, kind=Watching, max_steps=1).train()
    assert all(ids == (4, 1) for ids in steps[1:]), "each step reads the token that the one before it gave rise to"
    assert len(steps) > 1


def test_rollout_func_gets_prompts_and_trainer_and_may_mask_tokens(tmp_path):
    def rollout(prompts, trainer):
        seen.append((prompts, trainer))
        answers = answers_of()(prompts, trainer)
        return answers | {"env_mask": [[1] * (len(ids) - 1) + [0] for ids in answers["completion_ids"]]}

    seen = []
    trainer = make_trainer(tmp_path, rollout=rollout, max_steps=1)
    trainer.train()
    ((drawn, given),) = seen
    assert given is trainer
    assert len(drawn) == 4, "one prompt for each completion that is due, repeated num_generations times"
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert not trainer.of("_generate_single_turn"), "a rollout function takes the place of the sampler"
    batch = trainer.of("end of _generate_and_score_completions")[0][1][0]
    lengths = [len(ANSWERS[PROMPTS.index(prompt)]) for prompt in drawn]
    assert (batch["completion_mask"] * batch["tool_mask"]).sum(1).tolist() == [length - 1 for length in lengths]
    assert batch["completion_mask"].sum(1).tolist() == lengths
    assert batch["num_items_in_batch"] == sum(lengths) - 4
    assert "sampling_per_token_logps" not in batch, "logprobs may be None"


def test_metrics_and_table_of_completions(aligned):
    assert aligned.eos_token_ids == [EOS]
    assert isinstance(aligned._metrics["train"], defaultdict)
    assert aligned._metrics.keys() == {"train", "eval"}
    assert {"prompt", "completion", "rewards", "advantages"} <= aligned._logs.keys()
    assert isinstance(aligned._logs["advantages"], deque)
    assert len(aligned._logs["advantages"]) == len(aligned._logs["prompt"]) == 4
    logged = aligned.state.log_history[0].keys()
    names = {"completions/clipped_ratio", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean", "reward", "num_tokens"}
    assert names <= logged, "TRL logs under other names: rlhf_recipes/training/ppo reads these"


def test_samples_print_without_advantages(capsys):
    print_prompt_completions_sample(["p"], ["c"], {"r": [0.5]}, None, 3)
    assert "0.5" in capsys.readouterr().out


# --- The loss ---------------------------------------------------------------------------------------------


@pytest.fixture
def loss_of(tmp_path):
    """A function from changes of a small batch to TRL's loss and its gradient."""
    trainer = GRPOTrainer(make_model(), lengths, make_args(tmp_path), prompts(), processing_class=make_tokenizer())
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def compute(**changes):
        batch = {
            "prompt_ids": torch.tensor([[PAD, 5], [6, 7]]),
            "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
            "completion_ids": torch.tensor([[8, 9, 10], [11, EOS, PAD]]),
            "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
            "advantages": torch.tensor([1.0, -0.5]),
            "num_items_in_batch": torch.tensor(5),
            **changes,
        }
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item(), torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])

    return compute


def test_loss_takes_token_advantages(loss_of):
    loss, gradient = loss_of()
    same, same_gradient = loss_of(advantages=torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]]))
    assert same == pytest.approx(loss, abs=1e-7)
    assert torch.allclose(same_gradient, gradient, atol=1e-7), "GRPOTrainer._compute_loss does not take advantages (B, T)"
    _, one = loss_of(advantages=torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    _, other = loss_of(advantages=torch.tensor([[0.0, 1.0, 1.0], [-0.5, -0.5, -0.5]]))
    assert torch.allclose(one + other, gradient, atol=1e-6)


def test_loss_is_the_mean_over_the_tokens_of_the_batch(loss_of):
    """`dapo`, the default: with a ratio of 1 the sum of advantages over `num_items_in_batch`, which spans all processes."""
    assert loss_of()[0] == pytest.approx(-(3 * 1.0 - 2 * 0.5) / 5)
    assert loss_of(num_items_in_batch=torch.tensor(10))[0] == pytest.approx(-(3 * 1.0 - 2 * 0.5) / 10)


def test_tool_mask_masks_the_loss_and_not_the_attention(loss_of):
    """`Rollout.to_trl` puts `loss_mask` there."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    _, gradient = loss_of(tool_mask=mask)
    _, expected = loss_of(advantages=torch.tensor([[1.0, 0.0, 1.0], [-0.5, -0.5, -0.5]]))
    assert torch.allclose(gradient, expected, atol=1e-7), "a tool_mask of 0 does more than to leave a token out of the loss"
    loss, gradient = loss_of(tool_mask=torch.zeros(2, 3, dtype=torch.long))
    assert (loss, gradient.abs().max().item()) == (0, 0), "a batch without a token has a loss of 0"


def test_ratio_is_clipped(loss_of):
    loss, _ = loss_of(old_per_token_logps=torch.full((2, 3), -50.0), advantages=torch.ones(2, 3))
    assert loss == pytest.approx(-1.2), "a ratio far above 1 counts as 1 + epsilon"


def test_without_beta_trl_makes_no_reference_and_logs_no_kl(aligned, tmp_path):
    """PPO makes the reference itself, and logs `kl`."""
    assert aligned.ref_model is None
    assert "kl" not in aligned.state.log_history[0]
    model = with_adapter(make_model())
    make_trainer(tmp_path, model)
    assert set(model.peft_config) == {"default"}, "TRL makes a reference adapter though beta is 0"


# --- The fused LM head ------------------------------------------------------------------------------------


def test_fused_head_takes_shifted_labels_and_cut_hidden_states():
    """`forward_policy` cuts the backbone's output to the completion before the head runs."""
    model, ids = make_model(), torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, EOS]])
    logits = make_model()(ids).logits / 0.7
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))

    def cut(module, arguments, outputs):
        outputs.last_hidden_state = outputs.last_hidden_state[:, 1:3].contiguous()
        return outputs

    labels = ids[:, 2:4].clone()
    labels[1, 1] = -100
    with torch.no_grad():
        handle = model.base_model.register_forward_hook(cut)
        outputs = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
        handle.remove()
    logps = logits[:, 1:3].log_softmax(-1)
    expected = logps.gather(2, ids[:, 2:4, None])[..., 0]
    expected[1, 1] = 0
    assert outputs.log_probs.shape == (2, 2), "shift_labels are shifted again, or the head does not go by `base_model`"
    assert torch.allclose(outputs.log_probs, expected, atol=1e-5)
    entropy = -(logps.exp() * logps).sum(-1)
    entropy[1, 1] = 0
    assert torch.allclose(outputs.entropy, entropy, atol=1e-5)


def test_fused_head_has_the_loss_of_the_model():
    """`ptx_coef` uses it at temperature 1."""
    model, ids = make_model(), torch.tensor([[5, 6, 7, 8], [9, 10, PAD, PAD]])
    mask = (ids != PAD).long()
    labels = ids.masked_fill(mask == 0, -100)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    add_fused_lm_head(model)
    with_head = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).loss
    without = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    assert with_head.item() == pytest.approx(expected.item(), abs=1e-5)
    assert without.item() == pytest.approx(expected.item(), abs=1e-6), "without fused_lm_head the forward pass is the old one"


def test_policy_has_a_fused_head_with_temperature(tmp_path):
    for model in (make_model(), with_adapter(make_model())):
        trainer = make_trainer(tmp_path, model, temperature=0.5)
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            logps = (trainer.model(ids).logits[0, :2] / 0.5).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            outputs = trainer.model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert torch.allclose(outputs.log_probs[0], logps, atol=1e-5), "GRPOTrainer adds no fused head to the policy"
        assert outputs.entropy is not None


# --- Small helpers ----------------------------------------------------------------------------------------


def test_order_of_prompts_comes_from_a_generator():
    sampler = RepeatSampler(range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=True, seed=5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(11)).tolist()
    sampler.generator.manual_seed(11)
    expected = [row for chunk in (order[:3], order[3:6]) for _ in range(2) for row in chunk for _ in range(2)]
    assert list(sampler) == expected, "RepeatSampler does not draw by `generator`, or drops no last batch: EpochRepeatSampler"
    assert sampler.seed == 5
    assert parameters_of(RepeatSampler) == "data_source, mini_repeat_count, batch_size, repeat_count, shuffle, seed"
    assert not hasattr(RepeatSampler(range(7), 1, shuffle=False), "generator")


def test_names_and_kinds_of_reward_functions():
    async def later(**columns):
        return []

    class Judge:
        async def __call__(self, **columns):
            return []

    named = Judge()
    named.__name__ = "judge"
    assert get_callable_name(lengths) == get_callable_name(functools.partial(lengths, slope=1)) == "lengths"
    assert (get_callable_name(Judge()), get_callable_name(named)) == ("Judge", "judge")
    assert [is_async_callable(one) for one in (lengths, later, Judge(), functools.partial(later))] == [False, True, True, True]
    assert asyncio.run(later()) == []


def test_model_by_name_is_fp32_and_knows_its_name(tmp_path):
    save_base(tmp_path)
    model = create_model_from_path(str(tmp_path), trust_remote_code=False)
    assert model.dtype == torch.float32
    assert get_config_model_id(model.config) == str(tmp_path)


def test_padding_dropout_and_checkpointing_helpers():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert pad(rows, padding_value=9, padding_side="right").tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad(rows, padding_value=9, padding_side="left").tolist() == [[1, 2, 3], [9, 9, 4]]
    assert pad(rows, padding_value=9, padding_side="right", pad_to_multiple_of=4).shape == (2, 4)
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    disable_dropout_in_model(model)
    assert model[1].p == 0
    model = make_model()
    model.gradient_checkpointing_enable()
    with disable_gradient_checkpointing(model, None):
        assert not model.is_gradient_checkpointing
    assert model.is_gradient_checkpointing


def test_optimizer_class_and_options(tmp_path):
    args = make_args(tmp_path)
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, make_model())
    assert issubclass(optimizer, torch.optim.AdamW)
    assert options["lr"] == args.learning_rate
    assert "weight_decay" not in options, "Trainer passes it by groups of weights, and so does the critic"


def test_collectives_of_one_process(aligned):
    accelerator = aligned.accelerator
    assert gather_object([1, "a"]) == [1, "a"]
    assert accelerator.gather(torch.tensor(2.0)).mean() == 2
    assert accelerator.reduce(torch.tensor([2.0, 3.0]), reduction="mean").tolist() == [2, 3]
    assert accelerator.reduce(torch.tensor([2.0, 3.0]), reduction="sum").tolist() == [2, 3]
    assert accelerator.native_amp is False
    assert not is_peft_model(aligned.model)


def test_attributes_of_the_parser():
    parser = TrlParser((GRPOConfig,))
    assert {"_actions", "parse_known_args", "dataclass_types"} <= set(dir(parser))
    assert "parse_dict" in dir(TrlParser)
    assert {"dest", "default", "choices", "type"} <= set(dir(parser._actions[1]))


# --- PEFT and bitsandbytes --------------------------------------------------------------------------------


def test_adapters_are_activated_layer_by_layer():
    model = with_adapter(make_model())
    model.add_adapter("other", lora())
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == 14
    for name in ("active_adapters", "disable_adapters", "merged", "enable_adapters", "set_adapter"):
        assert hasattr(layers[0], name), f"PEFT's layers have no `{name}`, which `use_adapter` in models/roles.py needs"
    set_adapter(model, "other", inference_mode=False)
    assert {tuple(layer.active_adapters) for layer in layers} == {("other",)}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".other." in name for name in trained), "set_adapter makes trainable what it activates, and nothing else"
    set_adapter(model, "other", inference_mode=True)
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad]
    layers[0].set_adapter([])
    assert list(layers[0].active_adapters) == []
    layers[0].enable_adapters(False)
    assert layers[0].disable_adapters


def test_adapters_on_a_model_without_peft_model():
    model = make_model()
    inject_adapter_in_model(lora(), model, adapter_name="one")
    cast_adapter_dtype(model, "one")
    result = set_peft_model_state_dict(model, {}, adapter_name="one")
    assert any(".one." in key for key in result.missing_keys), "weights that are missing are not told of"
    assert result.unexpected_keys == []


def test_names_of_saved_adapter_weights(tmp_path):
    get_peft_model(make_model(), lora()).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    names = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") and ".default." not in name for name in names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"peft_type", "task_type", "modules_to_save", "base_model_name_or_path"} <= config.keys()


def test_weights_for_vllm_come_from_one_replaceable_method():
    """`training.ppo.vllm` replaces it to send the policy; TRL merges the adapter into the base."""
    generation = object.__new__(VLLMGeneration)
    received = []
    runner = SimpleNamespace(model=SimpleNamespace(load_weights=received.extend))
    executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
    generation.mode, generation.enable_sleep_mode, generation.accelerator = "colocate", False, None
    generation.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: None)
    generation._iter_named_params = lambda: iter([("a", 1), ("b", 2)])
    generation.sync_weights()
    assert received == [("a", 1), ("b", 2)]
    assert "merge_adapter" in inspect.getsource(VLLMGeneration._iter_named_params)


def test_continuous_batching_casts_the_model_and_leaves_training_mode():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    assert "unwrapped_model.to(torch.bfloat16)" in source
    assert "unwrapped_model.train()" in source


def test_compilation_depends_on_three_arguments(tmp_path):
    """`rlhf_recipes.models.kernels` unsets them once it has compiled the layers."""
    asked = TrainingArguments(str(tmp_path), use_cpu=True, torch_compile=True, torch_compile_backend="eager")
    rest = without_compilation(asked)
    assert (rest.torch_compile, rest.torch_compile_backend, rest.torch_compile_mode) == (False, None, None)
    assert TorchDynamoPlugin(backend=rest.torch_compile_backend).backend == "NO"
    assert asked.torch_compile


def test_generation_with_an_adapter_calls_the_base_module():
    """`GenerationRecorder` needs its hooks called."""
    model, calls = with_adapter(make_model()), []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(calls) == 3


def test_trl_casts_trained_weights_on_a_quantised_base(tmp_path):
    """`preserve_param_dtypes` and `keep_adapter_in_fp32` in models/precision.py undo it; they can go when this fails."""
    save_base(tmp_path)
    model = with_adapter(in_4_bits(tmp_path))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    make_trainer(tmp_path, model)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.bfloat16}


def test_4_bit_layers_can_turn_off_repacking(tmp_path):
    save_base(tmp_path)
    model = in_4_bits(tmp_path)
    switches = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(switches) == 14, (
        "bitsandbytes has renamed `support_avx512bf16_for_cpu`: see disable_cpu_4bit_repacking in models/precision.py"
    )
    assert model.is_quantized
    assert model.is_loaded_in_4bit


def test_counters_of_trainers():
    """`rlhf_recipes.training.mixin` saves it with checkpoints, and restores it with the random state."""
    loop = inspect.getsource(Trainer._inner_training_loop) + inspect.getsource(Trainer._maybe_log_save_evaluate)
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"):
        assert f"self.{name}" in loop, name
    assert "self._save_rng_state(" in inspect.getsource(Trainer._save_checkpoint)
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.index("self._load_rng_state(") < epoch.index("self.training_step("), (
        "counters are restored after the first step"
    )
    for kind in (SFTTrainer, DPOTrainer, RewardTrainer):
        assert "self._total_train_tokens" in inspect.getsource(kind), kind
        assert "self._metrics[" in inspect.getsource(kind), kind
