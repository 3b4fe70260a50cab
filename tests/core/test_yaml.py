"""YAML files: YAML 1.2, keys once, and one line for what is wrong."""

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.core.yaml import line_of, read_yaml, to_yaml

import pytest


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("+1e3", 1e3), ("yes", "yes"), ("off", "off"), ("010", 10), ("1:30", "1:30"), ("~", None)],
)
def test_yaml_1_2(tmp_path, text, value):
    (tmp_path / "x.yaml").write_text(f"key: {text}\n")
    read = read_yaml(tmp_path / "x.yaml")["key"]
    assert (read, type(read)) == (value, type(value))


def test_written_values_are_read_again(tmp_path):
    values = {"b": 1e-05, "a": "1e-4", "c": ["yes", True, None, "null"], "d": {"path": "a: b", "n": 10**30}, "e": "ä\nb"}
    (tmp_path / "x.yaml").write_text(to_yaml(values), encoding="utf-8")
    read = read_yaml(tmp_path / "x.yaml")
    assert read == values
    assert list(read) == list(values)


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_an_empty_file_is_an_empty_mapping(tmp_path, content):
    (tmp_path / "x.yaml").write_text(content)
    assert read_yaml(tmp_path / "x.yaml") == {}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"seed: 1\nseed: 2\n", ("not valid YAML", "line 2", '"seed"')),
        (b"seed: [1\n", ("not valid YAML", "line 2")),
        (b"\tseed: 1\n", ("not valid YAML", "line 1")),
        (b"seed: 1\n---\nseed: 2\n", ("not valid YAML", "line 2")),
        (b"seed: *nobody\n", ("not valid YAML", "line 1", "nobody")),
        (b"seed: 2001-13-45\n", ("not valid YAML", "month")),
        (b"seed: !!python/object/apply:os.system ['exit']\n", ("not valid YAML", "line 1", "os.system")),
        (b"- a\n- b\n", ("list", "key: value")),
        (b"just words", ("str", "key: value")),
        (b"\xff\xfe\x00", ("utf-8",)),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, parts):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in (str(path), *parts)), error.value


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(RecipeError, match=r"mien\.yaml: no such file; did you mean '.*mine\.yaml'"):
        read_yaml(tmp_path / "mien.yaml")


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (("a",), 1),
        (("stages", 1, "arguments", "beta"), 6),
        (("stages", 1, "arguments", "other"), 5),  # the last part that is there
        (("stages", 7), 2),
        (("3",), 8),
        (("nothing",), None),
    ],
)
def test_the_line_of_a_key(tmp_path, steps, line):
    path = tmp_path / "my.yaml"
    path.write_text("a: 1\nstages:\n- name: sft\n- name: dpo\n  arguments:\n    beta: 0.1\n\n3: {b: c}\n")
    assert line_of(path, steps) == line
    path.write_text("a: [1\n")  # it was edited meanwhile
    assert line_of(path, steps) is None
