"""The YAML key `policies`."""

import json

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.generation.policies import Policy, read_policies, warn_of_plain_text

import pytest


def make_adapter(folder, record=None):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()
    if record is not None:
        (folder / "recipe.json").write_text(json.dumps(record))
    return str(folder)


def test_every_form_of_an_entry_is_read(tmp_path):
    folder = make_adapter(tmp_path / "sft")
    entries = {
        "base": None,
        "sft": folder,
        "again": {"path": folder, "optional": True},
        "best": {"best_of": {"policy": "sft", "n": 4, "reward": "gold"}},
    }
    assert read_policies(entries) == {
        "base": Policy("base"),
        "sft": Policy("sft", folder),
        "again": Policy("again", folder),
        "best": Policy("best", best_of="sft", n=4, reward="gold"),
    }


def test_a_missing_policy_is_named_with_the_recipe_that_makes_it(tmp_path, capsys):
    with pytest.raises(RecipeError, match=r"policies: ppo: .*adapter_config\.json.*recipes/ppo\.py"):
        read_policies({"base": None, "ppo": str(tmp_path / "ppo")})
    assert list(read_policies({"base": None, "ppo": {"path": str(tmp_path / "ppo"), "optional": True}})) == ["base"]
    assert "policies: ppo: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "policies: x: 3"),
        ({"path": 3}, "policies: x: path: "),
        ({"folder": "a"}, "policies: x: path: "),
        ({"best_of": {"policy": "base"}}, "policies: x: best_of: n: "),
        ({"best_of": {"policy": "base", "n": 0}}, "policies: x: best_of: n: "),
        ({"best_of": {"policy": "base", "n": True}}, "policies: x: best_of: n: "),
        ({"best_of": {"policy": "base", "n": 2, "reward": ["gold"]}}, "policies: x: best_of: reward: "),
        ({"best_of": {"policy": "base", "n": 2, "m": 2}}, "policies: x: best_of: m: "),
        ({"best_of": {"policy": "nobody", "n": 2}}, "policies: x: best_of: policy: 'nobody' is none of base"),
    ],
)
def test_a_malformed_policy_is_rejected(entry, message):
    with pytest.raises(RecipeError, match=message):
        read_policies({"base": None, "x": entry})


def test_policies_trained_on_plain_text_are_named(tmp_path, caplog):
    def record(conversational):
        return {"data": {"train": {"conversational": conversational}}}

    policies = {
        "base": None,
        "plain": make_adapter(tmp_path / "plain", record(False)),
        "conversations": make_adapter(tmp_path / "conversations", record(True)),
        "unknown": make_adapter(tmp_path / "unknown"),
    }
    warn_of_plain_text(read_policies(policies))
    assert [message.rpartition(": ")[2] for message in caplog.messages] == ["plain"]
