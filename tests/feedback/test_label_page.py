"""The labelling page in a headless Chromium, and what its server refuses, by plain HTTP."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlhf_recipes.feedback.labels import Group, Label, Store
from rlhf_recipes.feedback.labels.app import make_server
from rlhf_recipes.feedback.labels.guard import HEADERS, LARGEST_BODY
from rlhf_recipes.feedback.labels.server import address_of, listen
from support import ROOT

import pytest

CHROMIUM = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync"]
WAIT = 15_000  # milliseconds, on a busy machine


def group(number, answers=("one", "two", "three", "four")):
    return Group(f"g{number}", f"Question {number}?", list(answers), [f"secret-{k}" for k in range(len(answers))])


class Site:
    """A store with its server in this process."""

    def __init__(self, path, groups, password=""):
        self.store = Store(path, overlap=1.0)
        self.store._run("PRAGMA synchronous = OFF")  # tests need not outlive a power cut, and are quicker so
        self.store.add(groups)
        self.listener = listen("127.0.0.1", 0, password)
        self.url = address_of(self.listener)
        self.port = self.listener.getsockname()[1]
        self.server = make_server(self.store, password, names=["labels.example"], delay=0.2)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.store.close()

    def labels(self):
        return {(label.labeller, label.group): label for label in self.store.labels()}


@pytest.fixture
def serve(tmp_path):
    """`serve(groups, password)`: a site, which ends with the test."""
    with contextlib.ExitStack() as sites:

        def start(groups, password=""):
            site = Site(tmp_path / "labels.sqlite", groups, password)
            sites.callback(site.close)
            return site

        yield start


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=WAIT)
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """`visit(url, name)`: a page in a browser of its own, signed in; errors on it fail the test."""
    from playwright.sync_api import expect

    errors = []
    with contextlib.ExitStack() as contexts:

        def open_page(url, name, context=None, **options):
            if context is None:
                context = browser.new_context(**options)
                context.set_default_timeout(WAIT)
                contexts.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("dialog", lambda dialog: errors.append(dialog.message))
            page.goto(url)
            page.keyboard.type(name)  # the name has the focus
            page.keyboard.press("Enter")
            expect(page.locator("#who")).to_have_text(name)
            return page

        yield open_page
    assert not errors


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def shown(page):
    return page.locator("#answers .text").all_inner_texts()


def places(page):
    return dict(zip(shown(page), page.locator("#answers .place").all_inner_texts(), strict=True))


def press_answer(page, text, before=""):
    """Presses the number of the answer that reads `text`."""
    page.keyboard.press(f"{before}Digit{shown(page).index(text) + 1}")


def done(page, number):
    expect(page.locator("#progress")).to_contain_text(f"{number} done")


# By the keyboard alone


def test_an_order_with_ties_and_an_unusable_answer(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    assert sorted(shown(page)) == ["four", "one", "three", "two"]
    press_answer(page, "two")
    press_answer(page, "four", "Shift+")
    page.keyboard.press("x")
    press_answer(page, "one")
    assert places(page) == {"two": "1st, tied", "four": "1st, tied", "one": "unusable", "three": "2nd (what is left)"}
    expect(page.get_by_role("status")).to_have_text(re.compile("unusable. Ready to save."))
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [None, 1, 2, 1]
    expect(page.locator("#prompt")).to_have_text("Question 2?")
    expect(page.get_by_role("status")).to_have_text("Saved.")
    expect(page.locator("#prompt-title")).to_be_focused()  # where a screen reader goes on


def test_a_number_again_takes_back_and_0_ties_the_rest(serve, visit):
    site = serve([group(1)])
    page = visit(site.url, "anna")
    press_answer(page, "one")
    press_answer(page, "two")
    press_answer(page, "one")
    press_answer(page, "one")
    page.keyboard.press("0")
    assert places(page) == {"two": "1st", "one": "2nd", "three": "3rd, tied", "four": "3rd, tied"}
    page.keyboard.press("c")
    assert set(places(page).values()) == {""}
    press_answer(page, "four")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("Not saved yet: answers")
    assert not site.labels()
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [2, 2, 2, 1]
    expect(page.get_by_role("heading", name="All done")).to_be_focused()


def test_of_two_one_key_and_enter(serve, visit):
    site = serve([group(1, ("better", "worse")), group(2, ("same", "alike"))])
    page = visit(site.url, "anna")
    expect(page.get_by_role("heading", name="Which answer is better?")).to_be_visible()
    expect(page.get_by_role("button", name="Better, answer 1")).to_be_visible()
    press_answer(page, "better")
    page.keyboard.press("Enter")
    done(page, 1)
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 2)
    assert [label.ranks for label in site.store.labels()] == [[1, 2], [1, 1]]


@pytest.mark.parametrize("keys", ["12", "012", "02"])
def test_of_two_the_one_that_was_pressed_last_is_better(serve, visit, keys):
    site = serve([group(1, ("a", "b"))])
    page = visit(site.url, "anna")
    better = shown(page)[1]
    for key in keys:
        page.keyboard.press(key)
    expect(page.get_by_role("button", name="1st: take back, answer 2")).to_be_visible()
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == ([1, 2] if better == "a" else [2, 1])
    page.keyboard.press("u")
    done(page, 0)
    page.keyboard.press("2")
    assert set(places(page).values()) == {""}, "again takes it back"
    page.get_by_role("button", name="Better, answer 2").click()
    page.get_by_role("button", name="Better, answer 1").click()
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == ([2, 1] if better == "a" else [1, 2])


def test_after_a_click_enter_saves(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    best = shown(page)[1]
    page.get_by_role("button", name="Best, answer 2").click()
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [1 if text == best else 2 for text in group(1).completions]


def test_undo_of_a_skip_brings_the_ranks_back(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    for text in ("three", "one"):
        press_answer(page, text)
    page.keyboard.press("s")
    done(page, 1)
    page.keyboard.press("u")
    done(page, 0)
    assert {text: place for text, place in places(page).items() if place} == {"three": "1st", "one": "2nd"}
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    assert [label.ranks for label in site.store.labels()] == [[2, 3, 1, 3]]


def test_a_demonstration_and_a_note_and_a_skip(serve, visit):
    site = serve([group(1), group(2), group(3)])
    page = visit(site.url, "anna")
    page.keyboard.press("n")
    page.keyboard.type("x1 is text here")
    page.keyboard.press("Escape")
    page.keyboard.press("0")
    page.keyboard.press("d")
    page.keyboard.type("It is 4.\nReally.")
    page.keyboard.press("Control+Enter")
    done(page, 1)
    page.keyboard.press("s")
    done(page, 2)
    page.keyboard.press("d")
    page.keyboard.type("Only this.")
    page.keyboard.press("Escape")
    page.keyboard.press("s")
    done(page, 3)
    said = [(label.ranks, label.demonstration, label.note) for label in site.store.labels()]
    assert said == [([1, 1, 1, 1], "It is 4.\nReally.", "x1 is text here"), (None, None, None), (None, "Only this.", None)]


def test_undo_brings_back_what_was_said(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    order = ("three", "one", "four", "two")
    for text in order[:3]:
        press_answer(page, text)
    page.keyboard.press("n")
    page.keyboard.type("first")
    page.keyboard.press("Control+Enter")
    done(page, 1)
    page.keyboard.press("u")
    done(page, 0)
    assert not site.labels()
    expect(page.locator("#prompt")).to_have_text("Question 1?")
    expect(page.locator("#note")).to_have_value("first")
    assert places(page) == {"three": "1st", "one": "2nd", "four": "3rd", "two": "4th"}
    page.keyboard.press("c")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [1, 1, 1, 1]
    page.keyboard.press("u")
    done(page, 0)
    page.keyboard.press("u")
    expect(page.get_by_role("alert").nth(0)).to_have_text("Nothing was undone. There is nothing to undo.")


def test_a_reload_goes_on_where_it_was(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    before = shown(page)
    press_answer(page, "two")
    page.keyboard.press("d")
    page.keyboard.type("half a sent")
    page.reload()
    done(page, 1)
    expect(page.locator("#demonstration")).to_have_value("half a sent")
    assert shown(page) == before
    assert places(page)["two"] == "1st"


def test_keys_can_be_turned_off(serve, visit):
    site = serve([group(1)])
    page = visit(site.url, "anna")
    page.get_by_label("Keyboard shortcuts").uncheck()
    page.keyboard.press("1")
    assert set(places(page).values()) == {""}
    page.reload()
    expect(page.get_by_label("Keyboard shortcuts")).not_to_be_checked()
    page.get_by_label("Keyboard shortcuts").check()
    page.keyboard.press("1")
    assert "1st" in places(page).values()


def test_more_answers_than_digits_by_tab_and_enter(serve, visit):
    answers = [f"answer {letter}" for letter in "abcdefghijkl"]
    site = serve([group(1, answers)])
    page = visit(site.url, "anna")
    last = shown(page)[-1]
    page.get_by_role("button", name="Best, answer 12").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="1st: take back, answer 12")).to_be_focused()
    page.keyboard.press("0")
    page.get_by_role("button", name="Save").focus()
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [1 if answer == last else 2 for answer in answers]


# Several labellers


def test_two_labellers_at_once_even_in_two_tabs_of_one_browser(serve, visit):
    site = serve([group(1), group(2)])
    anna = visit(site.url, "anna")
    berta = visit(site.url, "berta", context=anna.context)
    for number in (1, 2):
        for page, best in ((anna, "one"), (berta, "two")):
            expect(page.locator("#prompt")).to_have_text(f"Question {number}?")
            press_answer(page, best)
            page.keyboard.press("0")
        for page in (berta, anna):
            page.keyboard.press("Enter")
            done(page, number)
    assert {key: label.ranks for key, label in site.labels().items()} == {
        ("anna", "g1"): [1, 2, 2, 2],
        ("anna", "g2"): [1, 2, 2, 2],
        ("berta", "g1"): [2, 1, 2, 2],
        ("berta", "g2"): [2, 1, 2, 2],
    }
    anna.reload()
    expect(anna.locator("#who")).to_have_text("anna")


def test_who_waits_for_another_is_told_so(serve, visit):
    site = serve([group(1)])
    site.store._run("UPDATE settings SET overlap = 0.0")
    visit(site.url, "anna")
    page = visit(site.url, "berta")
    expect(page.get_by_role("heading", name="All done for now")).to_be_focused()
    expect(page.locator("#held")).to_contain_text("Others have 1 more on their screens.")


def test_a_name_that_is_here_already_is_asked_about(serve, visit, browser):
    site = serve([group(1)])
    visit(site.url, "anna")
    page = browser.new_page()
    page.goto(site.url)
    page.keyboard.type("Anna")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("'Anna' labels here already. Is that you?")
    page.get_by_role("button", name="Yes, I am Anna").click()
    expect(page.locator("#who")).to_have_text("anna")
    page.close()


def test_the_same_prompt_in_two_windows_is_labelled_once(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    site.store.save(Label("g1", "anna", [4, 3, 2, 1]))
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    expect(page.get_by_role("status")).to_contain_text("in another window already; that label stays")
    assert site.labels()["anna", "g1"].ranks == [4, 3, 2, 1]
    expect(page.locator("#prompt")).to_have_text("Question 2?")


# What a model wrote


def test_hostile_text_is_shown_as_text(serve, visit):
    hostile = [
        "<script>window.hacked = 1; alert(1)</script>",
        "<img src=x onerror='window.hacked = 1; alert(1)'>",
        "<b>bold</b> &amp; [link](javascript:alert(1)) </div></li>",
    ]
    site = serve(
        [Group("g1", [{"role": "user", "content": hostile[0]}], [[{"role": "assistant", "content": h}] for h in hostile])]
    )
    page = visit(site.url, "<i>anna</i>")
    assert sorted(shown(page)) == sorted(hostile)
    expect(page.locator("#prompt")).to_contain_text(hostile[0])
    assert page.locator("#work").locator("script, img, b, i, a").count() == 0
    page.keyboard.press("u")  # the page still works
    expect(page.get_by_role("alert").nth(0)).to_contain_text("There is nothing to undo")
    assert page.evaluate("window.hacked") is None
    assert "secret" not in page.content()


def test_an_empty_answer_can_only_be_unusable_and_equal_ones_are_one(serve, visit):
    site = serve([group(1, ("a", "", "b", "a "))])
    page = visit(site.url, "anna")
    assert sorted(shown(page)) == ["(empty: the model ended at once)", "a", "b"]
    press_answer(page, "(empty: the model ended at once)")
    expect(page.get_by_role("status")).to_contain_text("is empty: it can only be unusable")
    press_answer(page, "b")
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [2, None, 1, 2]


# What goes wrong


LIGHT = """
import sys
from pathlib import Path
from rlhf_recipes.feedback.labels import Store, read_groups
from rlhf_recipes.feedback.labels.server import listen, serve
store = Store(sys.argv[4])
store.add(read_groups(Path(sys.argv[2])))
"""
SERVES = """
serve(store, listen("127.0.0.1", int(sys.argv[6])))
"""
DIES = (
    """
