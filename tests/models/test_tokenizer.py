"""Tokenizers: templates that teach to stop, PAD and EOS, and the comparison of two of them."""

import shutil

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.generation.answers import encode_prompts
from rlhf_recipes.models.tokenizer import PLAIN_CHAT_TEMPLATE, check_tokenizer, encode, load_tokenizer

import pytest
from tokenizers.processors import ByteLevel, RobertaProcessing, Sequence, TemplateProcessing
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig

BASE = "rlhf_recipes.tiny.base"
CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def sft_config(**options):
    return SFTConfig(bf16=False, report_to="none", **options)


def save_tokenizer(folder, **changes):
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(BASE))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    shutil.copy(f"{resolve_path(BASE)}/config.json", folder)
    return ModelConfig(model_name_or_path=str(folder))


def test_tokenizer_without_template_gets_a_plain_one_that_teaches_to_stop(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, chat_template=None), sft_config())
    assert tokenizer.chat_template == PLAIN_CHAT_TEMPLATE
    turns = [*CONVERSATION, {"role": "user", "content": "Why"}, {"role": "assistant", "content": "So"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s>User: Hi\nAssistant: Ho</s>\nUser: Why\nAssistant: So</s>\n"
    )
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == "<s>User: Hi\nAssistant:"
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if own]
    assert learnt.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("pad", ["</s>", None])
def test_pad_is_never_eos(tmp_path, pad):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, pad_token=pad), sft_config())
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(resolve_path(BASE)))


def test_eos_token_is_taken_from_the_arguments(tmp_path):
    arguments = save_tokenizer(tmp_path, chat_template=None)
    assert load_tokenizer(arguments, sft_config(eos_token="<s>")).eos_token_id == 1
    with pytest.raises(RecipeError, match="eos_token: '<end>' is not in the vocabulary"):
        load_tokenizer(arguments, sft_config(eos_token="<end>"))


def test_tokenizer_of_an_earlier_stage_comes_first(tmp_path):
    arguments = save_tokenizer(tmp_path / "base", chat_template=None)
    taught = load_tokenizer(arguments, sft_config(eos_token="<s>"))
    taught.chat_template = taught.chat_template.replace("Assistant:", "Bot:")
    taught.save_pretrained(tmp_path / "sft")
    found = load_tokenizer(arguments, start_from=tmp_path / "sft")
    assert (found.eos_token, found.chat_template) == ("<s>", taught.chat_template)
    assert load_tokenizer(arguments, sft_config(eos_token="</s>"), start_from=tmp_path / "sft").eos_token == "</s>"
    (tmp_path / "bare").mkdir()  # an adapter that came without one
    assert load_tokenizer(arguments, start_from=tmp_path / "bare").chat_template == PLAIN_CHAT_TEMPLATE


def test_template_that_never_ends_a_turn_by_eos_is_refused(tmp_path):
    template = "{% for m in messages %}<s>{{ m['content'] }}<unk>{% endfor %}"
    with pytest.raises(RecipeError, match="eos_token: '<unk>'"):
        load_tokenizer(save_tokenizer(tmp_path, chat_template=template), sft_config())
    with pytest.raises(RecipeError, match="put `eos_token` after"):
        load_tokenizer(save_tokenizer(tmp_path, chat_template=template.replace("<unk>", "")), sft_config())


def test_template_from_a_file_or_another_tokenizer(tmp_path):
    (tmp_path / "own.jinja").write_text(template := "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    arguments = ModelConfig(model_name_or_path=BASE)
    assert load_tokenizer(arguments, sft_config(chat_template_path=str(tmp_path / "own.jinja"))).chat_template == template
    save_tokenizer(tmp_path / "other", chat_template=template + "\n")
    assert load_tokenizer(arguments, sft_config(chat_template_path=str(tmp_path / "other"))).chat_template == template + "\n"


def test_template_with_unknown_special_tokens_is_refused(tmp_path):
    other = AutoTokenizer.from_pretrained(resolve_path(BASE))
    other.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    other.chat_template = "<|turn|>{{ messages[0]['content'] + eos_token }}"
    other.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"chat_template_path: .*<\|turn\|>"):
        load_tokenizer(ModelConfig(model_name_or_path=BASE), sft_config(chat_template_path=str(tmp_path)))


def test_tokenizer_with_one_special_token_gets_another_pad(tmp_path):
    """As GPT-2's."""
    arguments = save_tokenizer(tmp_path, pad_token=None, unk_token=None, bos_token="</s>", eos_token="</s>")
    tokenizer = load_tokenizer(arguments, sft_config())
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tokenizer(tmp_path / "model")
    assert load_tokenizer(ModelConfig(model_name_or_path="~/model"), sft_config()).eos_token == "</s>"


def test_other_tokenizers_are_refused(tmp_path):
    def other(**changes):
        changed = AutoTokenizer.from_pretrained(resolve_path(BASE))
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    def refused(tokenizer, difference):
        with pytest.raises(RecipeError, match=f"tokenizers in {tmp_path} and of the model in use, .*, differ in {difference}"):
            check_tokenizer(tmp_path, tokenizer)

    other().save_pretrained(tmp_path)
    refused(other(chat_template=PLAIN_CHAT_TEMPLATE), "chat template")
    refused(other(eos_token="<s>"), r"eos_token \('</s>' against '<s>'\)")
    larger = other()
    larger.add_tokens(["<turn>"])
    refused(larger, f"vocabulary \\({len(larger) - 1} tokens against {len(larger)}\\)")
    check_tokenizer(tmp_path, other(padding_side="left", pad_token="<unk>"))
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(RecipeError, match=f"{tmp_path}: no readable tokenizer"):
        check_tokenizer(tmp_path, other())


def template(single):
    return TemplateProcessing(single, special_tokens=[("<s>", 1), ("</s>", 2)])


@pytest.mark.parametrize(
    ("processor", "begin"),
    [
        (template("<s> $A </s>"), [1]),
        (template("$A </s>"), []),
        (RobertaProcessing(("</s>", 2), ("<s>", 1)), [1]),
        (Sequence([ByteLevel(), template("<s> $A </s>")]), [1]),
        (template("<s> $A"), [1]),
    ],
)
def test_no_text_ends_by_a_token_that_the_tokenizer_adds(tmp_path, processor, begin):
    """Prompts would end before their answer; generation, scoring and training see the same ids."""
    arguments = save_tokenizer(tmp_path / "base", chat_template=None)
    saved = AutoTokenizer.from_pretrained(tmp_path / "base")
    saved.backend_tokenizer.post_processor = processor
    saved.save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(arguments, sft_config())
    tokenizer.save_pretrained(tmp_path / "stage")
    for stage in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "stage")):
        prompt, answer = (stage(text, add_special_tokens=False)["input_ids"] for text in ("Who is it?", " No one."))
        assert encode_prompts(stage, ["Who is it?"]) == [begin + prompt]
        assert encode(stage, "Who is it?", " No one.") == [*begin, *prompt, *answer, 2]
        (templated,) = encode_prompts(stage, [CONVERSATION[:1]])
        assert templated[0] == 1
        assert templated.count(1) == 1
        assert 2 not in templated
    check_tokenizer(tmp_path / "stage", tokenizer)
