"""Rows longer than `max_length`, and warnings of text that goes without a chat template."""

import json

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.data import check_rendered, load_data
from support.data_files import bot, user

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each word and each mark; every other word is one unknown token."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", chat_template=TEMPLATE)


def words(count):
    return " ".join("a" for _ in range(count))


def test_no_limit_checks_nothing(tokenizer):
    dataset = Dataset.from_dict({"text": [words(100)]})
    assert check_rendered(dataset, "sft", tokenizer, None, "error", "train") == (
        dataset,
        {"rows": 1, "dropped": {}, "longer_than_max_length": {"truncated": 0, "unusable": 0, "dropped": 0}},
    )


@pytest.mark.parametrize(
    ("conversational", "mapping", "warned"), [(True, {}, True), (True, {"prompt": "instruction"}, False), (False, {}, False)]
)
def test_plain_prompts_after_training_on_conversations_are_warned_of(tmp_path, caplog, conversational, mapping, warned):
    """The fix in the message is one."""
    stage = tmp_path / "sft"
    demonstrations = load_data(
        DataArguments(dataset_name="rlhf_recipes.tiny.splits.demonstrations", dataset_arguments={"rows": 2}),
        "sft",
        evaluate=False,
        seed=0,
    )
    assert demonstrations.report["train"]["conversational"]
    tokenizer = AutoTokenizer.from_pretrained(resolve_path("rlhf_recipes.tiny.base"))
    tokenizer.save_pretrained(stage)
    report = demonstrations.report if conversational else {}
    (stage / "recipe.json").write_text(json.dumps({"data": report}))
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nWhere?,Here.,There.\n")
    arguments = DataArguments(dataset_name=str(tmp_path / "pairs.csv"), column_mapping=mapping or None)
    data = load_data(arguments, "preference", evaluate=False, seed=0)
    data.check_rendered(AutoTokenizer.from_pretrained(stage), 64, "truncate")
    assert ("was trained on conversations" in caplog.text) == warned


@pytest.mark.parametrize("mapping", [{}, {"prompt": "instruction", "completion": "output"}])
def test_demonstrations_in_plain_text_are_warned_of(write, tokenizer, caplog, mapping):
    """The fix in the message is one."""
    path = write([{"prompt": "Where?", "completion": "Here."}])
    data = load_data(DataArguments(dataset_name=str(path), column_mapping=mapping or None), "sft", evaluate=False, seed=0)
    data.check_rendered(tokenizer, None, "truncate")
    assert ("without the chat template" in caplog.text) == (not mapping)


def test_truncated_and_unusable_rows_are_told_apart(tokenizer, caplog):
    # The end-of-text token counts where TRL adds it
    lengths = [(3, 5), (3, 6), (3, 7), (9, 1), (10, 1), (11, 1)]
    rows = [{"prompt": words(prompt), "completion": " " + words(completion)} for prompt, completion in lengths]
    dataset = Dataset.from_list(rows)
    kept, report = check_rendered(dataset, "sft", tokenizer, 10, "truncate", "train")
    assert report == {"rows": 4, "dropped": {}, "longer_than_max_length": {"truncated": 2, "unusable": 2, "dropped": 2}}
    assert kept.to_list() == rows[:4]
    assert "train: of 6 rows, 2 lose the end" in caplog.text
    kept, report = check_rendered(dataset, "sft", tokenizer, 10, "drop", "train")
    assert kept.to_list() == rows[:2]
    assert report["longer_than_max_length"]["dropped"] == 4
    with pytest.raises(RecipeError, match=r"train: of 6 rows.*'a a a a a.*long_rows"):
        check_rendered(dataset, "sft", tokenizer, 10, "error", "train")
    with pytest.raises(RecipeError, match="no row is left"):
        check_rendered(dataset, "sft", tokenizer, 2, "drop", "train")


def verdict(row, kind, tokenizer, max_length):
    """`fits`, `truncated` or `unusable`, for one row."""
    try:
        report = check_rendered(Dataset.from_list([row]), kind, tokenizer, max_length, "truncate", "train")[1]
    except RecipeError:
        return "unusable"
    return "truncated" if report["longer_than_max_length"]["truncated"] else "fits"


def test_a_pair_cut_to_the_same_tokens_is_unusable(tokenizer):
    row = {"prompt": "a a", "chosen": " a a a b", "rejected": " a a a a"}
    assert [verdict(row, "preference", tokenizer, length) for length in (2, 5, 6, 7)] == [
        "unusable",
        "unusable",
        "truncated",
        "fits",
    ]
    ranking = {"prompt": "a a", "completions": [" a b", " b b b", " b b a"], "ranks": [0, 1, 2]}
    assert [verdict(ranking, "ranking", tokenizer, length) for length in (4, 5, 6)] == ["unusable", "truncated", "fits"]


def test_conversations_count_the_template(tokenizer):
    row = {"messages": [user("a a"), bot("b b b")]}  # <user> a a <end> <assistant> b b b <end>
    assert [verdict(row, "sft", tokenizer, length) for length in (5, 6, 8, 9)] == ["unusable", "truncated", "truncated", "fits"]
    prompt = {"prompt": [user("a a")]}  # <user> a a <end> <assistant>
    assert [verdict(prompt, "prompt", tokenizer, length) for length in (4, 5)] == ["unusable", "fits"]
    assert verdict({"prompt": "a a"}, "prompt", tokenizer, 2) == "fits"


@pytest.mark.parametrize("max_length", [12, 20, 60])
@pytest.mark.parametrize("kind", ["messages", "text"])
def test_the_shortcut_agrees_with_tokenising_everything(tokenizer, kind, max_length):
    rows = [{"text": words(size)} for size in range(1, 80)]
    if kind == "messages":
        rows = [{"messages": [user(words(1 + size % 7)), bot(words(size))] * (1 + size % 3)} for size in range(1, 80)]
        lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows]
    else:
        lengths = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
    assert check_rendered(Dataset.from_list(rows), "sft", tokenizer, max_length, "drop", "x")[0].to_list() == fitting


def test_short_rows_are_not_tokenised(tokenizer, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("tokenised")

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", refuse)
    short = Dataset.from_list([{"text": words(10)}])
    assert check_rendered(short, "sft", tokenizer, 100, "error", "train")[0] is short
    with pytest.raises(AssertionError, match="tokenised"):
        check_rendered(Dataset.from_list([{"text": words(60)}]), "sft", tokenizer, 100, "error", "train")
