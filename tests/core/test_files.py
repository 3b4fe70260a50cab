"""Atomic writes, and messages about a disk that is full or read-only."""

import errno
import os

from rlhf_recipes.cli import exit_on_recipe_error
from rlhf_recipes.core.errors import failed_write
from rlhf_recipes.core.files import write_json, write_text

import pytest
from safetensors import SafetensorError


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_json(path, {"one": 1})
    before = path.read_text()

    def half(file):
        os.truncate(file, 300)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", half)
    with pytest.raises(OSError, match=r"No space left on device: '.*record\.json'"):
        write_text(path, "another" * 100)
    assert path.read_text() == before
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "full", "a/file"), ("No space left on device", "a/file")),
        (OSError(errno.EROFS, "no", "a/file"), ("Read-only file system", "a/file")),
        (FileNotFoundError(errno.ENOENT, "none", "a/file"), None),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ("No space left on device", "")),
        (Exception("No space left on device (os error 28)"), ("No space left on device", "")),  # of `tokenizers`
        (Exception("Read-only file system (os error 30)"), ("Read-only file system", "")),
        (Exception("No such file or directory (os error 2)"), None),
        (SafetensorError("Error while deserializing header: header too large"), None),
        (RuntimeError("[enforce fail at x.cc:672] . unexpected pos 576 vs 534"), ("is the disk full, or read-only?", "")),
        (RuntimeError("shapes differ"), None),
    ],
)
def test_failed_writes_are_recognised(error, reason):
    assert failed_write(error) == reason
    outer = ValueError("while saving")
    outer.__cause__ = error
    assert failed_write(outer) == reason


def test_message_names_the_file_and_leaves_unreadable_files_alone(capsys):
    with pytest.raises(SystemExit), exit_on_recipe_error():
        raise OSError(errno.ENOSPC, "full", "/cache/rows.arrow")
    said = capsys.readouterr().err
    assert said.startswith("error: /cache/rows.arrow: cannot be written to (No space left on device)")
    assert said.count("\n") == 1
    with pytest.raises(PermissionError), exit_on_recipe_error():
        raise PermissionError(errno.EACCES, "no", "/data/rows.jsonl")
