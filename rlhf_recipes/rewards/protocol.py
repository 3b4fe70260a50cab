"""Rewards that name the step and the sample where they fail."""

import asyncio
import contextlib
import inspect
import traceback
from collections.abc import Iterator
from typing import Any

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.rewards.functions import Reward, Text

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

_LARGEST = torch.finfo(torch.float32).max  # TRL keeps rewards in this type
_SHOWN = 200  # characters of a prompt in an error


def checked_reward(reward: Reward, name: str | None = None) -> Reward:
    """`reward`, which stops the run if it returns anything but one finite number, or None, for each completion.

    Without it a NaN passes for "not applicable". Numbers may come as a list, a tensor or an array. An asynchronous reward stays
    one, and what can be pickled stays so.

    Args:
        reward: a function or other callable with TRL's signature.
        name: under which TRL logs it; its own by default.

    Raises:
        RecipeError: (from the call) with the name of the reward, the number of the completion in the batch, and its prompt.
    """
    return (_CheckedAsync if is_async_callable(reward) else _Checked)(reward, name or get_callable_name(reward))


def score_completions(reward: Reward, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
    """The scores of completions by a reward, of any sort, outside of training, where nothing is logged.

    Args:
        reward: `checked_reward`, asynchronous or not.
        prompts: (N,).
        completions: (N,).
        columns: (N,) each, of the data.

    Raises:
        RecipeError: as in `checked_reward`.
    """
    options = {"trainer_state": None, "log_extra": _unlogged, "log_metric": _unlogged}
    scores = reward(prompts=prompts, completions=completions, **columns, **options)
    return asyncio.run(scores) if is_async_callable(reward) else scores


def _unlogged(*arguments: Any) -> None:
    """Where rewards log to, in training."""


class _Checked:
    def __init__(self, reward: Reward, name: str):
        self.reward, self.__name__ = reward, name
        self.__doc__ = inspect.getdoc(getattr(reward, "func", reward))  # of a function with its arguments, the function's

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        with _named(self.__name__):
            scores = self.reward(prompts=prompts, completions=completions, **columns)
        return _check_scores(scores, prompts, self.__name__)


class _CheckedAsync(_Checked):
    async def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        with _named(self.__name__):
            scores = await self.reward(prompts=prompts, completions=completions, **columns)
        return _check_scores(scores, prompts, self.__name__)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Says of an error in whose reward it happened, and where: the recipes print no traceback."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ": does it take the data's columns?"
        raise RecipeError(f"the reward {name} failed: {error!r}{place}") from error


def _check_scores(scores: Any, prompts: list[Text], name: str) -> list[float | None]:
    scores = _plain(scores)
    if not isinstance(scores, list | tuple):
        raise RecipeError(f"the reward {name} returned a {type(scores).__name__}, not a list of {len(prompts)} numbers")
    if len(scores) != len(prompts):
        raise RecipeError(f"the reward {name} returned {len(scores)} numbers for {len(prompts)} completions: one for each")
    scores = [_plain(score) for score in scores]
    for row, score in enumerate(scores):
        if score is not None and not (isinstance(score, int | float) and abs(score) <= _LARGEST):
            raise RecipeError(
                f"the reward {name} returned {score!r} for completion {row} of the batch, and must return a finite number, or "
                f"None where it does not apply; the prompt: {prompts[row]!r:.{_SHOWN}}"
            )
    return [None if score is None else float(score) for score in scores]


def _plain(value: Any) -> Any:
    """Numbers of torch and NumPy as those of Python."""
    return value.tolist() if hasattr(value, "tolist") else value
