"""The labelling page in a headless Chromium."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

from rlhf_recipes.feedback.labels import Group, Label, Store
from support import ROOT

import pytest

pytestmark = pytest.mark.browser
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
CHROMIUM += ["--disable-component-update", "--disable-sync"]
WAIT = 15_000  # milliseconds, for a busy machine


def group(number, answers=("one", "two", "three", "four")):
    return Group(f"g{number}", f"Question {number}?", list(answers), [f"secret-{k}" for k in range(len(answers))])


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
    """`visit(url, name)` opens a page in a new browser context and signs in. An error on the page fails the test."""
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
            press(page, "Enter")
            expect(page.locator("#who")).to_have_text(name)
            return page

        yield open_page
    assert not errors


@pytest.fixture
def open_page(serve, visit):
    """`open_page(groups)` starts a site and returns it and its page, where anna is signed in."""

    def start(groups):
        site = serve(groups)
        return site, visit(site.url, "anna")

    return start


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def shown(page):
    return page.locator("#answers .text").all_inner_texts()


def places(page):
    return dict(zip(shown(page), page.locator("#answers .place").all_inner_texts(), strict=True))


def press(page, *keys, done=None):
    """Press keys, and then wait for the page to show the number of labels that are done."""
    for key in keys:
        page.keyboard.press(key)
    if done is not None:
        expect_done(page, done)


def write(page, key, text):
    """Write into the field that a key opens."""
    press(page, key)
    page.keyboard.type(text)


def press_answer(page, text, modifier=""):
    """Press the number of an answer."""
    page.keyboard.press(f"{modifier}Digit{shown(page).index(text) + 1}")


def press_best_and_save(page, text, done=None):
    """Rank one answer first, tie the others, and save."""
    press_answer(page, text)
    press(page, "0", "Enter", done=done)


def expect_done(page, number):
    expect(page.locator("#progress")).to_contain_text(f"{number} done")


def alert(page):
    return expect(page.get_by_role("alert").nth(0))


# --- Keyboard ---------------------------------------------------------------------------------------------------------


def test_rank_with_ties_and_an_unusable_answer(open_page):
    site, page = open_page([group(1), group(2)])
    assert sorted(shown(page)) == ["four", "one", "three", "two"]
    press_answer(page, "two")
    press_answer(page, "four", "Shift+")
    press(page, "x")
    press_answer(page, "one")
    assert places(page) == {"two": "1st, tied", "four": "1st, tied", "one": "unusable", "three": "2nd (what is left)"}
    expect(page.get_by_role("status")).to_have_text(re.compile("unusable. Ready to save."))
    press(page, "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == [None, 1, 2, 1]
    expect(page.locator("#prompt")).to_have_text("Question 2?")
    expect(page.get_by_role("status")).to_have_text("Saved.")
    expect(page.locator("#prompt-title")).to_be_focused()


def test_a_repeated_number_takes_the_rank_back_and_0_ties_the_rest(open_page):
    site, page = open_page([group(1)])
    press_answer(page, "one")
    press_answer(page, "two")
    press_answer(page, "one")
    press_answer(page, "one")
    press(page, "0")
    assert places(page) == {"two": "1st", "one": "2nd", "three": "3rd, tied", "four": "3rd, tied"}
    press(page, "c")
    assert set(places(page).values()) == {""}
    press_answer(page, "four")
    press(page, "Enter")
    alert(page).to_contain_text("Not saved yet: answers")
    assert not site.labels()
    press(page, "0", "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == [2, 2, 2, 1]
    expect(page.get_by_role("heading", name="All done")).to_be_focused()


@pytest.mark.parametrize("keys", ["2", "12", "012", "02"])
def test_of_two_answers_the_last_one_pressed_is_better(open_page, keys):
    site, page = open_page([group(1, ("a", "b"))])
    expect(page.get_by_role("heading", name="Which answer is better?")).to_be_visible()
    better = shown(page)[1]
    for key in keys:
        page.keyboard.press(key)
    expect(page.get_by_role("button", name="1st: take back, answer 2")).to_be_visible()
    press(page, "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == ([1, 2] if better == "a" else [2, 1])
    press(page, "u", done=0)
    press(page, "2")
    assert set(places(page).values()) == {""}, "a repeated number takes the rank back"
    page.get_by_role("button", name="Better, answer 2").click()
    page.get_by_role("button", name="Better, answer 1").click()
    press(page, "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == ([2, 1] if better == "a" else [1, 2])


def test_enter_saves_after_a_click(open_page):
    site, page = open_page([group(1), group(2)])
    best = shown(page)[1]
    page.get_by_role("button", name="Best, answer 2").click()
    press(page, "0", "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == [1 if text == best else 2 for text in group(1).completions]


def test_a_demonstration_and_a_note_and_a_skip(open_page):
    site, page = open_page([group(1), group(2), group(3)])
    write(page, "n", "x1 is text here")
    press(page, "Escape", "0")
    write(page, "d", "It is 4.\nReally.")
    press(page, "Control+Enter", done=1)
    press(page, "s", done=2)
    write(page, "d", "Only this.")
    press(page, "Escape", "s", done=3)
    assert [(label.ranks, label.demonstration, label.note) for label in site.store.labels()] == [
        ([1, 1, 1, 1], "It is 4.\nReally.", "x1 is text here"),
        (None, None, None),
        (None, "Only this.", None),
    ]


def test_undo_restores_the_label(open_page):
    site, page = open_page([group(1), group(2)])
    order = ("three", "one", "four", "two")
    for text in order[:3]:
        press_answer(page, text)
    write(page, "n", "first")
    press(page, "Control+Enter", done=1)
    press(page, "u", done=0)
    assert not site.labels()
    expect(page.locator("#prompt")).to_have_text("Question 1?")
    expect(page.locator("#note")).to_have_value("first")
    assert places(page) == {"three": "1st", "one": "2nd", "four": "3rd", "two": "4th"}
    press(page, "c", "0", "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == [1, 1, 1, 1]
    press(page, "u", done=0)
    press(page, "u")
    alert(page).to_have_text("Nothing was undone. There is nothing to undo.")


def test_a_reload_keeps_the_draft(open_page):
    _, page = open_page([group(1), group(2)])
    press(page, "0", "Enter", done=1)
    before = shown(page)
    press_answer(page, "two")
    write(page, "d", "half a sent")
    page.reload()
    expect_done(page, 1)
    expect(page.locator("#demonstration")).to_have_value("half a sent")
    assert shown(page) == before
    assert places(page)["two"] == "1st"


def test_shortcuts_can_be_turned_off(open_page):
    _, page = open_page([group(1)])
    page.get_by_label("Keyboard shortcuts").uncheck()
    press(page, "1")
    assert set(places(page).values()) == {""}
    page.reload()
    expect(page.get_by_label("Keyboard shortcuts")).not_to_be_checked()
    page.get_by_label("Keyboard shortcuts").check()
    press(page, "1")
    assert "1st" in places(page).values()


def test_more_answers_than_digits_by_tab_and_enter(open_page):
    answers = [f"answer {letter}" for letter in "abcdefghijkl"]
    site, page = open_page([group(1, answers)])
    last = shown(page)[-1]
    page.get_by_role("button", name="Best, answer 12").focus()
    press(page, "Enter")
    expect(page.get_by_role("button", name="1st: take back, answer 12")).to_be_focused()
    press(page, "0")
    page.get_by_role("button", name="Save").focus()
    press(page, "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == [1 if answer == last else 2 for answer in answers]


# --- Several labellers ------------------------------------------------------------------------------------------------


def test_two_labellers_in_two_tabs_of_one_browser(serve, visit):
    site = serve([group(1)])
    anna = visit(site.url, "anna")
    berta = visit(site.url, "berta", context=anna.context)
    for page, best in ((anna, "one"), (berta, "two")):
        press_answer(page, best)
        press(page, "0")
    for page in (berta, anna):
        press(page, "Enter", done=1)
    assert [site.labels()[name, "g1"].ranks for name in ("anna", "berta")] == [[1, 2, 2, 2], [2, 1, 2, 2]]
    anna.reload()
    expect(anna.locator("#who")).to_have_text("anna")


def test_groups_on_others_screens_are_counted(serve, visit):
    site = serve([group(1)])
    site.execute("UPDATE settings SET overlap = 0.0")
    visit(site.url, "anna")
    page = visit(site.url, "berta")
    expect(page.get_by_role("heading", name="All done for now")).to_be_focused()
    expect(page.locator("#held")).to_contain_text("Others have 1 more on their screens.")


def test_a_known_name_must_be_confirmed(serve, visit, browser):
    site = serve([group(1)])
    visit(site.url, "anna")
    page = browser.new_page()
    page.goto(site.url)
    page.keyboard.type("Anna")
    press(page, "Enter")
    alert(page).to_contain_text("'Anna' labels here already. Is that you?")
    page.get_by_role("button", name="Yes, I am Anna").click()
    expect(page.locator("#who")).to_have_text("anna")
    page.close()


def test_a_prompt_in_two_windows_is_labelled_once(open_page):
    site, page = open_page([group(1), group(2)])
    site.store.save(Label("g1", "anna", [4, 3, 2, 1]))
    press(page, "0", "Enter", done=1)
    expect(page.get_by_role("status")).to_contain_text("in another window already; that label stays")
    assert site.labels()["anna", "g1"].ranks == [4, 3, 2, 1]
    expect(page.locator("#prompt")).to_have_text("Question 2?")


# --- Text of models ---------------------------------------------------------------------------------------------------


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
    alert(page).to_contain_text("There is nothing to undo")
    assert page.evaluate("window.hacked") is None
    assert "secret" not in page.content()


def test_code_and_other_scripts_are_readable_and_unchanged(open_page):
    code, cut_off = "So:\n\n```python\nfor x in y:\n    pass\n```\n\nDone, `x`.", "```\na = 1"
    answers = (code, cut_off, "\u0635\u0628\u0627\u062d", "plain ```")
    _, page = open_page([group(1, answers)])
    assert sorted(page.locator("#answers .text").evaluate_all("boxes => boxes.map(box => box.textContent)")) == sorted(answers)
    assert sorted(page.locator("code").all_text_contents()) == ["```\na = 1", "```python\nfor x in y:\n    pass\n```"]
    directions = page.locator("#answers .text").evaluate_all("boxes => boxes.map(box => getComputedStyle(box).direction)")
    assert directions.count("rtl") == 1


@pytest.mark.parametrize("length", [1, 300])
def test_the_last_turn_and_the_buttons_are_in_sight(open_page, length):
    prompt = [{"role": role, "content": f"{role} " * length} for role in ("user", "assistant")]
    _, page = open_page([Group("g", [*prompt, {"role": "user", "content": "And now?"}], ["a", "b"])])
    box, last = (page.locator(place).bounding_box() for place in ("#prompt", ".turn:last-child"))
    assert box["y"] <= last["y"] <= last["y"] + last["height"] <= box["y"] + box["height"]
    footer = page.locator("footer").bounding_box()
    assert footer["y"] + footer["height"] == page.viewport_size["height"]


def test_empty_answers_are_unusable_and_equal_ones_are_shown_once(open_page):
    site, page = open_page([group(1, ("a", "", "b", "a "))])
    assert sorted(shown(page)) == ["(empty: the model ended at once)", "a", "b"]
    press_answer(page, "(empty: the model ended at once)")
    expect(page.get_by_role("status")).to_contain_text("is empty: it can only be unusable")
    press_answer(page, "b")
    press(page, "Enter", done=1)
    assert site.labels()["anna", "g1"].ranks == [2, None, 1, 2]


# --- Failures ---------------------------------------------------------------------------------------------------------


def start(data, store, port):
    """Start the recipe in a new process, and return the process and its URL."""
    command = [sys.executable, ROOT / "recipes" / "label.py", "--data", data, "--store", store, "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if url := re.search(r"http://\S+", line):
            return process, url[0]
    pytest.fail(process.stderr.read())


@pytest.mark.kill
def test_a_killed_server_loses_nothing(tmp_path, visit):
    """The page keeps the unsaved label, and a new server has the saved one."""
    data, store = tmp_path / "groups.jsonl", tmp_path / "labels.sqlite"
    data.write_text("".join(json.dumps(group(number).row()) + "\n" for number in (1, 2)))
    process, url = start(data, store, 0)
    page = visit(url, "anna")
    press(page, "0", "Enter", done=1)
    press_answer(page, "three")
    press(page, "0")
    write(page, "d", "Long thought about.")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    press(page, "Control+Enter")
    alert(page).to_have_text(
        "This label is NOT saved; what you entered is kept here. Save again to send it. The server does not answer."
    )
    expect(page.locator("#demonstration")).to_have_value("Long thought about.")

    process, _ = start(data, store, url.rpartition(":")[2])
    press(page, "Control+Enter", done=2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    with Store(store) as opened:
        assert [(label.group, label.demonstration) for label in opened.labels()] == [
            ("g1", None),
            ("g2", "Long thought about."),
        ]
        assert opened.labels()[1].ranks == [2, 2, 1, 2]


def test_a_lost_reply_makes_no_second_label_and_loses_no_change(open_page):
    site, page = open_page([group(1), group(2)])

    lost = [True, True, False]  # one route for all: a browser may be slow to replace routes

    def lose(route):
        if lost.pop(0):
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route("**/api/label", lose)
    press_best_and_save(page, "one")
    alert(page).to_contain_text("NOT saved")
    assert site.labels()["anna", "g1"].ranks == [1, 2, 2, 2]  # it was saved, and the page cannot know
    page.reload()
    expect_done(page, 1)  # the server knows
    press(page, "u", done=0)
    press(page, "Enter")
    alert(page).to_contain_text("NOT saved")
    press(page, "c")
    press_best_and_save(page, "two", done=1)
    assert [label.ranks for label in site.store.labels()] == [[2, 1, 2, 2]]


def test_an_undo_can_be_repeated_after_a_lost_reply(open_page):
    site, page = open_page([group(1), group(2), group(3)])
    for number in (1, 2):
        press(page, "0", "Enter")
        expect_done(page, number)
    page.route("**/api/undo", lambda route: (route.fetch(), route.abort()), times=1)
    press(page, "u")
    alert(page).to_contain_text("Whether the label was undone is not known. Undo again")
    assert list(site.labels()) == [("anna", "g1")]
    press(page, "u", done=1)
    expect(page.locator("#prompt")).to_have_text("Question 2?")
    assert list(site.labels()) == [("anna", "g1")]
    press(page, "u", done=0)


def test_without_a_next_task_no_key_changes_the_saved_label(open_page):
    site, page = open_page([group(1), group(2)])
    page.route("**/api/task", lambda route: route.abort(), times=2)
    press_best_and_save(page, "one")
    alert(page).to_contain_text("Saved. The next prompt is not here yet")
    expect(page.get_by_role("status").last).to_have_text("Saved.")
    for key in ("c", "2", "0", "s", "Control+Enter"):
        page.keyboard.press(key)
    press(page, "Enter")
    expect(page.locator("#work")).not_to_have_attribute("aria-busy", "true")
    press(page, "Enter")
    expect(page.locator("#prompt")).to_have_text("Question 2?")
    assert [label.ranks for label in site.store.labels()] == [[1, 2, 2, 2]]


BLOCKED = """for (const name of ["localStorage", "sessionStorage"])
    Object.defineProperty(window, name, {get() { throw new DOMException("blocked", "SecurityError"); }});"""
FULL = """Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };"""


@pytest.mark.parametrize("storage", ["", BLOCKED, FULL], ids=["usable", "blocked", "full"])
def test_undo_of_a_skip_restores_the_ranks_in_any_browser(serve, visit, browser, storage):
    site = serve([group(1), group(2)])
    context = browser.new_context()
    context.add_init_script(storage)
    page = visit(site.url, "anna", context=context)
    assert page.get_by_text("This browser keeps nothing").is_visible() == bool(storage)
    for text in ("three", "one"):
        press_answer(page, text)
    press(page, "s", done=1)
    press(page, "u", done=0)
    assert {text: place for text, place in places(page).items() if place} == {"three": "1st", "one": "2nd"}
    press(page, "0", "Enter", done=1)
    assert [label.ranks for label in site.store.labels()] == [[2, 3, 1, 3]]
    context.close()


def test_unexpected_errors_are_shown(serve, browser):
    site = serve([group(1)])
    page = browser.new_page()
    page.goto(site.url)
    for failing in ("Promise.reject(new Error('odd'))", "setTimeout(() => { throw new Error('odd'); })"):
        page.evaluate("document.getElementById('sign-in-error').textContent = ''")
        page.evaluate(f"() => {{ {failing}; }}")
        alert(page).to_have_text(re.compile("The page failed .*odd.*. Reload it: what was saved"))
    page.close()


def test_a_label_that_does_not_fit_on_the_disk_is_not_reported_as_saved(open_page):
    site, page = open_page([group(1), group(2)])
    press(page, "0")
    page.locator("#demonstration").fill("x" * 20_000)
    ((pages,),) = site.execute("PRAGMA page_count")
    site.execute(f"PRAGMA max_page_count = {pages}")
    press(page, "Control+Enter")
    alert(page).to_contain_text(re.compile("NOT saved; .* the disk is full"))
    alert(page).not_to_contain_text(site.store.path.name)  # not for labellers
    expect(page.locator("#demonstration")).to_have_value("x" * 20_000)
    assert not site.labels()
    site.execute(f"PRAGMA max_page_count = {pages + 100}")
    press(page, "Control+Enter", done=1)
    assert site.labels()["anna", "g1"].demonstration == "x" * 20_000


def test_an_ended_session_asks_for_the_name_and_keeps_the_draft(serve, browser):
    site = serve([group(1)], password="correct horse")
    page = browser.new_page()
    page.goto(site.url)
    page.keyboard.type("anna")
    press(page, "Enter")
    alert(page).to_have_text("The password, please.")
    page.keyboard.type("correct horse")
    press(page, "Enter")
    expect(page.locator("#who")).to_have_text("anna")
    write(page, "n", "keep me")
    press(page, "Escape", "0")
    site.execute("DELETE FROM sessions")
    press(page, "Enter")
    alert(page).to_contain_text("This label is NOT saved")
    press(page, "Enter")
    page.get_by_role("button", name="Yes, I am anna").click()
    expect(page.locator("#work")).to_be_visible()
    expect(page.locator("#note")).to_have_value("keep me")
    press(page, "Enter", done=1)
    assert site.labels()["anna", "g1"].note == "keep me"
    page.close()


# --- Small screens and contrast ---------------------------------------------------------------------------------------


def test_label_by_touch_on_a_phone(serve, visit):
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
    expect_done(page, 1)
    assert site.labels()["anna", "g1"].ranks == [1, 2, 2]


@pytest.mark.parametrize("options", [{}, {"has_touch": True, "is_mobile": True}], ids=["zoomed", "touch"])
def test_shortcuts_are_on_only_where_they_can_be_turned_off(serve, visit, options):
    """At 200% zoom a window of 1280 pixels has 640."""
    site = serve([group(1)])
    page = visit(site.url, "anna", viewport={"width": 640, "height": 700}, **options)
    switch = page.get_by_label("Keyboard shortcuts")
    press(page, "1")
    assert switch.is_visible() == ("1st" in places(page).values()) == (not options)


def test_the_footer_scrolls_away_on_a_phone_in_landscape(serve, visit):
    site = serve([group(1, ("long " * 300, "short"))])
    page = visit(site.url, "anna", viewport={"width": 740, "height": 360}, has_touch=True, is_mobile=True)
    assert page.locator("footer").bounding_box()["y"] > 360


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(serve, visit, scheme):
    """At least 4.5 (WCAG 2.2, 1.4.3), for answers in every state, hints, buttons and messages."""
    site = serve([group(1)])
    page = visit(site.url, "anna", color_scheme=scheme)
    press_answer(page, "one")
    press(page, "x")
    press_answer(page, "two")
    press(page, "Enter")
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