import os, signal
save = store.save
store.save = lambda *given: (save(*given), os.kill(os.getpid(), signal.SIGKILL))
"""
    + SERVES
)


def start(program, data, store, port):
    """Starts a server in a process of its own; returns it and its URL."""
    command = [sys.executable, *program, "--data", data, "--store", store, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    pytest.fail(process.stderr.read())


def test_a_killed_server_loses_nothing(tmp_path, visit):
    """The page says that a label is not saved and keeps it; what was saved before is there when the recipe runs again."""
    data, store = tmp_path / "groups.jsonl", tmp_path / "labels.sqlite"
    data.write_text("".join(json.dumps(group(number).row()) + "\n" for number in (1, 2)))
    process, url = start(["-c", LIGHT + SERVES], data, store, 0)  # as the recipe, without what that imports
    page = visit(url, "anna")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    press_answer(page, "three")
    page.keyboard.press("0")
    page.keyboard.press("d")
    page.keyboard.type("Long thought about.")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert").nth(0)).to_have_text(
        "This label is NOT saved; what you entered is kept here. Save again to send it. The server does not answer."
    )
    expect(page.locator("#demonstration")).to_have_value("Long thought about.")

    process, _ = start([ROOT / "recipes" / "label.py"], data, store, url.rpartition(":")[2])
    page.keyboard.press("Control+Enter")
    done(page, 2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "")
    with Store(store) as opened:
        assert [(label.group, label.demonstration) for label in opened.labels()] == [
            ("g1", None),
            ("g2", "Long thought about."),
        ]
        assert opened.labels()[1].ranks == [2, 2, 1, 2]


def test_a_lost_answer_does_not_make_two_labels_nor_lose_what_was_changed_since(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")

    lost = [True, True, False]  # one route for all, since a browser may be late to take one off and put the next one on

    def lose(route):
        if lost.pop(0):
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route("**/api/label", lose)
    press_answer(page, "one")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("NOT saved")
    assert site.labels()["anna", "g1"].ranks == [1, 2, 2, 2]  # it was, and the page cannot know
    page.reload()
    done(page, 1)  # the server knows
    page.keyboard.press("u")
    done(page, 0)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("NOT saved")
    page.keyboard.press("c")
    press_answer(page, "two")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    assert [label.ranks for label in site.store.labels()] == [[2, 1, 2, 2]]


def test_an_undo_whose_answer_was_lost_can_be_asked_again(serve, visit):
    site = serve([group(1), group(2), group(3)])
    page = visit(site.url, "anna")
    for number in (1, 2):
        page.keyboard.press("0")
        page.keyboard.press("Enter")
        done(page, number)
    page.route("**/api/undo", lambda route: (route.fetch(), route.abort()), times=1)
    page.keyboard.press("u")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("Whether the label was undone is not known. Undo again")
    assert list(site.labels()) == [("anna", "g1")]
    page.keyboard.press("u")
    done(page, 1)
    expect(page.locator("#prompt")).to_have_text("Question 2?")
    assert list(site.labels()) == [("anna", "g1")]
    page.keyboard.press("u")
    done(page, 0)


def test_where_the_next_task_does_not_come_no_key_changes_what_was_saved(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    page.route("**/api/task", lambda route: route.abort(), times=2)
    press_answer(page, "one")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("Saved. The next prompt is not here yet")
    expect(page.get_by_role("status").last).to_have_text("Saved.")
    for key in ("c", "2", "0", "s", "Control+Enter"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_text("Question 2?")
    assert [label.ranks for label in site.store.labels()] == [[1, 2, 2, 2]]


BLOCKED = """for (const name of ["localStorage", "sessionStorage"])
    Object.defineProperty(window, name, {get() { throw new DOMException("blocked", "SecurityError"); }});"""
FULL = """Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };"""


@pytest.mark.parametrize("storage", [BLOCKED, FULL], ids=["blocked", "full"])
def test_a_browser_that_keeps_nothing_is_no_hindrance_and_said_to_be(serve, visit, browser, storage):
    site = serve([group(1), group(2)])
    context = browser.new_context()
    context.add_init_script(storage)
    page = visit(site.url, "anna", context=context)
    expect(page.locator("#notice")).to_contain_text("This browser keeps nothing")
    press_answer(page, "one")
    page.keyboard.press("s")
    done(page, 1)
    page.keyboard.press("u")
    done(page, 0)
    assert places(page)["one"] == "1st"
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [1, 2, 2, 2]
    context.close()


def test_what_was_not_foreseen_is_said(serve, browser):
    site = serve([group(1)])
    page = browser.new_page()
    page.goto(site.url)
    for failing in ("Promise.reject(new Error('odd'))", "setTimeout(() => { throw new Error('odd'); })"):
        page.evaluate("document.getElementById('sign-in-error').textContent = ''")
        page.evaluate(f"() => {{ {failing}; }}")
        expect(page.get_by_role("alert").nth(0)).to_have_text(re.compile("The page failed .*odd.*. Reload it: what was saved"))
    page.close()


def test_a_server_killed_between_disk_and_answer_has_one_label(tmp_path, visit):
    data, store = tmp_path / "groups.jsonl", tmp_path / "labels.sqlite"
    data.write_text("".join(json.dumps(group(number).row()) + "\n" for number in (1, 2)))
    process, url = start(["-c", LIGHT + DIES], data, store, 0)
    page = visit(url, "anna")
    press_answer(page, "three")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("NOT saved")
    process.communicate(timeout=30)
    with Store(store) as opened:
        assert [label.ranks for label in opened.labels()] == [[2, 2, 1, 2]]  # the page cannot know
    process, _ = start(["-c", LIGHT + SERVES], data, store, url.rpartition(":")[2])
    page.keyboard.press("c")
    press_answer(page, "two")
    page.keyboard.press("0")
    page.keyboard.press("Enter")
    done(page, 1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    with Store(store) as opened:
        assert [label.ranks for label in opened.labels()] == [[2, 1, 2, 2]]


def test_a_label_that_the_disk_does_not_take_is_not_said_to_be_saved(serve, visit):
    site = serve([group(1), group(2)])
    page = visit(site.url, "anna")
    page.keyboard.press("0")
    page.locator("#demonstration").fill("x" * 20_000)
    pages = site.store._one("PRAGMA page_count")[0]
    site.store._one(f"PRAGMA max_page_count = {pages}")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text(re.compile("NOT saved; .* the disk is full"))
    expect(page.get_by_role("alert").nth(0)).not_to_contain_text(site.store.path.name)  # which is nothing to labellers
    expect(page.locator("#demonstration")).to_have_value("x" * 20_000)
    assert not site.labels()
    site.store._one(f"PRAGMA max_page_count = {pages + 100}")
    page.keyboard.press("Control+Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].demonstration == "x" * 20_000


def test_a_session_that_ended_asks_who_it_is_and_keeps_what_was_typed(serve, browser):
    site = serve([group(1)], password="correct horse")
    page = browser.new_page()
    page.goto(site.url)
    page.keyboard.type("anna")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_have_text("The password, please.")
    page.keyboard.type("correct horse")
    page.keyboard.press("Enter")
    expect(page.locator("#who")).to_have_text("anna")
    page.keyboard.press("n")
    page.keyboard.type("keep me")
    page.keyboard.press("Escape")
    page.keyboard.press("0")
    site.store._run("DELETE FROM sessions")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").nth(0)).to_contain_text("This label is NOT saved")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Yes, I am anna").click()
    expect(page.locator("#work")).to_be_visible()
    expect(page.locator("#note")).to_have_value("keep me")
    page.keyboard.press("Enter")
    done(page, 1)
    assert site.labels()["anna", "g1"].note == "keep me"
    page.close()


# A phone, a dark room


def test_on_a_phone_by_touch(serve, visit):
    site = serve([group(1, ("short", "long " * 200, "https://" + "x" * 300))])
    page = visit(site.url, "anna", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    best = shown(page).index("short") + 1
    page.get_by_role("button", name=f"Best, answer {best}").tap()
    others = [k for k in (1, 2, 3) if k != best]
    page.get_by_role("button", name=f"Make it 2nd, answer {others[0]}").tap()
    page.get_by_role("button", name=f"Tie with 2nd, answer {others[1]}").tap()
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 40
    assert page.locator("kbd").first.is_hidden()
    page.get_by_role("button", name="Save").tap()
    done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [1, 2, 2]


@pytest.mark.parametrize("options", [{}, {"has_touch": True, "is_mobile": True}], ids=["zoomed", "touch"])
def test_keys_are_on_only_where_they_can_be_turned_off(serve, visit, options):
    """At 200 % zoom a window of 1280 pixels has 640."""
    site = serve([group(1)])
    page = visit(site.url, "anna", viewport={"width": 640, "height": 700}, **options)
    switch = page.get_by_label("Keyboard shortcuts")
    page.keyboard.press("1")
    assert switch.is_visible() == ("1st" in places(page).values()) == (not options)


def test_on_a_phone_on_its_side_the_footer_scrolls_away(serve, visit):
    site = serve([group(1, ("long " * 300, "short"))])
    page = visit(site.url, "anna", viewport={"width": 740, "height": 360}, has_touch=True, is_mobile=True)
    assert page.locator("footer").bounding_box()["y"] > 360


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_either_scheme(serve, visit, scheme):
    """Contrast of 4.5 at least (WCAG 2.2, 1.4.3), of answers in every state, hints, buttons and messages."""
    site = serve([group(1)])
    page = visit(site.url, "anna", color_scheme=scheme)
    press_answer(page, "one")
    page.keyboard.press("x")
    press_answer(page, "two")
    page.keyboard.press("Enter")
    colours = """selector => [...document.querySelectorAll(selector)].map(element => {
        let box = element;
        while (getComputedStyle(box).backgroundColor === "rgba(0, 0, 0, 0)") box = box.parentElement;
        return [getComputedStyle(element).color, getComputedStyle(box).backgroundColor];
    })"""
    found = page.evaluate(colours, "h1, h2, h3, .text, .place, .keys, #error, #status, #progress, button, label, textarea")
    assert len(found) > 30
    for ink, back in found:
        light, dark = sorted((luminance(ink), luminance(back)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, back)
    assert (luminance(found[0][1]) < 0.1) == (scheme == "dark")


# Plain HTTP


def ask(site, path="/", method="GET", body=None, **headers):
    """Status, headers and content."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=20)
    headers = {"host": f"127.0.0.1:{site.port}"} | headers
    headers = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    if content is not None and "transfer-encoding" not in headers:
        headers = {"content-type": "application/json", "content-length": str(len(content))} | headers
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(content)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, {name.lower(): value for name, value in reply.getheaders()}, text


