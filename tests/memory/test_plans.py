"""Memory plans of shipped and changed configurations, and of a small model beside what it takes."""

import importlib.util

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory import arithmetic, format_plans, plan_stage
from rlhf_recipes.memory.plan import GIB, LOGITS, OVERHEAD, SPARE
from rlhf_recipes.pipeline.estimates import plannable_stages
from support import ROOT

import pytest
import yaml
from transformers import LlamaConfig

RECIPES, CONFIGS = ROOT / "recipes", ROOT / "configs"


def plan_file(config, recipe=None):
    return [plan_stage(stage) for stage in plannable_stages(config, RECIPES, recipe)]


@pytest.fixture
def write(tmp_path):
    """Write a configuration of tiny/ or a family, changed, to a file of any name."""

    def write(config, changes=None, name=None, without=()):
        values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text()) | (changes or {})
        path = tmp_path / (name or f"{config.rpartition('/')[2]}.yaml")
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if key not in without}))
        return path

    return write


def test_pipeline_is_planned_stage_by_stage():
    plans = plan_file(CONFIGS / "tiny" / "pipeline.yaml")
    assert [plan.stage for plan in plans] == ["sft", "sample", "reward", "ppo", "dpo", "evaluate"]
    assert all(plan.fits(6) and plan.smallest_common_card == 6 for plan in plans)
    ppo = plans[3]
    assert ppo.parameters["policy"] == ppo.parameters["reference"] == 327_680  # rank 32, of the SFT stage
    assert not any(plan.notes for plan in plans[3:])  # a stage is known to write each folder that they read
    text = "\n".join(format_plans(plans))
    for part in ("activations", "6 or more", "ppo: 0.01 throughout"):
        assert part in text


def test_components_of_8b_in_4_bits():
    sft = plan_file(CONFIGS / "qwen3-8b" / "sft.yaml")[0]
    peak = sft.at_peak()
    assert peak["weights, quantised"] == arithmetic.quantised_bytes(6_945_767_424, 4, nested=True)
    assert peak["weights, others"] == 2 * (8_190_735_360 - 6_945_767_424)
    assert peak["adapters"] == peak["gradients"] == 4 * 43_646_976
    assert peak["optimizer"] == 43_646_976 * (2 + 8 / 256)
    assert sft.allocated == sum(peak.values())
    assert sft.fits(12) == (sft.allocated + OVERHEAD <= 12 * GIB * (1 - SPARE))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/pipeline.yaml")), ids=lambda path: path.parent.name)
def test_each_recipe_fits_the_card_of_its_family(path):
    card = yaml.safe_load(path.read_text()).get("gpu_memory")
    for recipe in ("sft", "reward", "ppo", "dpo", "evaluate") if card else ():
        plan = plan_stage(plannable_stages(path.parent / f"{recipe}.yaml", RECIPES)[-1])
        assert plan.fits(card), (recipe, plan.worst, plan.allocated / GIB)


def test_logits_of_an_evaluation_do_not_grow_with_its_batch(write):
    """The LM head reads a few rows at once."""
    few, many = (plan_file(write("qwen3-0.6b/evaluate", {"batch_size": size}), "evaluate")[-1] for size in (8, 256))
    logits = [plan.phases["log-probabilities"][LOGITS] for plan in (few, many)]
    assert logits[0] == logits[1] < GIB


def test_adapters_of_needed_stages_are_known(write):
    path = write("qwen3-0.6b/ppo", name="mine.yaml")
    with pytest.raises(RecipeError, match="--recipe"):
        plan_file(path)
    (known,) = plan_file(path, "ppo")
    assert not known.notes
    (unknown,) = plan_file(write("qwen3-0.6b/ppo", {"needs": []}, "mine.yaml"), "ppo")
    assert "LoRA of rank 16 on all-linear" in unknown.notes[0]
    assert unknown.parameters == known.parameters


def test_stages_with_one_default_output_dir_are_planned(write):
    sft, reward = (str(write(f"tiny/{name}", without=("output_dir",))) for name in ("sft", "reward"))
    dpo = write("tiny/dpo", {"needs": [sft, reward]}, without=("output_dir",))
    assert [plan.stage for plan in plan_file(dpo)] == ["dpo"]


def test_unknown_optimizers_and_dora_are_noted(write):
    (plain,) = plan_file(write("tiny/sft"))
    (odd,) = plan_file(write("tiny/sft", {"use_dora": True, "optim": "adafactor"}))
    assert not plain.notes
    assert "DoRA" in odd.notes[0]
    assert "optim: adafactor" in odd.notes[1]
    assert odd.parameters["policy"] > plain.parameters["policy"]


def test_a_length_without_a_bound_is_rejected(write):
    with pytest.raises(RecipeError, match="max_length: null"):
        plan_file(write("tiny/sft", {"max_length": None}))


def test_a_model_that_cannot_be_reached_is_named(launch, write):
    status, message = launch("plan", "--config", write("tiny/sft", {"model_name_or_path": "nobody/nothing"}))
    assert status == 2
    assert "model_name_or_path: nobody/nothing: " in message
    assert "config.json" in message


@pytest.mark.parametrize("card", ["nan", "-3", "0", "inf"])
def test_the_recipe_rejects_an_impossible_card(launch, card):
    status, message = launch("plan", f"--gpu_memory={card}")
    assert status == 2
    assert f"the command line: gpu_memory: {float(card)}" in message


@pytest.mark.parametrize(("stage", "variant"), [("sft", "fp32, LoRA, checkpointing"), ("reward", "fp32, LoRA")])
def test_plan_is_within_a_tenth_of_the_measured_peak(stage, variant):
    spec = importlib.util.spec_from_file_location("plan_vs_measured", ROOT / "benchmarks" / "plan_vs_measured.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2048, num_key_value_heads=2, **sizes)
    ((_, plan, measured),) = benchmark.compare(config, benchmark.variants(gpu=False)[variant], [stage], gpu=False)
    assert plan.allocated == pytest.approx(measured, rel=0.1)
