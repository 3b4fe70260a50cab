"""Labels: groups that are read, the store, what outlives a kill, export and import, agreement, and the recipe's messages."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tomllib
from pathlib import Path

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.data import load_data
from rlhf_recipes.feedback.labels import (
    Group,
    Label,
    Store,
    agreement,
    demonstrations,
    export_labels,
    import_labels,
    pairs,
    rankings,
    read_groups,
)
from rlhf_recipes.feedback.labels import store as store_module
from rlhf_recipes.feedback.labels.server import address_of, listen
from rlhf_recipes.feedback.labels.store import LEASE, AlreadyLabelledError, BadLabelError, KnownNameError
from rlhf_recipes.feedback.labels.task_view import TaskView
from support import ROOT

import pytest


def group(number, answers=("one", "two", "three"), **more):
    return Group(f"g{number}", f"Question {number}?", list(answers), **more)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "labels.sqlite", overlap=1.0) as opened:
        opened._run("PRAGMA synchronous = OFF")  # tests need not outlive a power cut, and are quicker so
        yield opened


def label(store, name, identity, *ranks, **more):
    store.save(Label(identity, name, list(ranks) or None, **more))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Groups


def test_groups_are_read_as_texts_or_as_messages(tmp_path):
    texts = write(tmp_path / "texts.jsonl", {"prompt": "Q", "completions": ["a", ""], "sources": ["x", "y"], "id": "i"})
    assert read_groups(texts) == [Group("i", "Q", ["a", ""], ["x", "y"])]
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}
    messages = write(
        tmp_path / "messages.jsonl",
        {"prompt": "Q", "completions": [[answer], "b"]},
        {"prompt": [user], "completions": ["a", "b"]},
    )
    (read,) = read_groups(messages)  # both rows are the same group, and have no id but what they say
    assert read.prompt == [user]
    assert read.completions == [[answer], [{"role": "assistant", "content": "b"}]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "there is no `completions`, only prompt, chosen, rejected"),
        ([], "it holds a list, not a mapping"),
        ({"prompt": "Q", "completions": ["a"]}, "`completions` is not a list of 2 to 64"),
        ({"prompt": " ", "completions": ["a", "b"]}, "the prompt is empty"),
        ({"prompt": "Q", "completions": ["a", None]}, "completion 2 is neither text nor a list of messages"),
        ({"prompt": "Q", "completions": ["a", "\ud800"]}, "completion 2 is not text that UTF-8 can hold"),
        (
            {"prompt": "Q", "completions": ["a", [{"role": "user", "content": "b"}]]},
            "completion 2 is not one message of the assistant",
        ),
        ({"prompt": [{"role": "user"}], "completions": ["a", "b"]}, "prompt has a message without a `role`"),
        ({"prompt": [{"role": "system", "content": "Q"}], "completions": ["a", "b"]}, "does not end with a turn of the user"),
        ({"prompt": [{"role": "user", "content": "Q"}] * 2, "completions": ["a", "b"]}, "two turns of one role in a row"),
        ({"prompt": "Q", "completions": ["a", "b"], "sources": ["x"]}, "`sources` is not a list of 2 names"),
        ({"prompt": "Q", "completions": ["a", "b"], "id": 7}, "`id` is 7, not a text"),
        ({"prompt": "Q", "completions": ["a", "c"], "id": "first"}, "the id 'first' stands in row 1 with other content"),
        ({"prompt": [{"role": "user", "content": "Q"}], "completions": ["a", "b"]}, "some prompts are texts and some lists"),
    ],
)
def test_a_row_that_is_no_group_is_named(tmp_path, row, message):
    path = write(tmp_path / "groups.jsonl", {"prompt": "Q", "completions": ["a", "b"], "id": "first"}, row)
    with pytest.raises(RecipeError) as caught:
        read_groups(path)
    assert str(caught.value).startswith(f"{path}: row 2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "row 1: not valid JSON"),
        (b"", "the file has no rows"),
        (b"\xff\xfe", "cannot be read"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_groups_is_named(tmp_path, content, message):
    path = tmp_path / "groups.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_groups(path)


def test_each_labeller_sees_an_order_of_their_own_and_equal_answers_once():
    shown = [TaskView(group(1, ("a", "b", "c", "b ", "d")), f"labeller {number}", "seed") for number in range(40)]
    orders = {tuple(each.page(None)["completions"]) for each in shown}
    assert len(orders) > 10
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    texts = shown[0].page(None)["completions"]
    ranks = {"a": 1, "b": 2, "c": None, "d": 2}
    assert shown[0].ranks_of_group([ranks[text] for text in texts]) == [1, 2, None, 2, 2]
    again = TaskView(group(1, ("a", "b", "c", "b ", "d")), "labeller 0", "seed")
    assert again.page(None) == shown[0].page(None)
    before = again.page(Label("g1", "labeller 0", [1, 2, None, 2, 2]))["before"]
    assert before["ranks"] == [ranks[text] for text in texts]


def test_who_wrote_an_answer_is_not_on_the_page():
    shown = TaskView(group(1, sources=["secret-1", "secret-2", "secret-3"]), "anna", "seed")
    assert "secret" not in json.dumps(shown.page(None))


# The store


def test_what_is_saved_is_there_in_another_connection(store):
    store.add([group(1)])
    label(store, "Anna", "g1", 2, 5, 2, demonstration=" four ", note=" unclear ")
    with Store(store.path) as other:
        (read,) = other.labels()
    assert (read.ranks, read.demonstration, read.note, read.labeller) == ([1, 2, 1], "four", "unclear", "Anna")
    assert read.at.endswith("+00:00")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2], "ranks are needed for 4 completions"),
        ([1, 0, 2, None], "a rank is a whole number from 1"),
        ([1, True, 2, None], "a rank is a whole number from 1"),
        ([1, 2, 3, None], "equal ones have one rank"),
        ([1, 2, 1, 3], "an empty completion can only be unusable"),
    ],
)
def test_ranks_fit_the_group(store, ranks, message):
    store.add([group(1, ("a", "b", "a ", ""))])
    with pytest.raises(BadLabelError, match=message):
        label(store, "anna", "g1", *ranks)
    assert not store.labels()


@pytest.mark.parametrize(("key", "longest"), [("demonstration", 20_000), ("note", 2_000)])
def test_texts_are_limited(store, key, longest):
    store.add([group(1), group(2)])
    label(store, "anna", "g1", **{key: "x" * longest})
    with pytest.raises(BadLabelError, match=f"has {longest + 1} characters"):
        label(store, "anna", "g2", **{key: "x" * (longest + 1)})
    with pytest.raises(BadLabelError, match="UTF-8"):
        label(store, "anna", "g2", **{key: "\udfff"})


@pytest.mark.parametrize("name", ["", "  ", "x" * 61, "a\x00b"])
def test_a_name_is_a_name(store, name):
    with pytest.raises(BadLabelError, match="is no name"):
        store.sign_in(name, "session")


def test_a_name_that_is_taken_is_asked_about(store):
    assert store.sign_in("Anna  B", "one") == "Anna B"
    with pytest.raises(KnownNameError):
        store.sign_in("anna b", "two")
    assert store.signed_in("two") is None
    assert store.sign_in(" anna b", "two", known=True) == "Anna B"
    assert (store.signed_in("one"), store.signed_in("two")) == ("Anna B", "Anna B")


def test_a_label_replaces_only_itself(store):
    """An answer that was lost makes the page send again, perhaps something else under the same submission."""
    store.add([group(1)])
    store.save(Label("g1", "anna", [1, 2, 3]), "attempt")
    store.save(Label("g1", "anna", [3, 2, 1]), "attempt")
    with pytest.raises(AlreadyLabelledError):
        store.save(Label("g1", "anna", [1, 1, 1]), "another")
    store.save(Label("g1", "berta", [2, 1, 3]), "attempt")
    assert [(each.labeller, each.ranks) for each in store.labels()] == [("anna", [3, 2, 1]), ("berta", [2, 1, 3])]


def test_undo_goes_back_label_by_label_and_touches_nobody_else(store):
    store.add([group(1), group(2)])
    label(store, "anna", "g1", 1, 2, 3)
    label(store, "anna", "g2", 3, 2, 1, note="wait")
    label(store, "berta", "g2", 1, 1, 2)
    undone = store.undo("anna")
    assert (undone.group, undone.ranks) == ("g2", [3, 2, 1])
    assert store.claim("anna").id == "g2"
    assert store.withdrawn("anna", "g2").note == "wait"
    assert store.undo("anna").group == "g1"
    assert store.claim("anna").id == "g1"
    assert store.undo("anna") is None
    assert [(each.labeller, each.group) for each in store.labels()] == [("berta", "g2")]
    label(store, "anna", "g1", 2, 1, 3)
    assert store.labels()[-1].ranks == [2, 1, 3]


def test_an_undo_that_names_its_label_takes_back_no_other(store):
    store.add([group(1), group(2)])
    label(store, "anna", "g1", 1, 2, 3)
    label(store, "anna", "g2", 1, 2, 3)
    newest = store.newest("anna")
    assert [store.undo("anna", newest).group for _ in range(2)] == ["g2", "g2"]
    assert store.undo("berta", newest) is None
    assert [each.group for each in store.labels()] == ["g1"]


def test_the_overlap_is_kept(tmp_path):
    path = tmp_path / "labels.sqlite"
    for given, kept in ((None, 0.1), (0.5, 0.5), (None, 0.5), (0.0, 0.0), (None, 0.0)):
        with Store(path, given) as store:
            assert store.overlap == kept


def label_all(store, *names):
    """Labellers take turns until nobody is given anything; returns who labelled what."""
    said = {name: [] for name in names}
    working = list(names)
    while working:
        working = [name for name in working if label_next(store, name, said[name])]
    return said


def label_next(store, name, said):
    given = store.claim(name)
    if given:
        label(store, name, given.id, 1, 2, 3)
        said.append(given.id)
    return given


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1.0])
def test_everyone_is_given_the_overlap_and_of_the_rest_each_prompt_goes_to_one(tmp_path, overlap):
    with Store(tmp_path / "labels.sqlite", overlap) as store:
        store._run("PRAGMA synchronous = OFF")
        assert store.add([group(number) for number in range(16)]) == 16
        said = label_all(store, "anna", "berta", "carla")
        shared = set.intersection(*map(set, said.values()))
        assert len(shared) == pytest.approx(16 * overlap, abs=1)
        alone = [identity for given in said.values() for identity in given if identity not in shared]
        assert len(alone) == len(set(alone)) == 16 - len(shared)
        assert len(set(map(len, said.values()))) <= 2 or overlap  # turns are fair
        for name, given in said.items():
            assert store.progress(name) == (len(given), 0)


@pytest.mark.parametrize("shared", [True, False], ids=["one process", "several"])
def test_labellers_at_once_are_never_given_the_same_prompt_that_is_for_one(tmp_path, shared):
    with Store(tmp_path / "labels.sqlite", overlap=0.0) as store:
        store.add([group(number) for number in range(12)])
        said = {name: [] for name in ("anna", "berta", "carla")}

        def work(name):
            with contextlib.nullcontext(store) if shared else Store(store.path, overlap=0.0) as own:
                while label_next(own, name, said[name]):
                    pass

        threads = [threading.Thread(target=work, args=(name,)) for name in said]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        given = [identity for one in said.values() for identity in one]
        assert sorted(given) == sorted({f"g{number}" for number in range(12)})
        assert {(each.labeller, each.group) for each in store.labels()} == {(n, i) for n, ids in said.items() for i in ids}


def test_a_prompt_that_somebody_left_is_given_to_another_after_an_hour(tmp_path):
    now = [0.0]
    with Store(tmp_path / "labels.sqlite", overlap=0.0, clock=lambda: now[0]) as store:
        store.add([group(1)])
        assert store.claim("anna").id == "g1"
        assert store.claim("anna").id == "g1"
        now[0] = LEASE - 1
        assert store.claim("berta") is None
        assert (store.held("berta"), store.held("anna")) == (1, 0)
        now[0] = LEASE + 1
        assert store.held("berta") == 0
        assert store.claim("berta").id == "g1"
        assert store.claim("anna") is None


def test_a_skipped_prompt_goes_to_another_and_not_back(tmp_path):
    with Store(tmp_path / "labels.sqlite", overlap=0.0) as store:
        store.add([group(1)])
        label(store, "anna", "g1")
        assert store.claim("anna") is None
        assert store.claim("berta").id == "g1"


def test_groups_can_be_added_later_and_twice(store):
    assert store.add([group(1), group(2, ("same", "same ", ""))]) == 1
    assert store.add([group(1), group(3)]) == 1
    assert [each.id for each in store.groups()] == ["g1", "g3"]
    with pytest.raises(RecipeError, match=r"the id 'g1' is in .* already, with other content"):
        store.add([group(4), group(1, ("other", "answers"))])
    with pytest.raises(RecipeError, match="texts or of messages, not both"):
        store.add([Group("m", [{"role": "user", "content": "Q"}], [[{"role": "assistant", "content": c}] for c in "ab"])])
    assert len(store.groups()) == 2


# What goes wrong


def test_other_databases_are_refused_and_left_as_they_are(tmp_path):
    foreign, text = tmp_path / "foreign.sqlite", tmp_path / "text.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mine (x)")
    text.write_text("not a database at all" * 100)
    for path in (foreign, text):
        content = path.read_bytes()
        with pytest.raises(RecipeError, match=f"{path.name}: not a database of labels: give another file"):
            Store(path)
        assert path.read_bytes() == content


def test_a_database_of_another_version_is_refused(store):
    store.close()
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA user_version = 1")
    with pytest.raises(RecipeError, match="a database of version 1, and this is rlhf-recipes for version 2: export it with"):
        Store(store.path)


def test_a_damaged_database_is_said_to_be(store):
    store.add([group(number) for number in range(200)])
    store.close()
    with store.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)
    with pytest.raises(RecipeError, match="the database is damaged: restore a backup"), Store(store.path) as damaged:
        damaged.groups()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="cannot be opened: does its folder exist"):
        Store(tmp_path / "nowhere" / "labels.sqlite")
    with pytest.raises(RecipeError, match="there is no such database of labels"):
        Store(tmp_path / "labels.sqlite", create=False)


def test_on_a_full_disk_nothing_is_lost_and_it_can_be_sent_again(store):
    store.add([group(number) for number in range(200)])
    label(store, "anna", "g1", 1, 2, 3)
    pages = store._one("PRAGMA page_count")[0]
    store._one(f"PRAGMA max_page_count = {pages}")
    saved, problem = 1, ""
    while not problem:
        try:
            label(store, "anna", f"g{saved + 1}", 1, 2, 3, demonstration="x" * 1000)
            saved += 1
        except RecipeError as error:
            problem = str(error)
    assert problem == f"{store.path}: the disk is full, and this was not saved: free some space and send it again"
    assert len(store.labels()) == saved
    store._one(f"PRAGMA max_page_count = {pages * 10}")
    label(store, "anna", f"g{saved + 1}", 1, 2, 3, demonstration="x" * 1000)
    with Store(store.path) as other:
        assert len(other.labels()) == saved + 1


def test_a_database_that_another_program_holds(store):
    store.add([group(1)])
    store._run("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RecipeError, match="another program holds the database"):
        label(store, "anna", "g1", 1, 2, 3)
    other.execute("ROLLBACK")
    other.close()
    label(store, "anna", "g1", 1, 2, 3)


READ_ONLY = """
import os, sys
from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels import Label, Store
if os.geteuid() == 0:
    os.setuid(65534)  # permissions do not hold root back
