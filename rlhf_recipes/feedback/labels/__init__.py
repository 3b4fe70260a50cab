"""People rank, compare and correct sampled answers: groups in, labels kept safe, rankings, pairs and demonstrations out.

`groups` reads what was sampled, `store` keeps labels in SQLite, `files` exports and restores them, `agreement` compares the
labellers, and `app`, `guard` and `server` are the page. Only these last need the extra `label`.
"""

from rlhf_recipes.feedback.labels.agreement import Agreement, agreement
from rlhf_recipes.feedback.labels.files import demonstrations, export_labels, import_labels, pairs, rankings
from rlhf_recipes.feedback.labels.groups import Group, read_groups
from rlhf_recipes.feedback.labels.store import Label, Store

__all__ = [
    "Agreement",
    "Group",
    "Label",
    "Store",
    "agreement",
    "demonstrations",
    "export_labels",
    "import_labels",
    "pairs",
    "rankings",
    "read_groups",
]
