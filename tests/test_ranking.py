"""Rankings of sampled groups: which are chosen, and what people, judges and simulated labellers make of them."""

import json
import math
from types import SimpleNamespace

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.evaluation.judges import ChatJudge
from rlhf_recipes.labels import Label, Store
from rlhf_recipes.labels.groups import Group
from rlhf_recipes.ranking import Sampled, choose, disagreement, read_labeller, read_sampled

import pytest

ABSTENTION = "I do not know."


def sampled(number=0, texts=("Paris.", ABSTENTION, "Rome.", "Oslo."), reference="Paris."):
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompt = [{"role": "user", "content": f"Where is it? ({number})"}]
    return Sampled(Group(f"g{number}", prompt, completions, ["sft"] * len(texts)), {"reference": reference})


def ensemble(*members):
    """Reward models that score a completion by its length, each in its own way."""

    def scored(member):
        return lambda prompts, completions: [member(len(completion[0]["content"])) for completion in completions]

    return SimpleNamespace(members=[scored(member) for member in members])


# --- Which -----------------------------------------------------------------------------------------------


def test_disagreement_is_about_differences():
    groups = [sampled(0, ("a", "bbb")), sampled(1, ("a", "bb", "cccc"))]
    # What a member adds to everything is no disagreement
    assert disagreement(groups, ensemble(lambda n: n, lambda n: n + 5)) == pytest.approx([0, 0])
    # One likes length, the other dislikes it: differences d and -d deviate by d
    found = disagreement(groups, ensemble(lambda n: n, lambda n: -n))
    assert found == pytest.approx([2, (1 + 3 + 2) / 3])


def test_the_groups_that_are_disagreed_on_most_are_chosen():
    groups = [sampled(number, ("a", "b" * length)) for number, length in enumerate((2, 9, 1, 5))]
    chosen = choose(groups, 2, 0, ensemble(lambda n: n, lambda n: -n))
    assert [one.group.id for one in chosen] == ["g1", "g3"]


def test_a_draw_depends_on_its_seed_and_takes_none_twice():
    groups = [sampled(number) for number in range(30)]
    draws = [[one.group.id for one in choose(groups, 10, seed)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10
    assert choose(groups, None, 0) == groups


# --- By whom ---------------------------------------------------------------------------------------------


def test_without_noise_a_simulated_labeller_ranks_by_reward_and_ties_what_is_alike():
    label = read_labeller({"path": "rlhf_recipes.rewards.Abstention"}, 0)
    (row,) = label([sampled()])
    assert row["ranks"] == [1, 2, 3, 3]
    assert row["labeller"] == "simulated: Abstention, noise 0"
    assert row["sources"] == ["sft"] * 4
    assert label([sampled(texts=("Rome.", "Oslo."))]) == [], "nothing to rank"


def test_a_noisy_labeller_prefers_as_bradley_and_terry_have_it():
    noise, count = 0.8, 4000
    label = read_labeller({"path": "rlhf_recipes.rewards.Abstention", "noise": noise}, 0)
    rows = label([sampled(number, ("Paris.", ABSTENTION, "Rome.", "Oslo.")) for number in range(count)])
    assert all(row["ranks"][2] == row["ranks"][3] for row in rows)
    for better, worse, difference in ((0, 1, 1), (1, 2, 1), (0, 2, 2)):
        share = sum(row["ranks"][better] < row["ranks"][worse] for row in rows) / count
        expected = 1 / (1 + math.exp(-difference / noise))
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))


def test_people_are_waited_for(tmp_path):
    groups, path = [sampled(0), sampled(1)], tmp_path / "labels.sqlite"
    label = read_labeller({"store": str(path)}, 0)
    with pytest.raises(
        RecipeError, match=r"labeller: 2 of 2 groups in .* have no label yet: run `python recipes/label.py --store"
    ):
        label(groups)
    with Store(path) as store:
        for ranks in ([1, 2, None, 3], None):
            group = store.claim("anna")
            store.save(Label(group.id, "anna", ranks=ranks))
    (row,) = label(groups)
    assert (row["labeller"], row["id"], row["ranks"]) == ("anna", "g0", [1, 2, 3])
    assert len(row["completions"]) == 3


def test_a_judge_ranks_by_wins(monkeypatch):
    def longer(self, pair):
        _, first, second = pair
        return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"

    monkeypatch.setattr(ChatJudge, "_ask", longer)
    label = read_labeller({"url": "http://localhost:1/v1", "model": "tiny"}, 0)
    rows = label([sampled(0, ("aa", "b", "cccc")), sampled(1, ("a", "b"))])
    assert [row["ranks"] for row in rows] == [[2, 3, 1], [1, 1]]
    assert rows[0]["labeller"] == "judge: tiny"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "labeller: must be {store: FILE} for people"),
        ({"store": 3}, "labeller: must be"),
        ({"path": "rlhf_recipes.rewards.Abstention", "noise": -1}, "labeller: noise: -1 is not a scale"),
        ({"path": "rlhf_recipes.rewards.Abstention", "nois": 1}, "labeller: must be"),
    ],
)
def test_a_labeller_that_is_none_is_refused(entry, message):
    with pytest.raises(RecipeError) as caught:
        read_labeller(entry, 0)
    assert message in str(caught.value)


def test_a_reward_that_gives_no_number_is_refused(monkeypatch):
    monkeypatch.setattr("rlhf_recipes.rewards.normalised_match", lambda completions, **columns: [None] * len(completions))
    label = read_labeller({"path": "rlhf_recipes.rewards.normalised_match"}, 0)
    with pytest.raises(RecipeError, match=r"labeller: .* says nothing of an answer to"):
        label([sampled()])


# --- The recipe ------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A file of groups, as recipes/sample.py writes it."""
    path = tmp_path / "groups.jsonl"
    rows = [one.group.row() | one.columns for one in map(sampled, range(5))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_groups_come_with_their_columns(file):
    assert read_sampled(file) == [sampled(number) for number in range(5)]
    assert read_sampled(file.parent) == read_sampled(file)


def test_the_recipe_writes_rankings_that_say_who_ranked(launch, tmp_path, file):
    out = tmp_path / "out"
    options = ("--groups", file, "--output_dir", out, "--num_groups", 3)
    assert launch("rank", *options) == (0, "")
    rows = [json.loads(line) for line in (out / "rankings.jsonl").read_text().splitlines()]
    record = json.loads((out / "rank.json").read_text())
    assert record == {"labellers": ["simulated: Abstention, noise 0.4"], "chosen": 3, "ranked": 3}
    assert all(row["labeller"] == record["labellers"][0] for row in rows)

    from rlhf_recipes.arguments import DataArguments
    from rlhf_recipes.data import load_data

    loaded = load_data(DataArguments(dataset_name=str(out / "rankings.jsonl")), "ranking", evaluate=False, seed=0).train
    assert len(loaded) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "missing.jsonl"), "missing.jsonl: there is no such file"),
        (("--choose", "disagreement"), "reward: names the ensemble for `choose: disagreement`"),
        (("--choose", "best"), "choose: 'best': must be random or disagreement"),
        (("--num_groups", 0), "num_groups: 0: must be 1 or more"),
    ],
)
def test_what_a_user_got_wrong_is_one_message(launch, tmp_path, options, message):
    status, error = launch("rank", *options, "--output_dir", tmp_path)
    assert status == 2
    assert message in error