with Store(sys.argv[1]) as store:
    print(len(store.labels()))
    try:
        store.save(Label("g1", "berta", [1, 2, 3]))
    except RecipeError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs file permissions")
def test_a_read_only_database_can_be_read_and_says_why_it_cannot_be_written():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders let nobody else pass
        path = Path(folder, "labels.sqlite")
        with Store(path) as store:
            store.add([group(1)])
            label(store, "anna", "g1", 1, 2, 3)
        path.chmod(0o444)
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", READ_ONLY, path]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    labels, problem = told.stdout.splitlines()
    assert labels == "1"
    assert problem.startswith(f"{path}: the database is read-only: let this user write to the file")


KILLED = """
import itertools, sys
from rlhf_recipes.feedback.labels import Label, Store
store = Store(sys.argv[1], overlap=1.0)
done = {label.group for label in store.labels()}
for group in store.groups():
    if group.id not in done:
        store.save(Label(group.id, "anna", [1, 2, 3], "x" * 3000))
        print(group.id, flush=True)  # acknowledged
"""


def test_what_was_acknowledged_outlives_kill_9(store):
    store.add([group(number) for number in range(3000)])
    acknowledged = []
    for kills, kills_after in enumerate((1, 7, 20, 33), start=1):
        command = [sys.executable, "-c", KILLED, store.path]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        ) as labeller:
            acknowledged += [labeller.stdout.readline().strip() for _ in range(kills_after)]
            labeller.send_signal(signal.SIGKILL)
            acknowledged += labeller.stdout.read().split()
        assert labeller.returncode == -signal.SIGKILL
        with Store(store.path) as opened:
            saved = [each.group for each in opened.labels()]
            assert opened._one("PRAGMA integrity_check")[0] == "ok"
        assert set(acknowledged) <= set(saved)
        assert len(saved) <= len(acknowledged) + kills  # each time one at most was saved and not yet acknowledged
        assert len(saved) == len(set(saved))


