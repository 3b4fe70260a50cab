"""The SFT recipe from end to end: LoRA, 4 bits, all weights, packing, resuming and the saved result."""

import json
import shutil

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.models.fingerprint import fingerprint
from support import NO_EVALUATION, run_recipe

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

BASE = resolve_path("rlhf_recipes.tiny.base")
SMALL = ("--dataset_arguments", '{"rows": 640}', "--per_device_train_batch_size", 16, "--logging_steps", 1, "--warmup_steps", 0)
NO_EVAL = (*NO_EVALUATION, "--save_strategy", "no")
IN_4_BITS = ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true")


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder, checkpoint):
    """Return loss and gradient norm of each step."""
    state = json.loads((folder / f"checkpoint-{checkpoint}" / "trainer_state.json").read_text())
    return [(e["step"], e["loss"], e["grad_norm"]) for e in state["log_history"] if "loss" in e]


def test_saved_adapter_and_record(launch, tmp_path):
    out = tmp_path / "out"
    assert launch("sft", *SMALL, "--max_steps", 3, "--eval_steps", 2, "--seed", 5, "--output_dir", out)[0] == 0
    record = json.loads((out / "recipe.json").read_text())
    assert (record["recipe"], record["seed"], record["parents"]) == ("sft", 5, [])
    base = record["base_model"]
    assert (base["name"], base["revision"]) == (BASE, "main")
    assert base["fingerprint"] == json.loads(json.dumps(fingerprint(AutoModelForCausalLM.from_pretrained(BASE))))
    assert record["arguments"]["SFTConfig"]["max_steps"] == 3
    assert record["arguments"]["DataArguments"]["dataset_arguments"] == {"rows": 640}
    assert record["arguments"]["ModelConfig"]["lora_r"] == 32
    assert {"python", "torch", "trl", "peft", "bitsandbytes"} <= record["versions"].keys()
    run = record["run"]
    assert (run["steps"], run["peak_memory"]["device"]) == (3, "process on CPU")
    assert run["peak_memory"]["bytes"] > 100e6
    assert run["tokens_per_s"] == pytest.approx(record["metrics"]["num_tokens"] / run["wall_time_s"], rel=0.05)
    assert record["data"]["train"]["rows"] == 640
    assert record["metrics"]["eval_loss"] > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(BASE).chat_template
    assert max(weight.abs().max() for name, weight in model.named_parameters() if "lora_B" in name) > 0


def test_evaluation_does_not_change_training(launch, tmp_path):
    """In 4 bits it would if bitsandbytes repacked the weights (`disable_cpu_4bit_repacking`)."""
    common = (*SMALL, *IN_4_BITS, "--max_steps", 4, "--save_strategy", "no", "--output_dir")
    launch("sft", *common, tmp_path / "with", "--eval_strategy", "steps", "--eval_steps", 1)
    launch("sft", *common, tmp_path / "without", *NO_EVALUATION)
    assert same(adapter(tmp_path / "with"), adapter(tmp_path / "without"))


@pytest.mark.parametrize("options", [IN_4_BITS, ("--use_peft", "false")], ids=["4bit", "full"])
def test_resumed_run_equals_unbroken_one(launch, tmp_path, options):
    common = (*SMALL, *options, "--max_steps", 6, "--save_steps", 3, "--eval_steps", 2, "--lora_dropout", 0.1)
    common = (*common, "--save_total_limit", 3, "--output_dir")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert launch("sft", *common, whole)[0] == 0
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-3", broken / "checkpoint-3")
    (broken / "checkpoint-5").mkdir()  # incomplete, so not resumed from
    assert launch("sft", *common, broken, "--resume_from_checkpoint", "true")[0] == 0
    name = "model.safetensors" if "--use_peft" in options else "adapter_model.safetensors"
    assert same(load_file(whole / name), load_file(broken / name))
    assert history(whole, 6) == history(broken, 6)
    assert json.loads((broken / "recipe.json").read_text())["run"]["steps"] == 3


def test_ctrl_c_names_the_newest_checkpoint(launch, tmp_path, monkeypatch):
    def press(self, *arguments):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    step = SFTTrainer.training_step
    monkeypatch.setattr(SFTTrainer, "training_step", press)
    options = (*SMALL, "--max_steps", 8, "--save_steps", 2, *NO_EVALUATION, "--output_dir", tmp_path)
    status, error = launch("sft", *options)
    kept = f"{tmp_path / 'checkpoint-2'} is kept: resume from it with `resume_from_checkpoint: true`"
    assert (status, error.splitlines()[-1]) == (130, f"stopped after 3 of 8 steps; {kept}")


