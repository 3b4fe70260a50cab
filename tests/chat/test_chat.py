"""Chats: turns, commands, scores, pipes and Ctrl-C."""

import functools
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

from rlhf_recipes.chat import Chat, session
from rlhf_recipes.chat.terminal import Writer, read_lines
from rlhf_recipes.config.chat import ChatArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.evaluation.named_rewards import load_named_rewards
from rlhf_recipes.generation.answers import log_probs
from rlhf_recipes.generation.policies import load_policy_bank, read_policies
from rlhf_recipes.models.tokenizer import PLAIN_CHAT_TEMPLATE, load_tokenizer
from support import ROOT

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

NAME = "rlhf_recipes.tiny.base"
BASE = resolve_path(NAME)
MODEL = ModelConfig(NAME, dtype="float32")
QUESTION = "What does Vokimo do?"


def length(prompts, completions, **columns):
    """A reward: how long an answer is."""
    return [float(len(completion[-1]["content"])) for completion in completions]


def broken(prompts, completions, **columns):
    raise ValueError("nothing works")


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """The base and two adapters; `sft` hardly changes it."""
    policies = {"base": None}
    for name, size in (("sft", 0.02), ("ppo", 0.1)):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, target_modules="all-linear"))
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data.normal_(std=size)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
        policies[name] = str(folder)
    arguments = ChatArguments(policies=policies)
    return load_policy_bank(MODEL, arguments, read_policies(policies), load_tokenizer(MODEL, arguments))


@pytest.fixture
def talk(bank):
    """Make a chat, and a function that handles lines and returns what is shown."""

    def make(rewards=(), policies=("base", "sft", "ppo"), width=100, **options):
        shown = io.StringIO()
        arguments = ChatArguments(policies=dict.fromkeys(policies), **{"max_new_tokens": 12, "temperature": 0.0} | options)
        named = load_named_rewards(list(rewards), bank)
        chat = Chat(bank, arguments.policies, named, arguments, Console(file=shown, width=width, highlight=False))

        def say(*lines):
            shown.seek(0)
            shown.truncate()
            for line in lines:
                assert chat.handle(line) is True
            return shown.getvalue()

        return chat, say

    return make


# --- Turns -----------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_policy(bank, talk):
    chat, say = talk()
    shown = say(QUESTION)
    (turn,) = chat.sides[0].turns
    assert shown == f"base: {turn.answer.text.strip()}\n"
    assert (turn.message, turn.policy, turn.answer.ended) == (QUESTION, "base", True)
    tokenizer = bank.tokenizer
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True)
    expected = AutoModelForCausalLM.from_pretrained(BASE).generate(
        torch.tensor([ids["input_ids"]]), max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id
    )
    assert turn.answer.ids == tuple(expected[0, len(ids["input_ids"]) :].tolist())


def test_a_prompt_holds_all_turns_before(talk):
    chat, say = talk()
    say(QUESTION, "What is the trade of Pewufa?")
    first, second = chat.sides[0].turns
    assert chat._messages([first], second.message) == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.answer.text.strip()},
        {"role": "user", "content": "What is the trade of Pewufa?"},
    ]


def test_answers_are_shown_word_by_word(talk):
    chat, _ = talk(temperature=4.0)
    pieces = []
    chat.console.print = lambda text="", **_: pieces.append(str(text))
    chat.handle(QUESTION)
    assert len(pieces) > 3
    assert "".join(pieces).startswith("base: ")


def test_what_the_template_writes_is_not_shown(bank, talk, monkeypatch):
    """As Qwen3's empty thought."""
    chat, say = talk(REWARDS)
    tokenizer = bank.tokenizer
    template = tokenizer.chat_template.replace("' ' + message['content']", "' Guess: ' + message['content']")
    monkeypatch.setattr(tokenizer, "chat_template", template)

    def generate(input_ids, streamer, **_):
        ids = tokenizer(" Guess: Guess: Rome.", add_special_tokens=False)["input_ids"]
        written = torch.tensor([*ids, tokenizer.eos_token_id])
        for value in (input_ids, *written[:, None]):
            streamer.put(value)
        streamer.end()
        return torch.cat([input_ids, written[None]], dim=1)

    with monkeypatch.context() as patch:
        patch.setattr(bank.model, "generate", generate)
        assert say(QUESTION) == "base: Guess: Rome.\n"
    assert chat._messages(chat.sides[0].turns, "?")[1]["content"] == "Guess: Rome."
    assert re.search(r"right +1.000", say("/score Guess: Rome."))


def test_sampling_follows_the_seed(talk):
    once, again, other = ([talk(temperature=3.0, seed=seed)[1](QUESTION) for _ in range(1)] for seed in (1, 1, 2))
    assert once == again != other


def test_a_small_top_p_is_greedy(talk):
    assert talk(temperature=1.0, top_p=1e-6)[1](QUESTION) == talk()[1](QUESTION)


def test_undo_and_clear(talk):
    chat, say = talk()
    say(QUESTION, "Where is the home of Senamu?")
    assert "messages left: 1" in say("/undo")
    assert [turn.message for turn in chat.sides[0].turns] == [QUESTION]
    say("/clear")
    assert chat.sides[0].turns == []
    with pytest.raises(RecipeError, match="/undo"):
        say("/undo")