def test_a_commit_is_synced_to_the_disk_with_its_folder(store):
    with Store(store.path) as opened:
        assert opened._one("PRAGMA synchronous")[0] == 3  # EXTRA
        assert opened._one("PRAGMA journal_mode")[0] == "delete"


# Export and import


@pytest.fixture
def labelled(store):
    store.add(
        [
            group(1, (" one", " two", " one", "", " four"), sources=["s1", "s2", "s3", "s4", "s5"]),
            group(2, (" a", " b")),
            group(3, (" a", " b")),
        ]
    )
    label(store, "Anna", "g1", 2, 1, 2, None, 3, note="one stands twice")
    label(store, "Berta", "g1", 1, None, 1, None, 2)
    label(store, "Anna", "g2", 1, 1)
    label(store, "Berta", "g2", None, None, demonstration="neither", note='ä \u2028 "quoted"')
    label(store, "Anna", "g3", demonstration="C")
    return store


def test_labels_become_rankings_pairs_and_demonstrations(labelled):
    assert rankings(labelled) == [
        {
            "prompt": "Question 1?",
            "completions": [" one", " two", " one", " four"],
            "ranks": [2, 1, 2, 3],
            "sources": ["s1", "s2", "s3", "s5"],
            "labeller": "Anna",
            "id": "g1",
        },
        {
            "prompt": "Question 1?",
            "completions": [" one", " one", " four"],
            "ranks": [1, 1, 2],
            "sources": ["s1", "s3", "s5"],
            "labeller": "Berta",
            "id": "g1",
        },
    ]
    assert [(row["chosen"], row["rejected"], row["labeller"]) for row in pairs(labelled)] == [
        (" two", " one", "Anna"),
        (" two", " four", "Anna"),
        (" one", " four", "Anna"),
        (" one", " four", "Berta"),
    ]
    # what follows a prompt that is text begins as the completions do
    assert [(row["prompt"], row["completion"]) for row in demonstrations(labelled)] == [
        ("Question 2?", " neither"),
        ("Question 3?", " C"),
    ]


