"""The report's page in a real Chromium: nothing leaves the file, nothing overflows, and axe finds nothing serious."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from attune.evaluation.report.page import to_html
from attune.evaluation.summary import Summary

CHROMIUM = shutil.which("chromium")
COMMITTED = Path(__file__).parents[2] / "reports/tiny/summary.json"
SERIOUS = ("serious", "critical")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("ATTUNE_TEST_CHROMIUM") != "1",
        reason="no chromium here; ATTUNE_TEST_CHROMIUM=1 makes that a failure",
    ),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(to_html(Summary.from_json(COMMITTED.read_text())))
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_as_a_browser_sees_it(browser, page_file, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    size = {"width": width, "height": 800}
    context = browser.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)  # axe is a script
    requested: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: requested.append(request.url))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert [url for url in requested if not url.startswith("data:")] == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("h1").bounding_box()["y"] < 200
    plot = page.locator(".forest").bounding_box()
    assert plot["y"] + plot["height"] < (800 if width == 1280 else 1100)  # the first screen, or nearly
    page.locator("a.term").first.hover()
    tip = page.evaluate("getComputedStyle(document.querySelector('a.term'), '::after').content")
    assert "minus that of the base" in tip
    found = [v for v in Axe().run(page).response["violations"] if v["impact"] in SERIOUS]
    assert not found, [(v["id"], v["nodes"][0]["html"]) for v in found]
    context.close()
