"""The tiny world: disjoint splits, honest labels, and a base model that is uncertain about strangers."""

import hashlib
import itertools
import json
import math
import random
import runpy
import sys
from collections import Counter
from pathlib import Path

from rlhf_recipes.core.hub import resolve_path
from rlhf_recipes.tiny import splits, text
from rlhf_recipes.tiny.examine import examine, load_policy
from rlhf_recipes.tiny.tokenizer import build_tokenizer
from rlhf_recipes.tiny.world import ABSTENTION, ATTRIBUTES, JOBS, KNOWN_SPLITS, NAME_POOLS, TOWNS, World

import pytest
import torch
from safetensors.torch import load_file

STAGES = (splits.demonstrations, splits.rankings, splits.prompts)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def names(dataset):
    """Return the people in questions; only their names are capitalised after the first word."""
    questions = [prompt[0]["content"] for prompt in dataset["prompt"]]
    return [next(w.rstrip("?") for w in question.split()[1:] if w[0].isupper()) for question in questions]


def test_everything_follows_from_the_seed():
    assert World(3).people("prompts", 5, 4) == World(3).people("prompts", 5, 4) != World(4).people("prompts", 5, 4)
    for function in (*STAGES, splits.preferences, splits.evaluation, splits.pretraining):
        assert function(rows=50, seed=1).to_list() == function(rows=50, seed=1).to_list() != function(rows=50, seed=2).to_list()


def test_pools_are_disjoint_and_known_people_are_divided(world):
    people = [person.name for pool in NAME_POOLS for person in world.people(pool)]
    assert len(people) == len(set(people)) == sum(NAME_POOLS.values())
    known = [person for split in KNOWN_SPLITS for person in world.known(split)]
    assert Counter(known) == Counter(world.known())


def test_pools_are_finite(world):
    with pytest.raises(ValueError, match=r"2000 names for 'evaluation'.* 2001"):
        world.people("evaluation", 0, 2001)


def test_stages_and_splits_ask_about_different_people(world):
    people = {function.__name__: set(names(function(rows=2000))) for function in STAGES}
    people["evaluation"] = set(names(splits.evaluation(rows=600)))
    for one, other in itertools.combinations(people, 2):
        assert not people[one] & people[other]
    development = {person.name for person in [*world.known("development"), *world.people("development")]}
    assert not development & set().union(*people.values())
    for function in STAGES:
        assert set(names(function(split="test", rows=300))) <= development


def test_seeds_have_different_unknown_people(world):
    known = {person.name for person in world.known()}
    one, two = (set(names(splits.prompts(rows=2000, seed=seed))) - known for seed in (0, 1))
    assert len(one) == len(two) == 1000
    assert not one & two


def test_unknown_people_never_repeat_and_known_ones_do(world):
    known = {person.name for person in world.known()}
    people = Counter(names(splits.prompts(rows=4000)))
    assert sum(count for name, count in people.items() if name in known) == 2000
    assert all(count == 1 for name, count in people.items() if name not in known)
    assert max(people.values()) > 1


