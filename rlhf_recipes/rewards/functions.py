"""Rewards that are not models of preference: functions that score completions, and the loader that reads them from YAML.

All have the signature that TRL gives to reward functions: called with the keywords `prompts`, `completions`, `completion_ids`
(token ids, EOS included), `trainer_state`, `log_extra`, `log_metric` and one list for each other column of the dataset, they
return one number a completion, or None where they do not apply. A completion is a string or, in conversational data, a list of
messages. The column `reference` is what `rlhf_recipes.data` makes of an answer in the data; a row without a reference (None, or
blank) gets None from every reward that compares, and the other rewards of a sum still count there.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError, did_you_mean
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.models.loading import model_path
from rlhf_recipes.rewards.matching import judge, normalise

import torch
from accelerate import PartialState
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig
from trl.trainer.utils import get_callable_name, is_async_callable

Text = str | list[dict[str, Any]]
Reward = Callable[..., Any]  # to a list[float | None], or to a coroutine of one

FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""The keywords that TRL passes to every reward function, besides the columns of the dataset."""

_FINITE = ConfigDict(allow_inf_nan=False)
_LARGEST = torch.finfo(torch.float32).max  # TRL keeps rewards in this type
_SAME_MEANING = ("entailment", "equivalent", "paraphrase", "duplicate")  # names of one label in NLI, MRPC, PAWS, QQP
_SHOWN = 200  # characters of a prompt in an error


def last_text(value: Text) -> str:
    """A text, or the content of the last message of a conversation, without surrounding space."""
    return (value if isinstance(value, str) else value[-1]["content"] or "").strip()


# --- Comparing with a reference --------------------------------------------------------------------------


def exact_match(completions: list[Text], reference: list[str | None] | None = None, **columns: Any) -> list[float | None]:
    """1 where the completion is the reference, letter by letter but for surrounding space, else 0.

    For answers with one spelling: numbers, labels, code.
    """
    return [
        None if truth is None else float(last_text(completion) == truth)
        for completion, truth in _with_references(completions, reference, "exact_match")
    ]


def normalised_match(completions: list[Text], reference: list[str | None] | None = None, **columns: Any) -> list[float | None]:
    """1 where the completion is the reference but for case, spacing and punctuation at the ends, else 0.

    For short answers in words; it calls right what `evaluation.truthfulness` calls right.
    """
    return [
        None if truth is None else float(normalise(last_text(completion)) == normalise(truth))
        for completion, truth in _with_references(completions, reference, "normalised_match")
    ]


