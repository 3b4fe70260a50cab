"""Arguments that DPO and PPO have in common."""

from dataclasses import dataclass, field

NEEDS = {
    "help": "YAML files of earlier stages; each is run first if this stage reads its `output_dir` and there is no result there."
}


@dataclass
class PolicyArguments:
    """Where a policy begins, by DPO or PPO."""

    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the SFT adapter that the policy starts as a copy of, and that is the reference. Without it the "
            "policy is the base with a fresh adapter, and the base is the reference."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "What ends an answer; by default what `start_from` was taught, or what the base has."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A .jinja file or a tokenizer with a chat template; by default that of `start_from`, or the base's."},
    )
    needs: list[str] = field(default_factory=list, metadata=NEEDS)
