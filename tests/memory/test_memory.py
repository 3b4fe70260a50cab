"""What a run will take in memory: the arithmetic by hand, the plan beside what small models take, and the dial."""

import importlib.util
import json
import runpy
import sys

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.memory import arithmetic, autofit, plan_stage, report, stages
from rlhf_recipes.memory.arithmetic import Numbers, Shape, Training
from rlhf_recipes.memory.autofit import choices, with_values
from rlhf_recipes.memory.models import adapter_of, shape_of
from rlhf_recipes.memory.stages import GIB, OVERHEAD, SPARE
from rlhf_recipes.pipeline import read_pipeline
from rlhf_recipes.pipeline.estimates import arguments_in
from support import ROOT, published, run_recipe

import pytest
import yaml
from peft import LoraConfig
from transformers import GPT2Config, LlamaConfig, MixtralConfig

RECIPES = ROOT / "recipes"
ALL = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
# 2 layers of width 8; 2 * (64 + 2 * 32 + 64 + 3 * 128) = 1152 weights in matrices
TOY = Shape(
    8, 16, 2, heads=2, kv_heads=1, head_dim=4, vocabulary=10, qk_norm=False, matrices=1152, largest=128, vectors=40, tied=True
)


def plan_file(config, recipes, recipe=None):
    """The plans of the stages in a YAML file."""
    return [plan_stage(stage) for stage in arguments_in(config, recipes, recipe)]


@pytest.fixture
def hub(monkeypatch):
    """The models of configs/, as if there were a network."""
    monkeypatch.setattr(stages, "load_config", published.load_config)


# --- The arithmetic --------------------------------------------------------------------------------------


def test_four_bits_with_their_scales():
    weights = 64 * 256  # 256 blocks of 64, whose scales are one block of 256
    assert arithmetic.quantised_bytes(weights, 4, nested=False) == weights / 2 + 256 * 4
    assert arithmetic.quantised_bytes(weights, 4, nested=True) == weights / 2 + 256 + 4
    assert arithmetic.quantised_bytes(weights, 8, nested=False) == weights


def test_parameters_count_a_head_that_is_tied_once():
    assert TOY.parameters() == 1152 + 40 + 80
    untied = Shape(**{**vars(TOY), "tied": False})
    assert untied.parameters() == 1152 + 40 + 160
    assert untied.parameters(head=False) == 1152 + 40 + 80


def test_state_of_optimizers():
    assert arithmetic.optimizer_bytes("adamw_torch_fused", 1000) == 8000
    assert arithmetic.optimizer_bytes("adamw_torch_fused", 1000, width=2) == 4000  # of a model in bf16
    assert arithmetic.optimizer_bytes("paged_adamw_8bit", 256_000) == 2 * (256_000 + 4 * 1000)
    assert arithmetic.optimizer_bytes("sgd", 1000) == 0


@pytest.mark.parametrize(
    ("optimizer", "each"), [("paged_adamw_32bit", 8), ("lion_32bit", 4), ("paged_lion_32bit", 4), ("rmsprop_bnb_32bit", 4)]
)
def test_bitsandbytes_keeps_fp32_whatever_the_weights_have(optimizer, each):
    assert arithmetic.optimizer_bytes(optimizer, 1000, width=2) == each * 1000


def test_cache_of_keys_and_values():
    # 2 layers and the one that grows, keys and values of width 4, 3 rows of 5 tokens, 2 bytes
    assert arithmetic.kv_cache_bytes(TOY, rows=3, tokens=5, width=2) == 3 * 2 * 4 * 3 * 5 * 2


def test_what_a_layer_keeps_in_fp32():
    numbers, training = Numbers(4, 4), Training(ALL, rank=2, checkpointing=False, padded=False)
    # the norm's input; gate, act(gate) and up; LoRA's inputs: the norm's output for two, the product for one; three bottlenecks
    assert arithmetic.saved_by_mlp(TOY, numbers, training) == 4 * 8 + 3 * 4 * 16 + 4 * 8 + 4 * 16 + 3 * 4 * 2
    # the norm's input and output; queries, keys, values and their result; a number a head; four bottlenecks
    kept = 4 * 8 + 4 * 8 + 4 * (8 + 4 + 4 + 8) + 4 * 2 + 4 * 4 * 2
    assert arithmetic.saved_by_attention(TOY, numbers, training, length=5) == kept


