"""The labelling page in a real browser, from the first key to a model that is trained on the answers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest

import labelled
import stages

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.integration
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("ATTUNE_TEST_CHROMIUM") != "1",
    reason="no chromium here; ATTUNE_TEST_CHROMIUM=1 makes that a failure",
)
KEYS = ["ArrowLeft", "2", "t", "ArrowRight", "1", "b", "ArrowDown"]
SIDES = ("--a", "base", "--b", "dpo")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose base and trained run have 24 images each."""
    runs = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    folder = stages.write(tmp_path_factory.mktemp("label"), runs, generate__prompts=12, data__test_prompts=12)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        for run in runs:
            stages.call("align", run=run)
            stages.call("generate", run=run)
        yield folder


@pytest.fixture
def browser() -> Iterator:
    """A browser page; errors of its scripts fail the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        chromium.close()
        assert not errors


def wait_for(page, text: str) -> None:
    """Until the page says which question it shows, and takes an answer."""
    page.wait_for_function("text => !busy && document.getElementById('count').textContent === text", arg=text)


def press(page, first: int, last: int) -> None:
    """Answers the questions with these numbers, counted from 1, by keyboard."""
    for number in range(first, last + 1):
        wait_for(page, f"{number} of 30")
        page.keyboard.press(KEYS[number % len(KEYS)])


@needs_chromium
def test_thirty_answers_by_keyboard_a_reload_and_a_kill_then_a_training(project, browser, tmp_path):
    words = (*SIDES, "--repeats", "0.25")
    with labelled.program(*words) as first:
        browser.goto(first.url)
        browser.fill("#name", "anna")
        browser.keyboard.press("Enter")
        press(browser, 1, 10)
        wait_for(browser, "11 of 30")
        browser.reload()
        wait_for(browser, "11 of 30")
        browser.keyboard.press("u")
        press(browser, 10, 17)
        wait_for(browser, "18 of 30")
        before = browser.text_content("#prompt")
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        browser.keyboard.press("1")
        browser.wait_for_selector("text=was not saved")
    with labelled.program(*words, "--port", str(first.page.port)) as second:
        assert second.page.state("anna")["answered"] == 17
        assert browser.text_content("#prompt") == before
        press(browser, 18, 30)
        browser.wait_for_selector("text=Done. Thank you!")
        assert "24 answers about 24 pairs, annotators: 1" in browser.text_content("#results")
        assert "--a base --b dpo --export" in browser.text_content("#export")
        assert second.end() == 128 + signal.SIGTERM
    with (project / "reports/short/people/base-vs-dpo.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 30
    stages.call("label", *words, "--export", str(tmp_path / "labels"))
    facts = json.loads((tmp_path / "labels/labels.json").read_text())
    assert facts["rows"] + facts["both_bad"] == 24
    assert facts["repeats"] == 6
    train_on(tmp_path)


def train_on(folder) -> None:
    """DPO for three batches on an export, by a project whose data source is `table`."""
    (folder / "test.txt").write_text("a red circle on a blue background\na green square on a white background\n")
    data = {"source": "table", "path": "labels/pairs.csv", "test_list": "test.txt", "min_side": 16, "score_with": []}
    runs = {"base": {"after": "data"}, "dpo": {"method": "dpo", "after": "data"}}
    stages.write(folder, runs, data=data, generate__prompts=2)
    with stages.inside(folder):
        stages.write_plans()
        stages.call("prepare")
        stages.call("align", run="dpo")
        counts = json.loads((folder / "reports/short/data.json").read_text())
        trained = json.loads((folder / "reports/short/train/dpo.json").read_text())
    assert counts["quarantined"] == 0
    assert trained["steps"] == 3
    assert trained["last_tenth"]["loss"] > 0


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844), (360, 640)])
def test_everything_fits_on_the_screen(project, browser, width, height):
    """Images, buttons and the longest prompt that a text encoder reads; pointers may choose too."""
    browser.set_viewport_size({"width": width, "height": height})
    with labelled.program(*SIDES, "--annotator", f"w{width}") as served:
        browser.goto(served.url)
        wait_for(browser, "1 of 26")
        browser.evaluate("() => { document.getElementById('prompt').textContent = 'a long prompt '.repeat(60) }")
        boxes = [box.bounding_box() for box in browser.query_selector_all(".image img, nav button")]
        assert len(boxes) == 7
        for box in boxes:
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["y"] + box["height"] <= height
            assert box["height"] >= 40
        browser.click(".image[data-choice=right]")
        wait_for(browser, "2 of 26")
        assert served.end(signal.SIGINT) == 128 + signal.SIGINT