def sign_in(site, name="anna", **more):
    status, _, text = ask(site, "/api/session", "POST", {"name": name} | more)
    return status, json.loads(text)


def test_every_answer_has_the_headers(serve):
    site = serve([group(1)])
    replies = [ask(site, path) for path in ("/", "/label.js", "/label.css", "/nothing", "/docs", "/openapi.json")]
    replies += [ask(site, "/api/task", "POST", {}), ask(site, host="evil.example"), ask(site, "/", "DELETE")]
    assert [status for status, _, _ in replies] == [200, 200, 200, 404, 404, 404, 401, 421, 411]
    for _, headers, _ in replies:
        assert {name: headers.get(name) for name in HEADERS} == HEADERS
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


@pytest.mark.parametrize("path", ["/", "/label.js", "/label.css"])
@pytest.mark.parametrize("file", ["/etc/passwd", "../app.py", "../../../pyproject.toml", "nothing", ""])
def test_an_address_names_no_file(serve, path, file):
    site = serve([group(1)])
    (status, _, text), (expected, _, page) = ask(site, f"{path}?file={file}"), ask(site, path)
    assert (status, text) == (expected, page)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("localhost:9000", 200),  # a tunnel
        ("[::1]:{port}", 200),
        ("LABELS.example", 200),
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example@127.0.0.1:{port}", 421),
        ("192.168.0.7:{port}", 421),
        ("[", 421),
        ("", 421),
    ],
)
def test_other_hosts_are_refused(serve, host, status):
    """A name that its owner has resolve to this machine (DNS rebinding) is still the name that the browser sends."""
    site = serve([group(1)])
    assert ask(site, host=host.format(port=site.port))[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:{port}"}, 200),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "http://localhost:{port}"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"content_type": "text/plain"}, 415),  # what a form of another site could send without asking
        ({"content_type": "application/json; charset=utf-8"}, 200),
        ({"transfer_encoding": "chunked"}, 411),
    ],
)
def test_other_sites_are_refused(serve, headers, status):
    site = serve([group(1)])
    headers = {name: value.format(port=site.port) for name, value in headers.items()}
    assert ask(site, "/api/session", "POST", {"name": "anna"}, **headers)[0] == status
    assert bool(site.store._one("SELECT count(*) FROM labellers")[0]) == (status == 200)


