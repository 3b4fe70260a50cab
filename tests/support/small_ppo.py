"""A small language model, prompts, rewards, and trainers that record, for tests of PPO."""

import copy

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.models.backbone import backbone
from rlhf_recipes.models.fingerprint import fingerprint
from rlhf_recipes.models.precision import disable_cpu_4bit_repacking
from rlhf_recipes.rewards.reward_json import store_normalisation, write_reward_record

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.trainer_callback import PrinterCallback

PAD, EOS, WORDS = 0, 1, 32
PROMPTS = [
    "w5 ",
    "w6 w7 w8 w9 w10 ",
    "w11 w12 ",
    "w13 w14 w15 w16 w17 w18 w19 ",
    "w20 w21 w22 ",
    "w23 ",
    "w24 w25 ",
    "w26 w5 w9 ",
]
# of every sort: EOS at once, one token and cut off there, EOS after some, cut off at the end
ANSWERS = [[EOS], [7], [8, 9, EOS], [10, 11, 12, 13, 14, 15], [16, EOS], [17, 18, 19, EOS], [20, 21, 22, 23, 24, EOS], [25, 26]]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


# --- Models ----------------------------------------------------------------------------------------------


def make_tokenizer():
    words = ["<pad>", "<eos>", "user", "assistant", *(f"w{number}" for number in range(4, WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", chat_template=TEMPLATE
    )


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS,
        max_position_embeddings=64,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.2,  # far from uniform, so that every mistake shows
        **{**SIZES, **options},
    )
    return LlamaForCausalLM(config).eval()


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "granitemoe": {**EXPERTS, "num_local_experts": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "modernbert-decoder": SIZES,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
}
"""Sizes of small models of other families; those not here take `SIZES`."""


def make_family(kind, **options):
    """Make a small random model of another family."""
    torch.manual_seed(0)
    tokens = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
    values = {"max_position_embeddings": 64, "initializer_range": 0.2, "init_std": 0.2, **tokens}
    config = AutoConfig.for_model(kind, **{**values, **FAMILIES.get(kind, SIZES), **options})
    return AutoModelForCausalLM.from_config(config).float().eval()


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def with_adapter(model, seed=1, **options):
    """Add a nonzero adapter, as SFT would."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, lora(init_lora_weights=False, **options))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.3)
    return adapted


def in_4_bits(folder):
    """Load the model in `folder` in NF4."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    disable_cpu_4bit_repacking(model)
    return model


def save_base(folder, **options):
    """Save a model with its tokenizer."""
    make_model(**options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_reward(folder, base, seed=0, normalised=True):
    """Save a random reward adapter as `recipes/reward.py` does."""
    torch.manual_seed(seed + 10)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, lora(task_type="SEQ_CLS", init_lora_weights=False, modules_to_save=["score"]))
    adapted.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_reward_record(folder, str(base), fingerprint(AutoModelForCausalLM.from_pretrained(base)))
    if normalised:
        store_normalisation(folder, [-1.0 - seed, 2.0, 3.5])
    return folder


# --- Trainers --------------------------------------------------------------------------------------------


def prompts(count=8, **columns):
    return Dataset.from_dict({"prompt": [PROMPTS[row % len(PROMPTS)] for row in range(count)], **columns})


def count_words(completion_ids, **columns):
    """Score completions so that no two are equal."""
    return [sum(ids) / 20 - len(ids) / 3 for ids in completion_ids]


def answers_of(table=ANSWERS):
    """Make a `rollout_func` that always answers a prompt in the same way."""

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [table[PROMPTS.index(prompt)] for prompt in prompts], "logprobs": None}

    return rollout


def make_args(folder, **options):
    values = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "num_iterations": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        **options,
    }
    return PPOConfig(str(folder), **values)


class Remembering(PPOTrainer):
    """PPOTrainer that records inputs and results of each update.

    Attributes:
        batches: rollouts in TRL's dictionaries, before they are shuffled and split.
        at_rollout: weights of policy and critic at each rollout.
        inputs: micro-batches.
        at_update: weights at each micro-batch.
        losses: policy loss of each micro-batch.
        gradients: of the policy at each optimizer step, before clipping.
        critic_gradients: likewise.
    """

    def __init__(self, *arguments, **options):
        self.batches, self.at_rollout, self.inputs, self.at_update, self.losses = [], [], [], [], []
        self.gradients, self.critic_gradients = [], []
        super().__init__(*arguments, **options)

    def weights_now(self):
        return copy.deepcopy(self.model.state_dict()), copies(self.critic.trainable())

    def _generate_and_score_completions(self, inputs):
        if self.model.training:
            self.at_rollout.append(self.weights_now())
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(copy.deepcopy(batch))
        return batch

    def _compute_loss(self, model, inputs):
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self.at_update.append(self.weights_now())
        self.inputs.append(copy.deepcopy(inputs))
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss

    def _step_critic(self):
        self.critic_gradients.append(gradients_of(self.critic.trainable()))
        super()._step_critic()

    def _clip_grad_norm(self, model):
        self.gradients.append(gradients_of(dict(self.model.named_parameters())))
        return super()._clip_grad_norm(model)


def copies(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def gradients_of(weights):
    return {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}


def make_trainer(folder, model=None, reward=count_words, kind=PPOTrainer, data=None, peft=None, init=None, **options):
    """Make a trainer on a small model; `options` are arguments of PPOConfig, `init` of the trainer."""
    trainer = kind(
        make_model() if model is None else model,
        reward,
        make_args(folder, **options),
        train_dataset=prompts() if data is None else data,
        processing_class=make_tokenizer(),
        peft_config=peft,
        **(init or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def moved(before, after):
    """Return the names of the weights that differ by a bit or more."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- Plain computations, one row at a time ---------------------------------------------------------------


def rows_of(batch):
    """Yield prompt and completion of each row as lists, without padding."""
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        yield prompt, batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()


def plain_logps(model, prompt, completion):
    """Return log-probabilities of the tokens of one completion."""
    logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(prompt) - 1 + place, token] for place, token in enumerate(completion)])


def plain_values(model, head, prompt, completion):
    """Return the value of the state before each token of one completion."""
    hidden = backbone(model)(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
    return (hidden[len(prompt) - 1 : -1] @ head.weight[0] + head.bias[0]) if completion else hidden[:0, 0]


def plain_roles(trainer, untouched, weights):
    """Return policy, backbone of the critic and its head as separate models, at recorded weights.

    Args:
        trainer: of the run, for the kind of its critic.
        untouched: a copy of the policy before training.
        weights: of policy and critic, recorded by `Remembering`.
    """
    of_policy, of_critic = weights
    policy = copy.deepcopy(untouched).eval()
    policy.load_state_dict(of_policy, strict=False)  # without the other adapters
    head = torch.nn.Linear(backbone(policy).config.hidden_size, 1)
    head.load_state_dict({name.removeprefix("head."): w for name, w in of_critic.items() if name.startswith("head.")})
    rest = {name: weight for name, weight in of_critic.items() if not name.startswith("head.")}
    if trainer.args.critic == "shared":
        critic = policy
    elif trainer.args.critic == "adapter":
        critic = copy.deepcopy(untouched).eval()
        loaded = critic.load_state_dict({name.replace(".critic.", ".default."): w for name, w in rest.items()}, strict=False)
        assert not loaded.unexpected_keys
    else:
        critic = copy.deepcopy(backbone(untouched)).eval()
        critic.load_state_dict(rest)
    return policy, critic, head
