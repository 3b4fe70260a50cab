"""People label sampled completions on a web page; labels become datasets.

`store` keeps labels in SQLite (`database`), `assignment` says which group a labeller gets, `files` exports and restores labels,
`agreement` compares labellers; `app`, `guard` and `server` are the page, which needs the extra `label`.
"""

from rlhf_recipes.feedback.groups import Group, read_groups
from rlhf_recipes.feedback.labels.agreement import agreement
from rlhf_recipes.feedback.labels.files import demonstrations, export_labels, import_labels, pairs, rankings
from rlhf_recipes.feedback.labels.label import Label
from rlhf_recipes.feedback.labels.store import Store

__all__ = ["Group", "Label", "Store", "agreement", "demonstrations", "export_labels", "import_labels", "pairs", "rankings"]
__all__ += ["read_groups"]
