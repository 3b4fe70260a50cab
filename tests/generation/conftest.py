"""The tiny base, for tests of generation."""

from support.evaluations import BASE

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def tiny():
    """Model and tokenizer."""
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
