"""Files, Hub names and Python functions to TRL's dataset types.

`sources` opens what a YAML file names, `shapes` lists the columns that data may have, `rows` converts each row to what the
stage trains on, `mixture` joins the parts, and `lengths` looks at `max_length`.
"""

from rlhf_recipes.data.conversion import Kind
from rlhf_recipes.data.lengths import check_lengths, check_positions, drop_overlong_mode
from rlhf_recipes.data.mixture import Data, check_source, load_data, load_demonstrations, load_texts

__all__ = [
    "Data",
    "Kind",
    "check_lengths",
    "check_positions",
    "check_source",
    "drop_overlong_mode",
    "load_data",
    "load_demonstrations",
    "load_texts",
]