@dataclass(config=_FINITE)
class Abstention:
    """One of three values: for the right answer, for an abstention, for anything else.

    For teaching a model to say that it does not know what it does not know (Schulman, "Reinforcement Learning from Human
    Feedback: Progress and Challenges", 2023): a demonstration cannot, since who wrote it knew other things than the model. The
    best policy abstains where its chance p of being right has `right * p + wrong * (1 - p) < abstaining`: for the defaults,
    where p < 1/2. With `abstaining` too close to `right`, it abstains on everything.

    Through `log_metric` it reports the shares `abstention/right`, `abstention/abstained` and `abstention/wrong` of the
    completions that have a reference, and `abstention/over`: the share that abstains on questions that the model could answer.
    Which those are must be in the data, in a boolean column `known`; without it over-abstention cannot be told from honesty and
    is not reported.

    Parameters:
        right: reward of a completion that equals the reference after `normalise`.
        abstaining: reward of a completion that starts with one of `phrases`.
        wrong: reward of every other completion.
        phrases: the beginnings of an abstention; case, spacing and punctuation at the ends do not matter.
    """

    right: float = 1.0
    abstaining: float = 0.0
    wrong: float = -1.0
    phrases: Sequence[str] = ("I do not know",)

    def __post_init__(self):
        self._beginnings = tuple(normalise(phrase) for phrase in self.phrases)
        if not all(self._beginnings):
            raise ValueError("phrases: an empty phrase would make an abstention of every completion")

    def __call__(
        self,
        completions: list[Text],
        reference: list[str | None] | None = None,
        known: list[bool | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores (B,), each one of the three values or None, and reports the shares."""
        pairs = _with_references(completions, reference, "Abstention")
        kinds = [
            None if truth is None else judge(last_text(completion), truth, self._beginnings) for completion, truth in pairs
        ]
        if log_metric is not None:
            for name, share in _shares(kinds, known):
                log_metric(f"abstention/{name}", share)
        values = {"right": self.right, "abstained": self.abstaining, "made_up": self.wrong, None: None}
        return [values[kind] for kind in kinds]


def _shares(kinds: list[str | None], known: list[bool | None] | None) -> Iterator[tuple[str, float]]:
    """The shares that `Abstention` reports, where there is something to take a share of."""
    judged = [kind for kind in kinds if kind is not None]
    if judged:
        names = {"right": "right", "abstained": "abstained", "made_up": "wrong"}
        yield from ((name, judged.count(kind) / len(judged)) for kind, name in names.items())
    if known is not None:
        answerable = [kind for kind, is_known in zip(kinds, known, strict=True) if kind is not None and is_known]
        if answerable:
            yield "over", answerable.count("abstained") / len(answerable)


@dataclass(config=_FINITE)
class Similarity:
    """How much a completion says what the reference says, in the judgement of a model that was trained to compare two texts.

    To compare two texts is easier than to write one, and supervised learning does it well. So demonstrations can serve as
    references: the policy is free to say the same in its own words, where imitation would ask for the labeller's.

    An empty completion scores 0 without being read. The model is loaded at the first call, without gradients, and needs room
    beside the policy.

    Parameters:
        model_name_or_path: a Hub name or local folder, with weights in safetensors.
        kind: what the model is.
            `"cross-encoder"` reads both texts at once. With one output: its sigmoid, in [0, 1] (STS models of
            sentence-transformers), or the output itself, in the range of its training labels, if the model's configuration
            says `problem_type: regression`. With several: the probability, in [0, 1], of the label that is named entailment
            (NLI), equivalent, paraphrase or duplicate. Both orders are read and the lower score counts, since one-sided
            entailment pays a policy for saying less, or more, than the reference (compare Kuhn et al., 2023).
            `"embedding"` reads each text alone: the cosine, in [-1, 1], of the means of the last hidden states (Reimers and
            Gurevych, 2019). Choose a model that was trained with mean pooling. Cheaper, but it sees a "not" less well.
        batch_size: texts, or pairs of texts, in one forward pass.
        max_length: tokens of a text, or pair, that are read (fewer if the model reads no more); what follows is not judged.
    """

    model_name_or_path: str
    kind: Literal["cross-encoder", "embedding"]
    batch_size: int = Field(default=32, gt=0)
    max_length: int = Field(default=512, gt=0)

    def __call__(
        self, completions: list[Text], reference: list[str | None] | None = None, **columns: Any
    ) -> list[float | None]:
        """Scores (B,), in the range of the model's kind, or None."""
        pairs = [(last_text(one), truth) for one, truth in _with_references(completions, reference, "Similarity")]
        scores = [None if truth is None else 0.0 for _, truth in pairs]
        readable = [row for row, (text, truth) in enumerate(pairs) if text and truth is not None]
        if readable:
            compare = self._in_both_orders if self.kind == "cross-encoder" else self._cosine
            for row, score in zip(readable, compare(*zip(*(pairs[row] for row in readable), strict=True)), strict=True):
                scores[row] = score
        return scores

    def _in_both_orders(self, texts: tuple[str, ...], references: tuple[str, ...]) -> list[float]:
        scores = self._read(
            lambda inputs, output: self._sameness(output.logits.float()), texts + references, references + texts
        )
        return scores.view(2, -1).amin(0).tolist()

    def _cosine(self, texts: tuple[str, ...], references: tuple[str, ...]) -> list[float]:
        sums = self._read(  # for a cosine as good as means
            lambda inputs, output: _masked_sum(output.last_hidden_state.float(), inputs["attention_mask"]), texts + references
        )
        return cosine_similarity(*sums.chunk(2)).tolist()

    @torch.no_grad()
    def _read(self, summarise: Callable[[Any, Any], torch.Tensor], *texts: tuple[str, ...]) -> torch.Tensor:
        """What `summarise` makes of the model's inputs and outputs, over all batches; two sequences are read as pairs."""
        tokenizer, model, limit = self._loaded
        results = []
        for start in range(0, len(texts[0]), self.batch_size):
            inputs = tokenizer(
                *(list(part[start : start + self.batch_size]) for part in texts),
                padding=True,
                padding_side="right",  # models with absolute positions count from the left
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            ).to(model.device)
            results.append(summarise(inputs, model(**inputs)))
        return torch.cat(results)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, int]:
        """The tokenizer, the model, and how many tokens are read."""
        auto = AutoModelForSequenceClassification if self.kind == "cross-encoder" else AutoModel
        try:
            path = model_path(ModelConfig(model_name_or_path=self.model_name_or_path))
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            options = {"use_safetensors": True, "trust_remote_code": False}
            model, report = auto.from_pretrained(path, **options, output_loading_info=True)
        except RecipeError as error:
            raise RecipeError(f"Similarity: {error}") from error
        except Exception as error:  # as in `load_architecture`
            raise self._error(explain_load_error(self.model_name_or_path, error)) from error
        # Transformers makes up what a folder lacks: weights at random, and a tokenizer without words
        missing = sorted(weight for weight in report["missing_keys"] if self.kind == "cross-encoder" or "pooler" not in weight)
        if missing:
            raise self._error(f"it is no {self.kind}: its weights lack {', '.join(missing[:3])}")
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise self._error("there is no tokenizer: its folder needs tokenizer.json and tokenizer_config.json")
        if tokenizer.pad_token is None:
            raise self._error("its tokenizer has no PAD")
        limit = min(self.max_length, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", math.inf))
        return tokenizer, model.eval().to(PartialState().device), limit

    def _sameness(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of logits (B, number of labels)."""
        config = self._loaded[1].config
        if config.num_labels == 1:
            return logits[:, 0] if config.problem_type == "regression" else logits[:, 0].sigmoid()
        labels = {name.lower(): index for index, name in config.id2label.items()}
        for name in _SAME_MEANING:
            if name in labels:
                return logits.softmax(-1)[:, labels[name]]
        raise self._error(
            f"none of its labels ({', '.join(config.id2label.values())}) is named {', '.join(_SAME_MEANING)}; name them in "
            "`id2label` of its config.json"
        )

    def _error(self, reason: str) -> RecipeError:
        return RecipeError(f"Similarity: model_name_or_path: {self.model_name_or_path}: {reason}")


def _with_references(completions: list[Text], reference: list[str | None] | None, name: str) -> list[tuple[Text, str | None]]:
    """Each completion with its stripped reference, or None where a row has none."""
    if reference is None:
        raise RecipeError(
            f"{name}: the data have no column `reference` to compare with: take data with answers, or give a column that name "
            "with `column_mapping`"
        )
    for row, text in enumerate(reference):
        if not isinstance(text, str | None):
            raise RecipeError(f"{name}: reference {row} of the batch is not a text: {text!r}")
    return [(one, (text or "").strip() or None) for one, text in zip(completions, reference, strict=True)]


def _masked_sum(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums (B, H) of states (B, T, H) over the tokens that are not padding."""
    return (states * mask.unsqueeze(-1)).sum(1)


# --- Penalties, to be added to another reward ------------------------------------------------------------


@dataclass(config=_FINITE)
class LengthPenalty:
    """0 for a length from `shortest` to `longest`, and `slope` less for each token or word out of that range; in (-inf, 0].

    Against the growth of answers that learned rewards invite, since they like length. Set `slope` against the spread of the
    reward that it is added to. TRL's `trl.rewards.get_soft_overlong_punishment` is another, in [-1, 0].

    Parameters:
        slope: loss of reward a unit.
        longest: length from which the penalty grows.
        shortest: length below which it grows; equal to `longest`, the two are a target.
        unit: `"tokens"`, with the EOS, as generation counts them, or `"words"` between spaces.
    """

    slope: float = Field(gt=0)
    longest: int = Field(ge=0)
    shortest: int = Field(default=0, ge=0)
    unit: Literal["tokens", "words"] = "tokens"

    def __post_init__(self):
        if self.shortest > self.longest:
            raise ValueError(f"shortest: {self.shortest} is more than longest: {self.longest}")

    def __call__(self, completions: list[Text], completion_ids: list[list[int]] | None = None, **columns: Any) -> list[float]:
        """Scores (B,), at most 0."""
        if self.unit == "words":
            lengths = [len(last_text(completion).split()) for completion in completions]
        elif completion_ids is not None:
            lengths = [len(ids) for ids in completion_ids]
        else:
            raise RecipeError("LengthPenalty: without `completion_ids` there are no tokens to count: set `unit: words`")
        return [self.slope * min(0, self.longest - length, length - self.shortest) for length in lengths]


@dataclass(config=_FINITE)
class RepetitionPenalty:
    """Minus the share of the completion's n-grams of words that stand in it earlier: 0 if none repeats, at most 0, above -1.

    Against loops, into which a policy falls when a reward likes length. Case and spacing do not matter; with fewer than `n`
    words nothing repeats. For languages without spaces take TRL's, of tokens: `trl.rewards.get_repetition_penalty_reward`.

    Parameters:
        n: words in an n-gram.
    """

    n: int = Field(default=3, gt=0)

    def __call__(self, completions: list[Text], **columns: Any) -> list[float]:
        """Scores (B,), in (-1, 0]."""
        return [self._penalty(normalise(last_text(completion)).split()) for completion in completions]

    def _penalty(self, words: list[str]) -> float:
        ngrams = [tuple(words[start : start + self.n]) for start in range(len(words) - self.n + 1)]
        return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0


# --- What a reward returns -------------------------------------------------------------------------------


def checked(reward: Reward, name: str | None = None) -> Reward:
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


def ask(reward: Reward, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
    """The scores of completions by a reward, of any sort, outside of training, where nothing is logged.

    Args:
        reward: `checked`, asynchronous or not.
        prompts: (N,).
        completions: (N,).
        columns: (N,) each, of the data.

    Raises:
        RecipeError: as in `checked`.
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


# --- From YAML -------------------------------------------------------------------------------------------


@dataclass(config=_FINITE)
class SavedReward:
    """A reward model in a folder, for `PPOTrainer` to put on its base.

    Parameters:
        folder: what `recipes/reward.py` saved.
        combine: how an ensemble becomes one score, if not as it was trained to.
        uncertainty_coef: likewise.
    """

    folder: str
    combine: Literal["mean", "min", "uncertainty"] | None = None
    uncertainty_coef: float | None = None


def load_rewards(specs: Any) -> tuple[list[Reward | SavedReward], list[float]]:
    """The rewards that the YAML key `reward_funcs` lists, and their weights (TRL's `reward_weights`).

        reward_funcs:
          - runs/tiny/reward
          - rlhf_recipes.rewards.normalised_match
          - path: rlhf_recipes.rewards.LengthPenalty
            weight: 0.5
            arguments: {slope: 0.01, longest: 64}

    A `path` is a folder that `recipes/reward.py` saved, with the `arguments` of `SavedReward` for an ensemble; or the dotted
    path of a function with TRL's signature, to which `arguments` are bound; of a class, which is
    instantiated with `arguments`; or, with `arguments` (they may be `{}`), of a function that makes a reward. A weight is 1 if
    it is not given; 0 logs a reward without training on it. Every reward is `checked`, and a name that comes twice is numbered,
    since TRL would log the two as one.

    Raises:
        RecipeError: with the entry, the key, and what would be right.
    """
    if not isinstance(specs, list) or not specs:
        raise RecipeError(f"reward_funcs: expected a list of rewards, found {specs!r}")
    rewards, names, weights = [], [], []
    for number, spec in enumerate(specs, start=1):
        where = f"reward_funcs, entry {number}"
        path, weight, arguments = _read_spec(spec, where)
        weights.append(weight)
        if "/" in path or Path(path).is_dir():
            rewards.append(_saved_reward(path, arguments or {}, f"{where}: {path}"))
            continue
        reward = _build(path, arguments, f"{where}: {path}")
        name = get_callable_name(reward)
        names.append(name)
        rewards.append(checked(reward, name if names.count(name) == 1 else f"{name}_{names.count(name)}"))
    return rewards, weights


def paths_of(specs: Sequence[str | dict[str, Any]]) -> list[str | None]:
    """What the entries of `reward_funcs` name, before anything is loaded."""
    return [spec.get("path") if isinstance(spec, dict) else spec for spec in specs]


def _saved_reward(path: str, arguments: dict[str, Any], where: str) -> SavedReward:
    if not Path(path).is_dir():
        raise RecipeError(f"{where}: no such folder: train the reward model first (recipes/reward.py), or name it in `needs`")
    try:
        return SavedReward(folder=path, **arguments)
    except (TypeError, ValidationError) as error:
        raise RecipeError(f"{where}: arguments: {_reason(error)}: there are `combine` and `uncertainty_coef`") from error


def _read_spec(spec: Any, where: str) -> tuple[str, float, dict[str, Any] | None]:
    """Path, weight and arguments of one entry."""
    spec = {"path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict) or not isinstance(spec.get("path"), str):
        raise RecipeError(f"{where}: must be a dotted path, or a mapping with `path`, found {spec!r}")
    keys = ("path", "weight", "arguments")
    for key in spec:
        if key not in keys:
            raise RecipeError(f"{where}: unknown key '{key}'{did_you_mean(str(key), keys)}")
    arguments = spec.get("arguments")
    if not isinstance(arguments, dict | None) or not all(isinstance(name, str) for name in arguments or ()):
        raise RecipeError(f"{where}: arguments: expected a mapping of names to values, found {arguments!r}")
    return spec["path"], _weight(spec.get("weight", 1.0), where), arguments


def _weight(value: Any, where: str) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            weight = float(value)  # a text too: PyYAML reads 1e-4 as one, since it has no dot
            if math.isfinite(weight):
                return weight
    raise RecipeError(f"{where}: weight: expected a finite number, found {value!r}")


def _build(path: str, arguments: dict[str, Any] | None, where: str) -> Reward:
    target = _resolve(path, where)
    if not callable(target):
        raise RecipeError(f"{where}: is a {type(target).__name__}, and must be a function or a class")
    try:
        inspect.signature(target)
    except ValueError as error:
        raise RecipeError(f"{where}: its parameters are unknown ({error}): wrap it in a function of yours") from error
    if inspect.isclass(target) or (arguments is not None and not _takes_completions(target)):
        reward = _make(target, arguments or {}, where)
    else:
        reward = _bind(target, arguments, where) if arguments else target
    missing = _refused_keywords(reward)
    if missing:
        raise RecipeError(
            f"{where}: TRL calls a reward with the keywords {', '.join(FROM_TRL)} and the columns of the data, and "
            f"{_signature(reward)} does not take {missing[0]}: end its parameters with `**columns`, or, if it makes a reward, "
            "give it `arguments` (they may be {})"
        )
    return reward


def _resolve(path: str, where: str) -> Any:
    """What a dotted path names."""
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise RecipeError(f"{where}: must be a dotted path such as rlhf_recipes.rewards.exact_match")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"{where}: cannot import {module_name} (its folder must be on PYTHONPATH): {error}{_nearest_module(module_name)}"
        ) from error
    if not hasattr(module, name):
        raise RecipeError(f"{where}: {module_name} has no '{name}'{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def _nearest_module(name: str) -> str:
    """A hint at a module with a similar name in the same package."""
    package, _, child = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except ImportError:
        return ""
    if spec is None or child in (siblings := [item.name for item in pkgutil.iter_modules(spec.submodule_search_locations)]):
        return ""
    return did_you_mean(child, siblings)


def _make(maker: Callable[..., Reward], arguments: dict[str, Any], where: str) -> Reward:
    """The reward that a class or factory makes of `arguments`."""
    _check_names(maker, arguments, where)
    try:
        inspect.signature(maker).bind(**arguments)
    except TypeError as error:
        raise RecipeError(f"{where}: arguments: {error} of {_signature(maker)}") from error
    try:
        reward = maker(**arguments)
    except (ValueError, RecipeError) as error:
        raise RecipeError(f"{where}: arguments: {_reason(error)}") from error
    if not callable(reward):
        raise RecipeError(f"{where}: makes a {type(reward).__name__}, which is no function")
    return reward


def _bind(function: Reward, arguments: dict[str, Any], where: str) -> Reward:
    """A reward function with `arguments` bound to it."""
    _check_names(function, arguments, where)
    for name in arguments:
        if name in FROM_TRL:
            raise RecipeError(f"{where}: arguments: '{name}' comes from TRL and cannot be set")
    return partial(function, **arguments)


def _check_names(function: Callable[..., Any], arguments: dict[str, Any], where: str) -> None:
    """Refuses an argument without a parameter of that name, which a reward's `**columns` would swallow."""
    parameters = inspect.signature(function).parameters.values()
    names = [item.name for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
    if inspect.isclass(function) and any(item.kind is item.VAR_KEYWORD for item in parameters):
        return
    for name in arguments:
        if name not in names:
            raise RecipeError(
                f"{where}: arguments: unknown argument '{name}' of {_signature(function)}{did_you_mean(name, names)}"
            )


def _takes_completions(function: Callable[..., Any]) -> bool:
    """Whether it is a reward, rather than what makes one."""
    parameters = inspect.signature(function).parameters
    return "completions" in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def _refused_keywords(reward: Reward) -> list[str]:
    """Which of TRL's keywords it does not take."""
    parameters = inspect.signature(reward).parameters
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return []
    return [name for name in FROM_TRL if name not in parameters]


def _signature(function: Callable[..., Any]) -> str:
    """The name and, without types, the parameters."""
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return f"{get_callable_name(function)}{inspect.Signature(parameters)}"


def _reason(error: Exception) -> str:
    """In one line, which argument is wrong and why."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    if not first["loc"]:  # from a __post_init__
        return str(first["ctx"]["error"])
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
