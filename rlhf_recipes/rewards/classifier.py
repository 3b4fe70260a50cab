"""Sequence classifiers to train as reward models."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import RECIPE, read_json
from rlhf_recipes.models.adapters import check_ranks, read_adapter_config
from rlhf_recipes.models.compatibility import check_base, check_tokenizer, check_vocabulary
from rlhf_recipes.models.loading import load_architecture
from rlhf_recipes.models.roles import POLICY
from rlhf_recipes.models.weights import ADAPTER, read_weights
from rlhf_recipes.rewards.reward_models import HEAD, ScalarHead
from rlhf_recipes.rewards.saved import PREFIX, fill_adapter, read_head

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, RewardConfig, get_peft_config
from trl.trainer.base_config import _BaseConfig as TrainingConfig


def load_reward_model(
    arguments: ModelConfig,
    training: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    parent: str | Path | None = None,
) -> PreTrainedModel | PeftModel:
    """The base with a scalar head in fp32, and by `use_peft` with an adapter, ready for `RankingTrainer`.

    A fresh head is drawn from N(0, 1 / (width + 1)) with the seed of the run (Huang et al., 2024, "The N+ implementation
    details of RLHF with PPO"). A base that is a reward model already keeps its head.

    Args:
        arguments: TRL's model arguments.
        training: for the seed and `model_init_kwargs`.
        tokenizer: of the run; its PAD is what the model looks for at the end of a sequence.
        parent: an SFT adapter to start from. The new adapter begins with its weights, its rank, alpha and targets (the LoRA
            arguments are not read), and stands on the base alone: it does not need its parent any more.

    Returns:
        A sequence classifier with one label, or a `PeftModel` of it whose adapter and head are trainable.

    Raises:
        RecipeError: as in `load_model`; for an architecture without such a head; for layers to adapt that the model has not,
            and for whole layers to train besides, which could not share a base; for a parent that is no LoRA adapter of this
            base, or with `use_peft: false`.
    """
    set_seed(training.seed)
    model, fresh = load_classifier(arguments, training)
    _install_head(model, fresh, arguments.model_revision)
    check_vocabulary(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if not arguments.use_peft:
        if parent is not None:
            raise RecipeError(f"the adapter {parent} can be started from with `use_peft: true` only; or merge it into its base")
        return model
    if parent is not None:
        if (Path(parent) / "tokenizer_config.json").is_file():
            check_tokenizer(Path(parent), tokenizer)
        return _continue_adapter(model, Path(parent))
    return _new_adapter(model, get_peft_config(arguments))


def load_classifier(arguments: ModelConfig, training: TrainingConfig) -> tuple[PreTrainedModel, bool]:
    """The base as a sequence classifier with one label, and whether its files lack the head, which then is random.

    Raises:
        RecipeError: as in `load_model`; for an architecture without such a head; if the files lack anything else.
    """
    with quiet():
        model, missing = load_architecture(AutoModelForSequenceClassification, arguments, training, num_labels=1)
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise RecipeError(f"{model.name_or_path}: {type(model).__name__} has no head `{HEAD}` of one output: it cannot be used")
    if lost := missing - {f"{HEAD}.weight"}:
        raise RecipeError(f"model_name_or_path: {model.name_or_path}: its files lack {', '.join(sorted(lost)[:3])}")
    return model, bool(missing)


def _new_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    if others := sorted({*(config.modules_to_save or ())} - {HEAD}):
        raise RecipeError(
            f"lora_modules_to_save: {', '.join(others)}: a reward adapter trains LoRA and its head only, since it shares its "
            "base with other roles: remove the key"
        )
    config.task_type, config.modules_to_save = "SEQ_CLS", [HEAD]
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        targets = config.target_modules
        named = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        raise RecipeError(f"lora_target_modules: {named}: {model.name_or_path}: {first_line(error)}") from error


def _install_head(model: PreTrainedModel, fresh: bool, revision: str | None) -> None:
    old = getattr(model, HEAD)
    head = ScalarHead(old.in_features)
    if fresh:
        nn.init.normal_(head.weight, std=(old.in_features + 1) ** -0.5)
    else:
        head.weight.data.copy_(read_head(model.name_or_path, old.weight.data, revision))
    setattr(model, HEAD, head.to(old.weight.device))


def _continue_adapter(model: PreTrainedModel, parent: Path) -> PeftModel:
    """A new reward adapter with the weights of a parent that was trained on the same base for another task."""
    config = read_adapter_config(parent, "start_from")
    if config.peft_type != "LORA":
        raise RecipeError(f"{parent}: only a LoRA adapter can be started from, and this is {config.peft_type}")
    check_base(parent, config.base_model_name_or_path, read_json(parent / RECIPE), model)
    if HEAD in (config.modules_to_save or ()):
        raise RecipeError(f"start_from: {parent} is a reward model: name the SFT adapter, or leave this out")
    if config.modules_to_save:
        raise RecipeError(f"{parent} trained {', '.join(config.modules_to_save)} besides LoRA: it cannot be started from")
    config.base_model_name_or_path, config.inference_mode = model.name_or_path, False
    if isinstance(config.target_modules, set):
        config.target_modules -= {"lm_head"}  # a reward model has none
    weights = {name: weight for name, weight in read_weights(parent / ADAPTER).items() if "lm_head" not in name}
    check_ranks(config, weights, f"start_from: {parent}")
    weights[f"{PREFIX}{HEAD}.weight"] = getattr(model, HEAD).weight.data.clone()
    adapted = _new_adapter(model, config)
    fill_adapter(adapted, weights, POLICY, parent)
    return adapted


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Transformers' report that the head is new and the LM head unused, which is what was asked for."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
