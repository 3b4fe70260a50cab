"""Rankings of sampled groups: which are chosen, and what people, judges and simulated labellers make of them."""

import json
import math
from types import SimpleNamespace

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels import Label, Store
from rlhf_recipes.feedback.labels.groups import Group
from rlhf_recipes.feedback.ranking import Sampled, choose, disagreement, read_labeller, read_sampled
from rlhf_recipes.generation.judges import ChatJudge

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
        RecipeError, match=r"labeller: 2 of 2 groups in .* are not ranked yet: run `python recipes/label.py --store"
    ):
        label(groups)
    with Store(path) as store:
        for ranks in ([1, 2, None, 3], None):
            group = store.claim("anna")
            store.save(Label(group.id, "anna", ranks=ranks))  # the second is a skip by all there are
    (row,) = label(groups)
    assert (row["labeller"], row["id"], row["ranks"]) == ("anna", "g0", [1, 2, 3])
    assert len(row["completions"]) == 3


def test_a_skipped_group_waits_for_another_labeller_and_in_the_end_for_nobody(tmp_path):
    groups, path = [sampled(number) for number in range(4)], tmp_path / "labels.sqlite"
    label = read_labeller({"store": str(path)}, 0)
    with Store(path) as store:
        store.add(one.group for one in groups)
        store.save(Label("g0", "anna"))  # a skip
        store.save(Label("g1", "anna", [None] * 4))  # unusable, which is a judgement
        store.save(Label("g2", "anna", [1, 1, 1, 1]))
        store.save(Label("g3", "berta", [1, 2, 3, 4]))
        with pytest.raises(RecipeError, match=r"1 of 4 groups in .* are not ranked yet \(1 were skipped, and wait for another"):
            label(groups)
        store.save(Label("g0", "berta"))
        assert [row["id"] for row in label(groups)] == ["g3"]


def test_people_are_given_what_is_wanted_now_and_not_what_was_sampled_before(tmp_path):
    path = tmp_path / "labels.sqlite"
    label = read_labeller({"store": str(path)}, 0)
    old, new = [sampled(0), sampled(1)], [sampled(1), sampled(2)]
    with Store(path) as store:
        for groups, given in ((old, "g0"), (new, "g1"), (old, "g1")):
            with pytest.raises(RecipeError, match="2 of 2 groups"):
                label(groups)
            assert store.claim("anna").id == given
            assert store.progress("anna") == (0, 2)
        store.save(Label("g0", "anna", [1, 2, 3, 4]))
        with pytest.raises(RecipeError, match="2 of 2 groups"):
            label(new)
        assert [label.group for label in store.labels()] == ["g0"], "labels stay"


def test_noise_is_of_the_group(tmp_path):
    """Neither the groups beside it nor the round change what is said of one; other groups have other noise."""
    label = read_labeller({"path": "rlhf_recipes.rewards.Abstention", "noise": 5}, 0)
    rows = {row["id"]: row["ranks"] for row in label([sampled(number) for number in range(20)])}
    assert [row["ranks"] for row in label([sampled(7), sampled(3)])] == [rows["g7"], rows["g3"]]
    assert len({str(ranks) for ranks in rows.values()}) > 3


def test_a_column_that_some_groups_lack_is_passed_on(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "rlhf_recipes.rewards.normalised_match", lambda completions, **columns: seen.update(columns) or [0.0] * len(completions)
    )
    other = Sampled(sampled(1).group, {"town": "Rome"})
    read_labeller({"path": "rlhf_recipes.rewards.normalised_match"}, 0)([sampled(0), other])
    assert (seen["reference"], seen["town"]) == (["Paris."] * 4 + [None] * 4, [None] * 4 + ["Rome"] * 4)


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

    from rlhf_recipes.config.data import DataArguments
    from rlhf_recipes.data import load_data

    loaded = load_data(DataArguments(dataset_name=str(out / "rankings.jsonl")), "ranking", evaluate=False, seed=0).train
    assert len(loaded) == 3


def test_without_an_ensemble_yet_the_choice_is_at_random(launch, tmp_path, file):
    options = ("--groups", file, "--num_groups", 3)
    assert launch("rank", *options, "--output_dir", tmp_path / "random") == (0, "")
    doubted = ("--choose", "disagreement", "--reward", "")  # as "{reward|}" has it in the first round
    assert launch("rank", *options, *doubted, "--output_dir", tmp_path / "doubted") == (0, "")
    assert (tmp_path / "doubted" / "rankings.jsonl").read_text() == (tmp_path / "random" / "rankings.jsonl").read_text()
    # and what later rounds need is asked for in this one
    config = tmp_path / "rank.yaml"
    config.write_text(
        f"groups: {file}\nlabeller: {{path: rlhf_recipes.rewards.Abstention}}\nchoose: disagreement\nreward: ''\n"
    )
    status, error = launch("rank", "--config", config, "--output_dir", tmp_path / "baseless")
    assert (status, "model_name_or_path: name the base model" in error) == (2, True)


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
