"""Fixtures of the tests of data."""

from support.data_files import write_rows

import pytest


@pytest.fixture
def write(tmp_path):
    """Write rows, or raw text, to a file: `write(rows, name)` returns its path."""
    return lambda rows, name="data.jsonl": write_rows(tmp_path / name, rows)
