"""Answers that do not end with EOS."""

import logging

logger = logging.getLogger(__name__)

NO_EOS = "raise `max_completion_length`, or see in docs/sft.md why a model never stops"
"""Advice where answers are cut off."""


def warn_of_endless(where: str, ended: int, answers: int, max_new_tokens: int) -> None:
    """Warn if fewer than half of the answers end with EOS."""
    if 2 * ended < answers:
        logger.warning(
            "%s: only %d of %d answers end with EOS, the others are cut off at `max_completion_length: %d`. Fix: %s",
            *(where, ended, answers, max_new_tokens, NO_EOS),
        )
