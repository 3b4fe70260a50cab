"""The one kind of error that is the user's to mend."""


class RecipeError(Exception):
    """Something in a YAML file, on the command line, or in the data is wrong.

    The message names the file, the key or row, and the remedy. Recipes print it without a traceback and exit with status 2
    (`rlhf_recipes.arguments.user_errors`).
    """


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error, to go into a message of ours; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
