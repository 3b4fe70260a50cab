"""A page on which people rank or compare sampled answers, and write what an answer should have been.

    python recipes/label.py --data groups.jsonl                              # http://127.0.0.1:8000
    python recipes/label.py --store groups.labels.sqlite --export data/mine  # rankings, pairs and demonstrations
    python recipes/label.py --store fresh.sqlite --import data/mine/labels.jsonl

Labels are kept in a SQLite file, which can be exported while people label. The page needs the extra `label`; `docs/label.md`
has the rest.
"""

import argparse
import os
from pathlib import Path

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels import Store, agreement, export_labels, import_labels, read_groups
from rlhf_recipes.feedback.labels.server import listen, serve


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSONL file of sampled groups that are to be labelled")
    parser.add_argument("--store", type=Path, help="database of labels (default: beside DATA, ending in .labels.sqlite)")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write rankings, pairs, demonstrations and labels there")
    parser.add_argument("--import", type=Path, metavar="FILE", dest="restore", help="a labels.jsonl that --export wrote")
    parser.add_argument("--agreement", action="store_true", help="print how often labellers agree")
    parser.add_argument(
        "--overlap", type=float, help="share of prompts that everyone is given; kept in the store (at first 0.1)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a password")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--password-env", metavar="NAME", help="environment variable with the password of the page")
    parser.add_argument("--name", action="append", default=[], help="host name under which others reach the page; repeatable")
    return parser.parse_args()


def main() -> None:
    """Reads, restores, and then exports or serves."""
    options = read_options()
    if not (options.data or options.store):
        raise RecipeError("the command line: give --data with a file of sampled groups, or --store with a database of labels")
    password = read_password(options.password_env)
    groups = read_groups(options.data) if options.data else []
    path = options.store or options.data.with_suffix(".labels.sqlite")
    serves = not (options.export or options.agreement or options.restore)
    listener = listen(options.host, options.port, password) if serves else None

    with Store(path, options.overlap, create=bool(options.data or options.restore)) as store:
        if groups:
            print(f"{path}: {store.add(groups)} of {len(groups)} groups are new{left_out(groups)}", flush=True)
        if options.restore:
            print(f"{path}: {import_labels(store, options.restore)} labels are new", flush=True)
        if options.export:
            for name, rows in export_labels(store, options.export).items():
                print(f"{options.export / name}: {rows or 'no'} rows")
        if options.export or options.agreement:
            print(*agreement(store.contents()).lines(), sep="\n")
        if listener:
            serve(store, listener, password, options.name)


def read_password(variable: str | None) -> str:
    """The password in an environment variable, which other users do not see as they would a command line."""
    if variable is not None and not os.environ.get(variable):
        raise RecipeError(f"--password-env {variable}: the environment has no such variable: export {variable}=...")
    return os.environ[variable] if variable else ""


def left_out(groups: list) -> str:
    """How many have nothing to compare, if any."""
    number = sum(not group.comparable() for group in groups)
    return f"; {number} without two different answers are left out" if number else ""


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
