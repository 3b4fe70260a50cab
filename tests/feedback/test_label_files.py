"""Labels as files: datasets, export and import; the agreement of labellers; the command line of recipes/label.py."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
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
from rlhf_recipes.feedback.labels.server import listen, url_of
from support import ROOT, hostile

import pytest
from hypothesis import given
from hypothesis import strategies as st


def group(number, answers=("one", "two", "three"), **more):
    return Group(f"g{number}", f"Question {number}?", list(answers), **more)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "labels.sqlite", overlap=1.0) as opened:
        opened._database.execute("PRAGMA synchronous = OFF")  # faster; tests need not survive a power cut
        yield opened


def label(store, name, identity, *ranks, **more):
    store.save(Label(identity, name, list(ranks) or None, **more))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def labelled(store):
    sources = ["s1", "s2", "s3", "s4", "s5"]
    store.add(
        [group(1, (" one", " two", " one", "", " four"), sources=sources), group(2, (" a", " b")), group(3, (" a", " b"))]
    )
    label(store, "Anna", "g1", 2, 1, 2, None, 3, note="one stands twice")
    label(store, "Berta", "g1", 1, None, 1, None, 2)
    label(store, "Anna", "g2", 1, 1)
    label(store, "Berta", "g2", None, None, demonstration="neither", note='ä \u2028 "quoted"')
    label(store, "Anna", "g3", demonstration="C")
    return store


def test_labels_become_rankings_pairs_and_demonstrations(labelled):
    contents = labelled.contents()
    assert rankings(contents) == [
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
    assert [(row["chosen"], row["rejected"], row["labeller"]) for row in pairs(contents)] == [
        (" two", " one", "Anna"),
        (" two", " four", "Anna"),
        (" one", " four", "Anna"),
        (" one", " four", "Berta"),
    ]
    # A demonstration after a plain prompt starts like the completions
    assert [(row["prompt"], row["completion"]) for row in demonstrations(contents)] == [
        ("Question 2?", " neither"),
        ("Question 3?", " C"),
    ]


@pytest.mark.parametrize("conversational", [False, True])
def test_the_recipes_read_an_export(labelled, tmp_path, conversational):
    if conversational:
        chat = Store(tmp_path / "chat.sqlite")
        for one, labels in labelled.contents():
            prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": one.prompt}]
            chat.add(
                [Group(one.id, prompt, [[{"role": "assistant", "content": text}] for text in one.completions], one.sources)]
            )
            for each in labels:
                chat.save(each)
        labelled = chat
    rows = export_labels(labelled, tmp_path / "out")
    assert rows == {"rankings.jsonl": 2, "pairs.jsonl": 4, "demonstrations.jsonl": 2, "labels.jsonl": 3}
    contents = labelled.contents()
    for name, kind, exported in (
        ("rankings", "ranking", rankings(contents)),
        ("pairs", "preference", pairs(contents)),
        ("demonstrations", "sft", demonstrations(contents)),
    ):
        data = load_data(DataArguments(dataset_name=str(tmp_path / "out" / f"{name}.jsonl")), kind, evaluate=False, seed=0)
        assert data.train.to_list() == [{column: row[column] for column in data.train.column_names} for row in exported]
    labelled.close()


def test_an_import_restores_an_export(labelled, tmp_path):
    export_labels(labelled, tmp_path / "out")
    with Store(tmp_path / "fresh.sqlite", overlap=1.0) as fresh:
        assert import_labels(fresh, tmp_path / "out" / "labels.jsonl") == 5
        assert fresh.contents() == labelled.contents()
        assert export_labels(fresh, tmp_path / "again") == export_labels(labelled, tmp_path / "out")
        for file in (tmp_path / "out").iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
        assert import_labels(fresh, tmp_path / "out" / "labels.jsonl") == 0
        assert fresh.undo("anna").group == "g3"


def test_undo_after_an_import_follows_the_times(store, tmp_path):
    store.add([group(1), group(2)])
    for identity, day in (("g2", 1), ("g1", 2)):
        label(store, "anna", identity, 1, 2, 3, at=f"2026-01-0{day}T00:00:00.000+00:00")
    export_labels(store, tmp_path)
    with Store(tmp_path / "fresh.sqlite") as fresh:
        import_labels(fresh, tmp_path / "labels.jsonl")
        assert fresh.undo("anna").group == "g1"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda row: row.pop("labels"), "labels: "),
        (lambda row: row["labels"][0].update(ranks=[1, 2]), "ranks: 2 for the 5 completions"),
        (lambda row: row["labels"][0].update(ranks="12"), "labels.0.ranks: "),
        (lambda row: row["labels"].append(row["labels"][0] | {"ranks": None}), "labels: Anna .* 'g1'"),
        (lambda row: row.pop("completions"), "completions: "),
    ],
)
def test_an_invalid_file_imports_nothing(labelled, tmp_path, change, key):
    export_labels(labelled, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().strip().split("\n")]
    change(rows[0])
    path = write(tmp_path / "changed.jsonl", *reversed(rows))
    with Store(tmp_path / "fresh.sqlite") as fresh:
        with pytest.raises(RecipeError, match=f"{path}: row 3: {key}"):
            import_labels(fresh, path)
        assert fresh.contents() == []


def test_an_export_removes_files_that_have_no_rows_now(labelled, tmp_path):
    export_labels(labelled, tmp_path)
    for name in ("Anna", "Berta"):
        labelled.undo(name)
    assert export_labels(labelled, tmp_path)["demonstrations.jsonl"] == 0
    assert not (tmp_path / "demonstrations.jsonl").exists()
    assert (tmp_path / "labels.jsonl").exists()


@pytest.mark.parametrize("name", ["pairs.jsonl", "labels.jsonl"])
def test_an_export_replaces_only_files_of_an_export(labelled, tmp_path, name):
    folder = tmp_path / "out"
    folder.mkdir()
    own = write(folder / name, {"prompt": "mine", "chosen": "a", "rejected": "b"})
    before = own.read_text()
    with pytest.raises(RecipeError, match=f"{name}: was not written by --export"):
        export_labels(labelled, folder)
    assert ([path.name for path in folder.iterdir()], own.read_text()) == ([name], before)


def test_an_export_parses_after_it_has_released_the_database(labelled, tmp_path, monkeypatch):
    """For many groups parsing takes longer than others wait for the database."""
    parse, parsed = Store._parse_label, []

    def parse_while_others_write(store, row):
        with sqlite3.connect(store.path, timeout=0.1, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("ROLLBACK")
        parsed.append(row)
        return parse(store, row)

    monkeypatch.setattr(Store, "_parse_label", parse_while_others_write)
    export_labels(labelled, tmp_path / "out")
    assert len(parsed) == 5, "each label once"


def test_an_export_that_cannot_be_written_is_one_message(labelled, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"--export: .*file: "):
        export_labels(labelled, tmp_path / "file")


# --- Damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder with a database, and the rows of its export."""
    folder = tmp_path_factory.mktemp("valid")
    with Store(folder / "valid.sqlite") as store:
        store.add([Group("one", "Q?", ["A", "B", "C"], ["sft", "ppo", "sft"]), Group("three", "S?", ["E", "F"])])
        store.save(Label("one", "Ann", [1, 2, None], "Better", "note"))
        store.save(Label("three", "Ann", None))
        store.save(Label("one", "Bob", [2, 1, 1]))
        export_labels(store, folder / "export")
    return folder, [json.loads(line) for line in (folder / "export" / "labels.jsonl").read_text().splitlines()]


