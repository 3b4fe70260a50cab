"""Rankings of sampled groups: the choice of groups, and labelers: people, judges and simulated ones."""

import json
import math
from types import SimpleNamespace

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.core.errors import LabelsMissingError, RecipeError
from rlhf_recipes.data import load_data
from rlhf_recipes.feedback.groups import Group
from rlhf_recipes.feedback.labels import Label, Store
from rlhf_recipes.feedback.ranking import choose_groups, disagreement, read_labeler
from rlhf_recipes.generation.judges import ChatJudge

import pytest

REWARD, TEXTS = "rlhf_recipes.rewards.Abstention", ("Paris.", "I do not know.", "Rome.", "Oslo.")


def sampled(number=0, texts=TEXTS, **columns):
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    prompt = [{"role": "user", "content": f"Where is it? ({number})"}]
    return Group(f"g{number}", prompt, completions, ["sft"] * len(texts), columns or {"reference": "Paris."})


def ensemble(*members):
    """Reward models that map the length of a completion to a score."""

    def model(member):
        return lambda prompts, completions: [member(len(completion[0]["content"])) for completion in completions]

    return SimpleNamespace(members=[model(member) for member in members])


# --- Choice -----------------------------------------------------------------------------------------------------------


def test_disagreement_is_about_differences():
    groups = [sampled(0, ("a", "bbb")), sampled(1, ("a", "bb", "cccc"))]
    # A constant that a member adds to all scores is not disagreement
    assert disagreement(groups, ensemble(lambda n: n, lambda n: n + 5)) == pytest.approx([0, 0])
    # Opposite members: differences d and -d have standard deviation d
    assert disagreement(groups, ensemble(lambda n: n, lambda n: -n)) == pytest.approx([2, (1 + 3 + 2) / 3])


def test_the_groups_with_most_disagreement_are_chosen():
    groups = [sampled(number, ("a", "b" * length)) for number, length in enumerate((2, 9, 1, 5))]
    chosen = choose_groups(groups, 2, 0, ensemble(lambda n: n, lambda n: -n))
    assert [group.id for group in chosen] == ["g1", "g3"]


def test_a_random_choice_depends_on_its_seed():
    groups = [sampled(number) for number in range(30)]
    choices = [[group.id for group in choose_groups(groups, 10, seed)] for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    assert len(set(choices[0])) == 10
    assert choose_groups(groups, None, 0) == groups


# --- Simulated labelers and judges ------------------------------------------------------------------------------------


def test_without_noise_a_simulated_labeler_ranks_by_reward():
    labeler = read_labeler({"path": REWARD}, 0)
    (row,) = labeler([sampled()])
    assert row["ranks"] == [1, 2, 3, 3]
    assert row["labeller"] == "simulated: Abstention, noise 0"
    assert row["sources"] == ["sft"] * 4
    assert labeler([sampled(texts=("Rome.", "Oslo."))]) == [], "nothing is preferred"


def test_a_noisy_labeler_prefers_with_bradley_terry_probabilities():
    noise, count = 0.8, 4000
    rows = read_labeler({"path": REWARD, "noise": noise}, 0)([sampled(number) for number in range(count)])
    assert all(row["ranks"][2] == row["ranks"][3] for row in rows)
    for better, worse, difference in ((0, 1, 1), (1, 2, 1), (0, 2, 2)):
        share = sum(row["ranks"][better] < row["ranks"][worse] for row in rows) / count
        expected = 1 / (1 + math.exp(-difference / noise))
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))


def test_noise_depends_on_the_group_alone():
    labeler = read_labeler({"path": REWARD, "noise": 5}, 0)
    rows = {row["id"]: row["ranks"] for row in labeler([sampled(number) for number in range(20)])}
    assert [row["ranks"] for row in labeler([sampled(7), sampled(3)])] == [rows["g7"], rows["g3"]]
    assert len({str(ranks) for ranks in rows.values()}) > 3


def test_rewards_get_the_columns_of_all_groups(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "rlhf_recipes.rewards.normalised_match", lambda completions, **columns: seen.update(columns) or [0.0] * len(completions)
    )
    read_labeler({"path": "rlhf_recipes.rewards.normalised_match"}, 0)([sampled(0), sampled(1, town="Rome")])
    assert (seen["reference"], seen["town"]) == (["Paris."] * 4 + [None] * 4, [None] * 4 + ["Rome"] * 4)


def test_a_judge_ranks_by_wins(monkeypatch):
    def prefer_longer(self, pair):
        _, first, second = pair
        return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"

    monkeypatch.setattr(ChatJudge, "_ask", prefer_longer)
    labeler = read_labeler({"url": "http://localhost:1/v1", "model": "tiny"}, 0)
    rows = labeler([sampled(0, ("aa", "b", "cccc")), sampled(1, ("a", "b"))])
    assert [row["ranks"] for row in rows] == [[2, 3, 1], [1, 1]]
    assert rows[0]["labeller"] == "judge: tiny"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "labeller: {}"),
        ({"store": 3}, "labeller: {'store': 3}"),
        ({"path": REWARD, "noise": -1}, "labeller: noise: -1"),
        ({"path": REWARD, "nois": 1}, "labeller: {"),
    ],
)
def test_an_invalid_labeler_is_rejected(entry, message):
    with pytest.raises(RecipeError) as caught:
        read_labeler(entry, 0)
    assert message in str(caught.value)


def test_a_reward_without_a_score_is_rejected(monkeypatch):
    monkeypatch.setattr("rlhf_recipes.rewards.normalised_match", lambda completions, **columns: [None] * len(completions))
    with pytest.raises(RecipeError, match=r"labeller: .*: returned None"):
        read_labeler({"path": "rlhf_recipes.rewards.normalised_match"}, 0)([sampled()])