@pytest.mark.parametrize("conversational", [False, True])
def test_the_recipes_read_what_was_exported(labelled, tmp_path, conversational):
    if conversational:
        chat = Store(tmp_path / "chat.sqlite")
        for each in labelled.groups():
            prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": each.prompt}]
            answers = [[{"role": "assistant", "content": answer}] for answer in each.completions]
            chat.add([Group(each.id, prompt, answers, each.sources)])
        for each in labelled.labels():
            chat.save(each)
        labelled = chat
    rows = export_labels(labelled, tmp_path / "out")
    assert rows == {"rankings.jsonl": 2, "pairs.jsonl": 4, "demonstrations.jsonl": 2, "labels.jsonl": 3}
    for name, kind, exported in (
        ("rankings", "ranking", rankings(labelled)),
        ("pairs", "preference", pairs(labelled)),
        ("demonstrations", "sft", demonstrations(labelled)),
    ):
        data = load_data(DataArguments(dataset_name=str(tmp_path / "out" / f"{name}.jsonl")), kind, evaluate=False, seed=0)
        read = data.train.to_list()
        assert read == [{column: row[column] for column in data.train.column_names} for row in exported]
    labelled.close()


def said(store):
    return [(each.group, each.labeller, each.ranks, each.demonstration, each.note, each.at) for each in store.labels()]