def test_sizes_are_limited(serve):
    site = serve([group(1)])
    assert ask(site, "/api/session", "POST", b" " * (LARGEST_BODY + 1))[0] == 413
    token = sign_in(site)[1]["token"]
    label = {"id": "g1", "submission": "s" * 16, "ranks": [1, 2, 3, 4], "demonstration": "", "note": ""}
    for change, status in (
        ({"note": "x" * 2001}, 422),
        ({"demonstration": "x" * 20_001}, 422),
        ({"ranks": [1] * 65}, 422),
        ({"ranks": [1, 2, 3]}, 400),
        ({"ranks": [1, 2, 3, 0]}, 400),
        ({"ranks": ["1", 2, 3, 4]}, 422),
        ({"id": "g2"}, 400),
        ({"id": "\ud800"}, 422),
        ({"id": ""}, 422),
        ({"labeller": "berta"}, 422),
        ({"note": "\ud800"}, 422),
        ({"demonstration": "\U0001f600" * 20_000}, 200),
    ):
        reply = ask(site, "/api/label", "POST", label | change, authorization=f"Bearer {token}")
        assert (reply[0], bool(site.labels())) == (status, status == 200), change
        if status != 200:
            assert json.loads(reply[2])["error"]
    assert sign_in(site, "x" * 61)[0] == 422


