"""Chat models as judges: both orders, ties, retries, and one message for what goes wrong."""

import sys

from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.evaluation.measurement import choose_judge
from rlhf_recipes.generation.judges import ChatJudge, read_chat_judge
from support.chat_server import NOWHERE, chat_server

import pytest


def prefer_good(question):
    first, second = (question.partition(f"[Answer {name}]\n")[2].partition("\n\n[")[0] for name in "AB")
    return "Both tried. " + ("[[C]]" if first == second else "[[A]]" if first == "good" else "[[B]]")


def test_each_pair_is_judged_in_both_orders():
    with chat_server(prefer_good) as (url, requests):
        judge = ChatJudge(url, "model", parallel=2)
        result = judge.compare(["one", "two", "three"], ["good", "bad", "good"], ["bad", "good", "good"])
    assert result == {"credits": [1.0, 0.0, 0.5], "swayed": 0.0, "unreadable": 0}
    assert len(requests) == 6
    assert requests[0][0] == "/v1/chat/completions"
    assert requests[0][2] | {"messages": None} == {"model": "model", "temperature": 0, "max_tokens": 512, "messages": None}
    assert sum("[Answer A]\ngood\n\n[Answer B]\nbad" in body["messages"][1]["content"] for _, _, body in requests) == 2


@pytest.mark.parametrize(("reply", "swayed", "unreadable"), [("A", 1.0, 0), ("A hard question.", 0.0, 2)])
def test_a_preference_for_a_position_and_replies_without_a_mark_tie(reply, swayed, unreadable):
    with chat_server(lambda question: reply) as (url, _):
        result = ChatJudge(url, "model").compare(["one"], ["x"], ["z"])
    assert result == {"credits": [0.5], "swayed": swayed, "unreadable": unreadable}


def test_a_judge_is_checked_by_one_question(caplog):
    with chat_server(lambda question: "[[A]]" if "1 + 1" in question else "?") as (url, requests):
        choose_judge(EvaluateArguments(judge={"url": url, "model": "m"}), {})
    assert len(requests) == 1
    assert not caplog.text
    with chat_server(lambda question: "Two.") as (url, _):
        ChatJudge(url, "a-model").check_replies()
    assert "judge: a-model" in caplog.text


def test_a_busy_server_is_asked_again_and_only_the_named_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    monkeypatch.setenv("A_KEY", "secret")
    with chat_server(prefer_good, statuses=[503, 429]) as (url, requests):
        judge = ChatJudge(url, "model", api_key_env="A_KEY", parallel=1)
        assert judge.compare(["one"], ["good"], ["bad"])["credits"] == [1.0]
        ChatJudge(url, "model").compare(["one"], ["good"], ["bad"])
    assert [authorization for _, authorization, _ in requests[:4]] == ["Bearer secret"] * 4
    assert "of another server" not in str(requests)


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ({"statuses": [404, 404]}, {}, r"judge: http.*status 404: no such model"),
        ({"statuses": [500, 500]}, {"retries": 0}, r"judge: http.*status 500"),
        ({"cut_off": True}, {"retries": 0}, r"judge: http.*cannot be reached \(.*body"),
        ({"reply": lambda question: ["[[A]]"]}, {}, r"judge: http.*does not follow OpenAI's chat API"),
        (None, {"retries": 1}, r"judge: http.*cannot be reached \(.*refused"),
        (None, {"api_key_env": "NO_SUCH_KEY"}, "judge: api_key_env: .*NO_SUCH_KEY"),
    ],
)
def test_a_failing_judge_is_one_message(server, options, message):
    if server is None:
        with pytest.raises(RecipeError, match=message):
            ChatJudge(NOWHERE, "model", **options).compare(["one"], ["x"], ["y"])
        return
    with chat_server(**{"reply": prefer_good} | server) as (url, _), pytest.raises(RecipeError, match=message):
        ChatJudge(url, "model", **options).compare(["one"], ["x"], ["y"])


def test_a_missing_client_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RecipeError, match=r"judge: .*pip install --editable '.\[judge\]'"):
        ChatJudge(NOWHERE, "model").check_replies()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"url": "http://x"}, "judge: model"),
        ({"url": "http://x", "model": "m", "modle": 1}, "judge: modle"),
        ({"url": "file:///etc/passwd", "model": "m"}, "judge: url"),
        ({"url": "http://x", "model": "m", "retries": -1}, "judge: retries"),
        ({"url": "http://my host/v1", "model": "m"}, "judge: url"),
        ({"url": "http://host:80a/v1", "model": "m"}, "judge: url"),
    ],
)
def test_the_yaml_of_a_judge_is_checked(entry, message):
    with pytest.raises(RecipeError, match=message):
        read_chat_judge(entry)


def test_an_unknown_reward_as_judge_is_rejected():
    with pytest.raises(RecipeError, match="judge: 'nobody'"):
        choose_judge(EvaluateArguments(judge="nobody", rewards=["rlhf_recipes.rewards.exact_match"]), {})
