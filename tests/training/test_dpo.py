"""DPO: the optimum that it shares with PPO, the reference on the policy's own base, and the recipe."""

import inspect
import json
import math
import re
from importlib import import_module

from rlhf_recipes.config.dpo import DIVERGENCES, LOSSES, SMOOTHED, DPOConfig
from rlhf_recipes.models.tokenizer import load_tokenizer
from rlhf_recipes.training.trainers import DPOTrainer
from support import ROOT
from support.small_ppo import copies, in_4_bits, logged, lora, make_model, make_tokenizer, moved, save_base, with_adapter
from support.tolerance import assert_close

import pytest
import torch
import trl
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import ModelConfig

PAIRS = [("w5 ", "w6 w7", "w8"), ("w9 w10 ", "w11", "w12 w13 w14"), ("w15 ", "w16", "w17 w18"), ("w19 ", "w20 w21", "w22")]


def pairs(count=8):
    rows = [PAIRS[number % len(PAIRS)] for number in range(count)]
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True)))


def make_trainer(folder, model=None, data=None, callbacks=(), peft=None, **options):
    values = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"}
    values |= {"save_strategy": "no", "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
    args = DPOConfig(str(folder), dataloader_pin_memory=False, **(values | options))
    model = with_adapter(make_model()) if model is None else model
    data = pairs() if data is None else data
    return DPOTrainer(
        model, args, train_dataset=data, processing_class=make_tokenizer(), callbacks=list(callbacks), peft_config=peft
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(params=["fp32", "4bit"])
def policy(base, request):
    return with_adapter(in_4_bits(base) if request.param == "4bit" else AutoModelForCausalLM.from_pretrained(base))


@pytest.mark.parametrize("single", ["w25 $A <eos>", "$A <eos>", "w25 $A", "$A"])
def test_pairs_begin_and_end_once_whatever_the_tokenizer_adds(tmp_path, single):
    """TRL encodes pairs within its trainer."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "w25"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single, special_tokens=[("w25", 25), ("<eos>", 1)])
    tokenizer.save_pretrained(tmp_path / "base")
    loaded = load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path / "base")))
    args = DPOConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False)
    trainer = DPOTrainer(with_adapter(make_model()), args, train_dataset=pairs(2), processing_class=loaded)
    begin = [25] if single.startswith("w25") else []
    for row, texts in zip(trainer.train_dataset, PAIRS, strict=False):
        prompt, chosen, rejected = (loaded(text, add_special_tokens=False)["input_ids"] for text in texts)
        ids = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        assert ids == (begin + prompt, [*chosen, 1], [*rejected, 1])


# --- The optimum ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
def test_optimum_is_the_closed_form(monkeypatch, adapted):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = import_module("closed_form")
    monkeypatch.setattr(bench, "PROMPTS", 2)
    monkeypatch.setattr(bench, "WORDS", {1: 8})
    peft = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if adapted else None
    result = bench.train_by_dpo(bench.make_task(0, 1), 0, steps=120, peft=peft, learning_rate=1e-2)
    assert result.best - result.start > 0.2
    assert result.closed >= 0.99, f"{100 * result.closed:.2f}% of the gap to the optimum"
    assert result.closed <= 1 + 1e-6, "above the optimum: one of the two is wrong"
    assert result.distance < 0.05 < result.distance_at_start


# --- The reference ----------------------------------------------------------------------------------------


def test_policy_starts_as_the_reference_which_stays_frozen(policy, tmp_path):
    trainer = make_trainer(tmp_path, policy)
    before = copies(dict(trainer.model.named_parameters()))
    trainer.train()
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert logged(trainer, name)[0] == 0
    changed = moved(before, dict(trainer.model.named_parameters()))
    assert changed
    assert all(".default." in name for name in changed), "a frozen weight has changed"
    for name, weight in before.items():
        if ".default." in name:
            assert weight.dtype == torch.float32
            torch.testing.assert_close(before[name.replace(".default.", ".ref.")], weight, rtol=0, atol=0)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def test_configured_dropout_is_off(tmp_path):
    trainer = make_trainer(tmp_path, with_adapter(make_model(attention_dropout=0.5)), max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    assert logged(trainer, "rewards/chosen")[0] == pytest.approx(0, abs=1e-5)


def test_base_is_the_reference_of_a_fresh_adapter(tmp_path):
    trainer = make_trainer(tmp_path, make_model(), peft=lora())
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0
    assert "ref" not in trainer.model.peft_config


def test_full_training_has_a_copy_as_reference(tmp_path):
    model = make_model()
    model.config._name_or_path = ""  # so that it cannot be loaded again
    trainer = make_trainer(tmp_path, model)
    before = copies(dict(trainer.ref_model.named_parameters()))
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0
    assert not moved(before, dict(trainer.ref_model.named_parameters()))


def test_last_answer_is_conditioned_on_all_turns(policy, tmp_path):
    talk = [{"role": role, "content": text} for role, text in (("user", "w5"), ("assistant", "w6"), ("user", "w7 w8"))]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "w9 w10"), ("rejected", "w11"))}
    expected = {name: by_hand(policy, talk, answer) for name, answer in answers.items()}
    assert abs(expected["chosen"] - by_hand(policy, talk[2:], answers["chosen"])) > 0.1  # the turns before matter
    trainer = make_trainer(tmp_path, policy, Dataset.from_list([{"prompt": talk} | answers] * 4))
    trainer.train()
    for name, logp in expected.items():
        assert_close(logged(trainer, f"logps/{name}")[0], logp, torch.float32)
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]


def by_hand(model, talk, answer):
    """Return the log-probability of the answer after a conversation, in the template's format."""
    tokenizer = make_tokenizer()
    start = len(tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"])
    ids = torch.tensor(tokenizer.apply_chat_template(talk + answer, return_dict=True)["input_ids"])
    with torch.no_grad():
        logps = model.eval()(ids[None]).logits[0].float().log_softmax(-1)
    return logps[start - 1 : -1].gather(1, ids[start:, None]).sum().item()


def test_policy_is_saved_without_its_reference(base, tmp_path):
    trainer = make_trainer(
        tmp_path, with_adapter(AutoModelForCausalLM.from_pretrained(base)), save_strategy="steps", save_steps=2
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "ref").exists()
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(alone(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("fresh", [False, True])
def test_precomputed_reference_logps_change_nothing(tmp_path, fresh):
    runs = []
    for precomputed in (False, True):
        of = {"model": make_model(), "peft": lora()} if fresh else {}
        torch.manual_seed(0)  # of the fresh adapter
        trainer = make_trainer(tmp_path, precompute_ref_log_probs=precomputed, **of)
        trainer.train()
        runs.append(logged(trainer, "loss"))
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)
    assert runs[0][-1] < runs[0][0] - 1e-3


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_resumed_run_equals_unbroken_one(tmp_path):
    unbroken = make_trainer(tmp_path / "one")
    unbroken.train()
    make_trainer(tmp_path / "two", callbacks=[Stop()], save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(tmp_path / "two")
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    assert logged(resumed, "loss") == pytest.approx(logged(unbroken, "loss"), abs=1e-6)
    assert not moved(copies(dict(unbroken.model.named_parameters())), dict(resumed.model.named_parameters()))


# --- Losses -----------------------------------------------------------------------------------------------


def test_losses_are_those_of_trl():
    source = inspect.getsource(trl.DPOTrainer)
    assert set(re.findall(r'\bloss_type == "(\w+)"', source)) == set(LOSSES)
    assert set(re.findall(r'f_divergence_type == "(\w+)"', source)) == set(DIVERGENCES)


def test_smoothed_losses_are_those_of_trl():
    branches = re.split(r'(?:el)?if loss_type == "(\w+)":', inspect.getsource(trl.DPOTrainer))
    found = {loss for loss, code in zip(branches[1::2], branches[2::2], strict=True) if "self.label_smoothing" in code}
    assert found == set(SMOOTHED)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_the_policy(tmp_path, loss):
    trainer = make_trainer(tmp_path, max_steps=2, loss_type=loss, label_smoothing=0.1 if loss == "exo_pair" else 0.0)
    before = copies(dict(trainer.model.named_parameters()))
    trainer.train()
    assert all(map(torch.isfinite, map(torch.tensor, logged(trainer, "loss"))))
    assert moved(before, dict(trainer.model.named_parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.1}, r"label_smoothing: 0.1: sigmoid"),
        ({"loss_type": ["ipo", "sft"], "label_smoothing": 0.1}, r"label_smoothing: 0.1: ipo, sft"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing: 0.5"),
        ({"loss_type": "robust", "label_smoothing": -0.1}, r"label_smoothing: -0.1"),
        ({"loss_type": "exo_pair"}, r"label_smoothing: .*exo_pair"),
        ({"loss_type": []}, r"loss_type: "),
        ({"loss_type": "ipo", "beta": 0.0}, r"beta: 0.0"),
        ({"loss_type": "sigmod"}, r"loss_type: 'sigmod' .*'sigmoid'"),
        ({"f_divergence_type": "jensen"}, r"f_divergence_type: 'jensen' .*js_divergence"),
    ],
)
def test_config_rejects_options_without_effect(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


@pytest.mark.parametrize(
    "options", [{"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, {"loss_type": "sft", "beta": 0.0}]
)
def test_config_accepts_options_that_a_loss_reads(tmp_path, options):
    assert DPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options).beta >= 0


# --- The recipe -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "sft"
    with_adapter(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant '", "'w4 '")
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder, base, sft, **options):
    rows = [{"prompt": f"w{number}", "completions": ["w5 w6", "w7", "w8 w9"], "ranks": [0, 1, 1]} for number in range(10, 16)]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model_name_or_path": str(base),
        "use_peft": True,
        "start_from": str(sft),
        "dataset_name": str(folder / "rankings.jsonl"),
        "test_split_size": 2,
        "loss_type": "ipo",
        "beta": 0.3,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_to": "none",
        "output_dir": str(folder / "dpo"),
    }
    config = folder / "dpo.yaml"
    config.write_text(yaml.safe_dump({key: value for key, value in (values | options).items() if value is not None}))
    return config


@pytest.mark.parametrize("bits", [None, 4])
def test_recipe_trains_a_policy_from_rankings(launch, base, sft, tmp_path, bits):
    options = {"load_in_4bit": True, "dtype": "float32", "max_steps": 2} if bits else {}
    status, error = launch("dpo", "--config", write_config(tmp_path, base, sft, **options))
    assert status == 0, error
    record = json.loads((tmp_path / "dpo" / "recipe.json").read_text())
    assert (record["recipe"], record["parents"]) == ("dpo", [str(sft)])
    assert record["data"]["train"]["rows"] == 4 * 2, "two comparisons per ranking; the third is a tie"
    assert [entry["step"] for entry in record["log"] if "eval_loss" in entry] == [2 if bits else 3]
    assert "eval_loss" in record["metrics"]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "dpo")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (sft, tmp_path / "dpo"))
    assert before.keys() == after.keys()
    assert moved(before, after)
    assert list(policy.peft_config) == ["default"]
    assert "w4" in (tmp_path / "dpo" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_from": "/nowhere"}, "start_from: /nowhere"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"use_peft": False}, "start_from: "),
    ],
)
def test_wrong_arguments_are_one_message(launch, base, sft, tmp_path, options, message):
    config = write_config(tmp_path, base, sft, **options)
    status, error = launch("dpo", "--config", config)
    assert status == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error
    assert str(config) in error
