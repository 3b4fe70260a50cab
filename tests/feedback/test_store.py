"""The store of labels: what it accepts, who gets which group, and that it loses nothing."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels import Group, Label, Store
from rlhf_recipes.feedback.labels.assignment import LEASE
from rlhf_recipes.feedback.labels.label import AlreadyLabelledError, InvalidLabelError, NameTakenError
from support import ROOT

import pytest

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def group(number, answers=("one", "two", "three"), **more):
    return Group(f"g{number}", f"Question {number}?", list(answers), **more)


def open_store(path, overlap=1.0, **options):
    store = Store(path, overlap, **options)
    store._database.execute("PRAGMA synchronous = OFF")  # faster; tests need not survive a power cut
    return store


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "labels.sqlite") as opened:
        yield opened


def label(store, name, identity, *ranks, **more):
    store.save(Label(identity, name, list(ranks) or None, **more))


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_a_saved_label_is_visible_to_another_connection(store):
    store.add([group(1)])
    label(store, "Anna", "g1", 2, 5, 2, demonstration=" four ", note=" unclear ")
    with Store(store.path) as other:
        (read,) = other.labels()
    assert (read.ranks, read.demonstration, read.note, read.labeller) == ([1, 2, 1], "four", "unclear", "Anna")
    assert read.at.endswith("+00:00")


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([1, 2], "ranks: 2 for the 4 completions"),
        ([1, 0, 2, None], "whole number"),
        ([1, True, 2, None], "whole number"),
        ([1, 2, 3, None], "equal ones share a rank"),
        ([1, 2, 1, 3], "always unusable"),
    ],
)
def test_ranks_must_fit_the_group(store, ranks, problem):
    store.add([group(1, ("a", "b", "a ", ""))])
    with pytest.raises(InvalidLabelError, match=problem):
        label(store, "anna", "g1", *ranks)
    assert not store.labels()


@pytest.mark.parametrize(("key", "limit"), [("demonstration", 20_000), ("note", 2_000)])
def test_texts_are_limited(store, key, limit):
    store.add([group(1), group(2)])
    label(store, "anna", "g1", **{key: "x" * limit})
    with pytest.raises(InvalidLabelError, match=f"{key}: {limit + 1} characters"):
        label(store, "anna", "g2", **{key: "x" * (limit + 1)})


@pytest.mark.parametrize("name", ["", "  ", "x" * 61, "a\x00b"])
def test_names_are_checked(store, name):
    with pytest.raises(InvalidLabelError, match="name: "):
        store.start_session(name, "session")


def test_a_known_name_must_be_confirmed(store):
    assert store.start_session("Anna  B", "one") == "Anna B"
    with pytest.raises(NameTakenError):
        store.start_session("anna b", "two")
    assert store.labeller_in("two") is None
    assert store.start_session(" anna b", "two", known=True) == "Anna B"
    assert (store.labeller_in("one"), store.labeller_in("two")) == ("Anna B", "Anna B")


def test_a_repeated_submission_replaces_its_label_and_no_other(store):
    """The page sends again after a lost reply, perhaps with other ranks."""
    store.add([group(1)])
    store.save(Label("g1", "anna", [1, 2, 3]), "attempt")
    store.save(Label("g1", "anna", [3, 2, 1]), "attempt")
    with pytest.raises(AlreadyLabelledError):
        store.save(Label("g1", "anna", [1, 1, 1]), "another")
    store.save(Label("g1", "berta", [2, 1, 3]), "attempt")
    assert [(one.labeller, one.ranks) for one in store.labels()] == [("anna", [3, 2, 1]), ("berta", [2, 1, 3])]


def test_undo_withdraws_ones_own_labels_from_the_newest(store):
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
    assert [(one.labeller, one.group) for one in store.labels()] == [("berta", "g2")]
    label(store, "anna", "g1", 2, 1, 3)
    assert store.labels()[-1].ranks == [2, 1, 3]


def test_repeating_an_undo_withdraws_no_other_label(store):
    store.add([group(1), group(2)])
    label(store, "anna", "g1", 1, 2, 3)
    label(store, "anna", "g2", 1, 2, 3)
    newest = store.newest("anna")
    assert [store.undo("anna", newest).group for _ in range(2)] == ["g2", "g2"]
    assert store.undo("berta", newest) is None
    assert [one.group for one in store.labels()] == ["g1"]


def test_groups_can_be_added_later_and_twice(store):
    assert store.add([group(1), group(2, ("same", "same ", ""))]) == 1
    assert store.add([group(1), group(3)]) == 1
    assert [one.id for one, _ in store.contents()] == ["g1", "g3"]
    with pytest.raises(RecipeError, match=r"id: 'g1'"):
        store.add([group(4), group(1, ("other", "answers"))])
    with pytest.raises(RecipeError, match="texts or messages"):
        store.add([Group("m", [{"role": "user", "content": "Q"}], [[{"role": "assistant", "content": c}] for c in "ab"])])
    assert len(store.contents()) == 2


# --- Who gets which group ---------------------------------------------------------------------------------------------


def test_the_file_keeps_the_overlap(tmp_path):
    for given, kept in ((None, 0.1), (0.5, 0.5), (None, 0.5), (0.0, 0.0), (None, 0.0)):
        with Store(tmp_path / "labels.sqlite", given) as store:
            assert store.overlap == kept


def label_next(store, name, labelled):
    claimed = store.claim(name)
    if claimed:
        label(store, name, claimed.id, 1, 2, 3)
        labelled.append(claimed.id)
    return claimed


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1.0])
def test_everyone_gets_the_overlap_and_one_labeller_each_other_group(tmp_path, overlap):
    labelled = {name: [] for name in ("anna", "berta", "carla")}
    with open_store(tmp_path / "labels.sqlite", overlap) as store:
        assert store.add([group(number) for number in range(16)]) == 16
        working = list(labelled)
        while working:
            working = [name for name in working if label_next(store, name, labelled[name])]
        shared = set.intersection(*map(set, labelled.values()))
        assert len(shared) == pytest.approx(16 * overlap, abs=1)
        alone = [identity for identities in labelled.values() for identity in identities if identity not in shared]
        assert len(alone) == len(set(alone)) == 16 - len(shared)
        assert len(set(map(len, labelled.values()))) <= 2 or overlap  # turns are fair
        for name, identities in labelled.items():
            assert store.progress(name) == (len(identities), 0, 0)


@pytest.mark.parametrize("shared", [True, False], ids=["one connection", "several"])
def test_concurrent_labellers_never_get_the_same_group(tmp_path, shared):
    with open_store(tmp_path / "labels.sqlite", 0.0) as store:
        store.add([group(number) for number in range(12)])
        labelled = {name: [] for name in ("anna", "berta", "carla")}

        def work(name):
            with contextlib.nullcontext(store) if shared else open_store(store.path, 0.0) as own:
                while label_next(own, name, labelled[name]):
                    pass

        threads = [threading.Thread(target=work, args=(name,)) for name in labelled]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        identities = [identity for one in labelled.values() for identity in one]
        assert sorted(identities) == sorted(f"g{number}" for number in range(12))
        stored = {(one.labeller, one.group) for one in store.labels()}
        assert stored == {(name, identity) for name, identities in labelled.items() for identity in identities}


def test_a_group_left_on_a_screen_goes_to_another_after_the_lease(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    with open_store(tmp_path / "labels.sqlite", 0.0) as store:
        store.add([group(1)])
        assert store.claim("anna").id == "g1"
        assert store.claim("anna").id == "g1"
        now[0] = LEASE - 1
        assert store.claim("berta") is None
        assert (store.progress("berta"), store.progress("anna")) == ((0, 0, 1), (0, 1, 0))
        now[0] = LEASE + 1
        assert store.progress("berta") == (0, 1, 0)
        assert store.claim("berta").id == "g1"
        assert store.claim("anna") is None


def test_a_skipped_group_goes_to_another_and_not_back(tmp_path):
    with open_store(tmp_path / "labels.sqlite", 0.0) as store:
        store.add([group(1)])
        label(store, "anna", "g1")
        assert store.claim("anna") is None
        assert store.claim("berta").id == "g1"


# --- Failures ---------------------------------------------------------------------------------------------------------


def test_other_files_are_rejected_and_not_changed(tmp_path):
    foreign, text = tmp_path / "foreign.sqlite", tmp_path / "text.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mine (x)")
    text.write_text("not a database at all" * 100)
    for path in (foreign, text):
        content = path.read_bytes()
        with pytest.raises(RecipeError, match=f"{path.name}: not a database of labels"):
            Store(path)
        assert path.read_bytes() == content


def test_another_version_is_rejected(store):
    store.close()
    with sqlite3.connect(store.path) as connection:
        connection.execute("PRAGMA user_version = 1")
    with pytest.raises(RecipeError, match="has version 1 of the format, not 2"):
        Store(store.path)


@pytest.mark.parametrize("damage", ["pages", "group", "text"])
def test_a_damaged_file_is_one_message(store, damage):
    store.add([group(number) for number in range(200)])
    if damage == "pages":
        store.close()
        with store.path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 8192)
    else:
        content = "'{}'" if damage == "group" else "CAST(x'ff' AS TEXT)"
        store._database.execute(f"UPDATE groups SET content = {content} WHERE number = 7")
    with pytest.raises(RecipeError, match=f"{store.path}: the database is damaged"), Store(store.path) as damaged:
        damaged.contents()


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere/labels.sqlite: cannot be opened"):
        Store(tmp_path / "nowhere" / "labels.sqlite")
    with pytest.raises(RecipeError, match=r"labels.sqlite: no such database"):
        Store(tmp_path / "labels.sqlite", create=False)


def test_a_full_disk_loses_nothing_and_the_label_can_be_sent_again(store):
    store.add([group(number) for number in range(200)])
    label(store, "anna", "g1", 1, 2, 3)
    (pages,) = store._database.one("PRAGMA page_count")
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    saved, problem = 1, ""
    while not problem:
        try:
            label(store, "anna", f"g{saved + 1}", 1, 2, 3, demonstration="x" * 1000)
            saved += 1
        except RecipeError as error:
            problem = str(error)
    assert problem.startswith(f"{store.path}: the disk is full, and this was not saved")
    assert len(store.labels()) == saved
    store._database.execute(f"PRAGMA max_page_count = {pages * 10}")
    label(store, "anna", f"g{saved + 1}", 1, 2, 3, demonstration="x" * 1000)
    with Store(store.path) as other:
        assert len(other.labels()) == saved + 1


def test_a_locked_database_is_one_message(store):
    store.add([group(1)])
    store._database.execute("PRAGMA busy_timeout = 10")
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
    os.setuid(65534)  # permissions do not stop root
with Store(sys.argv[1]) as store:
    print(len(store.labels()))
    try:
        store.save(Label("g1", "berta", [1, 2, 3]))
    except RecipeError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs file permissions")
def test_a_read_only_database_can_be_read():
    with tempfile.TemporaryDirectory() as folder:  # other users cannot enter pytest's folders
        path = Path(folder, "labels.sqlite")
        with Store(path) as store:
            store.add([group(1)])
            label(store, "anna", "g1", 1, 2, 3)
        path.chmod(0o444)
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", READ_ONLY, path]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    labels, problem = result.stdout.splitlines()
    assert labels == "1"
    assert problem.startswith(f"{path}: the database is read-only")


KILLED = """
import sys
from rlhf_recipes.feedback.labels import Label, Store
store = Store(sys.argv[1], overlap=1.0)
for group, labels in store.contents():
    if not labels:
        store.save(Label(group.id, "anna", [1, 2, 3], "x" * 3000))
        print(group.id, flush=True)  # acknowledged
"""


@pytest.mark.kill
def test_acknowledged_labels_survive_kill_9(store):
    store.add([group(number) for number in range(3000)])
    acknowledged = []
    for kills, labels_before_kill in enumerate((1, 7, 20, 33), start=1):
        command = [sys.executable, "-c", KILLED, store.path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as labeller:
            acknowledged += [labeller.stdout.readline().strip() for _ in range(labels_before_kill)]
            labeller.send_signal(signal.SIGKILL)
            acknowledged += labeller.stdout.read().split()
        assert labeller.returncode == -signal.SIGKILL
        with Store(store.path) as opened:
            saved = [one.group for one in opened.labels()]
            assert opened._database.one("PRAGMA integrity_check") == ("ok",)
        assert set(acknowledged) <= set(saved)
        assert len(saved) <= len(acknowledged) + kills  # each kill may leave one saved label unacknowledged
        assert len(saved) == len(set(saved))


def test_a_commit_syncs_the_file_and_its_folder(store):
    with Store(store.path) as opened:
        assert opened._database.one("PRAGMA synchronous") == (3,)  # EXTRA
        assert opened._database.one("PRAGMA journal_mode") == ("delete",)
