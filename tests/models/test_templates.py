"""Answers without what the chat template itself writes around them, under the templates of all families that TRL knows."""

import functools
import re
from pathlib import Path

from rlhf_recipes.chat.terminal import Writer
from rlhf_recipes.generation.answers import encode_prompts
from rlhf_recipes.models.tokenizer import PLAIN_CHAT_TEMPLATE, answer_messages, answer_text, template_text
from support.small_ppo import make_trainer, prompts

import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(trl.__file__).parent / "chat_templates"
PICTURES = ("idefics3", "smolvlm", "llava")  # take lists of parts only
TEMPLATES = {path.stem: path.read_text() for path in FOLDER.glob("*.jinja") if not path.stem.startswith(PICTURES)}
SHIPPED = ("qwen3", "qwen2_5", "llama3_1", "llama3_2")
TEMPLATES |= {
    "plain": PLAIN_CHAT_TEMPLATE,
    "tagged": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<answer>{{ m.content }}</answer>"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "bare": "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",  # without a generation prompt
}
QUESTION = [{"role": "user", "content": "Where is the cat?"}]
TALK = [*QUESTION, {"role": "assistant", "content": "In the house."}, {"role": "user", "content": "And the dog?"}]
CONTENT = "On the mat: think, answer, final."


@functools.cache
def make_tokenizer(template):
    """A tokenizer of bytes, with the special tokens of a template."""
    bytes_of = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(vocab=bytes_of, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|eos|>", bos_token="<|bos|>")
    special = sorted(
        {*re.findall(r"<[|\uff5c][^<>'\"{}]+[|\uff5c]?>", template), "<start_of_turn>", "<end_of_turn>", "<turn|>"}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["<think>", "</think>"])  # no special tokens in Qwen3's tokenizer
    tokenizer.chat_template = template
    rendered = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": CONTENT}], tokenize=False)
    ends = re.findall("|".join(map(re.escape, [*special, "<|eos|>"])), rendered[rendered.index(CONTENT) :])
    tokenizer.eos_token = next((end for end in ends if "RESPONSE" not in end), "<|eos|>")  # Cohere's ends the response first
    return tokenizer


def sampled(tokenizer, prompt, content):
    """The ids and the text of a policy that says `content` as SFT taught it."""
    (start,) = encode_prompts(tokenizer, [prompt])
    turns = [*prompt, {"role": "assistant", "content": content}]
    ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    same = next((place for place, pair in enumerate(zip(start, ids, strict=False)) if pair[0] != pair[1]), len(start))
    ids = ids[same:]
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else [*ids, tokenizer.eos_token_id]
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [QUESTION, TALK, [{"role": "system", "content": "Be short."}, *QUESTION]])
@pytest.mark.parametrize("family", sorted(TEMPLATES))
def test_answers_are_the_content_under_every_template(family, prompt):
    tokenizer = make_tokenizer(TEMPLATES[family])
    if prompt[0]["role"] == "system" and family.removesuffix("_training") == "gemma":
        pytest.skip("Gemma's first template takes no system message")
    ids, text = sampled(tokenizer, prompt, CONTENT)
    assert answer_text(tokenizer, prompt, text, ids).strip() == CONTENT
    assert answer_text(tokenizer, prompt, CONTENT) == CONTENT  # of a dataset
    message = [{"role": "assistant", "content": text}]
    assert answer_messages(tokenizer, [prompt], [message], [ids])[0][0]["content"].strip() == CONTENT
    for content in (CONTENT, "final: answer", "assistant: answer"):  # an answer is stripped once
        ids, text = sampled(tokenizer, prompt, content)
        for _ in range(2):
            text = answer_text(tokenizer, prompt, text, ids)
        assert text.strip() == content
    empty, text = sampled(tokenizer, prompt, "")
    assert answer_text(tokenizer, prompt, text.strip(), empty).strip() == ""


def test_what_templates_write_before_an_answer():
    expected = {
        "qwen3": "<think>\n\n</think>\n\n",
        "qwen2_5": "",
        "llama3_1": "",
        "llama3_2": "",
        "glm4moe": "\n<think></think>\n",
        "gptoss": "<|channel|>final<|message|>",
        "nemotron_3_nano": "</think>",
        "deepseek_r1_distill": "",
        "plain": " ",
        "tagged": "<answer>",
        "bare": "assistant: ",
    }
    found = {family: template_text(make_tokenizer(TEMPLATES[family]), QUESTION)[0] for family in expected}
    assert found == expected
    assert set(SHIPPED) <= expected.keys()


def test_thoughts_of_the_policy_and_texts_stay():
    """Only what the template writes is removed."""
    tokenizer = make_tokenizer(TEMPLATES["qwen3"])
    thought = "<think>\nIt purrs.\n</think>\n\nOn the mat."
    for text in (thought, "On <think>\n\n</think>\n\n it.", "<think>", ""):
        assert answer_text(tokenizer, QUESTION, text) == text
    assert answer_text(tokenizer, QUESTION, "\n<think>\n\n</think>") == ""
    assert answer_text(tokenizer, "Where? ", "<think>\n\n</think>\n\n x") == "<think>\n\n</think>\n\n x"
    tool = [{"role": "assistant", "content": None}, {"role": "tool", "content": "3"}]
    assert answer_messages(tokenizer, [QUESTION, "a"], [tool, "<think>"]) == [[{**tool[0], "content": ""}, tool[1]], "<think>"]


@pytest.mark.parametrize("family", ["qwen3", "gptoss", "glm4moe", "llama3_1", "plain"])
def test_streamed_answers_are_the_content(family):
    tokenizer, written = make_tokenizer(TEMPLATES[family]), []
    writer = Writer(tokenizer, written.append, QUESTION)
    writer.put(torch.tensor(encode_prompts(tokenizer, [QUESTION])))
    for token in sampled(tokenizer, QUESTION, CONTENT)[0]:
        writer.put(torch.tensor([token]))
    writer.end()
    assert "".join(written).strip() == CONTENT
    assert len(written) > 3, "nothing was streamed"


def test_rewards_of_ppo_see_the_content(tmp_path):
    seen = []

    def look(completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    tokenizer = make_tokenizer(TEMPLATES["qwen3"])
    trainer = make_trainer(tmp_path, reward=look, data=prompts(4))
    trainer.processing_class = tokenizer
    ids, text = sampled(tokenizer, QUESTION, CONTENT)
    completions = [[{"role": "assistant", "content": text}]]
    trainer._calculate_rewards([{"prompt": QUESTION}], [QUESTION], completions, [ids])
    assert seen == completions == [[{"role": "assistant", "content": CONTENT}]]  # TRL logs them afterwards