def test_a_mask_repeats_keys_and_values():
    numbers = Numbers(4, 4)
    plain, padded = (Training(ALL, rank=2, padded=padded) for padded in (False, True))
    more = arithmetic.saved_by_attention(TOY, numbers, padded, 5) - arithmetic.saved_by_attention(TOY, numbers, plain, 5)
    assert more == 4 * 2 * (8 - 4)
    assert arithmetic.mask_bytes(3, 5, numbers, padded) == 3 * 5 * 5 * 4
    assert arithmetic.mask_bytes(3, 5, numbers, plain) == 0


def test_adapters_on_a_base_in_bf16_that_is_not_quantised_keep_copies():
    training = Training(ALL, rank=2, padded=False)
    quantised, plain = (arithmetic.saved_by_mlp(TOY, Numbers(2, 2, bits), training) for bits in (4, None))
    assert plain - quantised == 2 * 8  # gate and up have one each of the norm's output


def test_checkpointing_keeps_the_input_of_each_layer():
    training = Training(ALL, rank=2, checkpointing=True)
    assert arithmetic.saved_bytes(TOY, Numbers(2, 2), training, rows=3, length=5) == 3 * 5 * 2 * 8 * 2


def test_eager_attention_keeps_matrices():
    numbers = Numbers(2, 2)
    short, long = (arithmetic.saved_by_attention(TOY, numbers, Training(eager=True), length) for length in (10, 110))
    assert long - short == 100 * 2 * (4 + 2)


def test_the_fused_head_keeps_one_tile():
    numbers = Numbers(2, 2)
    few, many = (arithmetic.fused_head_bytes(TOY, numbers, scored, gradients=False) for scored in (5000, 9000))
    assert many - few == 4000 * 8 * 2  # hidden states: the tile has 4,096 tokens at the most
    assert few == 4096 * 32_768 * 2 + 5000 * 8 * 2


# --- Models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("Qwen/Qwen3-8B-Base", 8190.7), ("Qwen/Qwen3-0.6B-Base", 596.0), ("meta-llama/Llama-3.2-1B", 1235.8)]
)
def test_sizes_of_published_models(name, millions):
    assert round(shape_of(published.MODELS[name]).parameters() / 1e6, 1) == millions


def test_matrices_are_what_bitsandbytes_quantises():
    shape = shape_of(published.MODELS["Qwen/Qwen3-8B-Base"])
    assert shape.matrices == 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288)
    assert shape.largest == 4096 * 12_288
    assert not shape.tied
    assert shape.qk_norm


def test_adapters_are_counted_by_peft():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    whole = adapter_of(config, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    assert whole.parameters == 8 * 4 * (16 + 16) + 6 * 4 * (16 + 32)  # an (in, r) and an (r, out) for each
    assert (whole.parts, whole.rank, whole.dropout) == (ALL, 4, True)
    assert adapter_of(config, LoraConfig(r=4)).parts == {"q", "v"}  # PEFT's choice for Llama
    assert adapter_of(config, LoraConfig(r=4, inference_mode=True)).parameters  # as it is saved
    with pytest.raises(RecipeError, match="lora_target_modules"):
        adapter_of(config, LoraConfig(r=4, target_modules=["nothing"]))


def test_adapters_differ_by_every_option():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    plain = adapter_of(config, LoraConfig(r=4))
    assert adapter_of(config, LoraConfig(r=4, use_dora=True)).parameters == plain.parameters + 4 * 16
    assert adapter_of(config, LoraConfig(r=4, layers_to_transform=[0])).parameters == plain.parameters / 2
    wider = adapter_of(config, LoraConfig(r=4, rank_pattern={"q_proj": 8}))
    assert (wider.parameters, wider.rank) == (plain.parameters * 1.5, 8)


@pytest.mark.parametrize(
    "config", [GPT2Config(n_layer=1), MixtralConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64)]
)
def test_other_layers_are_refused(config):
    with pytest.raises(RecipeError, match="the plan knows layers as those of Llama"):
        shape_of(config)


