"""Sequence classifiers with a scalar head, to train as reward models."""

from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.core.files import ADAPTER, RECIPE, read_json
from rlhf_recipes.models.adapters import add_adapter, read_adapter_config
from rlhf_recipes.models.fingerprint import check_base
from rlhf_recipes.models.loading import check_vocabulary, load_architecture
from rlhf_recipes.models.roles import POLICY
from rlhf_recipes.models.tokenizer import check_tokenizer
from rlhf_recipes.models.weights import check_finite, read_weights
from rlhf_recipes.rewards.reward_models import HEAD, HEAD_IN_ADAPTER, ScalarHead

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from trl import ModelConfig, RewardConfig, get_peft_config
from trl.trainer.base_config import _BaseConfig as TrainingConfig


def load_reward_model(
    arguments: ModelConfig,
    training: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    parent: str | Path | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a base with an fp32 scalar head, and perhaps an adapter, to train.

    A new head is drawn from N(0, 1 / (width + 1)) with the seed of the run (Huang et al., 2024, "The N+ implementation details
    of RLHF with PPO"). A base that is a reward model keeps its head.

    Args:
        arguments: TRL's model arguments.
        training: for the seed and `model_init_kwargs`.
        tokenizer: of the run; the model finds the end of a sequence by its PAD.
        parent: an SFT adapter to start from. The new adapter takes its weights, rank, alpha and targets (the LoRA arguments are
            not read), and does not need its parent afterwards.

    Returns:
        A sequence classifier with one label, or a `PeftModel` of it with trainable adapter and head.

    Raises:
        RecipeError: as in `load_model`; for an architecture without such a head; for LoRA targets that the model lacks, or full
            layers to train besides LoRA, which cannot share a base; for a parent that is not a LoRA adapter of this base.
    """
    set_seed(training.seed)
    model, head_is_new = load_classifier(arguments, training)
    old = getattr(model, HEAD)
    head = ScalarHead(old.in_features)
    if head_is_new:
        nn.init.normal_(head.weight, std=(old.in_features + 1) ** -0.5)
    else:
        head.weight.data.copy_(read_head(model.name_or_path, old.weight.data, arguments.model_revision))
    setattr(model, HEAD, head.to(old.weight.device))
    check_vocabulary(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if parent is None:
        return _new_adapter(model, get_peft_config(arguments)) if arguments.use_peft else model
    if not arguments.use_peft:
        raise RecipeError(f"start_from: {parent} is an adapter. Fix: set `use_peft: true`, or merge it into its base")
    if (Path(parent) / "tokenizer_config.json").is_file():
        check_tokenizer(Path(parent), tokenizer)
    return _continue_adapter(model, Path(parent))


def load_classifier(arguments: ModelConfig, training: TrainingConfig) -> tuple[PreTrainedModel, bool]:
    """Load the base as a classifier; return it, and whether its head is random.

    Raises:
        RecipeError: as in `load_model`; for an architecture without such a head; if other weights are missing.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # no report of the new head and the unused LM head
    try:
        model, missing = load_architecture(AutoModelForSequenceClassification, arguments, training, num_labels=1)
    finally:
        transformers.logging.set_verbosity(verbosity)
    scalar_head(model)
    missing -= _tie_embeddings(model, missing, arguments.model_revision)
    if others := missing - {f"{HEAD}.weight"}:
        names = ", ".join(sorted(others)[:3])
        raise RecipeError(f"model_name_or_path: {model.name_or_path}: weights are missing in its files ({names})")
    return model, bool(missing)


def _tie_embeddings(model: PreTrainedModel, missing: set[str], revision: str | None) -> set[str]:
    """Read missing embeddings from the LM head, to which a language model ties them.

    A file holds tied weights under one name, and a classifier has no place for the LM head's.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    ties = getattr(family, "_tied_weights_keys", None) if model.config.get_text_config().tie_word_embeddings else None
    found = set()
    for head, embedding in (ties if isinstance(ties, dict) else {}).items():
        if embedding in missing and (weight := _read_weight(model.name_or_path, head, revision)) is not None:
            model.get_parameter(embedding).data.copy_(weight)
            check_finite({embedding: model.get_parameter(embedding)}, model.name_or_path)
            found.add(embedding)
    return found


def scalar_head(model: PreTrainedModel) -> nn.Linear:
    """Return the head of a sequence classifier.

    Raises:
        RecipeError: if it has not one output without bias.
    """
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise RecipeError(f"{model.name_or_path}: {type(model).__name__} has no head `{HEAD}` with one output and without bias")
    return head


def read_head(name: str | Path, loaded: Tensor, revision: str | None = None) -> Tensor:
    """Return the head's weight from the files of a model, in fp32.

    `from_pretrained` rounds it to bf16. If the files have it under another name, `loaded`, the weight as loaded, is returned.
    """
    weight = _read_weight(name, f"{HEAD}.weight", revision)
    return loaded if weight is None else weight.float()


def _read_weight(name: str | Path, key: str, revision: str | None) -> Tensor | None:
    """Return one weight from the files of a model, or None if they lack it."""
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **options)
    file = read_json(Path(index)).get("weight_map", {}).get(key) if index else SAFE_WEIGHTS_NAME
    path = file and cached_file(name, file, **options)
    if not path:
        return None
    with safe_open(path, "pt") as weights:
        return weights.get_tensor(key) if key in weights.keys() else None  # noqa: SIM118 - not a mapping


def _new_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    if others := sorted({*(config.modules_to_save or ())} - {HEAD}):
        raise RecipeError(
            f"lora_modules_to_save: {', '.join(others)}: a reward adapter shares its base with other roles, so it trains LoRA "
            "and its head only. Fix: remove the key"
        )
    config.task_type, config.modules_to_save = "SEQ_CLS", [HEAD]
    targets = config.target_modules
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    with error_context(f"lora_target_modules: {names}: {model.name_or_path}", ValueError):
        return get_peft_model(model, config)


def _continue_adapter(model: PreTrainedModel, parent: Path) -> PeftModel:
    """Return a new reward adapter with the weights of an SFT adapter of the same base."""
    where = f"start_from: {parent}"
    config = read_adapter_config(parent, "start_from")
    if config.peft_type != "LORA" or config.modules_to_save:
        trained = ", ".join([config.peft_type.value, *(config.modules_to_save or ())])
        raise RecipeError(f"{where}: trained {trained}. Fix: name an SFT adapter that trained LoRA only, or leave the key out")
    check_base(where, config.base_model_name_or_path, read_json(parent / RECIPE), model)
    config.base_model_name_or_path, config.task_type, config.modules_to_save = model.name_or_path, "SEQ_CLS", [HEAD]
    if isinstance(config.target_modules, set):
        config.target_modules -= {"lm_head"}  # a reward model has none
    weights = {name: weight for name, weight in read_weights(parent / ADAPTER).items() if "lm_head" not in name}
    weights[HEAD_IN_ADAPTER] = getattr(model, HEAD).weight.data.clone()
    return add_adapter(model, config, weights, POLICY, where, trainable=True)
