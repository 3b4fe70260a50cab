"""Labelling: a page to rank or compare sampled answers, and to write better ones.

    python recipes/label.py --data groups.jsonl                              # http://127.0.0.1:8000
    python recipes/label.py --store groups.labels.sqlite --export data/mine  # rankings, pairs and demonstrations
    python recipes/label.py --store fresh.sqlite --import data/mine/labels.jsonl

Labels are kept in a SQLite file, which can be exported while people label. The page needs the extra `label`. More is in
`docs/label.md`.
"""

import argparse
import os

try:
    from rlhf_recipes.cli import exit_on_recipe_error
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}. Fix: run `source .venv/bin/activate` first") from None
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.paths import user_path
from rlhf_recipes.feedback.labels import Store, agreement, export_labels, import_labels, read_groups
from rlhf_recipes.feedback.labels.server import listen, serve


def main() -> None:
    """Read or restore labels, then export or serve them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, help="JSONL file of sampled groups to label")
    parser.add_argument("--store", type=user_path, help="database of labels (default: beside DATA, ending in .labels.sqlite)")
    parser.add_argument(
        "--export", type=user_path, metavar="FOLDER", help="write rankings, pairs, demonstrations, labels there"
    )
    parser.add_argument("--import", type=user_path, metavar="FILE", dest="restore", help="read a labels.jsonl of --export")
    parser.add_argument("--agreement", action="store_true", help="print how often labellers agree")
    parser.add_argument("--overlap", type=float, help="share of prompts that everyone labels (default: 0.1; kept in the store)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond this machine, a password is needed")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--password-env", metavar="NAME", help="environment variable that holds the password of the page")
    parser.add_argument("--name", action="append", default=[], help="host name by which others reach the page; repeatable")
    options = parser.parse_args()
    if not (options.data or options.store):
        raise RecipeError("--data: missing. Fix: name a file of sampled groups, or a database of labels with --store")
    password = os.environ.get(options.password_env or "", "")  # other users can read a command line
    if options.password_env and not password:
        raise RecipeError(f"--password-env: {options.password_env}: no such variable. Fix: export {options.password_env}=...")

    groups = read_groups(options.data) if options.data else []
    path = options.store or options.data.with_suffix(".labels.sqlite")
    only_files = options.export or options.agreement or options.restore
    listener = None if only_files else listen(options.host, options.port, password)
    with Store(path, options.overlap, create=bool(options.data or options.restore)) as store:
        if groups:
            alike = sum(not group.comparable() for group in groups)
            print(f"{path}: {store.add(groups)} of {len(groups)} groups are new; {alike} with equal answers are left out")
        if options.restore:
            print(f"{path}: {import_labels(store, options.restore)} labels are new", flush=True)
        if options.export:
            for name, rows in export_labels(store, options.export).items():
                print(f"{options.export / name}: {rows or 'no'} rows")
        if options.export or options.agreement:
            print(*agreement(store.contents()).lines(), sep="\n")
        if listener:
            serve(store, listener, password, options.name)


if __name__ == "__main__":
    with exit_on_recipe_error():
        main()
