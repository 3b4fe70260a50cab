"""A chat model that says which of two answers is better, asked in both orders."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.generation.answers import Prompt

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

INSTRUCTIONS = (
    "You compare two answers to one question. Judge whether they are correct, helpful and honest; neither order nor length is "
    "a merit. Say which is better: [[A]], [[B]], or [[C]] if they are equally good. End with that mark and nothing "
    "else."
)
_QUESTION = "[Question]\n{prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}"
_MARK = re.compile(r"\[\[([ABC])\]\]")
_BARE = re.compile(r"\W*([ABC])\W*")
_WORTH = {"A": 1.0, "B": 0.0, "C": 0.5}
_PASSING = (408, 409, 429)  # HTTP statuses that are worth another try, besides all from 500


@dataclass(config=ConfigDict(extra="forbid"))
class ChatJudge:
    """A chat model at an OpenAI-compatible address, local or remote, in the role of a judge (Zheng et al., 2023).

    Models prefer the first answer, or the second; each pair is asked about in both orders, and the two verdicts are averaged.

    Parameters:
        url: up to and without `/chat/completions`, for instance http://localhost:8000/v1.
        model: its name there.
        api_key_env: the environment variable that holds the key, if one is needed.
        instructions: the system prompt; it must ask for [[A]], [[B]] or [[C]].
        max_pairs: how many pairs are judged, the first ones.
        max_tokens: of a reply.
        timeout_s: seconds to wait for a reply.
        retries: how often a request is repeated that failed and may pass later.
        pause_s: seconds before the first repetition; each further pause is twice as long.
        parallel: requests at once.
    """

    url: str
    model: str
    api_key_env: str | None = None
    instructions: str = INSTRUCTIONS
    max_pairs: int = Field(default=200, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    timeout_s: float = Field(default=60.0, gt=0)
    retries: int = Field(default=3, ge=0)
    pause_s: float = Field(default=1.0, ge=0)
    parallel: int = Field(default=4, gt=0)

    def compare(self, prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """Asks about every pair in both orders.

        Args:
            prompts: (N,) texts or conversations.
            answers: (N,) of one policy.
            others: (N,) of another.

        Returns:
            `credits`, (N,): the mean over both orders of 1 for a win of `answers`, 0 for a loss and .5 for a tie;
            `swayed`: the share of pairs in which the order changed the verdict; `unreadable`: how many replies had no mark,
            which count as ties.

        Raises:
            RecipeError: if the address cannot be reached or refuses the request, or the environment lacks the key.
        """
        pairs = list(zip(map(prompt_as_text, prompts), answers, others, strict=True))
        asked = [(p, a, b) for p, a, b in pairs] + [(p, b, a) for p, a, b in pairs]
        with ThreadPoolExecutor(self.parallel) as pool:
            marks = list(pool.map(self._ask, asked))
        worths = [_WORTH.get(mark, 0.5) for mark in marks]
        straight, swapped = worths[: len(pairs)], [1 - worth for worth in worths[len(pairs) :]]
        return {
            "credits": [(one + other) / 2 for one, other in zip(straight, swapped, strict=True)],
            "swayed": sum(one != other for one, other in zip(straight, swapped, strict=True)) / len(pairs),
            "unreadable": marks.count(None),
        }

    def try_out(self) -> None:
        """Asks one trivial question, so that what is wrong is known before hours of sampling, and not after.

        Raises:
            RecipeError: as `compare`; not for a reply without a mark, which is printed.
        """
        if self._ask(("How much is 1 + 1?", "2", "3")) is None:
            print(f"judge: {self.model} was asked a trivial question and replied without a mark; such replies count as ties")

    def _ask(self, pair: tuple[str, str, str]) -> str | None:
        """A, B or C; None where the reply does not say."""
        prompt, first, second = pair
        question = _QUESTION.format(prompt=prompt, first=first, second=second)
        reply = self._post([{"role": "system", "content": self.instructions}, {"role": "user", "content": question}])
        marks = _MARK.findall(reply)
        bare = _BARE.fullmatch(reply)
        return marks[-1] if marks else bare[1] if bare else None

    def _post(self, messages: list[dict[str, str]]) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if self.api_key_env:
            if self.api_key_env not in os.environ:
                raise RecipeError(f"judge: api_key_env: the environment has no {self.api_key_env}: set it to your key")
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return _content(response.read(), address)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_said(error) or error.reason}"
                if error.code < 500 and error.code not in _PASSING:
                    refused = f"judge: {address} refuses the request ({problem}): mend `url`, `model` or the key"
                    raise RecipeError(refused) from None
            except (OSError, http.client.HTTPException) as error:  # no such host, refused, timed out, broken off
                problem = first_line(getattr(error, "reason", error) if isinstance(error, urllib.error.URLError) else error)
        raise RecipeError(
            f"judge: {address} cannot be reached, in {self.retries + 1} attempts ({problem}): start the server, mend `url`, or "
            "name one of `rewards` as judge"
        )


def read_chat_judge(entry: dict[str, Any]) -> ChatJudge:
    """A judge of the mapping in YAML.

    Raises:
        RecipeError: for a key that is missing, unknown, or has a value of the wrong type; for an address that is not of http,
            or malformed.
    """
    try:
        judge = TypeAdapter(ChatJudge).validate_python(entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"judge: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not judge.url.startswith(("http://", "https://")):
        raise RecipeError(f"judge: url: must begin with http:// or https://, found {judge.url!r}")
    if not _is_address(judge.url):
        raise RecipeError(f"judge: url: {judge.url!r} is no address: write it like http://localhost:8000/v1, without spaces")
    return judge


def _is_address(url: str) -> bool:
    """Whether there is a host, a port that is a number if there is one, and nothing that a request could not hold."""
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018 - parsed here, and refused
    except ValueError:
        return False
    return bool(parts.hostname) and url.isascii() and url.isprintable() and " " not in url


def _said(error: urllib.error.HTTPError) -> str:
    """How the body of a refusal begins, if it comes."""
    try:
        return error.read(300).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def _content(body: bytes, address: str) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"] or ""
        return content + ""  # a list of parts, say, is no text
    except (ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"judge: {address} does not answer as OpenAI's interface does: {body[:200]!r}") from error


def prompt_as_text(prompt: Prompt) -> str:
    """A prompt for people: its text, or the turns of a conversation with who speaks, where there are several."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