# --- Plans -----------------------------------------------------------------------------------------------


def test_a_pipeline_is_planned_stage_by_stage():
    plans = plan_file(ROOT / "configs" / "tiny" / "pipeline.yaml", RECIPES)
    assert [plan.stage for plan in plans] == ["sft", "reward", "ppo", "dpo", "evaluate"]
    assert all(plan.fits(6) and plan.smallest == 6 for plan in plans)
    ppo = plans[2]
    assert ppo.parameters["policy"] == ppo.parameters["reference"] == 327_680  # rank 32, of the SFT stage
    assert not any(plan.notes for plan in plans[2:])  # every folder is known to be written by a stage
    text = "\n".join(report(plans))
    assert "activations" in text
    assert "6 or more" in text
    assert "ppo: 0.01 all the time" in text


def test_components_of_8b_in_4_bits(hub):
    sft = plan_file(ROOT / "configs" / "qwen3-8b" / "sft.yaml", RECIPES)[0]
    peak = sft.at_peak()
    assert peak["weights, quantised"] == arithmetic.quantised_bytes(6_945_767_424, 4, nested=True)
    assert peak["weights, others"] == 2 * (8_190_735_360 - 6_945_767_424)
    assert peak["adapters"] == peak["gradients"] == 4 * 43_646_976
    assert peak["optimizer"] == 43_646_976 * (2 + 8 / 256)
    assert sft.allocated == sum(peak.values())
    assert sft.fits(12) == (sft.allocated + OVERHEAD <= 12 * GIB * (1 - SPARE))


def test_one_recipe_finds_the_adapters_of_those_that_it_needs(hub, tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "qwen3-0.6b" / "ppo.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match="--recipe"):
        plan_file(path, RECIPES)
    (known,) = plan_file(path, RECIPES, "ppo")
    assert not known.notes
    path.write_text(yaml.safe_dump({**values, "needs": []}))
    (unknown,) = plan_file(path, RECIPES, "ppo")
    assert "taken for LoRA of rank 16 on all-linear" in unknown.notes[0]
    assert unknown.parameters == known.parameters


def test_a_model_that_cannot_be_reached_is_said_so(launch, tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model_name_or_path: nobody/nothing\ndataset_name: data.jsonl\noutput_dir: runs/x\n")
    status, message = launch("plan", "--config", path)
    assert status == 2
    assert "nobody/nothing" in message
    assert "config.json" in message


def test_what_the_plan_takes_for_granted_of_optimizers_and_dora_is_noted(tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "tiny" / "sft.yaml").read_text())
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(values))
    (plain,) = plan_file(path, RECIPES)
    path.write_text(yaml.safe_dump({**values, "use_dora": True, "optim": "adafactor"}))
    (odd,) = plan_file(path, RECIPES)
    assert not plain.notes
    assert ["DoRA" in odd.notes[0], "optim: adafactor is not known" in odd.notes[1]] == [True, True]
    assert odd.parameters["policy"] > plain.parameters["policy"]


def test_a_file_that_names_no_folder_is_planned(tmp_path):
    paths = {name: tmp_path / f"{name}.yaml" for name in ("sft", "reward", "dpo")}
    for name, path in paths.items():
        values = yaml.safe_load((ROOT / "configs" / "tiny" / f"{name}.yaml").read_text())
        del values["output_dir"]  # all write to the same default folder
        needs = {"needs": [str(paths["sft"]), str(paths["reward"])]} if name == "dpo" else {}
        path.write_text(yaml.safe_dump(values | needs))
    assert [plan.stage for plan in plan_file(paths["sft"], RECIPES)] == ["sft"]
    assert [plan.stage for plan in plan_file(paths["dpo"], RECIPES)] == ["dpo"]


def test_a_length_without_a_bound_is_refused(tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "tiny" / "sft.yaml").read_text())
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({**values, "max_length": None}))
    with pytest.raises(RecipeError, match="max_length: null has no bound"):
        plan_file(path, RECIPES)


