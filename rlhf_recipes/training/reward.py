"""Reward models: what TRL's `RewardTrainer` lacks, which is rankings, an fp32 head, and a start from the SFT adapter."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.core.files import RECIPE, read_json
from rlhf_recipes.models.kernels import keep_forward
from rlhf_recipes.models.loading import (
    ADAPTER,
    adapter_config,
    base_name,
    check_base,
    check_ranks,
    check_vocabulary,
    fingerprint,
    keep_adapter_in_fp32,
    load_architecture,
    preserve_param_dtypes,
    read_weights,
)
from rlhf_recipes.models.roles import (
    HEAD,
    POLICY,
    PREFIX,
    ScalarHead,
    check_tokenizer,
    encode,
    fill_adapter,
    stored_head,
    write_reward_record,
)

import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, RewardConfig, RewardTrainer, get_peft_config
from trl.data_utils import get_dataset_column_names
from trl.trainer.base_config import _BaseConfig as TrainingConfig
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.utils import global_then_local_main_first, pad

logger = logging.getLogger(__name__)


# --- The loss --------------------------------------------------------------------------------------------


def ranking_loss(rewards: Tensor, ranks: Tensor, center_rewards_coefficient: float | None = None) -> Tensor:
    """InstructGPT's loss on rankings (Ouyang et al., 2022, equation 1), the mean over the batch; a scalar.

    Of a ranking of K completions, each comparison weighs 1 / (K (K - 1) / 2). A tie is no comparison and adds nothing, so a
    ranking with ties weighs less, as it says less.

    Args:
        rewards: (B, K), K being that of the longest ranking; what stands in places without a completion does not matter.
        ranks: (B, K) whole numbers, the best 0; -1 where there is no completion.
        center_rewards_coefficient: of the squared sum of the two rewards of each comparison, as in TRL, or None.
    """
    better = comparisons(ranks)
    rewards = rewards.masked_fill(ranks < 0, 0.0)  # first of all: 0 times NaN would be NaN in the gradient
    losses = -nn.functional.logsigmoid(rewards[:, :, None] - rewards[:, None, :])
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (rewards[:, :, None] + rewards[:, None, :]) ** 2
    k = (ranks >= 0).sum(1)
    pairs = (k * (k - 1) / 2).clamp(min=1)
    return (losses.masked_fill(~better, 0.0).sum((1, 2)) / pairs).mean()


def comparisons(ranks: Tensor) -> Tensor:
    """Whether the first completion is better than the second: bool (B, K, K) from ranks (B, K) with -1 for none."""
    first, second = ranks[:, :, None], ranks[:, None, :]
    return (first >= 0) & (first < second)


# --- The trainer -----------------------------------------------------------------------------------------


class RankingCollator(DataCollatorForPreference):
    """Makes batches of rankings; pairs go to TRL's collator.

    From rows of `ranked_ids` (K lists of token ids) and `ranks` come, for B rankings of sum K completions in all:

    - `input_ids`, `attention_mask`: (sum K, T), padded on the right, ranking after ranking
    - `ranks`: (B, largest K) whole numbers, the best 0, and -1 where a ranking has no more completions
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch, as tensors."""
        if "ranked_ids" not in examples[0]:
            return super().torch_call(examples)
        ids = [torch.tensor(completion) for example in examples for completion in example["ranked_ids"]]
        options = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        return {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **options),
            "attention_mask": pad([torch.ones_like(row) for row in ids], padding_value=0, **options),
            "ranks": pad([_dense(example["ranks"]) for example in examples], padding_value=-1, padding_side="right"),
        }


class RankingTrainer(RewardTrainer):
    """TRL's `RewardTrainer` that also takes rankings: one row, one ranking, each completion through the model once.

    Rows of `prompt, chosen, rejected` (and `margin`) train as TRL does it. Rows of `prompt, completions, ranks`, lower ranks
    being better, train by `ranking_loss`; a batch of `per_device_train_batch_size` rankings is that many times K sequences.
    Like TRL it leaves out rows with a sequence longer than `max_length`, and says how many. What is trained stays in the type
    that it came in, where TRL would cast it to bf16 on a quantised base. `reward.json` is saved beside every checkpoint.
    """

    def __init__(self, model: PreTrainedModel | PeftModel | str, *args: Any, **kwargs: Any):
        with contextlib.nullcontext() if isinstance(model, str) else preserve_param_dtypes(model):
            super().__init__(model, *args, **kwargs)
        keep_forward(self.args)
        keep_adapter_in_fp32(self)
        if type(self.data_collator) is DataCollatorForPreference:
            self.data_collator = RankingCollator(self.data_collator.pad_token_id, self.data_collator.pad_to_multiple_of)
        self._base_fingerprint = fingerprint(self.model)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = get_dataset_column_names(dataset)
        if "completions" in columns or "ranked_ids" in columns:
            prepared = self._prepare_rankings(dataset, processing_class, args, dataset_name)
        else:
            prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset):
            _report_left_out(dataset_name, len(dataset), len(prepared), args.max_length)
        return prepared

    @staticmethod
    def _prepare_rankings(
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        args: RewardConfig,
        name: str,
    ) -> Dataset | IterableDataset:
        whole = isinstance(dataset, Dataset)  # an IterableDataset takes neither of these
        options = {"num_proc": args.dataset_num_proc} if whole else {}
        with global_then_local_main_first():
            columns = get_dataset_column_names(dataset)
            if "ranked_ids" not in columns:
                described = {"desc": f"Tokenizing {name} dataset"} if whole else {}
                gone = [column for column in columns if column != "ranks"]
                dataset = dataset.map(
                    _encode_ranking, fn_kwargs={"tokenizer": tokenizer}, remove_columns=gone, **options, **described
                )
            if args.max_length is not None:
                described = {"desc": f"Filtering {name} >{args.max_length} tokens"} if whole else {}
                dataset = dataset.filter(_fits, fn_kwargs={"max_length": args.max_length}, **options, **described)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*self._signature_columns, "ranked_ids", "ranks"}]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch of `RankingCollator`, and with `return_outputs` the model's output too."""
        if "ranks" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ranks = inputs["ranks"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores = outputs.logits.squeeze(-1)
        # The completions follow each other as the places of `ranks` do, row by row.
        rewards = scores.new_zeros(ranks.shape).masked_scatter(ranks >= 0, scores)
        loss = ranking_loss(rewards, ranks, self.args.center_rewards_coefficient)
        self._log_rankings(scores.detach(), rewards.detach(), ranks, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _log_rankings(self, scores: Tensor, rewards: Tensor, ranks: Tensor, mask: Tensor) -> None:
        """Keeps what TRL logs of pairs: of the rewards of this batch, and of its comparisons."""
        mode = "train" if self.model.training else "eval"
        differences = (rewards[:, :, None] - rewards[:, None, :])[comparisons(ranks)]
        # One row a process, since they may have different numbers of completions.
        row = [mask.sum(), scores.sum(), len(scores), (differences > 0).sum(), differences.sum(), len(differences)]
        rows = self.accelerator.gather(torch.tensor([[float(value) for value in row]], device=scores.device))
        extremes = self.accelerator.gather(torch.stack([scores.min(), scores.max()])[None])
        tokens, total, count, correct, margin, compared = rows.sum(0).tolist()
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(extremes[:, 0].min().item())
        metrics["mean_reward"].append(total / count)
        metrics["max_reward"].append(extremes[:, 1].max().item())
        if compared:
            metrics["accuracy"].append(correct / compared)
            metrics["margin"].append(margin / compared)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model, tokenizer and `reward.json`."""
        if self.args.should_save:  # first, since saving may end with an upload
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_reward_record(folder, base_name(self.model), self._base_fingerprint)
        super().save_model(output_dir, _internal_call)


def _dense(ranks: list[float]) -> Tensor:
    """Ranks as whole numbers from 0, without gaps; the order and the ties stay."""
    order = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    return torch.tensor([order[rank] for rank in ranks])


def _encode_ranking(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    return {"ranked_ids": [encode(tokenizer, row["prompt"], completion) for completion in row["completions"]]}


def _fits(row: dict[str, Any], max_length: int) -> bool:
    return max(map(len, row["ranked_ids"])) <= max_length


def _report_left_out(name: str, before: int, after: int, max_length: int | None) -> None:
    if not after:
        raise RecipeError(f"{name}: all {before} rows are longer than `max_length: {max_length}`: raise it")
    if after < before:
        logger.warning("%s: %d of %d rows are left out: longer than `max_length: %s`", name, before - after, before, max_length)


# --- The model -------------------------------------------------------------------------------------------


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
        head.weight.data.copy_(stored_head(model.name_or_path, old.weight.data, revision))
    setattr(model, HEAD, head.to(old.weight.device))


def _continue_adapter(model: PreTrainedModel, parent: Path) -> PeftModel:
    """A new reward adapter with the weights of a parent that was trained on the same base for another task."""
    config = adapter_config(parent, "start_from")
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
