"""A conversation with one or two policies: commands, answers and their scores."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.chat.terminal import Write, Writer, interruptible, read_lines
from rlhf_recipes.config.chat import ChatArguments
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.evaluation.named_rewards import NamedReward
from rlhf_recipes.generation.answers import Answer, encode_prompts, log_probs, stream
from rlhf_recipes.generation.policies import Policy, PolicyBank
from rlhf_recipes.models.backbone import base_of
from rlhf_recipes.models.loading import release_memory
from rlhf_recipes.rewards.protocol import checked_reward, score_completions

import torch
from jinja2 import TemplateError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

BASE = "the base"  # as reference, where no policy is one

_COMMANDS = {
    "/policy": ("NAME", "change who answers, in the same conversation; without a name, show who does"),
    "/both": ("NAME NAME", "let two policies answer side by side, each in its own conversation"),
    "/score": ("[ANSWER]", "show rewards and KL of the last answer; ANSWER is the right one, for rewards that compare"),
    "/undo": ("", "take back the last message and its answer"),
    "/clear": ("", "start a new conversation"),
    "/help": ("", "show this table"),
    "/quit": ("", "end, as Ctrl-D does; Ctrl-C stops an answer"),
}


@dataclass(frozen=True)
class Turn:
    """A message of the user, and a policy's answer to the conversation so far."""

    message: str
    policy: str
    answer: Answer


@dataclass
class Side:
    """A conversation with a policy, which may take over from another."""

    policy: str
    turns: list[Turn] = field(default_factory=list)