def test_a_cut_off_answer_is_marked(talk):
    assert "cut off after 1 tokens" in talk(max_new_tokens=1)[1](QUESTION)


def test_a_conversation_that_is_too_long_is_refused_before_the_model_fails(talk):
    chat, say = talk()
    with pytest.raises(RecipeError, match=r"\d+ tokens.*256"):
        say("a " * 300)
    assert chat.sides[0].turns == []
    ids = [2 + len(chat.bank.tokenizer("x " * n)["input_ids"]) for n in range(300)]
    assert chat._token_limit(chat.sides[0], "x " * next(n for n, length in enumerate(ids) if length > 235)) < 30


def test_control_characters_are_replaced():
    written = []
    writer = Writer(AutoTokenizer.from_pretrained(BASE), written.append, [{"role": "user", "content": QUESTION}])
    for text in ("  ", " a\x1b[2J\x9b", "\tb\n\x07"):
        writer.on_finalized_text(text)
    assert "".join(written) == "a\ufffd[2J\ufffd\tb\n\ufffd"


# --- Who answers -----------------------------------------------------------------------------------------


def test_another_policy_continues_the_conversation(talk):
    chat, say = talk()
    say(QUESTION, "/policy ppo", QUESTION)
    assert [turn.policy for turn in chat.sides[0].turns] == ["base", "ppo"]
    assert "You talk to ppo. Others: base, sft." in say("/policy")


def test_two_policies_answer_side_by_side_in_their_own_conversations(talk):
    chat, say = talk()
    say(QUESTION)
    shown = say("/both base ppo", "Where is the home of Senamu?")
    left, right = chat.sides
    assert (left.turns[0], left.turns[1].policy, right.turns[1].policy) == (right.turns[0], "base", "ppo")
    assert re.search(r"base +ppo", shown)
    words = [side.turns[1].answer.text.split()[0] for side in chat.sides]
    assert re.search(rf"^ +{re.escape(words[0])}.* {re.escape(words[1])}", shown, re.M)
    assert max(map(len, shown.splitlines())) <= 100
    say("/policy ppo")
    assert chat.sides[0].turns is right.turns


def test_columns_fit_a_narrow_terminal(talk):
    _, say = talk(width=30, temperature=5.0)
    assert max(map(len, say("/both base ppo", QUESTION).splitlines())) <= 30


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/polcy ppo", "/polcy: .*'/policy'"),
        ("/policy pp", "'pp' .*base, sft, ppo.*'ppo'"),
        ("/both base", "/both: .*base, sft, ppo"),
        ("/both base base", "/both: "),
        ("/both base nobody", "'nobody'"),
        ("/score", "/score: "),
        ("/clear all", "/clear: "),
        ("/", "/: .*/help"),
    ],
)
def test_a_wrong_command_is_one_message(talk, line, message):
    with pytest.raises(RecipeError, match=message):
        talk()[1](line)


def test_a_message_may_begin_with_a_slash(talk):
    chat, say = talk()
    say("//home of Senamu")
    assert chat.sides[0].turns[0].message == "/home of Senamu"


# --- Scores ----------------------------------------------------------------------------------------------

REWARDS = ({"path": f"{__name__}.length"}, {"path": "rlhf_recipes.rewards.normalised_match", "name": "right"})


def test_score_shows_each_reward_and_the_kl(bank, talk):
    chat, say = talk(REWARDS)
    say("/policy ppo", QUESTION)
    shown = say("/score")
    (turn,) = chat.sides[0].turns
    assert re.search(rf"length +{float(len(turn.answer.text)):.3f}", shown)
    assert re.search(r"right +does not apply", shown)
    prompt = [{"role": "user", "content": QUESTION}]
    logps = []
    for name in ("ppo", "sft"):
        with bank.use_policy(name) as model:
            logps += [log_probs(model, bank.tokenizer, [prompt], [turn.answer])[0]]
    kl = logps[0] - logps[1]
    assert f"{kl:.2f} nats, {kl / len(turn.answer.ids):.3f} a token" in shown
    assert "KL from sft" in shown
    assert abs(kl) > 0.01
    assert re.search(r"right +1.000", say(f"/score {turn.answer.text}"))


def test_score_is_that_of_the_policy_that_answered(talk):
    _, say = talk()
    say(QUESTION)
    before = say("/score")
    assert say("/policy ppo", "/score").endswith(before)


def test_score_of_two_policies(talk):
    _, say = talk(REWARDS)
    shown = say("/both sft ppo", QUESTION, "/score")
    assert re.search(r"KL from sft +-?0.00 nats, -?0.000 a token +-?\d+\.\d+ nats", shown)


def test_a_reward_that_fails_does_not_end_the_chat(talk):
    _, say = talk([{"path": f"{__name__}.broken"}])
    assert "nothing works" in " ".join(say(QUESTION, "/score").split())


def test_without_an_sft_policy_kl_is_measured_from_the_base(bank, talk):
    _, say = talk(policies=("ppo",))
    assert "KL from the base" in say(QUESTION, "/score")
    bank._adapters.pop(session.BASE)  # the next test has the same bank


