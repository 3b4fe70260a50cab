"""What a recipe prints at its end: its warnings again, and why it cannot continue."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.config.current import CURRENT_RUN, CurrentRun
from rlhf_recipes.config.keys import check_all_keys, read_options
from rlhf_recipes.config.origins import COMMAND_LINE, config_of, origin_of
from rlhf_recipes.config.overrides import merge_overrides
from rlhf_recipes.core.errors import (
    LabelsMissingError,
    RecipeError,
    causes,
    error_context,
    failed_write,
    first_line,
    lack_of_memory,
)
from rlhf_recipes.core.paths import add_current_folder, expand_paths
from rlhf_recipes.core.warning_log import repeat_warnings
from rlhf_recipes.core.yaml import read_yaml
from rlhf_recipes.inputs import check_inputs, needed_stages
from rlhf_recipes.stages import find_stage

# What imports PyTorch is imported where it is needed: recipes/label.py starts without it


@contextlib.contextmanager
def exit_on_recipe_error() -> Iterator[None]:
    """Print a user's error as one message and exit with 2; after Ctrl-C, with 130.

    Where labels of people are missing, it exits with 3.

    The message begins with the file that the arguments of the run come from. Out of memory, a full disk and the complaint of
    a tracker are such errors too. All others keep their traceback. Warnings come before, once more.
    """
    with contextlib.suppress(AttributeError):  # a notebook's stdout
        sys.stdout.reconfigure(line_buffering=True)  # keeps the order of stdout and stderr in one file
    token = CURRENT_RUN.set(None)
    try:
        with repeat_warnings(_written_at):
            yield
    except Exception as error:
        run = CURRENT_RUN.get()
        message = _message(error, run)
        if message is None:
            raise
        if isinstance(error, LabelsMissingError):
            print(f"waiting: {message}", file=sys.stderr)
            sys.exit(LabelsMissingError.STATUS)
        print(f"error: {f'{run.origin.place(message)}: ' if run else ''}{message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        run = CURRENT_RUN.get()
        print("; ".join([f"stopped{_when(run)}", *_kept(run, "true")]), file=sys.stderr)
        sys.exit(130)
    finally:
        CURRENT_RUN.reset(token)


def _written_at(message: str) -> str:
    """Return where the argument that a warning begins with was written."""
    run = CURRENT_RUN.get()
    return run.origin.written_at(message) if run else ""


def check_early(recipe: str | Path) -> None:
    """Exit with one message for a misspelt key or path, in less than a second.

    Recipes call it before they import PyTorch. Everything else that may be wrong is found when they parse their arguments.
    """
    with exit_on_recipe_error():
        add_current_folder()
        recipe = Path(recipe).resolve()
        types = find_stage(recipe.stem).argument_types()
        options = read_options(sys.argv[1:], types)
        config = config_of(recipe, options.pop("config", None))
        with error_context(COMMAND_LINE):
            options = expand_paths(options)
        check_file(config, types, recipe.parent, options)


def check_file(
    config: Path, types: Mapping[str, str], recipes: Path, overrides: Mapping[str, Any], written: Sequence[Path] = ()
) -> None:
    """Check the keys and paths of a recipe's YAML file, and of those that it needs.

    Args:
        config: the file.
        types: the keys of the recipe, with their types as text.
        recipes: the folder of the recipes.
        overrides: keys and values of the command line.
        written: folders that other stages will write.

    Raises:
        RecipeError: with the file and the line, or the command line.
    """
    values = read_yaml(config)
    with origin_of(config, values, overrides).context():
        check_all_keys(values, types)
        merged = merge_overrides(values, overrides)
        needed = dict(needed_stages(merged.get("needs") or (), merged, recipes))
        written = [*written, *needed.values()]
        check_inputs(merged, types, lambda path: any(Path(path).is_relative_to(folder) for folder in written))
    for path in needed:
        check_file(path, find_stage(path.stem).argument_types(), recipes, {}, written)


def _message(error: Exception, run: CurrentRun | None) -> str | None:
    """Return the message of an error that the user can fix, None for any other."""
    if exhausted := lack_of_memory(error):
        from rlhf_recipes.memory.out_of_memory import explain_out_of_memory

        return ". ".join([explain_out_of_memory(exhausted, run, _when(run)), *_kept(run)])
    if isinstance(error, RecipeError):
        return str(error)
    return _tracker_complaint(error) or _failed_write(error, run)


def _when(run: CurrentRun | None) -> str:
    """Return the step of the training that had begun."""
    if run is None or run.trainer is None:
        return ""
    state = run.trainer.state
    return f" after {state.global_step} of {state.max_steps} steps"


def _kept(run: CurrentRun | None, resume: str | None = None) -> list[str]:
    """Return the newest checkpoint of the training, and how to resume from it.

    With None for `resume_from_checkpoint` it is named, which lets other arguments change.
    """
    if run is None or run.trainer is None:
        return []
    from rlhf_recipes.training.resume import newest_checkpoint

    folder = Path(run.trainer.args.output_dir)
    newest = newest_checkpoint(folder)
    if newest is None:
        return []
    if resume is None and folder.name.startswith("member-"):  # an ensemble resumes from no single checkpoint
        return [f"{newest} is kept"]
    same = "" if resume else " and the same `optim`"
    return [f"{newest} is kept: resume from it with `resume_from_checkpoint: {resume or newest}`{same}"]


def _tracker_complaint(error: BaseException) -> str | None:
    """Return the message of a tracker that stopped a training, or None."""
    from rlhf_recipes.config.checks import TRACKERS

    for cause in causes(error):
        package = type(cause).__module__.partition(".")[0]
        if package in TRACKERS:
            fix = ". Fix: log in with `wandb login`, or set WANDB_MODE=offline" if package == "wandb" else ""
            return f"report_to: {package}: {first_line(cause)}{fix}"
    return None


def _failed_write(error: Exception, run: CurrentRun | None) -> str | None:
    """Return a message about a disk that is full or not writable, or None."""
    failure = failed_write(error)
    if failure is None:
        return None
    (reason, file), values = failure, run.values if run else {}
    output = values.get("output_dir")
    within = bool(output) and (not file or Path(output).resolve() in (Path(file).resolve(), *Path(file).resolve().parents))
    if not within and (not file or any(isinstance(cause, PermissionError) for cause in causes(error))):
        return None  # a file that could not be read
    resume = " with `resume_from_checkpoint: true`" if within and "resume_from_checkpoint" in values else ""
    place = f"output_dir: {output}" if within else file
    return f"{place}: cannot be written to ({reason}). Fix: make room, and run again{resume}. Complete files are kept"
