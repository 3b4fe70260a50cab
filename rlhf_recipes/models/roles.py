"""The roles that reward models play on a base that is in memory: adapters and heads that score, alone or as an ensemble.

A folder that `recipes/reward.py` saved holds an adapter with its head in PEFT's format, the tokenizer, and `reward.json`: what
base it was trained on, and the mean and standard deviation that its scores are normalised by. What does not fit is refused.
"""

import contextlib
import copy
import functools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import REWARD, read_json, write_json
from rlhf_recipes.models.loading import (
    ADAPTER,
    adapter_config,
    backbone,
    base_name,
    base_of,
    check_base,
    check_finite,
    check_ranks,
    disable_cpu_4bit_repacking,
    fitting,
    forward_backbone,
    read_weights,
)

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.functional import cast_adapter_dtype, inject_adapter_in_model, set_adapter, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

logger = logging.getLogger(__name__)

HEAD = "score"
"""The name that Transformers gives the head of a decoder that classifies sequences."""

POLICY = "default"
"""PEFT's name for an adapter that was not given one: that of the policy, which is trained."""

NO_ADAPTER = object()
"""For `use_adapter`: the base alone, without any adapter."""

PREFIX = "base_model.model."
"""PEFT's, of the names of saved weights."""

_HEAD_NAMES = {"score", "classifier"}  # PEFT lists both for every sequence classifier
_PROBE = "Is 1 + 1 = 2?\nYes: Straße, 东京."

Messages = list[dict[str, Any]]


