"""A chat model as judge of which of two answers is better."""

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Annotated, Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.generation.answers import Prompt

from pydantic import AfterValidator, ConfigDict, Field, HttpUrl, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

logger = logging.getLogger(__name__)

INSTRUCTIONS = (
    "You compare two answers to one question. Judge whether they are correct, helpful and honest; neither order nor length is "
    "a merit. Say which is better: [[A]], [[B]], or [[C]] if they are equally good. End with that mark and nothing "
    "else."
)
_QUESTION = "[Question]\n{prompt}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}"
_MARK = re.compile(r"\[\[([ABC])\]\]")
_BARE_MARK = re.compile(r"^\W*([ABC])\W*$")
_CREDIT = {"A": 1.0, "B": 0.0, "C": 0.5, None: 0.5}


@dataclass(config=ConfigDict(extra="forbid"))
class ChatJudge:
    """A chat model at an OpenAI-compatible URL as judge.

    Models prefer the first answer, or the second. Each pair is judged in both orders, and the two verdicts are averaged
    (Zheng et al., 2023).

    Parameters:
        url: of the API, without `/chat/completions`, for instance http://localhost:8000/v1.
        model: its name there.
        api_key_env: the environment variable that holds the API key, where the server needs one.
        instructions: the system prompt; it must ask for [[A]], [[B]] or [[C]].
        max_pairs: the number of pairs to judge, from the first on.
        max_tokens: of a reply.
        timeout_s: seconds to wait for a reply.
        retries: repetitions of a request that failed and may succeed later; the client pauses longer before each.
        parallel: requests at once.
    """

    url: Annotated[str, AfterValidator(lambda url: TypeAdapter(HttpUrl).validate_python(url) and url)]
    model: str
    api_key_env: str | None = None
    instructions: str = INSTRUCTIONS
    max_pairs: int = Field(default=200, gt=0)
    max_tokens: int = Field(default=512, gt=0)
    timeout_s: float = Field(default=60.0, gt=0)
    retries: int = Field(default=3, ge=0)
    parallel: int = Field(default=4, gt=0)

    def compare(self, prompts: Sequence[Prompt], answers: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """Judge every pair of answers in both orders.

        Returns:
            `credits`, (N,): the mean over both orders of 1 for a win of `answers`, 0 for a loss and .5 for a tie;
            `swayed`: the share of pairs in which the order changed the verdict; `unreadable`: the number of replies without
            a mark, which count as ties.

        Raises:
            RecipeError: if the server cannot be reached or rejects the request, or the environment has no API key.
        """
        pairs = list(zip(map(prompt_as_text, prompts), answers, others, strict=True))
        swapped_pairs = [(prompt, other, answer) for prompt, answer, other in pairs]
        self._client  # noqa: B018 - opened once, before the threads ask for it
        with ThreadPoolExecutor(self.parallel) as pool:
            marks = list(pool.map(self._ask, [*pairs, *swapped_pairs]))
        verdicts = [_CREDIT[mark] for mark in marks[: len(pairs)]]
        swapped = [1 - _CREDIT[mark] for mark in marks[len(pairs) :]]
        return {
            "credits": [(one + other) / 2 for one, other in zip(verdicts, swapped, strict=True)],
            "swayed": sum(one != other for one, other in zip(verdicts, swapped, strict=True)) / len(pairs),
            "unreadable": marks.count(None),
        }

    def check_replies(self) -> None:
        """Ask one trivial question, so that a wrong URL or key fails early."""
        if self._ask(("How much is 1 + 1?", "2", "3")) is None:
            logger.warning("judge: %s gave no verdict on a trivial question. Replies without a mark count as ties.", self.model)

    def _ask(self, pair: tuple[str, str, str]) -> str | None:
        """Return the verdict A, B or C; None where the reply has none."""
        prompt, first, second = pair
        question = _QUESTION.format(prompt=prompt, first=first, second=second)
        reply = self._reply([{"role": "system", "content": self.instructions}, {"role": "user", "content": question}])
        marks = _MARK.findall(reply) or _BARE_MARK.findall(reply)
        return marks[-1] if marks else None

    def _reply(self, messages: list[dict[str, str]]) -> str:
        client = self._client
        import openai  # an optional extra, which `_client` has found

        options = {"temperature": 0, "max_tokens": self.max_tokens}
        try:
            reply = client.chat.completions.create(model=self.model, messages=messages, **options)
            content = reply.choices[0].message.content or ""
            return content + ""  # a list of parts is no text
        except openai.APIConnectionError as error:
            problem = f"cannot be reached ({first_line(error.__cause__ or error)}). Fix: start the server, or correct `url`"
        except openai.APIStatusError as error:
            problem = (
                f"status {error.status_code}: {error.response.text[:300].strip()}. Fix: correct `url`, `model` or the API key"
            )
        except (AttributeError, LookupError, TypeError, ValueError, openai.OpenAIError) as error:
            problem = f"the reply does not follow OpenAI's chat API ({first_line(error)}). Fix: correct `url`"
        raise RecipeError(f"judge: {self.url}: {problem}, or name one of `rewards` as judge.")

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise RecipeError(
                "judge: a chat model needs the client of OpenAI. Fix: pip install --editable '.[judge]'"
            ) from error
        key = "unused"  # without a key the client would send OPENAI_API_KEY to whatever `url` names
        if self.api_key_env:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise RecipeError(f"judge: api_key_env: {self.api_key_env} is not set. Fix: set it to your API key.")
        return openai.OpenAI(base_url=self.url, api_key=key, timeout=self.timeout_s, max_retries=self.retries)


def read_chat_judge(entry: dict[str, Any]) -> ChatJudge:
    """Return the judge that a mapping in YAML describes.

    Raises:
        RecipeError: for a key that is missing or unknown, or a value of the wrong type.
    """
    try:
        return TypeAdapter(ChatJudge).validate_python(entry)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"judge: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def prompt_as_text(prompt: Prompt) -> str:
    """Return a prompt as text, with the roles where there are several turns."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