# --- What the recipe is given ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policies", "{}"), "policies: "),
        (("--policies", '{"a": {"path": "runs/nowhere", "optional": true}}'), "policies: none of them exists"),
        (("--policies", '{"a": "runs/nowhere/sft"}'), "policies: a: runs/nowhere/sft"),
        (("--policies", '{"a": null, "b": {"best_of": {"policy": "a", "n": 2}}}'), "policies: b: "),
        (("--kl_reference", "bsae"), "kl_reference: 'bsae'"),
        (("--system_prompt", "Be kind."), "system_prompt: the chat template rejects it"),
        (("--temperature", "-1"), "temperature: -1.0: "),
        (("--top_p", "0"), "top_p: 0.0: "),
        (("--max_new_tokens", "0"), "max_new_tokens: 0: "),
    ],
)
def test_wrong_arguments_are_one_message(launch, options, message):
    status, error = launch("chat", *options)
    assert status == 2
    assert message in error


def test_a_base_without_a_template_gets_the_plain_one(talk, bank, monkeypatch):
    monkeypatch.setattr(bank.tokenizer, "chat_template", PLAIN_CHAT_TEMPLATE)
    chat, _ = talk(system_prompt="Be kind.")
    text = bank.tokenizer.apply_chat_template(chat._messages([], "Hello."), tokenize=False, add_generation_prompt=True)
    assert text.endswith("System: Be kind.\nUser: Hello.\nAssistant:")


def test_a_full_gpu_does_not_end_the_chat(talk, monkeypatch):
    chat, _ = talk()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session, "stream", full)
    monkeypatch.setattr(session, "read_lines", lambda _: [QUESTION, "/policy"])
    chat.run()
    assert "memory of the GPU" in chat.console.file.getvalue()
    assert chat.sides[0].turns == []


# --- Lines and signals -----------------------------------------------------------------------------------


def test_lines_of_a_pipe_are_shown(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\x1b[31mtwo"))
    assert list(read_lines(Console(file=shown))) == ["one", "\x1b[31mtwo"]
    assert shown.getvalue() == "one\n\N{REPLACEMENT CHARACTER}[31mtwo\n\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    chat, say = talk(temperature=3.0, max_new_tokens=100)
    put, tokens = Writer.put, []

    def press(self, value):
        tokens.append(value)
        if len(tokens) == 4:  # the prompt, and three tokens
            os.kill(os.getpid(), signal.SIGINT)
        put(self, value)

    monkeypatch.setattr(Writer, "put", press)
    before = signal.getsignal(signal.SIGINT)
    shown = say("a b c")
    assert re.search(r"stopped after \d tokens", shown)
    assert len(chat.sides[0].turns[0].answer.ids) < 8
    assert signal.getsignal(signal.SIGINT) is before
    say(QUESTION)
    assert len(chat.sides[0].turns) == 2


POLICIES = ("--policies", '{"base": null, "b": null}')


def test_the_recipe_reads_a_pipe(launch, monkeypatch):
    script = f"{QUESTION}\n/nonsense\n\n/policy b\n{QUESTION}\n".encode() + b"\xff\n/score\n/quit\nnever read\n"
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script), encoding="utf-8"))
    monkeypatch.setattr(session, "Console", lambda **options: Console(file=shown, width=100, **options))
    status, error = launch("chat", *POLICIES, "--temperature", 0, "--rewards", "[]")
    assert status == 0, error
    assert re.search(r"What does Vokimo do\?\nbase: \w+", shown.getvalue())
    assert "/nonsense: unknown command" in shown.getvalue()
    assert re.search(r"b: \w+", shown.getvalue())
    assert "KL from the base" in shown.getvalue()
    assert "never read" not in shown.getvalue()


def test_the_recipe_in_a_terminal():
    command = [sys.executable, ROOT / "recipes" / "chat.py", *POLICIES, "--max_new_tokens", "200", "--temperature", "4"]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}}
    own, theirs = pty.openpty()
    # a test run in the background ignores Ctrl-C, and so would its children
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, **options)
    os.close(theirs)
    shown, read = b"", 0

    def until(text, seconds=60):
        nonlocal shown, read
        end = time.monotonic() + seconds
        while text not in shown[read:] and time.monotonic() < end:
            if select.select([own], [], [], 0.2)[0]:
                shown += os.read(own, 65536)
        assert text in shown[read:], shown.decode()
        read = shown.index(text, read) + len(text)

    try:
        until(b"you> ")
        os.write(own, f"{QUESTION}\n".encode())
        until(b"base: ")
        until(b"you> ")
        time.sleep(1)  # Python's `input` misses a signal that comes between its prompt and its wait
        os.kill(process.pid, signal.SIGINT)  # at the prompt: the line is given up
        until(b"Ctrl-D ends")
        until(b"you> ")
        os.write(own, b"/both base b\n")
        until(b"You talk to base and b")
        until(b"you> ")
        os.write(own, f"{QUESTION}\n".encode())
        until(b"you> ")
        os.write(own, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(own)
