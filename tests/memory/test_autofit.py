"""Autofit: the fastest arguments that fit a card, and advice where none do."""

import json

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory import autofit, plan_stage
from rlhf_recipes.memory.autofit import choices
from rlhf_recipes.memory.plan import GIB, OVERHEAD
from rlhf_recipes.pipeline.estimates import plannable_stages
from rlhf_recipes.pipeline.running import read_pipeline
from rlhf_recipes.pipeline.settings import read_settings
from support import ROOT, run_recipe

import pytest
import yaml

RECIPES = ROOT / "recipes"


def stage_of(config):
    """Return the arguments of a configuration such as "qwen3-8b/sft"."""
    return plannable_stages(ROOT / "configs" / f"{config}.yaml", RECIPES)[-1]


def values_of(stage, key, **changes):
    """Return the values that autofit tries for a key."""
    return {choice.get(key) for choice in choices(stage.override(changes))}


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_an_optimizer_step_learns_from_the_same_rows(recipe):
    for card in (10, 12, 16, 24, 48):
        choice, plan = autofit(stage_of(f"qwen3-8b/{recipe}"), card)
        assert plan.fits(card)
        assert choice["per_device_train_batch_size"] * choice["gradient_accumulation_steps"] == 16
        if recipe == "ppo":
            assert choice["per_device_train_batch_size"] * choice["steps_per_generation"] == 16


@pytest.mark.parametrize(
    ("batches", "completions"),
    [
        ({"gradient_accumulation_steps": 2, "generation_batch_size": 12}, 12),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 1}, 4),
    ],
)
def test_a_ppo_iteration_keeps_its_completions(tmp_path, batches, completions):
    values = yaml.safe_load((ROOT / "configs" / "qwen3-0.6b" / "ppo.yaml").read_text())
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values | {"per_device_train_batch_size": 4} | batches))
    (stage,) = plannable_stages(path, RECIPES)
    for choice in choices(stage):
        rows = choice["per_device_train_batch_size"]
        assert rows * choice["gradient_accumulation_steps"] == 4 * batches["gradient_accumulation_steps"]
        assert rows * choice["steps_per_generation"] == completions


def test_a_larger_card_trains_faster():
    small, large = (autofit(stage_of("qwen3-8b/ppo"), card)[0] for card in (10, 80))
    assert small["gradient_checkpointing"]
    assert not large["gradient_checkpointing"]
    assert large["per_device_train_batch_size"] == 8


def test_sampling_in_parts_needs_less_memory():
    stage = stage_of("qwen3-8b/ppo")
    at_once, in_parts = (plan_stage(stage.override({"rollout_batch_size": size})) for size in (None, 4))
    for phase in ("prompts read", "sampling"):
        for part in {"KV cache", "activations", "logits"} & at_once.phases[phase].keys():
            assert in_parts.phases[phase][part] == pytest.approx(at_once.phases[phase][part] / 4)
    assert not {"prompts read", "sampling"} & plan_stage(stage.override({"use_vllm": True})).phases.keys()


def test_ppo_samples_in_parts_as_a_last_resort_and_enlarges_passes_without_gradients():
    stage = stage_of("qwen3-8b/ppo")
    choice, plan = autofit(stage, 8)
    assert choice["rollout_batch_size"] < 16
    assert plan.fits(8)
    assert choice["local_rollout_forward_batch_size"] > choice["per_device_train_batch_size"]
    assert "rollout_batch_size" not in autofit(stage, 48)[0]
    assert "local_rollout_forward_batch_size" not in autofit(stage, 9, fixed={"local_rollout_forward_batch_size"})[0]
    with pytest.raises(RecipeError, match="gpu_memory: 8: "):
        autofit(stage, 8, fixed={"rollout_batch_size"})