def test_an_export_restored_into_a_fresh_database_is_the_same(labelled, tmp_path):
    export_labels(labelled, tmp_path / "out")
    with Store(tmp_path / "fresh.sqlite", overlap=1.0) as fresh:
        assert import_labels(fresh, tmp_path / "out" / "labels.jsonl") == 5
        assert sorted(said(fresh)) == sorted(said(labelled))
        assert fresh.groups() == labelled.groups()
        assert export_labels(fresh, tmp_path / "again") == export_labels(labelled, tmp_path / "out")
        for file in (tmp_path / "out").iterdir():
            rows, again = (sorted(path.read_text().split("\n")) for path in (file, tmp_path / "again" / file.name))
            assert rows == again
        assert import_labels(fresh, tmp_path / "out" / "labels.jsonl") == 0
        assert fresh.undo("anna").group == "g3"


def test_an_export_that_has_lost_its_rows_leaves_no_old_file(labelled, tmp_path):
    export_labels(labelled, tmp_path)
    for name in ("Anna", "Berta"):
        labelled.undo(name)
    assert export_labels(labelled, tmp_path)["demonstrations.jsonl"] is None
    assert not (tmp_path / "demonstrations.jsonl").exists()
    assert (tmp_path / "labels.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("labels"), "there is no list `labels`: --import reads the labels.jsonl"),
        (lambda row: row["labels"][0].update(ranks=[1, 2]), "ranks are needed for 5 completions"),
        (lambda row: row["labels"][0].update(ranks="12"), '`ranks` is "12", which no label has'),
        (lambda row: row["labels"][0].update(labeller=None), "`labeller` is null, which no label has"),
        (lambda row: row["labels"][0].update(rank=[1]), "a label is a mapping of labeller, ranks"),
        (lambda row: row["labels"].append(row["labels"][0] | {"ranks": None}), "Anna has another label on the group 'g1'"),
        (lambda row: row.pop("completions"), "there is no `completions`"),
    ],
)
def test_a_file_that_cannot_be_imported_imports_nothing(labelled, tmp_path, change, message):
    export_labels(labelled, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().strip().split("\n")]
    change(rows[0])
    path = write(tmp_path / "changed.jsonl", *reversed(rows))
    with Store(tmp_path / "fresh.sqlite") as fresh:
        with pytest.raises(RecipeError) as caught:
            import_labels(fresh, path)
        assert str(caught.value).startswith(f"{path}: row 3: ")
        assert message in str(caught.value)
        assert (fresh.labels(), fresh.groups()) == ([], [])