def test_nothing_is_given_to_who_has_not_signed_in(serve):
    site = serve([group(1)])
    sign_in(site)
    for path in ("task", "label", "undo"):
        body = {"id": "g1", "submission": "s" * 16, "ranks": None, "demonstration": "", "note": ""} if path == "label" else {}
        for authorization in (None, "Bearer ", "Bearer anna"):
            assert ask(site, f"/api/{path}", "POST", body, authorization=authorization)[0] == 401
    assert not site.labels()


def test_a_password_is_asked_for_and_ends_the_sessions_of_another(serve):
    site = serve([group(1)], password="correct horse")
    assert sign_in(site) == (401, {"error": "The password, please.", "kind": "sign in"})
    assert sign_in(site, password="correct hors")[0] == 401
    status, session = sign_in(site, password="correct horse")
    assert status == 200
    asked = {"method": "POST", "body": {}, "authorization": f"Bearer {session['token']}"}
    assert ask(site, "/api/task", **asked)[0] == 200
    site.close()
    other = serve([group(1)], password="another horse")
    assert ask(other, "/api/task", **asked)[0] == 401


def test_what_is_sent_does_not_tell_who_wrote_what(serve):
    site = serve([group(1)])
    token = sign_in(site)[1]["token"]
    text = ask(site, "/api/task", "POST", {}, authorization=f"Bearer {token}")[2]
    assert "Question 1?" in text
    assert "secret" not in text


def test_wrong_passwords_wait_for_each_other(serve):
    site = serve([group(1)], password="correct horse")
    begun = time.monotonic()
    guesses = [threading.Thread(target=sign_in, args=(site,), kwargs={"password": "wrong"}) for _ in range(3)]
    for guess in guesses:
        guess.start()
    for guess in guesses:
        guess.join()
    assert time.monotonic() - begun >= 3 * 0.2


def test_the_page_asks_nobody_else():
    for file in (ROOT / "rlhf_recipes" / "labels" / "page").iterdir():
        assert not re.search(r"https?://|innerHTML|eval\(", Path(file).read_text())
