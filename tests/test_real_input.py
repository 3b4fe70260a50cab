"""Real models on real data: `stories3M` learns from instructions and from HH-RLHF, and learns to stop."""

import json

from rlhf_recipes.evaluation.answers import answer

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

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
dataset_name: {shared}/data/{data}
dataset_train_split: "train[:1000]"
test_split_size: 100
bad_rows: drop
max_length: 128
long_rows: drop
per_device_train_batch_size: 8
per_device_eval_batch_size: 32
max_steps: 60
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
    ended = [0]
    generate = model.generate

    def counting(**inputs):
        output = generate(**inputs)
        ended[0] += (output[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id).any(1).sum().item()
        return output

    model.generate = counting
    answer(model, tokenizer, prompts, temperature=0, max_new_tokens=96)
    del model.generate
    return ended[0] / len(prompts)


@pytest.mark.parametrize("bits", [(), IN_4_BITS], ids=["fp32", "4bit"])
@pytest.mark.parametrize("data", ["instructions.1100.jsonl.gz", "hh_pairs.train.jsonl.gz"])
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