def test_what_no_export_wrote_is_not_replaced(labelled, tmp_path):
    for name in ("pairs.jsonl", "labels.jsonl"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        own = write(folder / name, {"prompt": "mine", "chosen": "a", "rejected": "b"})
        before = own.read_text()
        with pytest.raises(RecipeError, match=f"{name}: was not written by --export, which would replace it: give another"):
            export_labels(labelled, folder)
        assert ([path.name for path in folder.iterdir()], own.read_text()) == ([name], before)


def test_an_export_holds_nobody_up_while_it_parses(labelled, tmp_path, monkeypatch):
    """Of many groups parsing takes longer than others wait for the database."""
    free, parse = [], store_module._label

    def slow(row):
        with sqlite3.connect(labelled.path, timeout=0.1, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("ROLLBACK")
        free.append(row)
        return parse(row)

    monkeypatch.setattr(store_module, "_label", slow)
    export_labels(labelled, tmp_path / "out")
    assert len(free) == 5, "each label once"


def test_undo_after_an_import_takes_back_what_came_last(store, tmp_path):
    store.add([group(1), group(2)])
    label(store, "anna", "g2", 1, 2, 3, at="2026-01-01T00:00:00.000+00:00")
    label(store, "anna", "g1", 1, 2, 3, at="2026-01-02T00:00:00.000+00:00")
    export_labels(store, tmp_path)
    with Store(tmp_path / "fresh.sqlite") as fresh:
        import_labels(fresh, tmp_path / "labels.jsonl")
        assert fresh.undo("anna").group == "g1"


def test_a_folder_that_cannot_be_written(labelled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"cannot be written \(.*\): .* the labels themselves are safe in the database"):
        export_labels(labelled, tmp_path / "file")


# Agreement


def test_agreement_is_what_one_counts_by_hand(store):
    store.add([group(1), group(2), group(3, ("a", "b")), group(4, ("a", "a ", "b"))])
    label(store, "anna", "g1", 1, 2, 3)  # pairs 12, 13, 23: anna < < <
    label(store, "berta", "g1", 1, 3, 2)  # < < >: agree, agree, not
    label(store, "carla", "g1", 1, 1, 2)  # = < <: with anna: tie, agree, agree; with berta: tie, agree, not
    label(store, "anna", "g2", 1, 2, None)  # only 12 is compared
    label(store, "berta", "g2", 2, 1, 3)  # not
    label(store, "anna", "g3", 1, 1)
    label(store, "berta", "g3", 1, 1)  # both tie
    label(store, "anna", "g4", 1, 1, 2)  # the equal ones count once
    label(store, "carla", "g4", 1, 1, 2)  # agree
    label(store, "berta", "g4")  # a skip is no judgement
    found = agreement(store)
    # g1: anna-berta 2 of 3, anna-carla 2 of 2, berta-carla 1 of 2; g2: 0 of 1; g4: 1 of 1
    assert (found.compared, found.tied, found.prompts) == (9, 3, 3)
    assert found.share == pytest.approx(6 / 9)
    assert found.share_with_ties == pytest.approx(7 / 12)  # and of the ties only that in g3 is said by both
    assert found.labellers == {"anna": (5 / 7, 7), "berta": (3 / 6, 6), "carla": (4 / 5, 5)}
    low, high = found.interval
    assert 0 <= low < found.share < high <= 1
    assert found.lines()[0].startswith("Agreement: 67% [")


def test_without_two_who_judged_the_same_there_is_no_agreement(store):
    store.add([group(1)])
    label(store, "anna", "g1", 1, 2, 3)
    assert agreement(store).share is None
    assert agreement(store).lines() == ["Agreement: no two labellers have ordered the same completions yet."]


def test_agreement_where_all_have_a_tie_is_not_said_to_be_nothing(store):
    store.add([group(1, ("a", "b")), group(2, ("a", "b"))])
    for name, ranks in (("anna", (1, 1)), ("berta", (1, 2))):
        label(store, name, "g1", *ranks)
        label(store, name, "g2", 1, 1)
    assert agreement(store).lines() == ["Agreement: 2 judgements, all with a tie; 50% are the same."]


# The recipe


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        Path("groups.jsonl"), {"prompt": "Q", "completions": ["a", "b"], "id": "g"}, {"prompt": "P", "completions": ["a", "a"]}
    )


def test_the_recipe_exports_and_imports(files, launch, capsys):
    with Store("groups.labels.sqlite") as store:
        store.add(read_groups(Path("groups.jsonl")))
        label(store, "anna", "g", 2, 1)
        label(store, "berta", "g", 2, 1)
    assert launch("label", "--store", "groups.labels.sqlite", "--export", "out") == (0, "")
    assert launch("label", "--store", "fresh.sqlite", "--import", "out/labels.jsonl", "--export", "again") == (0, "")
    assert Path("again/rankings.jsonl").read_text() == Path("out/rankings.jsonl").read_text() != ""
    assert launch("label", "--data", "groups.jsonl", "--agreement") == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data with a file of sampled groups, or --store"),
        (["--data", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--store", "none.sqlite"], "none.sqlite: there is no such database of labels"),
        (["--data", "groups.jsonl", "--overlap", "10", "--port", "0"], "overlap: 10.0: must be a share from 0 to 1"),
        (["--data", "groups.jsonl", "--host", "0.0.0.0"], "--host 0.0.0.0: others could reach the page there"),
        (["--data", "groups.jsonl", "--host", "no.such.invalid"], "no address to listen on"),
        (["--data", "groups.jsonl", "--port", "99999"], "--port 99999: there is no such port: give one from 0 to 65535"),
        (["--data", "groups.jsonl", "--port", "-1"], "--port -1: there is no such port"),
        (["--data", "groups.jsonl", "--password-env", "NONE_SUCH"], "the environment has no such variable"),
        (["--data", "groups.jsonl", "--password-env", "SHORT"], "The password has 5 letters: take 8 or more"),
    ],
)
def test_what_is_wrong_is_one_message(files, launch, monkeypatch, options, message):
    monkeypatch.setenv("SHORT", "12345")
    status, told = launch("label", *options)
    assert (status, told.count("\n")) == (2, 1)
    assert told.startswith("error: ")
    assert message in told
    assert not list(Path().glob("*.sqlite")), "nothing is changed"


def test_a_port_in_use_is_said_to_be(files, launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, told = launch("label", "--data", "groups.jsonl", "--port", port)
    assert status == 2
    assert told.startswith(f"error: --host 127.0.0.1 --port {port}: the port is in use, perhaps by another label.py: end that")


def test_without_the_extra_its_installation_is_named(files, launch, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "rlhf_recipes.feedback.labels.app", raising=False)
    status, told = launch("label", "--data", "groups.jsonl")
    assert status == 2
    assert "needs the extra `label` (there is no fastapi). In the clone: python -m pip install" in told


def has_network():
    """Whether this machine has a way to others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(("192.0.2.1", 9)) == 0


def test_other_addresses_need_a_password():
    with listen("0.0.0.0", 0, "a long password") as listener:
        assert "0.0.0.0" not in address_of(listener) or not has_network(), "a phone could not open that"
    with listen("localhost", 0) as listener:
        assert address_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_page_and_the_schema_are_part_of_the_package():
    folder = ROOT / "rlhf_recipes" / "feedback" / "labels"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "rlhf_recipes.feedback.labels"
    ]
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert packed == {path for path in folder.rglob("*") if path.suffix in (".sql", ".html", ".css", ".js")}
    assert len(packed) == 4
