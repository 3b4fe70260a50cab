"""TRL's protocol for reward functions: call them, and check what they return."""

import asyncio
import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_recipes.core.errors import RecipeError

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

Text = str | list[dict[str, Any]]
"""A plain text, or a conversation."""
Reward = Callable[..., Any]
"""A function of keyword arguments, to a `list[float | None]` or a coroutine of one."""
TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL passes to every reward function, besides the columns of the dataset."""

_LARGEST = torch.finfo(torch.float32).max  # TRL stores rewards in fp32


def checked_reward(reward: Reward, name: str | None = None) -> Reward:
    """Wrap a reward: it must return one finite number or None per completion.

    TRL takes a NaN for "not applicable". Numbers may come as a list, a tensor or an array. Asynchronous rewards stay
    asynchronous, and a reward that can be pickled still can.

    Args:
        reward: a callable with TRL's signature.
        name: under which TRL logs it; by default its own.

    Raises:
        RecipeError: (from the call) with the name of the reward, the row in the batch, and the prompt.
    """
    return (_CheckedAsync if is_async_callable(reward) else _Checked)(reward, name or get_callable_name(reward))


def score_completions(reward: Reward, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
    """Return the scores of any reward, synchronous or not, outside of training.

    Prompts, completions and the columns of the data have one element each per row. `reward` comes from `checked_reward`.
    """
    options = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
    scores = reward(prompts=prompts, completions=completions, **columns, **options)
    return asyncio.run(scores) if is_async_callable(reward) else scores


def _ignore(*arguments: Any) -> None:
    """Stand in for the functions by which rewards log in training."""


class _Checked:
    def __init__(self, reward: Reward, name: str):
        self.reward, self.__name__ = reward, name
        self.__doc__ = inspect.getdoc(getattr(reward, "func", reward))  # a `partial` has the docstring of its class

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        with _reward_errors(self.__name__):
            scores = self.reward(prompts=prompts, completions=completions, **columns)
        return _check_scores(scores, prompts, self.__name__)


class _CheckedAsync(_Checked):
    async def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        with _reward_errors(self.__name__):
            scores = await self.reward(prompts=prompts, completions=completions, **columns)
        return _check_scores(scores, prompts, self.__name__)


@contextlib.contextmanager
def _reward_errors(name: str) -> Iterator[None]:
    """Turn an error inside a reward into one line with its place."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ": does it take the data's columns?"
        raise RecipeError(f"the reward {name} failed: {error!r}{place}") from error


def _check_scores(scores: Any, prompts: list[Text], name: str) -> list[float | None]:
    scores = _to_python(scores)
    if not isinstance(scores, list | tuple) or len(scores) != len(prompts):
        returned = f"{len(scores)} scores" if isinstance(scores, list | tuple) else type(scores).__name__
        raise RecipeError(f"the reward {name} returned {returned}. Fix: return a list of {len(prompts)}, one per completion")
    scores = [_to_python(score) for score in scores]
    for row, score in enumerate(scores):
        if score is not None and not (isinstance(score, int | float) and abs(score) <= _LARGEST):
            raise RecipeError(
                f"the reward {name} returned {score!r} for completion {row} of the batch. Fix: return a finite number, or None "
                f"where it does not apply. The prompt: {prompts[row]!r:.200}"
            )
    return [None if score is None else float(score) for score in scores]


def _to_python(value: Any) -> Any:
    """Convert tensors, arrays and their numbers to Python's types."""
    return value.tolist() if hasattr(value, "tolist") else value
