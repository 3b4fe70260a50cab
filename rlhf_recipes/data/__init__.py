"""Files, Hub names and Python functions to TRL's dataset types.

`sources` opens what a YAML file names, `shapes` lists the columns that data may have, `rows` converts each row to what the
stage trains on, `mixture` joins the parts, and `rendering` checks them as the tokenizer renders them.
"""

from rlhf_recipes.data.conversion import Kind
from rlhf_recipes.data.mixture import Data, check_source, load_data, load_demonstrations, load_texts
from rlhf_recipes.data.rendering import check_positions, check_rendered, drop_overlong_mode

__all__ = [
    "Data",
    "Kind",
    "check_positions",
    "check_rendered",
    "check_source",
    "drop_overlong_mode",
    "load_data",
    "load_demonstrations",
    "load_texts",
]