class ScalarHead(nn.Linear):
    """One number for each hidden state, computed in fp32 whatever the type of the base and under autocast too.

    bf16 has three digits: too few to tell good answers from better ones. Its weight is saved and loaded as that of
    Transformers' own head.
    """

    def __init__(self, width: int, bias: bool = False):
        super().__init__(width, 1, bias=bias, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores, fp32 of shape (..., 1), of hidden states (..., width)."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)


@dataclass(frozen=True)
class Normalisation:
    """The mean and standard deviation of raw scores on demonstrations; normalised scores have 0 and 1 there.

    Raises:
        RecipeError: if one of them is not finite, or the deviation is not positive.
    """

    mean: float
    std: float
    samples: int

    def __post_init__(self):
        if not (_is_number(self.mean) and _is_number(self.std) and self.std > 0):
            raise RecipeError(f"scores of mean {self.mean} and standard deviation {self.std} cannot be normalised")

    def __call__(self, scores: Tensor) -> Tensor:
        """The normalised scores."""
        return (scores - self.mean) / self.std


class Scorer(ABC):
    """Anything that scores completions, and is a reward function for TRL's trainers.

    Parameters:
        name: what TRL logs the rewards under.
        tokenizer: of the policy, which is that of the reward model too.
        batch_size: completions a forward pass, when called as a reward function.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        self.__name__ = name
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @abstractmethod
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores, fp32 of shape (B,), of padded sequences (B, T)."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """The score of each completion, in TRL's protocol for reward functions.

        Completions are read as in training: conversations through the chat template, and texts with EOS behind. So a
        completion that was cut off before its EOS is scored as if it ended there: whoever minds must look at the tokens.

        Args:
            prompts: texts, or lists of messages.
            completions: one for each prompt, of the same kind.
            kwargs: what else TRL passes; not used.
        """
        sequences = [
            encode(self.tokenizer, prompt, self._as_written(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))  # alike lengths: little padding
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            batch = self.score(*_padded([sequences[place] for place in places]))
            for place, score in zip(places, batch.tolist(), strict=True):
                scores[place] = score
        return scores

    def _as_written(self, completion: Any) -> Any:
        """A generated answer without the space that the template puts before it: rendered again, it would stand there twice."""
        if isinstance(completion, str) or not completion:
            return completion
        first, *others = completion
        return [{**first, "content": (first.get("content") or "").removeprefix(_template_gap(self.tokenizer))}, *others]


class RewardModel(Scorer):
    """A reward model: an adapter on a base that it shares with other roles, or a model of its own.

    Scoring leaves everything as it was: which adapters are active, what is trained, training mode, and every weight.

    Parameters:
        model: the base with its adapters, or a sequence classifier.
        adapter: the name of the adapter to score by, or None for a model of its own.
        head: hidden state -> raw score.
        normalisation: applied to raw scores; None: scores stay raw.
        folder: where it was loaded from.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str | None,
        head: ScalarHead,
        tokenizer: PreTrainedTokenizerBase,
        normalisation: Normalisation | None,
        folder: Path,
        name: str,
        batch_size: int,
    ):
        super().__init__(name, tokenizer, batch_size)
        self.model, self.adapter, self.head = model, adapter, head
        self.normalisation, self.folder = normalisation, folder

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor, normalise: bool = True) -> Tensor:
        """Scores, fp32 of shape (B,): the head's value at the last token of each sequence.

        Args:
            input_ids: (B, T), padded on the right or on the left.
            attention_mask: (B, T), 1 on tokens and 0 on padding.
            normalise: whether to apply the stored normalisation.

        Raises:
            ValueError: if a sequence has no token.
        """
        ids, mask = _right_padded(input_ids, attention_mask)
        device = backbone(self.model).get_input_embeddings().weight.device
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        with use_adapter(self.model, self.adapter):
            hidden = forward_backbone(self.model, **inputs).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1).to(hidden.device) - 1]
        scores = self.head(last.to(self.head.weight.device))[:, 0]
        return self.normalisation(scores) if normalise and self.normalisation else scores

    def calibrate(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Normalisation:
        """Measures and stores the normalisation: from now on these demonstrations score 0 on average with deviation 1.

        Raises:
            RecipeError: if all of them score alike.
        """
        before, self.normalisation = self.normalisation, None
        try:
            self.normalisation = store_normalisation(self.folder, self(prompts, completions))
        except BaseException:
            self.normalisation = before
            raise
        return self.normalisation


class Ensemble(Scorer):
    """Several reward models as one (Coste et al., 2024, "Reward model ensembles help mitigate overoptimization").

    Each member's own normalisation comes first, since raw scores of two models have no common scale.

    Parameters:
        members: the reward models; adapters on one base, or models of their own.
        combine: `"mean"`, `"min"`, or `"uncertainty"`: the mean less `uncertainty_coef` standard deviations.
        uncertainty_coef: 0 or more; read under `"uncertainty"` only.

    Raises:
        RecipeError: without members, for an unknown way to combine, or a negative coefficient.
    """

    def __init__(
        self,
        members: Sequence[RewardModel],
        combine: Literal["mean", "min", "uncertainty"] = "mean",
        uncertainty_coef: float = 1.0,
        name: str = "ensemble",
    ):
        if not members:
            raise RecipeError("an ensemble needs at least one reward model")
        if combine not in ("mean", "min", "uncertainty"):
            raise RecipeError(f"an ensemble is combined by mean, min or uncertainty, not by {combine!r}")
        if not (_is_number(uncertainty_coef) and uncertainty_coef >= 0):
            raise RecipeError(f"uncertainty_coef: {uncertainty_coef}: must be 0 or more")
        super().__init__(name, members[0].tokenizer, members[0].batch_size)
        self.members, self.combine, self.uncertainty_coef = list(members), combine, uncertainty_coef

    @property
    def scale(self) -> float:
        """The mean deviation that the members' scores were divided by: it makes combined scores log-odds again, about."""
        stds = [member.normalisation.std if member.normalisation else 1.0 for member in self.members]
        return sum(stds) / len(stds)

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Combined scores, fp32 of shape (B,), of padded sequences (B, T)."""
        return self.combined(self.member_scores(input_ids, attention_mask))

    def member_scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The scores of each member, (members, B); `.std(0, correction=0)` of them is what "uncertainty" subtracts."""
        return torch.stack([member.score(input_ids, attention_mask) for member in self.members])

    def combined(self, scores: Tensor) -> Tensor:
        """Scores (B,) from those of the members, (members, B)."""
        if self.combine == "min":
            return scores.amin(0)
        if self.combine == "mean":
            return scores.mean(0)
        return scores.mean(0) - self.uncertainty_coef * scores.std(0, correction=0)


# --- Loading ---------------------------------------------------------------------------------------------


def load_reward(
    model: PreTrainedModel | PeftModel,
    folder: str | Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
) -> RewardModel:
    """Puts a saved reward adapter on a base that is in memory, beside the adapters that are there, and frozen.

    Which adapters are active and what is trained stays as it is; the global random state too.

    Args:
        model: the base as a language model, with or without adapters.
        folder: what `recipes/reward.py` saved.
        name: the adapter's name on this model.
        tokenizer: the policy's.
        batch_size: completions a forward pass, when called as a reward function.

    Raises:
        RecipeError: if the folder holds no reward adapter with a head, or one that was trained on another base or with another
            tokenizer or chat template; or if `name` is taken.
    """
    folder = Path(folder)
    config = _adapter_config(folder)
    weights, head = _adapter_weights(folder)
    check_ranks(config, weights, str(folder))
    record = read_json(folder / REWARD)
    check_base(folder, config.base_model_name_or_path, record, model)
    check_tokenizer(folder, tokenizer)
    if name in getattr(model, "peft_config", {}):
        raise RecipeError(f"{folder}: the model has an adapter '{name}' already: give this one another name")
    normalisation = _normalisation(record, folder)
    with torch.random.fork_rng(devices=[]):  # new weights are drawn at random before they are overwritten
        head = _build_head(head, model, folder)
        _add_adapter(model, config, weights, name, folder)
    disable_cpu_4bit_repacking(model)
    return RewardModel(model, name, head, tokenizer, normalisation, folder, name, batch_size)


def load_whole_reward(
    folder: str | Path, name: str, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32, **options: Any
) -> RewardModel:
    """A reward model with weights of its own (`use_peft: false`, or a merged one), as a role.

    Args:
        folder: a sequence classifier with one label, and its tokenizer.
        name: what TRL logs its rewards under.
        tokenizer: the policy's.
        batch_size: completions a forward pass, when called as a reward function.
        options: more of `from_pretrained`'s arguments (`dtype`, `device_map`, ...).

    Raises:
        RecipeError: if it cannot be loaded, a weight is not in its files, or its tokenizer or chat template differs.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise RecipeError(f"{folder} holds an adapter, not a whole model: put it on its base with `load_reward`")
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options
        )
    except Exception as error:  # as in `load_architecture`
        raise RecipeError(f"{folder}: no usable reward model there ({first_line(error)})") from error
    if loading["missing_keys"]:
        raise RecipeError(f"{folder}: its files lack {', '.join(sorted(loading['missing_keys']))}: it would score at random")
    check_finite(dict(model.named_parameters()), folder)
    check_tokenizer(folder, tokenizer)
    head = _build_head({"weight": stored_head(folder, _find_head(model).weight.data, options.get("revision"))}, model, folder)
    normalisation = _normalisation(read_json(folder / REWARD), folder)
    disable_cpu_4bit_repacking(model)
    return RewardModel(model.eval(), None, head, tokenizer, normalisation, folder, name, batch_size)


def stored_head(name: str | Path, loaded: Tensor, revision: str | None = None) -> Tensor:
    """The weight of a whole model's head as it stands in its file, in fp32: `from_pretrained` rounds it to the base's type.

    Args:
        name: folder, or name on the Hub.
        loaded: the weight as it was loaded; returned where the file has another name for it.
        revision: of the model on the Hub.
    """
    key, options = f"{HEAD}.weight", {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
    file = read_json(Path(index)).get("weight_map", {}).get(key) if index else SAFE_WEIGHTS_NAME
    path = file and cached_file(name, file, **options)
    if not path:
        return loaded
    with safe_open(path, "pt") as weights:
        return weights.get_tensor(key).float() if key in weights.keys() else loaded  # noqa: SIM118 (no mapping)


def load_saved_rewards(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    combine: str | None = None,
    uncertainty_coef: float | None = None,
    batch_size: int = 32,
) -> Scorer:
    """What `recipes/reward.py` saved, whatever it is: an adapter, an ensemble of them, or a whole model.

    An adapter is put on the policy's base, under the name of the folder; a whole model on the device of this process. A model
    without a scale is warned of: its scores are raw.

    Args:
        folder: of the reward model or of the ensemble, whose members are those that its `reward.json` lists. A whole model may
            be named by its name on the Hub too (from Python: in YAML a reward is a folder or a dotted path).
        model: the policy: the base with its adapters.
        tokenizer: the policy's.
        combine: of an ensemble, if not as it was trained to.
        uncertainty_coef: likewise.
        batch_size: completions a forward pass.

    Raises:
        RecipeError: as in `load_reward` and `load_whole_reward`; for an adapter where `model` has none and is trained itself;
            for `combine` or `uncertainty_coef` where there is no ensemble; and for one that was not finished.
    """
    folder = Path(folder)
    stored = read_json(folder / REWARD).get("ensemble")
    if stored is not None:
        names, trained, coefficient = _read_ensemble(stored, folder)
        rewards = [_load_saved(folder / name, model, tokenizer, f"{folder.name}-{name}", batch_size) for name in names]
        coefficient = coefficient if uncertainty_coef is None else uncertainty_coef
        return Ensemble(rewards, combine or trained, coefficient, folder.name)
    alone = any((folder / name).exists() for name in ("adapter_config.json", "config.json"))
    if not alone and any(folder.glob("member-*/*config.json")):
        raise RecipeError(
            f"{folder} holds members of an ensemble, and no {REWARD} that lists them: it was not finished; go on with "
            "`resume_from_checkpoint: true`, or name one member"
        )
    if combine is not None or uncertainty_coef is not None:
        raise RecipeError(f"{folder} holds one reward model: `combine` and `uncertainty_coef` are for ensembles: remove them")
    return _load_saved(folder, model, tokenizer, folder.name, batch_size)


def _load_saved(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, batch_size: int) -> RewardModel:
    if not (folder / "adapter_config.json").exists():
        # where the policy is, or will be when its trainer has placed it
        reward = load_whole_reward(folder, name, tokenizer, batch_size, device_map={"": PartialState().device})
    elif not isinstance(model, PeftModel):
        raise RecipeError(f"{folder} is an adapter, which needs a base that stays as it is: set `use_peft: true`, or merge it")
    else:
        name = name.replace(".", "_")  # PyTorch allows no dots there
        taken = sum(other == name or other.startswith(f"{name}_") for other in model.peft_config)
        reward = load_reward(model, folder, f"{name}_{taken + 1}" if taken else name, tokenizer, batch_size)
    if reward.normalisation is None:
        logger.warning(
            "%s has no scale (`normalisation` in %s): its raw scores are used, whose mean and spread are arbitrary; "
            "recipes/reward.py measures one at its end: go on with `resume_from_checkpoint: true` if it was interrupted",
            folder,
            REWARD,
        )
    return reward


def _adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a reward adapter.

    Raises:
        RecipeError: if there is none in the folder, or one of another kind.
    """
    config = adapter_config(folder)
    if config.peft_type != "LORA":
        raise RecipeError(f"{folder}: a reward adapter is LoRA (peft_type LORA), and this is {config.peft_type.value}")
    if (task := config.task_type) != "SEQ_CLS":
        raise RecipeError(f"{folder}: a reward adapter has task_type SEQ_CLS, and this one has {task}: it is no reward model")
    others = set(config.modules_to_save or ()) - _HEAD_NAMES
    if others:
        raise RecipeError(
            f"{folder}: besides LoRA and its head it trained {', '.join(sorted(others))}, which cannot share a base with others"
        )
    return config


def _adapter_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the adapter, under PEFT's names, and those of its head, under their own.

    Raises:
        RecipeError: if the file is missing or damaged, or there is no head in it.
    """
    path = folder / ADAPTER
    weights = {name: weight.float() for name, weight in read_weights(path).items()}
    prefix = f"{PREFIX}{HEAD}."
    head = {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    if "weight" not in head:
        raise RecipeError(f"{path} has no head ({prefix}weight): the adapter would score at random; train or save it again")
    return weights, head


def _add_adapter(
    model: PreTrainedModel | PeftModel, config: LoraConfig, weights: dict[str, Tensor], name: str, folder: Path
) -> None:
    config.task_type, config.modules_to_save, config.inference_mode = None, None, True
    with restore_adapter_state(model):
        with fitting(str(folder), model):
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                with warnings.catch_warnings():  # several adapters on one base are what roles are
                    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                    inject_adapter_in_model(config, model, adapter_name=name)
        if not isinstance(model, PeftModel):
            weights = {key.removeprefix(PREFIX): weight for key, weight in weights.items()}
        cast_adapter_dtype(model, name)  # to fp32, before the weights come in
        fill_adapter(model, weights, name, folder)


def fill_adapter(model: nn.Module, weights: dict[str, Tensor], name: str, folder: str | Path) -> None:
    """Puts saved weights into an adapter that is on the model; none of the two has any that the other lacks.

    Args:
        model: with the adapter.
        weights: under the names of PEFT's files, which on a `PeftModel` begin with `PREFIX`.
        name: of the adapter.
        folder: where the weights come from, for messages.

    Raises:
        RecipeError: if a weight has no counterpart, or one of another shape.
    """
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RecipeError(f"{folder}: its weights do not fit {base_name(model)}: {reason}") from error
    missing = [key for key in result.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
    if strays := [*missing, *result.unexpected_keys]:
        raise RecipeError(f"{folder}: its weights do not fit {base_name(model)}: {strays[0]} has no counterpart")


def _build_head(weights: dict[str, Tensor], model: nn.Module, folder: Path) -> ScalarHead:
    embedding = backbone(model).get_input_embeddings()
    width = base_of(model).config.get_text_config().hidden_size
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if shapes != {"weight": (1, width)}:
        raise RecipeError(f"{folder}: a head of shape {shapes}, and {base_name(model)} needs one weight of (1, {width})")
    head = ScalarHead(width).requires_grad_(False)
    head.weight.data.copy_(weights["weight"])
    return head.to(embedding.weight.device)


def _find_head(model: PreTrainedModel) -> nn.Linear:
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise RecipeError(f"{base_name(model)}: {type(model).__name__} has no head `{HEAD}` with one output")
    return head


# --- Switching -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_adapter(model: nn.Module, adapter: str | object | None, train: bool = False) -> Iterator[None]:
    """Within, `adapter` alone is active; afterwards all is as before.

    What is to be back-propagated must be so within: outside it would be recomputed with other adapters under gradient
    checkpointing.

    Args:
        model: with adapters, or without.
        adapter: its name; `NO_ADAPTER` for the base alone; None leaves the adapters alone.
        train: whether the adapter, and nothing else, is trainable within; if not, the model is in eval mode.

    Raises:
        RecipeError: if an adapter is merged into the base, which switching would undo.
    """
    if any(layer.merged for layer in _modules(model, BaseTunerLayer)):
        raise RecipeError("an adapter is merged into the base: unmerge it before another one is used")
    with restore_adapter_state(model):
        if adapter is not None:
            for layer in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                if layer.disable_adapters != (adapter is NO_ADAPTER):
                    layer.enable_adapters(adapter is not NO_ADAPTER)
            if adapter is not NO_ADAPTER:
                set_adapter(model, adapter, inference_mode=not train)
        if not train:
            model.eval()
        yield


def copy_adapter(model: PeftModel, source: str, name: str) -> None:
    """Adds a frozen copy of the adapter `source` under another name; which adapters are active stays as it is.

    Raises:
        RecipeError: if `name` is taken.
    """
    if name in model.peft_config:
        raise RecipeError(f"the model has an adapter '{name}' already: rename it")
    weights = {key: weight.clone() for key, weight in get_peft_model_state_dict(model, adapter_name=source).items()}
    with torch.random.fork_rng(devices=[]), restore_adapter_state(model):
        model.add_adapter(name, copy.deepcopy(model.peft_config[source]))
        cast_adapter_dtype(model, name)
        set_peft_model_state_dict(model, weights, adapter_name=name)


@contextlib.contextmanager
def save_single_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Within, `save_pretrained` of a `PeftModel` saves this adapter, and not the other roles on its base."""
    if not isinstance(model, PeftModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=[adapter])
    try:
        yield
    finally:
        del model.save_pretrained


@contextlib.contextmanager
def restore_adapter_state(model: nn.Module) -> Iterator[None]:
    """Puts back, at the end, the active adapters of each layer, `requires_grad` of each weight, and training mode.

    PEFT's own `set_adapter` makes everything trainable that it activates, and freezes the rest. Layers that come into being
    within have no active adapter afterwards, and nothing to train.
    """
    layers = {
        layer: (list(layer.active_adapters), layer.disable_adapters)
        for layer in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for layer in _modules(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            active, disabled = layers.get(layer, ([], False))
            layer.set_adapter(active)
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
        for weight in model.parameters():
            if weight.requires_grad != (weight in trained):
                weight.requires_grad_(weight in trained)
        for module in model.modules():
            mode = training.get(module, training[model])
            if module.training != mode:
                module.training = mode


def _modules(model: nn.Module, kind: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


# --- Text to tokens --------------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any) -> list[int]:
    """Token ids of a prompt and its completion, as TRL's `RewardTrainer` has them.

    Args:
        tokenizer: with a chat template, where the prompt is a list of messages.
        prompt: a text, or a list of messages.
        completion: likewise; EOS is added to a text that does not end by it.
    """
    if isinstance(prompt, str):
        end = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
        return tokenizer(text=prompt + completion + end)["input_ids"]
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True)["input_ids"]


def _template_gap(tokenizer: PreTrainedTokenizerBase) -> str:
    """The blank text that the chat template puts between a generation prompt and the answer; "" where there is none."""
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    gap = whole.removeprefix(prompt).partition("answer")[0]
    return gap if whole.startswith(prompt) and gap.isspace() else ""


def _padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T), padded on the right; what padding holds does not matter, since the mask is 0 there."""
    length = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in sequences])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in sequences])
    return ids, mask


def _right_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same sequences with the padding on the right, as in training, and cut to the longest of them."""
    lengths = attention_mask.sum(1)
    if not lengths.all():
        raise ValueError("a sequence without a token has no score")
    order = attention_mask.bool().logical_not().long().argsort(dim=1, stable=True)[:, : lengths.max()]
    return input_ids.gather(1, order), attention_mask.gather(1, order)


# --- What is saved beside an adapter ---------------------------------------------------------------------


def write_reward_record(folder: str | Path, base_model: str, base_fingerprint: dict[str, Any]) -> None:
    """Writes `reward.json` for a reward model that has just been trained, and is not normalised yet.

    Args:
        folder: where the model was saved.
        base_model: Hub name or folder of its base.
        base_fingerprint: from `fingerprint`.
    """
    content = {"base_model": {"name": base_model, "fingerprint": base_fingerprint}, "normalisation": None}
    write_json(Path(folder) / REWARD, content)


def write_ensemble_record(folder: str | Path, members: Sequence[str], combine: str, uncertainty_coef: float) -> None:
    """Writes the `reward.json` of an ensemble, when all of its members can be used.

    Args:
        folder: of the ensemble.
        members: the folders of its members, inside it.
        combine: as of `Ensemble`.
        uncertainty_coef: likewise.
    """
    content = {"members": [*members], "combine": combine, "uncertainty_coef": uncertainty_coef}
    write_json(Path(folder) / REWARD, {"ensemble": content})


def _read_ensemble(stored: Any, folder: Path) -> tuple[list[str], str, float]:
    """The folders of the members, and how they are combined."""
    try:
        names, combine, coefficient = stored["members"], stored["combine"], stored["uncertainty_coef"]
    except (TypeError, KeyError) as error:
        expected = "expected members, combine and uncertainty_coef"
        raise RecipeError(f"{folder / REWARD}: ensemble: {expected}, found {stored}") from error
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise RecipeError(f"{folder / REWARD}: ensemble: members: must be a list of names of folders, and is {names}")
    if missing := [name for name in names if not (folder / name).is_dir()]:
        raise RecipeError(f"{folder / REWARD}: the member {missing[0]} is not there: train the ensemble again")
    return names, combine, coefficient


def _is_name(value: Any) -> bool:
    """Of a folder in another, and nowhere else."""
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def store_normalisation(folder: str | Path, scores: Sequence[float] | Tensor) -> Normalisation:
    """Stores the mean and standard deviation (of the population) of raw scores beside a reward model.

    Args:
        folder: of the reward model.
        scores: raw scores of demonstrations, (N,).

    Raises:
        RecipeError: if there are none, one is not finite, or all are equal.
    """
    values = torch.as_tensor(scores, dtype=torch.float64)
    if not values.numel():
        raise RecipeError(f"{folder}: no scores to normalise by")
    mean, std = values.mean().item(), values.std(correction=0).item()
    if std <= 1e-6 * values.abs().max().item():  # what fp32 leaves between scores that are equal
        std = 0.0
    try:
        normalisation = Normalisation(mean, std, values.numel())
    except RecipeError as error:
        raise RecipeError(f"{folder}: {values.numel()} {error}: does the reward model tell demonstrations apart?") from error
    write_json(Path(folder) / REWARD, {**read_json(Path(folder) / REWARD), "normalisation": asdict(normalisation)})
    return normalisation


def _normalisation(record: dict[str, Any], folder: Path) -> Normalisation | None:
    stored = record.get("normalisation")
    if stored is None:
        return None
    try:
        return Normalisation(**stored)
    except (TypeError, RecipeError) as error:
        expected = "expected mean, std above 0 and samples"
        raise RecipeError(f"{folder / REWARD}: normalisation: {expected}, found {stored}") from error


def _is_number(value: Any) -> bool:
    """Whether it is one that fp32 can hold, which scores are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < torch.finfo(torch.float32).max


# --- Refusals --------------------------------------------------------------------------------------------


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer or chat template that differs from those saved with the model in `folder`.

    Raises:
        RecipeError: names both sides, and says in what they differ.
    """
    try:
        own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers' own is nothing more
        raise RecipeError(
            f"{folder}: no tokenizer there that can be read, so none can be compared with the policy's: save it "
            f"({first_line(error)})"
        ) from error
    differences = []
    if own.get_vocab() != tokenizer.get_vocab():
        differences.append(f"vocabulary ({len(own)} tokens against {len(tokenizer)})")
    if own.chat_template != tokenizer.chat_template:
        differences.append(f"chat template ({_shown(own.chat_template)} against {_shown(tokenizer.chat_template)})")
    for name in ("bos_token", "eos_token"):
        if getattr(own, name) != getattr(tokenizer, name):
            differences.append(f"{name} ('{getattr(own, name)}' against '{getattr(tokenizer, name)}')")
    if not differences and own(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        differences.append("the way it cuts text into tokens")
    if differences:
        raise RecipeError(
            f"the tokenizer in {folder} and that of the model in use, {tokenizer.name_or_path}, differ in "
            f"{', '.join(differences)}: one would not read what the other writes; train both with one"
        )


def _shown(template: str | None, length: int = 60) -> str:
    return repr(template if template is None or len(template) <= length else template[: length - 3] + "...")