def test_the_recipe_says_what_to_change(hub, monkeypatch, capsys):
    config = ROOT / "configs" / "qwen3-8b" / "sft.yaml"
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config", str(config), "--gpu_memory", "6"])
    runpy.run_path(str(RECIPES / "plan.py"), run_name="__main__")
    assert "sft on 6 GB: it does not fit: " in capsys.readouterr().out


@pytest.mark.parametrize("card", ["nan", "-3", "0", "inf"])
def test_the_recipe_refuses_what_is_no_card(launch, card):
    status, message = launch("plan", f"--gpu_memory={card}")
    assert status == 2
    assert "the command line: gpu_memory: " in message
    assert "is not the memory of a card" in message


def test_the_recipe_shows_what_does_not_fit_and_judges_the_card_that_is_asked_for(tmp_path, capsys):
    config = write_pipeline(tmp_path, gpu_memory=0.8)
    run_recipe("plan", "--config", config)
    small = capsys.readouterr().out
    run_recipe("plan", "--config", config, "--gpu_memory", 24)
    large = capsys.readouterr().out
    assert "GiB at the peak" in small
    assert "sft on 0.8 GB: it does not fit: " in small
    assert "sft on 24 GB: it fits" in large
    (stage,) = arguments_in(config, RECIPES, card=24)
    assert stage.per_device_train_batch_size == 8, "as the dial would have it for that card"
    assert not stage.gradient_checkpointing


