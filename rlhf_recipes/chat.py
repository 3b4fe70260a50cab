"""A conversation with policies in a terminal, or through a pipe: commands, answers as they come, and what they score."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.config.chat import ChatArguments
from rlhf_recipes.core.errors import RecipeError, did_you_mean, first_line
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
from transformers import PreTrainedTokenizerBase, TextStreamer

PROMPT = "you> "
BASE = "the base"  # where no policy is, as reference

# What a model writes is shown, and does nothing to the terminal.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_COMMANDS = {
    "/policy": ("NAME", "who answers from here on; without a name, who there is"),
    "/both": ("NAME NAME", "two answer from here on, side by side, each in a conversation of its own"),
    "/score": ("[ANSWER]", "rewards and KL of the last answer; rewards that compare need the right one"),
    "/undo": ("", "takes back the last message and its answer"),
    "/clear": ("", "begins anew"),
    "/help": ("", "this table"),
    "/quit": ("", "ends, as Ctrl-D does; Ctrl-C stops an answer"),
}


@dataclass(frozen=True)
class Turn:
    """A message and the answer to it.

    Parameters:
        message: the user's.
        policy: who answered.
        answer: to it and all that came before.
    """

    message: str
    policy: str
    answer: Answer


@dataclass
class Side:
    """A conversation with a policy, which may take over from another."""

    policy: str
    turns: list[Turn] = field(default_factory=list)


class Chat:
    """Messages and commands, line by line.

    Parameters:
        bank: the base with the policies on it.
        policies: their names, in order; the first one is talked to first.
        rewards: what /score shows, by name.
        arguments: of the recipe.
        console: where it is shown; the terminal by default.

    Raises:
        RecipeError: without policies; for a `kl_reference` that is not there, or a system prompt that the chat template
            does not take.
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
            raise RecipeError("policies: none of them is there: train one first, or add `base: null`")
        self.console = console or Console(highlight=False)
        self.reference = self._choose_reference()
        self.sides = [Side(self.policies[0])]
        self._check_system_prompt()
        torch.manual_seed(arguments.seed)

    def run(self) -> None:
        """Answers until the input ends, or /quit."""
        self.console.print(f"{self._names()}. /help says what can be said besides.", markup=False)
        for line in read_lines(self.console):
            full = False
            try:
                if not self.hear(line):
                    return
            except RecipeError as error:
                self._say(str(error), "red")
            except KeyboardInterrupt:
                self._say("\nstopped", "dim")
            except torch.OutOfMemoryError:
                full = True
            if full:  # not within `except`, where the error still holds what fills it
                release_memory()
                self._say("the GPU has no memory left for so long a conversation: /undo or /clear", "red")

    def hear(self, line: str) -> bool:
        """One line: a message, or a command; whether to go on.

        Raises:
            RecipeError: for an unknown command or policy, or a conversation that is too long.
        """
        line = line.strip()
        if line.startswith("//"):  # a message that begins by a slash
            line = line[1:]
        elif line.startswith("/"):
            command, _, rest = line.partition(" ")
            return self._obey(command, rest.strip())
        if line:
            self._answer(line)
        return True

    # --- Commands ---------------------------------------------------------------------------------------

    def _obey(self, command: str, rest: str) -> bool:
        if command not in _COMMANDS:
            raise RecipeError(
                f"no command {command}{did_you_mean(command, _COMMANDS) or '; /help lists them'} (a message may begin by //)"
            )
        if rest and not _COMMANDS[command][0]:
            raise RecipeError(f"{command} takes nothing behind it")
        if command == "/quit":
            return False
        getattr(self, f"_{command[1:]}")(rest)
        return True

    def _policy(self, name: str) -> None:
        if name:
            self._require(name)
            side = next((side for side in self.sides if side.policy == name), self.sides[0])
            self.sides = [Side(name, side.turns)]
        self._say(self._names(), "dim")

    def _both(self, rest: str) -> None:
        names = rest.split()
        if len(names) != 2 or names[0] == names[1]:
            raise RecipeError(f"/both: name two policies: {', '.join(self.policies)}")
        for name in names:
            self._require(name)
        # each goes on with its own conversation, if it is here
        own = {side.policy: side.turns for side in self.sides}
        self.sides = [Side(name, [*own.get(name, self.sides[0].turns)]) for name in names]
        self._say(self._names(), "dim")

    def _score(self, reference: str) -> None:
        if not self.sides[0].turns:
            raise RecipeError("/score: there is no answer yet")
        columns = {side.turns[-1].policy: self._scores(side, reference or None) for side in self.sides}
        table = Table(box=SIMPLE_HEAD)
        for name in ("", *columns):
            table.add_column(Text(name), overflow="fold")
        for row in next(iter(columns.values())):
            table.add_row(Text(row), *(Text(scores[row]) for scores in columns.values()))
        self.console.print(table)

    def _undo(self, _: str) -> None:
        if not self.sides[0].turns:
            raise RecipeError("/undo: there is nothing to take back")
        for side in self.sides:
            side.turns = side.turns[:-1]
        left = len(self.sides[0].turns)
        self._say(f"taken back; {left} {'message is' if left == 1 else 'messages are'} left", "dim")

    def _clear(self, _: str) -> None:
        self.sides = [Side(side.policy) for side in self.sides]
        self._say("a new conversation", "dim")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for command, (argument, meaning) in _COMMANDS.items():
            table.add_row(Text(f"{command} {argument}".strip(), "bold", no_wrap=True), Text(meaning))
        self.console.print(table)

    # --- Answers ----------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        """Asks every side; where one had no time to say anything, the message is as if it had not been."""
        limits = [self._room(side, message) for side in self.sides]
        show = self._side_by_side() if len(self.sides) > 1 else self._alone()
        with _interruptible() as stopped, show as writers:
            answers = [
                self._draw(side, message, limit, writer, stopped)
                for side, limit, writer in zip(self.sides, limits, writers, strict=True)
            ]
        if not all(answer.ids for answer in answers):
            self._say("stopped; the message is taken back", "dim")
            return
        for side, answer in zip(self.sides, answers, strict=True):
            side.turns = [*side.turns, Turn(message, side.policy, answer)]
            if not answer.ended:
                who = f"{side.policy}: " if len(self.sides) > 1 else ""
                self._say(f"{who}{'stopped' if stopped() else 'cut off'} after {len(answer.ids)} tokens", "dim")

    def _draw(self, side: Side, message: str, limit: int, write: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        if stopped():
            return Answer("", (), False)
        arguments = self.arguments
        with self.bank.use_policy(side.policy) as model:
            return stream(
                model,
                self.bank.tokenizer,
                self._messages(side.turns, message),
                _Writer(self.bank.tokenizer, write),
                stopped,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                max_new_tokens=limit,
            )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[list[Callable[[str], None]]]:
        """Writes an answer after the name of who gives it."""
        self.console.print(Text(f"{self.sides[0].policy}: ", "bold green"), end="")
        try:
            yield [lambda text: self.console.print(Text(text), end="", soft_wrap=True)]
        finally:
            self.console.print()

    @contextlib.contextmanager
    def _side_by_side(self) -> Iterator[list[Callable[[str], None]]]:
        """Writes answers into columns, one after the other; where there is no terminal, when both are done."""
        table = Table(box=SIMPLE_HEAD, expand=True)
        cells = [Text() for _ in self.sides]
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
        """A conversation up to a message that is to be answered."""
        said = [] if self.arguments.system_prompt is None else [("system", self.arguments.system_prompt)]
        for turn in turns:
            said += [("user", turn.message), ("assistant", turn.answer.text.strip())]
        return [{"role": role, "content": content} for role, content in (*said, ("user", message))]

    def _room(self, side: Side, message: str) -> int:
        """How many tokens the answer may have: `max_new_tokens`, or what the model can still read."""
        (ids,) = encode_prompts(self.bank.tokenizer, [self._messages(side.turns, message)])
        most = getattr(base_of(self.bank.model).config.get_text_config(), "max_position_embeddings", None)
        left = self.arguments.max_new_tokens if most is None else min(self.arguments.max_new_tokens, most - len(ids))
        if left < 1:
            raise RecipeError(f"the conversation has {len(ids)} tokens, and the model reads {most}: /undo or /clear")
        return left

    # --- Scores -----------------------------------------------------------------------------------------

    def _scores(self, side: Side, reference: str | None) -> dict[str, str]:
        """What is said of the last answer of a side, by name: each reward, and KL."""
        *before, turn = side.turns
        prompt = self._messages(before, turn.message)
        scores = {name: self._reward(reward, prompt, turn.answer, reference) for name, reward in self.rewards.items()}
        logps = [self._log_prob(name, prompt, turn.answer) for name in (turn.policy, self.reference)]
        kl, tokens = logps[0] - logps[1], len(turn.answer.ids)
        return {**scores, f"KL from {self.reference}": f"{kl:.2f} nats, {kl / tokens:.3f} a token"}

    def _reward(self, reward: NamedReward, prompt: list[dict[str, str]], answer: Answer, reference: str | None) -> str:
        completion = [{"role": "assistant", "content": answer.text}]
        columns: dict[str, Any] = {"completion_ids": [list(answer.ids)], "reference": [reference]}
        try:
            (score,) = score_completions(checked_reward(reward.function, reward.name), [prompt], [completion], **columns)
        except RecipeError as error:
            return str(error)
        missing = "does not apply" if reference else "does not apply (if it compares: /score ANSWER)"
        return missing if score is None else f"{score:.3f}"

    def _log_prob(self, policy: str, prompt: list[dict[str, str]], answer: Answer) -> float:
        with self.bank.use_policy(policy) as model:
            return float(log_probs(model, self.bank.tokenizer, [prompt], [answer])[0])

    # --- Checks and words -------------------------------------------------------------------------------

    def _choose_reference(self) -> str:
        wanted = self.arguments.kl_reference
        if wanted is not None and wanted not in self.policies:
            known = ", ".join(self.policies)
            raise RecipeError(
                f"kl_reference: {wanted!r} is none of the policies ({known}){did_you_mean(wanted, self.policies)}"
            )
        if wanted or "sft" in self.policies:
            return wanted or "sft"
        self.bank.add(BASE, None, "kl_reference")
        return BASE

    def _check_system_prompt(self) -> None:
        try:
            encode_prompts(self.bank.tokenizer, [self._messages([], "message")])
        except TemplateError as error:
            raise RecipeError(f"system_prompt: the chat template takes none: {first_line(error)}") from error

    def _require(self, name: str) -> None:
        if name not in self.policies:
            raise RecipeError(
                f"'{name}' is none of the policies ({', '.join(self.policies)}){did_you_mean(name, self.policies)}"
            )

    def _names(self) -> str:
        now = " and ".join(side.policy for side in self.sides)
        others = [name for name in self.policies if name not in [side.policy for side in self.sides]]
        there = f"; there {'is' if len(others) == 1 else 'are'} also {', '.join(others)}" if others else ""
        return f"You talk to {now}{there}"

    def _say(self, text: str, style: str) -> None:
        self.console.print(Text(text, style))


class _Writer(TextStreamer):
    """Hands an answer on in whole words, without the space before it and without what would steer the terminal."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.begun = write, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        if text:
            self.begun = True
            self.write(text.translate(_CONTROLS))


def read_lines(console: Console) -> Iterator[str]:
    """The lines of the input until it ends; those that nobody types are shown, so that what comes out can be read.

    Ctrl-C gives up the line.
    """
    typed = sys.stdin.isatty()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` a history, and arrow keys)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(Text("\n/quit or Ctrl-D ends", "dim"))
            continue
        if not typed:
            console.print(Text(line.translate(_CONTROLS)))
        yield line


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only sets what is yielded: no pass through the model is broken off in the middle. The second one does."""
    pressed = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
