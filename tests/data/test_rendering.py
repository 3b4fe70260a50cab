"""Rows longer than `max_length`, and warnings of text that goes without a chat template."""

import copy
import json
from pathlib import Path

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.data import check_rendered, load_data
from support.data_files import bot, user

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
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


def with_template(tokenizer, name):
    """The tokenizer with a template that TRL ships."""
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<s>"
    changed.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return changed


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


def test_rows_beyond_the_context_of_the_model_are_warned_of(tokenizer, caplog):
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 8
    dataset = Dataset.from_list([{"text": words(size)} for size in (5, 9, 12, 30)])
    assert len(check_rendered(dataset, "sft", short, 20, "drop", "train")[0]) == 3
    assert "2 of 3 rows have more than 8 tokens" in caplog.text
    caplog.clear()
    check_rendered(dataset, "sft", short, None, "drop", "train")
    check_rendered(dataset, "sft", short, 6, "truncate", "train")
    assert "more than 8 tokens" not in caplog.text


def test_prompts_are_measured_whatever_other_columns_there_are(tokenizer):
    others = {"text": words(50), "messages": [user(words(50)), bot("a")], "chosen": "a", "rejected": words(50), "ranks": [1]}
    rows = [{"prompt": "a", **others}, {"prompt": words(20), **others}]
    assert check_rendered(Dataset.from_list(rows), "prompt", tokenizer, 10, "drop", "train")[0].to_list() == rows[:1]


# --- What the chat template leaves out -------------------------------------------------------------------

THOUGHT = "<think>\nSo {0}, and\n</think>\n\nYes"
TURNS = [user("a"), bot(THOUGHT.format(1)), user("b"), bot(THOUGHT.format(2))]
LEFT_OUT = "the chat template leaves out a part of the answer"


@pytest.mark.parametrize(
    ("template", "kind", "row", "problem"),
    [
        ("deepseek_r1_distill", "sft", {"messages": TURNS[:2]}, LEFT_OUT),
        ("deepseekv3", "sft", {"prompt": TURNS[:1], "completion": [bot("So</think>Yes")]}, LEFT_OUT),
        ("qwen3", "sft", {"messages": TURNS}, LEFT_OUT),
        ("glm4moe", "sft", {"messages": TURNS}, LEFT_OUT),
        ("qwen3", "sft", {"messages": TURNS[:2]}, None),
        ("qwen3", "sft", {"messages": [TURNS[0], bot("Yes "), *TURNS[2:]]}, None),
        ("qwen3", "sft", {"prompt": TURNS[:3], "completion": TURNS[3:]}, None),
        ("deepseek_r1_distill", "preference", {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [bot("No")]}, LEFT_OUT),
        ("llama3", "preference", {"prompt": TURNS[:1], "chosen": TURNS[1:2], "rejected": [bot("No")]}, None),
        (
            "qwen3",
            "preference",
            {"prompt": TURNS[:1], "chosen": [bot("<think>\n\n</think>\n\nYes")], "rejected": [bot("Yes")]},
            "chosen equal to rejected, once rendered",
        ),
        (
            "qwen3",
            "ranking",
            {
                "prompt": TURNS[:1],
                "completions": [[bot("<think>\n\n</think>\n\nYes")], [bot("No")], [bot("Yes")]],
                "ranks": [0, 1, 2],
            },
            "equal completions of different rank, once rendered",
        ),
        (None, "preference", {"prompt": "a", "chosen": " b", "rejected": " b</s>"}, "chosen equal to rejected, once rendered"),
    ],
)
def test_rows_that_lose_an_answer_are_bad_rows(tokenizer, caplog, template, kind, row, problem):
    if template:
        tokenizer = with_template(tokenizer, template)
    good = json.loads(json.dumps(row).replace("think>", "thought>").replace("</s>", "."))
    dataset = Dataset.from_list([good, row, good])
    if problem is None:
        kept, report = check_rendered(dataset, kind, tokenizer, None, "error", "train")
        assert (kept, report["dropped"]) == (dataset, {})
        return
    with pytest.raises(RecipeError, match=rf"1 of 3 rows of the train data \(1 {problem}.*bad_rows: drop"):
        check_rendered(dataset, kind, tokenizer, None, "error", "train")
    kept, report = check_rendered(dataset, kind, tokenizer, None, "error", "train", bad_rows="drop")
    assert kept.to_list() == [dataset[0], dataset[2]]
    ((reason, count),) = report["dropped"].items()
    assert reason.startswith(problem)
    assert count == 1
    assert f"1 {problem}" in caplog.text


