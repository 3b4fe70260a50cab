"""What this project assumes of TRL and Transformers beyond what they promise.

PPO stands on private parts of TRL's `GRPOTrainer`, so `trl` is pinned to one minor version. Whoever raises it runs this file
first: each failure says what moved, and who relied on it. Here is what would go wrong silently; a name that has gone fails in
the tests of what uses it.
"""

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import tomllib
from collections import defaultdict, deque

from rlhf_recipes.config.ppo import _One
from rlhf_recipes.rewards.protocol import TRL_KEYWORDS
from rlhf_recipes.training.ppo.trainer import PPOTrainer
from rlhf_recipes.training.reward import RankingTrainer
from support import ROOT
from support.small_ppo import EOS, in_4_bits, make_model, make_tokenizer, prompts, save_base, with_adapter

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RewardTrainer
from trl.trainer.utils import add_fused_lm_head, shuffle_sequence_dict, split_tensor_dict

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


for _name in [*HOOKS, "_prepare_inputs", "_clip_grad_norm", "_maybe_log_save_evaluate", "_save", "_save_rng_state"]:
    setattr(CallRecorder, _name, listen(_name))


def make_trainer(folder, model=None, reward=lengths, kind=CallRecorder, data=None, **options):
    arguments = (model or make_model(), reward, make_args(folder, **options), data or prompts())
    return kind(*arguments, processing_class=make_tokenizer())


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


def class_tree(cls):
    (tree,) = [
        node
        for node in ast.parse(inspect.getsource(inspect.getmodule(cls))).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    ]
    return tree


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


def test_tensors_of_a_batch_are_shuffled_and_split_alike():
    batch = {"a": torch.arange(8), "b": torch.arange(16.0).view(8, 2), "count": torch.tensor(5)}
    parts = split_tensor_dict(shuffle_sequence_dict(batch), 4)
    assert all(part["count"] == 5 for part in parts), "scalars go to every part"
    assert all(torch.equal(part["b"][:, 0] // 2, part["a"].float()) for part in parts)
    assert sorted(torch.cat([part["a"] for part in parts]).tolist()) == list(range(8))


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


def test_without_beta_trl_makes_no_reference_and_logs_no_kl(aligned, tmp_path):
    """PPO makes the reference itself, and logs `kl`."""
    assert aligned.ref_model is None
    assert "kl" not in aligned.state.log_history[0]
    model = with_adapter(make_model())
    make_trainer(tmp_path, model)
    assert set(model.peft_config) == {"default"}, "TRL makes a reference adapter though beta is 0"


# --- Models -----------------------------------------------------------------------------------------------


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


def test_4_bit_layers_can_turn_off_repacking(tmp_path):
    save_base(tmp_path)
    model = in_4_bits(tmp_path)
    switches = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(switches) == 14, (
        "bitsandbytes has renamed `support_avx512bf16_for_cpu`: see disable_cpu_4bit_repacking in models/precision.py"
    )
