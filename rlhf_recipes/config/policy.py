"""Arguments that DPO and PPO have in common."""

from dataclasses import dataclass, field

NEEDS = {
    "help": "YAML files of earlier stages; each is run first if this stage reads its `output_dir` and there is no result there."
}


@dataclass
class PolicyArguments:
    """What a policy starts from."""

    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the SFT adapter: the policy starts as a copy of it, and it is the reference. Without it the "
            "policy is the base model with a fresh adapter, and the base model is the reference."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "The token that ends an answer; by default that of `start_from`, or of the base model."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A .jinja file or a tokenizer with a chat template; by default that of `start_from`, or the base's."},
    )
    needs: list[str] = field(default_factory=list, metadata=NEEDS)
