"""Arguments of `recipes/merge.py`."""

from dataclasses import dataclass

from rlhf_recipes.config import option


@dataclass
class MergeArguments:
    """Which adapter to merge into its base model, and where to write the result."""

    adapter: str | None = option(
        None, "Adapter folder of a policy or reward model. Default of `model_name_or_path`: the base that it was trained on."
    )
    tolerance: float | None = option(
        None,
        "Greatest difference between the merged model's logits or scores and the adapter's, as a share of their deviation; "
        "default: 1e-3 in float32, 2e-2 in float16, 1e-1 in bfloat16.",
    )
    max_shard_size: str = option("5GB", "Greatest size of a file of weights.")
    push_to_hub: bool = option(False, "Upload the merged model to the Hub.")
    hub_model_id: str | None = option(None, "Name on the Hub; default: that of `output_dir`, under your account.")
    hub_private_repo: bool | None = option(None, "Whether a new repository is private; default: as your account has it.")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")
    output_dir: str = option("runs/merge", "Folder for the merged model; it must be new or empty.")

    def __post_init__(self):
        if self.adapter is None:
            raise ValueError("adapter: missing. Fix: name the folder of the adapter to merge")
        if self.tolerance is not None and self.tolerance <= 0:
            raise ValueError(f"tolerance: {self.tolerance}: must be above 0")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError(f"hub_model_id: {self.hub_model_id}: is not read. Fix: set `push_to_hub: true`")