class Chat:
    """A chat, one line of input at a time. The first of `policies` answers first.

    Raises:
        RecipeError: without policies; for an unknown `kl_reference`; for a system prompt that the chat template rejects.
    """

    def __init__(
        self,
        bank: PolicyBank,
        policies: dict[str, Policy],
        rewards: dict[str, NamedReward],
        arguments: ChatArguments,
        console: Console | None = None,
    ):
        self.bank, self.policies, self.rewards, self.arguments = bank, list(policies), rewards, arguments
        if not self.policies:
            raise RecipeError("policies: none of them exists. Fix: train one, or add `base: null`.")
        self.console = console or Console(highlight=False)
        if arguments.kl_reference:
            self._check_policies(arguments.kl_reference, key="kl_reference: ")
        self.reference = arguments.kl_reference or "sft"
        if self.reference not in self.policies:
            self.reference = BASE
            bank.add(BASE, None, "kl_reference")
        self.sides = [Side(self.policies[0])]
        with error_context("system_prompt: the chat template rejects it", TemplateError):
            encode_prompts(bank.tokenizer, [self._messages([], "message")])
        torch.manual_seed(arguments.seed)

    def run(self) -> None:
        """Answer until the input ends, or /quit."""
        self._print(f"{self._status()} /help shows the commands.")
        for line in read_lines(self.console):
            out_of_memory = False
            try:
                if not self.handle(line):
                    return
            except RecipeError as error:
                self._print(str(error), "red")
            except KeyboardInterrupt:
                self._print("\nstopped", "dim")
            except torch.OutOfMemoryError:
                out_of_memory = True
            if out_of_memory:  # not within `except`, where the error still holds the tensors
                release_memory()
                self._print("The conversation is too long for the memory of the GPU: /undo or /clear", "red")

    def handle(self, line: str) -> bool:
        """Answer a message, or run a command. Returns False for /quit.

        Raises:
            RecipeError: for an unknown command or policy, or a conversation that is too long.
        """
        line = line.strip()
        if not line.startswith("/") or line.startswith("//"):
            if line:
                self._answer(line[1:] if line.startswith("//") else line)
            return True
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command not in _COMMANDS:
            hint = did_you_mean(command, _COMMANDS) or "; /help shows them"
            raise RecipeError(f"{command}: unknown command{hint} (begin a message with // for a slash)")
        if rest and not _COMMANDS[command][0]:
            raise RecipeError(f"{command}: takes no argument")
        if command in ("/score", "/undo") and not self.sides[0].turns:
            raise RecipeError(f"{command}: there is no answer yet")
        if command == "/quit":
            return False
        getattr(self, f"_{command[1:]}")(rest)
        return True

    # --- Commands ---------------------------------------------------------------------------------------

    def _policy(self, name: str) -> None:
        if name:
            self._check_policies(name)
            side = next((side for side in self.sides if side.policy == name), self.sides[0])
            self.sides = [Side(name, side.turns)]
        self._print(self._status(), "dim")

    def _both(self, rest: str) -> None:
        names = rest.split()
        if len(names) != 2 or names[0] == names[1]:
            raise RecipeError(f"/both: name two policies of {', '.join(self.policies)}")
        self._check_policies(*names)
        turns = {side.policy: side.turns for side in self.sides}  # each continues its own conversation, if it has one
        self.sides = [Side(name, [*turns.get(name, self.sides[0].turns)]) for name in names]
        self._print(self._status(), "dim")

    def _score(self, reference: str) -> None:
        columns = {side.turns[-1].policy: self._scores(side, reference or None) for side in self.sides}
        table = Table(box=SIMPLE_HEAD)
        for name in ("", *columns):
            table.add_column(Text(name), overflow="fold")
        for row in next(iter(columns.values())):
            table.add_row(Text(row), *(Text(scores[row]) for scores in columns.values()))
        self.console.print(table)

    def _undo(self, _: str) -> None:
        for side in self.sides:
            side.turns = side.turns[:-1]
        self._print(f"taken back; messages left: {len(self.sides[0].turns)}", "dim")

    def _clear(self, _: str) -> None:
        self.sides = [Side(side.policy) for side in self.sides]
        self._print("a new conversation", "dim")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, (argument, meaning) in _COMMANDS.items():
            table.add_row(Text(f"{command} {argument}".strip(), "bold", no_wrap=True), Text(meaning))
        self.console.print(table)

    def _status(self) -> str:
        active = [side.policy for side in self.sides]
        others = [name for name in self.policies if name not in active]
        return f"You talk to {' and '.join(active)}." + (f" Others: {', '.join(others)}." if others else "")

    def _check_policies(self, *names: str, key: str = "") -> None:
        for name in names:
            if name not in self.policies:
                known = f"{', '.join(self.policies)}{did_you_mean(name, self.policies)}"
                raise RecipeError(f"{key}{name!r} is none of the policies {known}")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))

    # --- Answers ----------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        """Let every side answer; take the message back if one has no token yet."""
        limits = [self._token_limit(side, message) for side in self.sides]
        with interruptible() as stopped, self._columns() if len(self.sides) > 1 else self._single() as writers:
            answers = [
                self._stream(side, message, limit, write, stopped)
                for side, limit, write in zip(self.sides, limits, writers, strict=True)
            ]
        if not all(answer.ids for answer in answers):
            self._print("stopped; the message is taken back", "dim")
            return
        for side, answer in zip(self.sides, answers, strict=True):
            side.turns = [*side.turns, Turn(message, side.policy, answer)]
            if not answer.ended:
                self._print(f"{side.policy}: {'stopped' if stopped() else 'cut off'} after {len(answer.ids)} tokens", "dim")

    def _stream(self, side: Side, message: str, limit: int, write: Write, stopped: Callable[[], bool]) -> Answer:
        if stopped():
            return Answer("", (), False)
        prompt = self._messages(side.turns, message)
        with self.bank.use_policy(side.policy) as model:
            return stream(
                model,
                self.bank.tokenizer,
                prompt,
                Writer(self.bank.tokenizer, write, prompt),
                stopped,
                temperature=self.arguments.temperature,
                top_p=self.arguments.top_p,
                max_new_tokens=limit,
            )

    @contextlib.contextmanager
    def _single(self) -> Iterator[list[Write]]:
        """Yield a writer that shows an answer after the name of its policy."""
        self.console.print(Text(f"{self.sides[0].policy}: ", "bold green"), end="")
        try:
            yield [lambda text: self.console.print(Text(text), end="", soft_wrap=True)]
        finally:
            self.console.print()

    @contextlib.contextmanager
    def _columns(self) -> Iterator[list[Write]]:
        """Yield a writer for each column. Without a terminal, show them at the end."""
        table, cells = Table(box=SIMPLE_HEAD, expand=True), [Text() for _ in self.sides]
        for side in self.sides:
            table.add_column(Text(side.policy, "bold green"), ratio=1, overflow="fold")
        table.add_row(*cells)
        if not self.console.is_terminal:
            yield [cell.append for cell in cells]
            self.console.print(table)
            return
        with Live(table, console=self.console, auto_refresh=False) as live:
            yield [lambda text, cell=cell: (cell.append(text), live.refresh()) for cell in cells]

    def _messages(self, turns: list[Turn], message: str) -> list[dict[str, str]]:
        """Return a conversation that ends with a message to answer."""
        messages = [] if self.arguments.system_prompt is None else [("system", self.arguments.system_prompt)]
        for turn in turns:
            messages += [("user", turn.message), ("assistant", turn.answer.text.strip())]
        return [{"role": role, "content": content} for role, content in (*messages, ("user", message))]

    def _token_limit(self, side: Side, message: str) -> int:
        """Return `max_new_tokens`, or what is left of the model's context."""
        (ids,) = encode_prompts(self.bank.tokenizer, [self._messages(side.turns, message)])
        context = getattr(base_of(self.bank.model).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        limit = min(self.arguments.max_new_tokens, context - len(ids))
        if limit < 1:
            raise RecipeError(f"the conversation has {len(ids)} tokens, and the model reads {context}: /undo or /clear")
        return limit

    # --- Scores -----------------------------------------------------------------------------------------

    def _scores(self, side: Side, reference: str | None) -> dict[str, str]:
        """Return each reward of the last answer, and its KL, as text."""
        *before, turn = side.turns
        prompt = self._messages(before, turn.message)
        scores = {name: self._reward(reward, prompt, turn.answer, reference) for name, reward in self.rewards.items()}
        kl = self._log_prob(turn.policy, prompt, turn.answer) - self._log_prob(self.reference, prompt, turn.answer)
        return {**scores, f"KL from {self.reference}": f"{kl:.2f} nats, {kl / len(turn.answer.ids):.3f} a token"}

    def _reward(self, reward: NamedReward, prompt: list[dict[str, str]], answer: Answer, reference: str | None) -> str:
        completions, function = [[{"role": "assistant", "content": answer.text}]], checked_reward(reward.function, reward.name)
        columns: dict[str, Any] = {"completion_ids": [list(answer.ids)], "reference": [reference]}
        try:
            (score,) = score_completions(function, [prompt], completions, **columns)
        except RecipeError as error:
            return str(error)
        if score is None:
            return "does not apply" if reference else "does not apply (if it compares: /score ANSWER)"
        return f"{score:.3f}"

    def _log_prob(self, policy: str, prompt: list[dict[str, str]], answer: Answer) -> float:
        with self.bank.use_policy(policy) as model:
            return float(log_probs(model, self.bank.tokenizer, [prompt], [answer])[0])
