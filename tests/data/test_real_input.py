"""Real models on real data: SFT learns to answer and to stop, and a reward model learns from conversations."""

import gzip
import json
import re

from rlhf_recipes.generation.answers import sample

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]

IN_4_BITS = ("--load_in_4bit", "true", "--use_bnb_nested_quant", "true")
CONFIG = """
model_name_or_path: {shared}/models/stories3M
dtype: float32
eos_token: <s> # ends a story; </s> was never trained, and LoRA cannot move its row of the LM head
use_peft: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.0
lora_target_modules: all-linear
dataset_name: {shared}/data/{data}.jsonl.gz
dataset_train_split: "train[:950]"
test_split_size: 50
bad_rows: drop
max_length: 128
long_rows: drop
per_device_train_batch_size: 8
per_device_eval_batch_size: 32
max_steps: 50
learning_rate: 3.0e-3
lr_scheduler_type: cosine
warmup_steps: 5
gradient_checkpointing: false
eval_strategy: steps
eval_steps: 1000
eval_on_start: true
logging_steps: 10
save_strategy: "no"
report_to: none
output_dir: {output}
"""


def stop_share(model, tokenizer, prompts):
    """The share of greedy answers that end by EOS within 96 tokens."""
    return np.mean([answer.ended for answer in sample(model, tokenizer, prompts, temperature=0, max_new_tokens=96)])


@pytest.mark.parametrize(("data", "bits"), [("instructions.1100", IN_4_BITS), ("hh_pairs.train", ())], ids=["4bit", "fp32"])
def test_stories3m_learns_and_learns_to_stop(launch, tmp_path, shared, data, bits):
    config = tmp_path / "sft.yaml"
    config.write_text(CONFIG.format(shared=shared, data=data, output=tmp_path / "out"))
    status, error = launch("sft", "--config", config, *bits)
    assert status == 0, error
    record = json.loads((tmp_path / "out" / "recipe.json").read_text())
    before, after = losses = [entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry]
    assert after < before - 0.5, losses

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories3M")
    questions = ["Rewrite the sentence.", "What is the capital of France?", "Name a fruit.", "What do cats eat?"]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    assert stop_share(base, tokenizer, prompts) == 0
    assert stop_share(PeftModel.from_pretrained(base, tmp_path / "out"), tokenizer, prompts) >= 0.75


# --- Reward models ---------------------------------------------------------------------------------------

REWARD_CONFIG = """
model_name_or_path: {shared}/models/stories260K
dtype: float32
use_peft: true
lora_r: 4
lora_target_modules: all-linear
train_on: {train_on}
dataset_name: {data}/train.jsonl
eval_datasets: [{{path: {data}/eval.jsonl}}]
max_length: 512
per_device_train_batch_size: 4
max_steps: 3
learning_rate: 3.0e-3
gradient_checkpointing: false
eval_strategy: steps
eval_steps: 100
logging_steps: 1
save_strategy: "no"
report_to: none
output_dir: {output}
"""


def turns(transcript):
    """The messages of a raw HH transcript."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)]


@pytest.fixture
def transcripts(shared):
    """Short raw transcripts of several turns."""
    with gzip.open(shared / "data" / "hh_raw.helpful-base.test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    fit = [row for row in rows if row["chosen"].count("Human:") >= 2 and max(map(len, row.values())) < 500]
    return [row for row in fit if all(turn["content"] for text in row.values() for turn in turns(text))][:20]


@pytest.mark.parametrize("train_on", ["pairs", "rankings"])
def test_reward_model_learns_from_raw_transcripts_of_several_turns(launch, tmp_path, shared, transcripts, train_on):
    """It scores the complete conversation in the chat template: Transformers and PEFT alone give the same scores."""
    train, held_out = transcripts[:10], transcripts[10:]
    for name, rows in (("train", train), ("eval", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, config = tmp_path / "out", tmp_path / "reward.yaml"
    config.write_text(REWARD_CONFIG.format(shared=shared, data=tmp_path, output=output, train_on=train_on))
    status, error = launch("reward", "--config", config)
    assert status == 0, error
    tokenizer = AutoTokenizer.from_pretrained(output)
    base = AutoModelForSequenceClassification.from_pretrained(shared / "models" / "stories260K", num_labels=1)
    model = PeftModel.from_pretrained(base, output).eval()

    def score(transcript):
        ids = tokenizer.apply_chat_template(turns(transcript), return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            return model(input_ids=ids).logits.item()

    scores = np.array([[score(row["chosen"]), score(row["rejected"])] for row in held_out])
    (result,) = json.loads((output / "evaluation.json").read_text()).values()
    assert result["accuracy"]["n"] == len(held_out)
    assert result["accuracy"]["accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())
    assert result["scores"]["mean"] == pytest.approx(scores.mean(), abs=1e-4)
    assert result["scores"]["std"] == pytest.approx(scores.std(), abs=1e-4)
    recipe = json.loads((output / "recipe.json").read_text())
    assert recipe["data"]["train"]["rows"] == len(train)
    assert recipe["metrics"]["loss"] > 0