# --- The plan beside what is measured --------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "variant"), [("sft", "fp32, LoRA, checkpointing"), ("reward", "fp32, LoRA")])
def test_the_plan_is_within_a_tenth_of_the_peak_of_a_small_model(stage, variant):
    spec = importlib.util.spec_from_file_location("plan_vs_measured", ROOT / "benchmarks" / "plan_vs_measured.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2048, num_key_value_heads=2, **sizes)
    ((_, plan, measured),) = benchmark.compare(config, benchmark.variants(gpu=False)[variant], [stage], gpu=False)
    assert plan.allocated == pytest.approx(measured, rel=0.1)


# --- The dial --------------------------------------------------------------------------------------------


def test_the_dial_keeps_what_a_step_learns_from(hub):
    for recipe in ("sft", "ppo"):
        stage = arguments_in(ROOT / "configs" / "qwen3-8b" / f"{recipe}.yaml", RECIPES)[-1]
        for card in (10, 12, 16, 24, 48):
            choice, plan = autofit(stage, card)
            assert plan.fits(card)
            assert choice["per_device_train_batch_size"] * choice["gradient_accumulation_steps"] == 16
            if recipe == "ppo":
                assert choice["per_device_train_batch_size"] * choice["steps_per_generation"] == 16


def test_a_larger_card_is_used(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-8b" / "ppo.yaml", RECIPES)[-1]
    small, large = (autofit(stage, card)[0] for card in (10, 80))
    assert small["gradient_checkpointing"]
    assert not large["gradient_checkpointing"]
    assert large["per_device_train_batch_size"] == 8


def test_rollouts_in_parts_need_less_to_read_prompts_and_to_sample(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-8b" / "ppo.yaml", RECIPES)[-1]
    whole, parts = (plan_stage(with_values(stage, {"rollout_batch_size": size})) for size in (None, 4))
    for phase in ("prompts read", "sampling"):
        for part in ("KV cache", "activations", "logits"):
            if part in whole.phases[phase]:
                assert parts.phases[phase][part] == pytest.approx(whole.phases[phase][part] / 4)
    assert not {"prompts read", "sampling"} & plan_stage(with_values(stage, {"use_vllm": True})).phases.keys()


def test_the_dial_samples_in_parts_where_nothing_else_fits_and_reads_in_larger_passes_where_that_fits(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-8b" / "ppo.yaml", RECIPES)[-1]
    choice, plan = autofit(stage, 8)
    assert choice["rollout_batch_size"] < 16
    assert plan.fits(8)
    assert choice["local_rollout_forward_batch_size"] > choice["per_device_train_batch_size"]
    assert "rollout_batch_size" not in autofit(stage, 48)[0]
    assert "local_rollout_forward_batch_size" not in autofit(stage, 9, fixed={"local_rollout_forward_batch_size"})[0]
    with pytest.raises(RecipeError, match="at the least"):
        autofit(stage, 8, fixed={"rollout_batch_size"})


def test_the_critic_is_never_made_larger_nor_taken_from_a_rate_that_was_chosen_for_it(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-0.6b" / "ppo.yaml", RECIPES)[-1]
    assert stage.critic == "shared"
    assert all("critic" not in choice for choice in choices(stage))
    adapter = with_values(stage, {"critic": "adapter"})
    assert {choice["critic"] for choice in choices(adapter)} == {"adapter", "shared"}
    assert autofit(adapter, 80)[0]["critic"] == "adapter"
    chosen = with_values(adapter, {"value_learning_rate": 1e-5})
    assert all("critic" not in choice for choice in choices(chosen))


@pytest.mark.parametrize(
    ("own", "allowed"),
    [
        ("adamw_torch", {"adamw_torch", "paged_adamw_8bit"}),
        ("adamw_8bit", {"adamw_torch_fused", "paged_adamw_8bit"}),
        ("sgd", {None}),
        ("lion_8bit", {None}),
        ("adafactor", {None}),
    ],
)
def test_the_optimizer_stays_of_its_family(hub, own, allowed):
    stage = arguments_in(ROOT / "configs" / "qwen3-0.6b" / "sft.yaml", RECIPES)[-1]
    assert {choice.get("optim") for choice in choices(with_values(stage, {"optim": own}))} == allowed


@pytest.mark.parametrize(
    ("own", "completions"),
    [
        ({"gradient_accumulation_steps": 2, "generation_batch_size": 12}, 12),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 1}, 4),
    ],
)
def test_completions_of_an_iteration_stay_what_the_file_says(hub, tmp_path, own, completions):
    values = yaml.safe_load((ROOT / "configs" / "qwen3-0.6b" / "ppo.yaml").read_text())
    path = tmp_path / "ppo.yaml"
    path.write_text(yaml.safe_dump(values | {"per_device_train_batch_size": 4} | own))
    (stage,) = arguments_in(path, RECIPES)
    for choice in choices(stage):
        rows = choice["per_device_train_batch_size"]
        assert rows * choice["gradient_accumulation_steps"] == 4 * own["gradient_accumulation_steps"]
        assert rows * choice["steps_per_generation"] == completions


def test_layers_that_are_compiled_are_not_computed_again(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-8b" / "sft.yaml", RECIPES)[-1]
    compiled = with_values(stage, {"torch_compile": True})
    assert not any(choice["gradient_checkpointing"] for choice in choices(compiled))
    assert min(choice["per_device_train_batch_size"] for choice in choices(compiled)) == 1
    assert autofit(stage, 10)[0]["gradient_checkpointing"]
    with pytest.raises(RecipeError, match=r"set `gradient_checkpointing: true`.* `torch_compile: false`"):
        autofit(compiled, 10)


def test_vllm_on_the_same_card_leaves_less_of_it(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-0.6b" / "ppo.yaml", RECIPES)[-1]
    beside, elsewhere = (
        plan_stage(with_values(stage, {"use_vllm": True, "vllm_mode": mode, "vllm_gpu_memory_utilization": 0.5}))
        for mode in ("colocate", "server")
    )
    assert beside.allocated == elsewhere.allocated
    card = (beside.allocated + OVERHEAD) / GIB
    assert elsewhere.fits(card / 0.94)
    assert not beside.fits(card / 0.46)
    assert beside.fits(card / 0.44)
    assert "vllm_gpu_memory_utilization: 0.5" in beside.notes[0]
    greedy = with_values(stage, {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.97})
    with pytest.raises(RecipeError, match=r"more than vLLM leaves of any card .*a smaller `vllm_gpu_memory_utilization`"):
        autofit(greedy, 80)


def test_fixed_keys_are_left_alone(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-0.6b" / "ppo.yaml", RECIPES)[-1]
    choice, _ = autofit(stage, 24, fixed={"per_device_train_batch_size", "critic"})
    assert not {"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "critic"} & choice.keys()


def test_what_fits_nowhere_is_refused_with_a_remedy(hub):
    stage = arguments_in(ROOT / "configs" / "qwen3-8b" / "dpo.yaml", RECIPES)[-1]
    with pytest.raises(RecipeError, match=r"gpu_memory: 8.5: dpo needs \d+\.\d GiB at the least .*`max_length: 512`"):
        autofit(stage, 8.5)
    with pytest.raises(RecipeError, match="a smaller base, or a card of"):
        autofit(stage, 4)


def write_pipeline(folder, **options):
    entry = {"name": "sft", "config": str(ROOT / "configs" / "tiny" / "sft.yaml"), **options.pop("stage", {})}
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps({"output_dir": str(folder / "runs"), "stages": [entry], **options}))  # JSON is YAML
    return path


def test_the_dial_of_a_pipeline_goes_over_the_file_and_under_its_arguments(tmp_path):
    plain = read_pipeline(write_pipeline(tmp_path), RECIPES)
    dialled = read_pipeline(write_pipeline(tmp_path, gpu_memory=6), RECIPES)
    (before,), (after,) = plain.stages, dialled.stages
    assert not before.picked
    assert before.values["per_device_train_batch_size"] == 128
    assert after.values == before.values | after.picked
    assert after.picked["per_device_train_batch_size"] == 8
    assert after.picked["gradient_accumulation_steps"] == 16
    assert after.fingerprint != before.fingerprint
    assert "gpu_memory sets" in "\n".join(dialled.plan())
    assert "`optim: adamw_torch_fused`" in "\n".join(dialled.plan())
    own = {"arguments": {"gradient_checkpointing": True, "optim": "sgd"}}
    (fixed,) = read_pipeline(write_pipeline(tmp_path, gpu_memory=6, stage=own), RECIPES).stages
    assert fixed.values["optim"] == "sgd"
    assert fixed.values["gradient_checkpointing"] is True
    assert not {"optim", "gradient_checkpointing"} & fixed.picked.keys()


def test_what_the_plan_takes_for_granted_is_printed_before_anything_runs(tmp_path, capsys):
    config = write_pipeline(tmp_path, gpu_memory=6, stage={"arguments": {"optim": "adafactor"}})
    run_recipe("pipeline", "--config", config, "--dry-run")
    assert "sft: optim: adafactor is not known to the plan" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_a_card_is_not_reckoned_with_where_several_share_a_model(tmp_path, engine):
    shared = {"accelerate_config": f"configs/accelerate/{engine}.yaml"}
    with pytest.raises(RecipeError, match=r"gpu_memory: its arithmetic is that of one GPU.* configs/accelerate/ddp.yaml"):
        read_pipeline(write_pipeline(tmp_path, gpu_memory=6, **shared), RECIPES)
    path = write_pipeline(tmp_path, **shared)
    assert arguments_in(path, RECIPES)
    with pytest.raises(RecipeError, match="gpu_memory: its arithmetic"):
        arguments_in(path, RECIPES, card=24)
    assert read_pipeline(write_pipeline(tmp_path, gpu_memory=6, accelerate_config="configs/accelerate/ddp.yaml"), RECIPES)


@pytest.mark.parametrize("value", ["12", 0, True, -1, float("nan"), float("inf")])
def test_a_card_must_be_a_number(tmp_path, value):
    with pytest.raises(RecipeError, match=r"gpu_memory: .* is not the memory of a card"):
        read_pipeline(write_pipeline(tmp_path, gpu_memory=value), RECIPES)


def test_a_card_that_is_too_small_is_said_with_the_stage(tmp_path):
    with pytest.raises(RecipeError, match=r"pipeline.yaml: stages, entry 1: gpu_memory: 0.5: sft needs"):
        read_pipeline(write_pipeline(tmp_path, gpu_memory=0.5), RECIPES)


# --- The configurations of real models -------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*/pipeline.yaml")), ids=lambda path: path.parent.name)
def test_a_recipe_alone_fits_the_card_of_its_folder(hub, path):
    card = yaml.safe_load(path.read_text()).get("gpu_memory")
    for recipe in ("sft", "reward", "ppo", "dpo", "evaluate") if card else ():
        plan = plan_stage(arguments_in(path.parent / f"{recipe}.yaml", RECIPES)[-1])
        assert plan.fits(card), (recipe, plan.worst, plan.allocated / GIB)