@pytest.mark.fuzz
@hostile.examples(60)
@given(data=st.data())
def test_an_import_restores_all_labels_or_none(valid, data):
    folder, rows = valid
    rows = hostile.replaced(rows, data.draw(st.sampled_from(hostile.places(rows))), data.draw(hostile.values))
    file = write(folder / "labels.jsonl", *rows)
    (folder / "import.sqlite").unlink(missing_ok=True)
    with Store(folder / "import.sqlite") as store:
        number, message = hostile.outcome(lambda: import_labels(store, file))
        contents = store.contents()
    if message is None:
        assert number == sum(len(labels) for _, labels in contents) == sum(len(row["labels"]) for row in rows)
        assert [one.prompt for one, _ in contents] == [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    else:
        assert (str(file) in message, contents) == (True, [])


@pytest.mark.fuzz
@hostile.examples(40)
@given(data=st.data())
def test_a_damaged_database_is_one_message(valid, data):
    path = valid[0] / "damaged.sqlite"
    path.write_bytes(data.draw(hostile.spoilt_bytes((valid[0] / "valid.sqlite").read_bytes())))

    def read():
        with Store(path) as store:
            store.contents()
            store.progress("Ann")
            store.claim("Ann")

    _, message = hostile.outcome(read)
    assert message is None or str(path) in message


# --- Agreement --------------------------------------------------------------------------------------------------------


def test_agreement_equals_a_count_by_hand(store):
    store.add([group(1), group(2), group(3, ("a", "b")), group(4, ("a", "a ", "b"))])
    label(store, "anna", "g1", 1, 2, 3)  # pairs 12, 13, 23: anna < < <
    label(store, "berta", "g1", 1, 3, 2)  # < < >: same, same, different
    label(store, "carla", "g1", 1, 1, 2)  # = < <: with anna tie, same, same; with berta tie, same, different
    label(store, "anna", "g2", 1, 2, None)  # only 12 is compared
    label(store, "berta", "g2", 2, 1, 3)  # different
    label(store, "anna", "g3", 1, 1)
    label(store, "berta", "g3", 1, 1)  # both tie
    label(store, "anna", "g4", 1, 1, 2)  # equal completions count once
    label(store, "carla", "g4", 1, 1, 2)  # same
    label(store, "berta", "g4")  # a skip is no judgement
    result = agreement(store.contents())
    # g1: anna-berta 2 of 3, anna-carla 2 of 2, berta-carla 1 of 2; g2: 0 of 1; g4: 1 of 1
    assert (result.compared, result.tied, result.prompts) == (9, 3, 3)
    assert result.share == pytest.approx(6 / 9)
    assert result.share_with_ties == pytest.approx(7 / 12)  # of the ties both give only that in g3
    assert result.labellers == {"anna": (5 / 7, 7), "berta": (3 / 6, 6), "carla": (4 / 5, 5)}
    low, high = result.interval
    assert 0 <= low < result.share < high <= 1
    assert result.lines()[0].startswith("Agreement: 67% [")


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("groups_of_a_prompt", [1, 5])
def test_agreement_resamples_prompts_however_many_groups_they_have(conversational, groups_of_a_prompt):
    """Judgements of one prompt are alike: five groups of a prompt say no more than one."""
    contents, prompts = [], [f"Question {number}?" for number in range(40)]
    if conversational:
        prompts = [[{"role": "system", "content": "Be short."}, {"role": "user", "content": prompt}] for prompt in prompts]
    for number, prompt in enumerate(prompts):
        for k in range(groups_of_a_prompt):
            one = Group(f"{number}-{k}", prompt, ["a", "b"])
            labels = [Label(one.id, "anna", [1, 2]), Label(one.id, "berta", [1, 2] if number % 4 else [2, 1])]
            contents.append((one, labels))
    result = agreement(contents)
    assert (result.prompts, result.compared) == (40, 40 * groups_of_a_prompt)
    assert result.share == pytest.approx(0.75)
    low, high = result.interval
    assert high - low == pytest.approx(2 * 1.96 * (0.75 * 0.25 / 40) ** 0.5, rel=0.1)


def test_agreement_without_judgements_or_with_ties_only(store):
    store.add([group(1, ("a", "b")), group(2, ("a", "b"))])
    label(store, "anna", "g1", 1, 1)
    label(store, "anna", "g2", 1, 1)
    assert agreement(store.contents()).share is None
    assert "no two labellers" in agreement(store.contents()).lines()[0]
    label(store, "berta", "g1", 1, 2)
    label(store, "berta", "g2", 1, 1)
    assert agreement(store.contents()).lines() == ["Agreement: 2 judgements, all with a tie; 50% are the same."]


# --- The recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    groups = ({"prompt": "Q", "completions": ["a", "b"], "id": "g"}, {"prompt": "P", "completions": ["a", "a"]})
    write(Path("groups.jsonl"), *groups)


def test_the_recipe_exports_and_imports(files, launch):
    with Store("groups.labels.sqlite") as store:
        store.add(read_groups(Path("groups.jsonl")))
        label(store, "anna", "g", 2, 1)
        label(store, "berta", "g", 2, 1)
    assert launch("label", "--store", "groups.labels.sqlite", "--export", "out") == (0, "")
    assert launch("label", "--store", "fresh.sqlite", "--import", "out/labels.jsonl", "--export", "again") == (0, "")
    assert Path("again/rankings.jsonl").read_text() == Path("out/rankings.jsonl").read_text() != ""
    assert launch("label", "--data", "groups.jsonl", "--agreement") == (0, "")


LIST_IMPORTS = """
import atexit, runpy, sys
from rlhf_recipes.feedback.labels import server
server.serve = lambda *_: None
atexit.register(lambda: print("imported:", *{"torch", "transformers", "trl", "datasets"} & sys.modules.keys()))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("options", "status"),
    [((), 0), (("--agreement", "--export", "out"), 0), (("--overlap", "2"), 2)],
    ids=["page", "export", "error"],
)
def test_the_recipe_runs_without_pytorch(files, options, status):
    """PyTorch takes 10 seconds and half a GiB."""
    with Store("groups.labels.sqlite") as store:
        store.add(read_groups(Path("groups.jsonl")))
        for name in ("anna", "berta"):
            label(store, name, "g", 2, 1)
    recipe = (ROOT / "recipes" / "label.py", "--data", "groups.jsonl", "--port", "0", *options)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", LIST_IMPORTS, *recipe], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (status, "imported:"), result.stderr


WEAK = {"SHORT": "12345", "BLANK": " " * 8, "MOSTLY_BLANK": "  secret   ", "TABS": "\t" * 9, "INVISIBLE": "\u200b" * 8}
WEAK |= {"WIDE_BLANK": "\u3000" * 8, "NOT_TEXT": "secretsecret\udcff"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data"),
        (["--data", "none.jsonl"], "none.jsonl: "),
        (["--store", "none.sqlite"], "none.sqlite: no such database"),
        (["--data", "groups.jsonl", "--overlap", "10", "--port", "0"], "overlap: 10.0"),
        (["--data", "groups.jsonl", "--host", "0.0.0.0"], "--host: 0.0.0.0: others could"),
        (["--data", "groups.jsonl", "--host", "no.such.invalid"], "--host: no.such.invalid: "),
        (["--data", "groups.jsonl", "--port", "99999"], "--port: 99999"),
        (["--data", "groups.jsonl", "--port", "-1"], "--port: -1"),
        (["--data", "groups.jsonl", "--password-env", "NONE_SUCH"], "NONE_SUCH"),
        *((["--data", "groups.jsonl", "--password-env", name], "--password-env: too weak a password") for name in WEAK),
    ],
)
def test_a_mistake_of_the_user_is_one_message_and_changes_nothing(files, launch, monkeypatch, options, message):
    for name, password in WEAK.items():
        monkeypatch.setenv(name, password)
    status, error = launch("label", *options)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert message in error
    assert not list(Path().glob("*.sqlite"))


def test_a_port_in_use_is_named(files, launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error = launch("label", "--data", "groups.jsonl", "--port", port)
    assert status == 2
    assert error.startswith(f"error: --host: 127.0.0.1: cannot listen on port {port} (")


def test_without_the_extra_its_installation_is_named(files, launch, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "rlhf_recipes.feedback.labels.app", raising=False)
    status, error = launch("label", "--data", "groups.jsonl")
    assert status == 2
    assert "`label` (missing: fastapi)" in error


def has_network():
    """Return whether this machine has a route to others. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(("192.0.2.1", 9)) == 0


def test_urls_can_be_opened_by_others():
    with listen("0.0.0.0", 0, "a long password") as listener:
        assert "0.0.0.0" not in url_of(listener) or not has_network()
    with listen("localhost", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_page_and_the_schema_are_part_of_the_package():
    folder = ROOT / "rlhf_recipes" / "feedback" / "labels"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in settings["package-data"]["rlhf_recipes.feedback.labels"] for path in folder.glob(pattern)}
    assert packed == {path for path in folder.rglob("*") if path.suffix in (".sql", ".html", ".css", ".js")}
    assert len(packed) == 4
