"""Arguments of `recipes/merge.py`."""

from dataclasses import dataclass, field


@dataclass
class MergeArguments:
    """Which adapter is merged into its base, and where the result goes. The names are those of TRL's trainers."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the adapter: a policy, or a reward model. Without `model_name_or_path` the base is the one that "
            "it was trained on."
        },
    )
    tolerance: float | None = field(
        default=None,
        metadata={
            "help": "How much the merged model's logits, or scores, may differ from the adapter's, as a share of their "
            "deviation; by default 1e-3 in float32, 2e-2 in float16 and 1e-1 in bfloat16."
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Size at which weights go on in another file."})
    push_to_hub: bool = field(default=False, metadata={"help": "Whether the merged model is uploaded to the Hub."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Its name on the Hub; by default that of `output_dir`, under your account."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private; by default as your account has it."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Whether code that comes with a model is run."})
    output_dir: str = field(
        default="runs/merge", metadata={"help": "Where the merged model is written: a new folder, or an empty one."}
    )

    def __post_init__(self):
        if self.adapter is None:
            raise ValueError("adapter: name the folder of the adapter that is to be merged")
        if self.tolerance is not None and self.tolerance <= 0:
            raise ValueError(f"tolerance: {self.tolerance}: must be above 0")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError("hub_model_id: goes with `push_to_hub: true`")