def test_resuming_from_no_checkpoint_is_refused(launch, tmp_path):
    status, error = launch("sft", *SMALL, "--resume_from_checkpoint", tmp_path)
    assert status == 2
    assert f"resume_from_checkpoint: {tmp_path}: " in error


def test_resuming_with_other_arguments_is_refused(launch, tmp_path):
    common = (*SMALL, *NO_EVALUATION, "--save_steps", 2, "--output_dir", tmp_path)
    assert launch("sft", *common, "--max_steps", 2)[0] == 0
    status, error = launch("sft", *common, "--max_steps", 4, "--learning_rate", 1e-5, "--resume_from_checkpoint", "true")
    assert status == 2
    assert "learning_rate: 0.001 then, 1e-05 now" in error
    assert launch("sft", *common, "--max_steps", 4, "--logging_steps", 2, "--resume_from_checkpoint", "true")[0] == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["run"]["steps"] == 2


def test_finished_run_resumed_keeps_its_cost(launch, tmp_path):
    common = (*SMALL, *NO_EVALUATION, "--save_steps", 2, "--max_steps", 2, "--output_dir", tmp_path)
    assert launch("sft", *common)[0] == 0
    cost, weights = json.loads((tmp_path / "recipe.json").read_text())["run"], adapter(tmp_path)
    assert launch("sft", *common, "--resume_from_checkpoint", "true")[0] == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["run"] == cost
    assert same(weights, adapter(tmp_path))