def test_the_critic_never_grows_and_keeps_a_learning_rate_of_its_own():
    stage = stage_of("qwen3-0.6b/ppo")
    assert stage.critic == "shared"
    assert values_of(stage, "critic") == {None}
    assert values_of(stage, "critic", critic="adapter") == {"adapter", "shared"}
    assert values_of(stage, "critic", critic="adapter", value_learning_rate=1e-5) == {None}
    assert autofit(stage.override({"critic": "adapter"}), 80)[0]["critic"] == "adapter"


@pytest.mark.parametrize(
    ("optimizer", "tried"),
    [
        ("adamw_torch", {"adamw_torch", "paged_adamw_8bit"}),
        ("adamw_8bit", {"adamw_torch_fused", "paged_adamw_8bit"}),
        ("sgd", {None}),
        ("lion_8bit", {None}),
        ("adafactor", {None}),
    ],
)
def test_the_optimizer_stays_in_its_family(optimizer, tried):
    assert values_of(stage_of("qwen3-0.6b/sft"), "optim", optim=optimizer) == tried


def test_compiled_layers_are_not_checkpointed():
    stage = stage_of("qwen3-8b/sft")
    assert values_of(stage, "gradient_checkpointing", torch_compile=True) == {False}
    assert min(values_of(stage, "per_device_train_batch_size", torch_compile=True)) == 1
    assert autofit(stage, 10)[0]["gradient_checkpointing"]
    with pytest.raises(RecipeError, match=r"set `gradient_checkpointing: true`.* `torch_compile: false`"):
        autofit(stage.override({"torch_compile": True}), 10)


