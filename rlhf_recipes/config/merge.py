"""Arguments of `recipes/merge.py`."""

from dataclasses import dataclass, field


@dataclass
class MergeArguments:
    """Which adapter to merge into its base model, and where to write the result."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the adapter of a policy or reward model. Without `model_name_or_path` the base model is the one "
            "that it was trained on."
        },
    )
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Greatest difference of the merged model's logits, or scores, from the adapter's, as a share of their "
            "deviation; by default 1e-3 in float32, 2e-2 in float16 and 1e-1 in bfloat16."
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Greatest size of a file of weights."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the merged model to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Name on the Hub; by default that of `output_dir`, under your account."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; by default as your account has it."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    output_dir: str = field(default="runs/merge", metadata={"help": "Folder for the merged model; it must be new or empty."})

    def __post_init__(self):
        if self.adapter is None:
            raise ValueError("adapter: missing. Fix: name the folder of the adapter to merge")
        if self.tolerance is not None and self.tolerance <= 0:
            raise ValueError(f"tolerance: {self.tolerance}: must be above 0")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError(f"hub_model_id: {self.hub_model_id}: is not read. Fix: set `push_to_hub: true`")