# --- People -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def people(tmp_path):
    """A labeler, and the store that its people label in."""
    path = tmp_path / "labels.sqlite"
    with Store(path) as store:
        yield read_labeler({"store": str(path)}, 0), store


def test_rankings_of_people_are_complete_or_an_error(people):
    labeler, store = people
    groups = [sampled(0), sampled(1)]
    with pytest.raises(LabelsMissingError, match=r"labels.sqlite: 2 of 2 groups .* `python recipes/label.py --store"):
        labeler(groups)
    for ranks in ([1, 2, None, 3], None):  # the second is a skip by everyone who labels
        store.save(Label(store.claim("anna").id, "anna", ranks=ranks))
    (row,) = labeler(groups)
    assert (row["labeller"], row["id"], row["ranks"]) == ("anna", "g0", [1, 2, 3])
    assert len(row["completions"]) == 3


def test_missing_labels_of_people_have_a_status_of_their_own(launch, tmp_path, file):
    store = tmp_path / "labels.sqlite"
    status, printed = launch("rank", "--groups", file, "--labeller", json.dumps({"store": str(store)}))
    assert (status, printed.splitlines()[-1].startswith(f"waiting: {store}: 5 of 5 groups are not ranked")) == (3, True)


def test_a_skipped_group_waits_until_everyone_has_skipped_it(people):
    labeler, store = people
    groups = [sampled(number) for number in range(4)]
    store.add(groups)
    store.save(Label("g0", "anna"))  # a skip
    store.save(Label("g1", "anna", [None] * 4))  # unusable answers are a judgement
    store.save(Label("g2", "anna", [1, 1, 1, 1]))
    store.save(Label("g3", "berta", [1, 2, 3, 4]))
    with pytest.raises(RecipeError, match=r"1 of 4 groups .* \(1 were skipped"):
        labeler(groups)
    store.save(Label("g0", "berta"))
    assert [row["id"] for row in labeler(groups)] == ["g3"]


def test_people_get_only_the_groups_wanted_now(people):
    labeler, store = people
    old, new = [sampled(0), sampled(1)], [sampled(1), sampled(2)]
    for groups, claimed in ((old, "g0"), (new, "g1"), (old, "g1")):
        with pytest.raises(RecipeError, match="2 of 2 groups"):
            labeler(groups)
        assert store.claim("anna").id == claimed
        assert store.progress("anna") == (0, 2, 0)
    store.save(Label("g0", "anna", [1, 2, 3, 4]))
    with pytest.raises(RecipeError, match="2 of 2 groups"):
        labeler(new)
    assert [label.group for label in store.labels()] == ["g0"], "labels stay"


# --- The recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A file of groups, as recipes/sample.py writes it."""
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(group.row() | group.columns) + "\n" for group in map(sampled, range(5))))
    return path


def test_the_recipe_writes_rankings_with_their_labeler(launch, tmp_path, file):
    out = tmp_path / "out"
    assert launch("rank", "--groups", file, "--output_dir", out, "--num_groups", 3) == (0, "")
    rows = [json.loads(line) for line in (out / "rankings.jsonl").read_text().splitlines()]
    record = json.loads((out / "rank.json").read_text())
    assert record == {"labellers": ["simulated: Abstention, noise 0.4"], "chosen": 3, "ranked": 3}
    assert all(row["labeller"] == record["labellers"][0] for row in rows)
    arguments = DataArguments(dataset_name=str(out / "rankings.jsonl"))
    assert len(load_data(arguments, "ranking", evaluate=False, seed=0).train) == 3


def test_rankings_without_a_preference_are_an_error(launch, tmp_path, file):
    alike = '{"path": "rlhf_recipes.rewards.LengthPenalty", "arguments": {"slope": 1, "longest": 99, "unit": "words"}}'
    status, error = launch("rank", "--groups", file, "--output_dir", tmp_path / "out", "--labeller", alike)
    assert (status, "labeller: prefers no answer in any of 5 groups" in error) == (2, True)
    assert not (tmp_path / "out" / "rank.json").exists()


def test_the_choice_is_random_while_there_is_no_ensemble(launch, tmp_path, file):
    options = ("--groups", file, "--num_groups", 3)
    assert launch("rank", *options, "--output_dir", tmp_path / "random") == (0, "")
    first_round = ("--choose", "disagreement", "--reward", "")  # "{reward|}" in a pipeline
    assert launch("rank", *options, *first_round, "--output_dir", tmp_path / "first") == (0, "")
    assert (tmp_path / "first" / "rankings.jsonl").read_text() == (tmp_path / "random" / "rankings.jsonl").read_text()
    # The first round already asks for the base model that later rounds need
    config = tmp_path / "rank.yaml"
    config.write_text(f"groups: {file}\nlabeller: {{path: {REWARD}}}\nchoose: disagreement\nreward: ''\n")
    status, error = launch("rank", "--config", config, "--output_dir", tmp_path / "baseless")
    assert (status, "model_name_or_path: " in error) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--groups", "missing.jsonl"), "missing.jsonl: "),
        (("--choose", "disagreement"), "reward: "),
        (("--choose", "best"), "choose: 'best'"),
        (("--num_groups", 0), "num_groups: 0"),
    ],
)
def test_a_mistake_of_the_user_is_one_message(launch, tmp_path, options, message):
    status, error = launch("rank", *options, "--output_dir", tmp_path)
    assert status == 2
    assert message in error