def test_vllm_takes_its_share_of_the_same_card():
    stage = stage_of("qwen3-0.6b/ppo")

    def plan(mode, share):
        return plan_stage(stage.override({"use_vllm": True, "vllm_mode": mode, "vllm_gpu_memory_utilization": share}))

    same_card, server = plan("colocate", 0.5), plan("server", 0.5)
    assert same_card.allocated == server.allocated
    card = (same_card.allocated + OVERHEAD) / GIB
    assert server.fits(card / 0.94)
    assert not same_card.fits(card / 0.46)
    assert same_card.fits(card / 0.44)
    assert "vllm_gpu_memory_utilization: 0.5" in same_card.notes[0]
    greedy = stage.override({"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.97})
    with pytest.raises(RecipeError, match=r"more than vLLM leaves .*`vllm_gpu_memory_utilization`"):
        autofit(greedy, 80)


def test_fixed_keys_do_not_change():
    choice, _ = autofit(stage_of("qwen3-0.6b/ppo"), 24, fixed={"per_device_train_batch_size", "critic"})
    assert not {"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "critic"} & choice.keys()


def test_advice_where_nothing_fits():
    stage = stage_of("qwen3-8b/dpo")
    with pytest.raises(RecipeError, match=r"gpu_memory: 8.5: dpo needs at least \d+\.\d GiB .*`max_length: 512`"):
        autofit(stage, 8.5)
    with pytest.raises(RecipeError, match=r"gpu_memory: 4: .*a smaller base, or a card of"):
        autofit(stage, 4)


# --- `gpu_memory` of a pipeline --------------------------------------------------------------------------


def write_pipeline(folder, stage=None, **options):
    entry = {"name": "sft", "config": str(ROOT / "configs" / "tiny" / "sft.yaml"), **(stage or {})}
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps({"output_dir": str(folder / "runs"), "stages": [entry], **options}))  # JSON is YAML
    return path


def test_gpu_memory_goes_over_the_file_and_under_the_arguments(tmp_path):
    (before,) = read_pipeline(write_pipeline(tmp_path), RECIPES).stages
    fitted = read_pipeline(write_pipeline(tmp_path, gpu_memory=6), RECIPES)
    (after,) = fitted.stages
    assert not before.autofitted
    assert before.values["per_device_train_batch_size"] == 128
    assert after.values == before.values | after.autofitted
    assert (after.autofitted["per_device_train_batch_size"], after.autofitted["gradient_accumulation_steps"]) == (8, 16)
    assert after.fingerprint != before.fingerprint
    assert "`optim: adamw_torch_fused`" in "\n".join(fitted.describe())
    arguments = {"gradient_checkpointing": True, "optim": "sgd"}
    for place in ({"stage": {"arguments": arguments}}, {"arguments": arguments}):  # of the stage, and of all stages
        (fixed,) = read_pipeline(write_pipeline(tmp_path, **place, gpu_memory=6), RECIPES).stages
        assert fixed.values | arguments == fixed.values
        assert not arguments.keys() & fixed.autofitted.keys()


def test_the_plan_recipe_reads_the_arguments_of_all_stages_and_those_of_its_command_line(tmp_path):
    config = write_pipeline(tmp_path, arguments={"max_length": 48, "lora_r": 4})
    (stage,) = plannable_stages(config, RECIPES, settings=read_settings(["sft.lora_r=8"]))
    assert (stage.max_length, stage.lora_r) == (48, 8)
    recipe = ROOT / "configs" / "tiny" / "sft.yaml"
    (stage,) = plannable_stages(recipe, RECIPES, settings=read_settings(["lora_r=8"]))
    assert stage.lora_r == 8
    with pytest.raises(RecipeError, match=r"--set: sft\.lora_r: the file is of one recipe"):
        plannable_stages(recipe, RECIPES, settings=read_settings(["sft.lora_r=8"]))


def test_assumptions_of_the_plan_are_printed_before_anything_runs(tmp_path, capsys):
    config = write_pipeline(tmp_path, {"arguments": {"optim": "adafactor"}}, gpu_memory=6)
    run_recipe("pipeline", "--config", config, "--dry-run")
    assert "sft: optim: adafactor" in capsys.readouterr().out


def test_the_plan_recipe_shows_stages_that_do_not_fit_and_takes_another_card(tmp_path, capsys):
    config = write_pipeline(tmp_path, gpu_memory=0.8)
    run_recipe("plan", "--config", config)
    small = capsys.readouterr().out
    run_recipe("plan", "--config", config, "--gpu_memory", 24)
    assert "GiB at the peak" in small
    assert "sft on 0.8 GB: it does not fit: " in small
    assert "sft on 24 GB: it fits" in capsys.readouterr().out
    (stage,) = plannable_stages(config, RECIPES, gpu_memory=24)
    assert (stage.per_device_train_batch_size, stage.gradient_checkpointing) == (8, False)


@pytest.mark.parametrize("launcher", ["fsdp", "zero2", "zero3"])
def test_gpu_memory_is_rejected_where_cards_share_a_model(tmp_path, launcher):
    shared = {"accelerate_config": f"configs/accelerate/{launcher}.yaml"}
    with pytest.raises(RecipeError, match=r"gpu_memory: .* configs/accelerate/ddp.yaml"):
        read_pipeline(write_pipeline(tmp_path, gpu_memory=6, **shared), RECIPES)
    path = write_pipeline(tmp_path, **shared)
    assert plannable_stages(path, RECIPES)
    with pytest.raises(RecipeError, match="gpu_memory: "):
        plannable_stages(path, RECIPES, gpu_memory=24)
    assert read_pipeline(write_pipeline(tmp_path, gpu_memory=6, accelerate_config="configs/accelerate/ddp.yaml"), RECIPES)


@pytest.mark.parametrize("value", ["12", 0, True, -1, float("nan"), float("inf")])
def test_gpu_memory_must_be_a_size(tmp_path, value):
    with pytest.raises(RecipeError, match=r"pipeline\.yaml: line 1: gpu_memory: "):
        read_pipeline(write_pipeline(tmp_path, gpu_memory=value), RECIPES)


def test_a_stage_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"pipeline.yaml: line 1: stages: sft: gpu_memory: 0.5: sft needs"):
        read_pipeline(write_pipeline(tmp_path, gpu_memory=0.5), RECIPES)