def test_bad_rows_once_rendered_are_counted_with_the_others(write, tokenizer):
    rows = [{"messages": TURNS}, {"messages": TURNS[2:]}, {"messages": [user("a")]}]
    data = load_data(DataArguments(dataset_name=write(rows), bad_rows="drop"), "sft", evaluate=False, seed=0)
    report = data.check_rendered(with_template(tokenizer, "qwen3"), None, "error").report["train"]
    assert report["rows"] == 1
    assert sum(report["dropped"].values()) == 2


@pytest.mark.parametrize(("template", "complete"), [("qwen3", True), ("deepseek_r1_distill", True), ("deepseekv3", False)])
def test_the_template_that_trl_trains_with_counts(tokenizer, template, complete):
    """With `assistant_only_loss`, TRL encodes with a variant of many templates that leaves nothing out."""
    arguments = Dataset.from_list([{"messages": TURNS}]), "sft", with_template(tokenizer, template), None, "error", "train"
    if complete:
        assert check_rendered(*arguments, assistant_only_loss=True)[1]["rows"] == 1
    else:
        with pytest.raises(RecipeError, match=LEFT_OUT):
            check_rendered(*arguments, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("kind", "answer"), [("prompt", {}), ("preference", {"chosen": [bot("Yes")], "rejected": [bot("No")]})]
)
def test_earlier_turns_that_are_left_out_are_counted(tokenizer, caplog, kind, answer):
    """No answer suffers, and models with such a template never see them."""
    rows = [{"prompt": TURNS[:1]} | answer, {"prompt": TURNS[:3]} | answer]
    assert check_rendered(Dataset.from_list(rows), kind, with_template(tokenizer, "qwen3"), None, "error", "x")[1]["rows"] == 2
    assert "x: the chat template leaves out a part of earlier turns in 1 of 2 rows" in caplog.text


@pytest.mark.parametrize(
    "template", ["qwen3", "qwen2_5", "llama3", "llama3_1", "llama3_2", "gemma3", "phi3", "gptoss", "cohere"]
)
def test_usual_conversations_are_complete(tokenizer, caplog, template):
    code = " ```python\n  x = 1\n\n```\n"
    row = {"messages": [{"role": "system", "content": "Be  brief.\n"}, user(" Hi\n"), bot(" Hi"), user("Hi"), bot(code)]}
    dataset = Dataset.from_list([row])
    assert check_rendered(dataset, "sft", with_template(tokenizer, template), None, "error", "train")[0] is dataset
    assert not caplog.text


# --- One BOS ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("sft", {"text": "<s>a b</s>"}, {"text": "a b</s>"}),
        ("sft", {"prompt": "<s>a", "completion": " b"}, {"prompt": "a", "completion": " b"}),
        ("preference", {"prompt": "<s>a", "chosen": " a", "rejected": " b"}, {"prompt": "a", "chosen": " a", "rejected": " b"}),
        ("prompt", {"prompt": "<s>a", "text": "<s>"}, {"prompt": "a", "text": "<s>"}),
        ("sft", {"text": "<s><s>a <s>"}, {"text": "a <s>"}),
    ],
)
def test_a_bos_is_not_added_twice(tokenizer, kind, row, expected):
    rows = Dataset.from_list([row])
    assert check_rendered(rows, kind, tokenizer, None, "error", "train")[0].to_list() == [row]  # adds none
    adds = copy.deepcopy(tokenizer)
    adds.bos_token = "<s>"
    adds.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", adds.bos_token_id)])
    assert check_rendered(rows, kind, adds, None, "error", "train")[0].to_list() == [expected]