def test_unfinished_run_is_not_overwritten_and_finished_one_is(launch, tmp_path):
    common = (*SMALL, *NO_EVALUATION, "--save_steps", 1, "--save_total_limit", 9, "--output_dir", tmp_path)
    assert launch("sft", *common, "--max_steps", 3)[0] == 0
    record = tmp_path / "recipe.json"
    record.rename(tmp_path / "elsewhere.json")
    status, error = launch("sft", *common, "--max_steps", 2)
    assert status == 2
    assert "output_dir: " in error
    assert "checkpoint-3" in error
    (tmp_path / "elsewhere.json").rename(record)
    assert launch("sft", *common, "--max_steps", 2)[0] == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("damage", ["trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_incomplete_checkpoint_is_not_resumed_from(launch, tmp_path, damage):
    common = (*SMALL, *NO_EVALUATION, "--save_steps", 1, "--save_total_limit", 9, "--output_dir", tmp_path)
    assert launch("sft", *common, "--max_steps", 2)[0] == 0
    weights, path = adapter(tmp_path), tmp_path / "checkpoint-2" / damage
    if damage == "trainer_state.json":
        path.write_text(path.read_text()[:100])
    else:
        path.unlink()
    assert launch("sft", *common, "--max_steps", 2, "--resume_from_checkpoint", "true")[0] == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["run"]["steps"] == 1  # from checkpoint-1
    assert same(weights, adapter(tmp_path))


def test_record_has_the_arguments_as_parsed(launch, tmp_path):
    (tmp_path / "own.jinja").write_text(AutoTokenizer.from_pretrained(BASE).chat_template)
    options = ("--chat_template_path", tmp_path / "own.jinja", "--model_init_kwargs", '{"attn_implementation": "eager"}')
    assert launch("sft", *SMALL, *NO_EVAL, *options, "--max_steps", 1, "--output_dir", tmp_path / "out")[0] == 0
    arguments = json.loads((tmp_path / "out" / "recipe.json").read_text())["arguments"]["SFTConfig"]
    assert arguments["chat_template_path"] == str(tmp_path / "own.jinja")
    assert arguments["model_init_kwargs"] == {"attn_implementation": "eager"}


def test_trained_eos_is_saved_for_generation(launch, tmp_path):
    options = ("--eos_token", "<s>", "--max_steps", 1, "--output_dir", tmp_path)
    assert launch("sft", *SMALL, *NO_EVAL, *options)[0] == 0
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_rows_that_packing_splits_are_not_too_long(launch, tmp_path):
    long = [{"text": "Karimo lives in Alderby. " * 40} for _ in range(4)]
    data = write_rows(tmp_path / "long.jsonl", long)
    options = ("--dataset_name", data, "--dataset_arguments", "none", "--long_rows", "error", "--max_steps", 1)
    options = (*SMALL[2:], *NO_EVAL, *options, "--packing", "true", "--output_dir", tmp_path / "out", "--packing_strategy")
    assert launch("sft", *options, "wrapped")[0] == 0
    status, error = launch("sft", *options, "bfd")
    assert status == 2
    assert "max_length: 64" in error
    assert "Karimo lives in Alderby." in error


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversations(turns):
    people = ["Karimo", "Bazepo", "Didifu", "Zoguka"]
    return [
        {
            "messages": [
                message
                for turn in range(turns)
                for message in (
                    {"role": "user", "content": f"Where does {people[(row + turn) % 4]} live?"},
                    {"role": "assistant", "content": ["Alderby.", "Dunmere."][row % 2]},
                )
            ]
        }
        for row in range(8)
    ]


def train_one_step(launch, tmp_path, name, rows, *options):
    data = write_rows(tmp_path / f"{name}.jsonl", rows)
    config = tmp_path / f"{name}.yaml"
    config.write_text(
        f"model_name_or_path: rlhf_recipes.tiny.base\ndataset_name: {data}\nuse_peft: true\nlora_target_modules: all-linear\n"
        f"lora_dropout: 0.0\ngradient_checkpointing: false\noutput_dir: {tmp_path / name}\nmax_steps: 1\n"
        f"save_steps: 1\nlogging_steps: 1\nper_device_train_batch_size: 8\nreport_to: none\n"
    )
    status, error = launch("sft", "--config", config, *options)
    assert status == 0, error
    return history(tmp_path / name, 1)[0][1]


def reference_loss(rows, counts):
    """Return the mean negative log-likelihood of tokens whose assistant mask counts, one conversation at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    losses = []
    for row in rows:
        encoded = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        masks = encoded["assistant_masks"][1:]
        losses += [-logp.item() for logp, mask in zip(log_probs, masks, strict=True) if counts(mask)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("turns", "options", "counts"),
    [
        (3, (), lambda assistant: True),
        (3, ("--assistant_only_loss", "true"), bool),
        (1, ("--packing", "true", "--max_length", 128), lambda assistant: True),
        (1, "completion", bool),
    ],
    ids=["every turn", "assistant only", "packed rows apart", "completion of a prompt"],
)
def test_loss_is_that_of_each_conversation_alone(launch, tmp_path, turns, options, counts):
    rows = data = conversations(turns)
    if options == "completion":
        data, options = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows], ()
    loss = train_one_step(launch, tmp_path, "run", data, *options)
    assert loss == pytest.approx(reference_loss(rows, counts), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--packing", "true", "--max_length", "none"), "sft: When packing is enabled"),
        (("--assistant_only_loss", "true", "--dataset_name", "rlhf_recipes.tiny.splits.pretraining"), "not conversational"),
        (("--dataset_arguments", '{"row": 5}'), "row"),
        (("--dataset_arguments", '{"rows": "x"}'), "failed for split `train`"),
        (("--model_name_or_path", "./nowhere"), "./nowhere: no such folder"),
        (("--model_init_kwargs", '{"nonsense": 1}'), "model_name_or_path"),
        (("--eval_strategy", "steps", "--dataset_name", "./none.jsonl", "--dataset_arguments", "none"), "none.jsonl"),
    ],
)
def test_wrong_arguments_are_one_message(launch, tmp_path, options, message):
    status, error = launch("sft", *SMALL, *NO_EVAL, "--output_dir", tmp_path, *options)
    last = error.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in error


def test_conversation_that_the_chat_template_rejects_is_named(launch, tmp_path):
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": turns[1:]}, {"messages": turns}])
    options = ("--dataset_name", data, "--dataset_arguments", "none", "--output_dir", tmp_path / "out")
    status, error = launch("sft", *SMALL[2:], *NO_EVAL, *options)
    assert status == 2
    assert "system user assistant" in error
    assert "Traceback" not in error


def test_adapter_and_full_model_replace_each_other(launch, tmp_path):
    common = (*SMALL, *NO_EVAL, "--max_steps", 1, "--output_dir", tmp_path)
    assert launch("sft", *common)[0] == 0
    assert launch("sft", *common, "--use_peft", "false")[0] == 0
    assert not list(tmp_path.glob("adapter*"))
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert launch("sft", *common)[0] == 0
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("model*.safetensors"))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path)


def test_unwritable_output_dir_is_refused_at_the_start(launch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    status, error = launch("sft", *SMALL, *NO_EVAL, "--output_dir", tmp_path / "file" / "out")
    assert status == 2
    assert "output_dir: " in error


def test_trained_turns_and_replaced_run_are_printed(tmp_path, capsys):
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    options = ("--dataset_name", tmp_path / "talks.jsonl", "--max_steps", 1, "--warmup_steps", 0, *NO_EVAL)
    options = (*options, "--output_dir", tmp_path / "out")
    for others in ((), ("--assistant_only_loss", "true")):
        run_recipe("sft", *options, *others)
        printed = capsys.readouterr().out
        assert ("Every turn is learnt" in printed) == (not others)
        assert (f"{tmp_path / 'out'} holds a finished run" in printed) == bool(others)
