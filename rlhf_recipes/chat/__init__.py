"""A chat with policies, in a terminal or through a pipe."""

from rlhf_recipes.chat.session import Chat

__all__ = ["Chat"]
