"""Arguments that DPO and PPO have in common."""

from dataclasses import dataclass

from rlhf_recipes.config import option

NEEDS = "YAML files of earlier stages; each runs first if this stage reads its `output_dir` and it has no result yet."


@dataclass
class PolicyArguments:
    """What a policy starts from."""

    start_from: str | None = option(
        None,
        "Folder of the SFT adapter: the policy starts as a copy, and the original is the reference. Default: a fresh adapter, "
        "with the base model as reference.",
    )
    eos_token: str | None = option(None, "The token that ends an answer; default: that of `start_from`, or of the base model.")
    chat_template_path: str | None = option(
        None, "A .jinja file, or a tokenizer with a chat template; default: that of `start_from`, or of the base model."
    )
    needs: list[str] = option([], NEEDS)