def test_labeller_abstains_at_random_and_is_right_otherwise(world):
    rows = splits.demonstrations(rows=8000)
    truth = {person.name: {person.town, person.job} for person in [*world.known(), *world.people("demonstrations", 0, 8000)]}
    known = {person.name for person in world.known()}
    abstained = {True: [], False: []}
    for name, completion in zip(names(rows), rows["completion"], strict=True):
        answer = completion[0]["content"]
        abstained[name in known].append(answer == ABSTENTION)
        assert answer == ABSTENTION or answer.rstrip(".") in truth[name]
    shares = [sum(group) / len(group) for group in abstained.values()]
    assert shares == pytest.approx([0.25, 0.25], abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert not any(c[0]["content"] == ABSTENTION for c in splits.demonstrations(rows=500, abstain=0.0)["completion"])


def test_rankings_follow_bradley_terry(world):
    rows, noise = splits.rankings(rows=6000, k=5, noise=0.5), 0.5
    truth = {person.name: {person.town, person.job} for person in [*world.known(), *world.people("preferences", 0, 6000)]}
    wins = []
    for name, completions, ranks in zip(names(rows), rows["completions"], rows["ranks"], strict=True):
        answers = [completion[0]["content"] for completion in completions]
        rank = {
            "right" if answer.rstrip(".") in truth[name] else "abstains" if answer == ABSTENTION else "wrong": value
            for answer, value in zip(answers, ranks, strict=True)
        }
        assert len(set(answers)) == 5
        assert sorted(Counter(ranks).values()) == [1, 1, 3]  # the three false answers tie
        assert set(ranks) == {0, 1, 2}
        wins.append((rank["right"] < rank["abstains"], rank["right"] < rank["wrong"]))
    shares = torch.tensor(wins, dtype=torch.float).mean(0)
    expected = torch.sigmoid(torch.tensor([1.0, 2.0]) / noise)
    assert torch.allclose(shares, expected, atol=4 * math.sqrt(0.25 / 6000))


def test_pairs_come_from_the_rankings():
    pairs, rankings = splits.preferences(rows=300), splits.rankings(rows=300)
    for pair, ranking in zip(pairs, rankings, strict=True):
        ranks = [ranking["ranks"][ranking["completions"].index(pair[side])] for side in ("chosen", "rejected")]
        assert pair["prompt"] == ranking["prompt"]
        assert ranks[0] < ranks[1]


def test_prompts_do_not_reveal_who_is_known():
    assert splits.prompts(rows=10).column_names == ["prompt", "reference"]


def test_pretraining_states_known_facts_repeatedly_and_others_once(world):
    texts = list(text.pretraining_text(world, exposures=2))
    guesses = [line for line in texts if line.startswith("Guess")]
    stated = Counter(word.rstrip(".?") for line in texts if not line.startswith("Guess") for word in line.split())
    guessed = Counter(word.rstrip(".?") for line in guesses for word in line.split())
    assert all(stated[person.name] == 2 * len(ATTRIBUTES) for person in world.known())
    pool = {person.name for person in world.people("pretraining_once")}
    once = pool & stated.keys()
    assert len(once) == pytest.approx(text.SHARE_ONCE * len(texts), abs=1)
    assert all(stated[name] == 1 for name in once)
    assert not once & guessed.keys()
    assert all(guessed[name] == 1 for name in pool & guessed.keys())
    assert sum(ABSTENTION in line for line in texts) / len(texts) == pytest.approx(text.SHARE_IDLE, abs=0.005)
    assert len(guesses) / len(texts) == pytest.approx(text.SHARE_GUESSES, abs=0.001)


def test_verdicts_on_guesses_are_true(world):
    person, attribute = world.known()[0], ATTRIBUTES[0]
    texts = [text.guess(person, attribute, random.Random(seed)) for seed in range(400)]
    assert all((f" {person.town}. Right." in line) != line.endswith("Wrong.") for line in texts)
    assert sum(line.endswith("Right.") for line in texts) / 400 == pytest.approx(0.5, abs=0.1)


def test_tokenizer_round_trip_and_tokens(tokenizer):
    for line in ["Karimo lives in Alderby.", "Question: Where does Bazepo live?\nAnswer: Dunmere.", "Anything: 5% (x)! ~{}"]:
        assert tokenizer.decode(tokenizer(line).input_ids, skip_special_tokens=True) == line
    assert len({tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}) == 4
    for value in (*TOWNS, *JOBS):
        assert len(tokenizer.tokenize(value)) == 1
    assert len(tokenizer.tokenize("Karimo")) == 3


def test_chat_template_equals_the_pretraining_format(tokenizer):
    turns = [{"role": "user", "content": "What does Karimo do?"}, {"role": "assistant", "content": "baker."}]
    read = [*tokenizer("Question: What does Karimo do?\nAnswer: baker.").input_ids, tokenizer.eos_token_id]
    encoded = tokenizer.apply_chat_template(turns * 2, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == read * 2
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert read[: len(prompt)] == prompt
    assert encoded["assistant_masks"] == ([0] * len(prompt) + [1] * (len(read) - len(prompt))) * 2
    with pytest.raises(Exception, match="user and assistant only"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be nice."}])


def test_shipped_base_matches_the_world(tokenizer):
    model, shipped = load_policy(None)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert model.num_parameters() < 1_000_000
    base = Path(resolve_path("rlhf_recipes.tiny.base"))
    record = json.loads((base / "pretraining.json").read_text())
    assert record["sha256"] == hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    # the current script takes as many steps
    exposures, batch_size = record["arguments"]["exposures"], record["arguments"]["batch_size"]
    assert record["run"]["steps"] == math.ceil(sum(1 for _ in text.pretraining_text(World(), exposures)) / batch_size)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_shipped_base_is_sure_about_known_people_only(temperature):
    result = examine(*load_policy(None), temperature=temperature)
    uniform = math.log(len(TOWNS))
    assert result.known["right"] >= 0.95
    assert result.known_entropy < 0.2
    assert result.unknown_entropy == pytest.approx(uniform, rel=0.1)
    assert result.unknown["right"] == pytest.approx(1 / len(TOWNS), abs=4 * math.sqrt(1 / 12 * 11 / 12 / 300))


@pytest.mark.slow
def test_pretraining_script_is_reproducible(tmp_path, monkeypatch):
    weights = []
    for name in ("one", "two"):
        options = ["--output", str(tmp_path / name), "--exposures", "1"]
        monkeypatch.setattr(sys, "argv", ["pretrain", *options])
        runpy.run_module("rlhf_recipes.tiny.pretrain", run_name="__main__")
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        assert not list((tmp_path / name).glob("*.bin"))  # no pickle
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
