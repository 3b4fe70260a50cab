"""Files, Hub names and Python functions to TRL's dataset types, and every check on what comes in.

`sources` opens what a YAML file names, `rows` reads each row into one of the shapes of `kinds` and converts it to what the
stage trains on, `splits` joins the parts, and `lengths` looks at `max_length`.
"""

from rlhf_recipes.data.lengths import check_lengths, drop_overlong_mode
from rlhf_recipes.data.mixture import Data, check_source, load_data, load_demonstrations, load_texts
from rlhf_recipes.data.shapes import Kind

__all__ = [
    "Data",
    "Kind",
    "check_lengths",
    "check_source",
    "drop_overlong_mode",
    "load_data",
    "load_demonstrations",
    "load_texts",
]
