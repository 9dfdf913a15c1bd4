"""Tests of the trial page in headless Chromium, served by tiny models."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import expect  # noqa: E402

from deltaw.serving.http.opening import OpenOptions, open_any  # noqa: E402
from deltaw.serving.http.settings import Limits, ServerSettings  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.encoder_models import train_classifier, write_bert  # noqa: E402
from tests.serving.http.server_thread import run_server  # noqa: E402
from tests.serving.http.test_rerank_route import run  # noqa: E402, F401

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture
def open_page(browser):
    """Serve a model and open its page. The test fails on console errors or requests to other servers."""
    with contextlib.ExitStack() as stack:

        def serve_and_open(base, *keys, width=1440, **page_options):
            options = OpenOptions(precision="fp32", device="cpu")
            served = open_any(str(base), {}, options, Limits(), log=lambda line: None)
            stack.callback(served.close)
            server = stack.enter_context(run_server(served, ServerSettings(port=0, keys=keys)))
            page = browser.new_page(viewport={"width": width, "height": 844}, **page_options)
            stack.callback(page.close)
            page.set_default_timeout(10_000)
            errors = []
            page.on("console", lambda message: errors.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda r: r.url.startswith((server.url, "data:")) or errors.append(r.url))
            page.goto(server.url)
            stack.callback(lambda: check([c for c in errors if "Failed to load resource" not in c]))
            return page

        def check(errors):
            assert errors == []

        yield serve_and_open


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return train_classifier(write_bert(folder / "bert"), folder / "mood", ("good", "bad", "fine"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_classes_are_sorted_by_probability(open_page, classifier, scheme, width):
    page = open_page(classifier, width=width, color_scheme=scheme)
    expect(page.get_by_role("heading")).to_have_text("Try mood")
    page.get_by_label("Text", exact=True).fill("good number 1 ☃ <b>")
    page.get_by_label("Text", exact=True).press("Enter")
    rows = page.locator("#result tr")
    expect(rows).to_have_count(3)
    shares = [float(row.locator(".number").inner_text().split()[0]) for row in rows.all()]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)
    widths = [row.locator(".bar").bounding_box()["width"] for row in rows.all()]
    assert widths == sorted(widths, reverse=True) and widths[0] > 10
    assert page.locator("#result caption").inner_text() == rows.first.locator("th").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if AXE is not None:
        page.evaluate(AXE.read_text() if hasattr(AXE, "read_text") else AXE)
        violations = page.evaluate("axe.run().then((r) => r.violations.map((v) => v.id))")
        assert violations == []


def test_texts_are_sorted_by_similarity(open_page, tmp_path):
    page = open_page(write_bert(tmp_path / "bert"))
    page.get_by_label("Text", exact=True).fill("a cat")
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_role("alert")).to_contain_text("enter at least one")
    page.get_by_label("Texts to compare it with").fill("something else\n\na cat\n")
    page.get_by_role("button", name="Try").click()
    rows = page.locator("#result tr")
    expect(rows).to_have_count(2)
    assert rows.first.inner_text().split("\t")[0] == "a cat" and "1.000" in rows.first.inner_text()


def test_passages_are_sorted_by_score(open_page, run):  # noqa: F811
    page = open_page(run)
    page.get_by_label("Query").fill("good film")
    page.get_by_label("Passages").fill("plot\ngood\nthe")
    page.get_by_role("button", name="Try").click()
    rows = page.locator("#result tr")
    expect(rows).to_have_count(3)
    scores = [float(row.locator(".number").inner_text()) for row in rows.all()]
    assert scores == sorted(scores, reverse=True)


def test_page_accepts_key_and_shows_server_errors(open_page, classifier):
    page = open_page(classifier, "long-enough")
    page.get_by_label("API key").fill("long-enough")
    page.get_by_label("Text", exact=True).fill("good")
    page.get_by_role("button", name="Try").click()
    expect(page.locator("#result tr")).to_have_count(3)
    page.get_by_label("Text", exact=True).fill("x" * 5000)
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_role("alert")).to_contain_text("tokens")
    expect(page.locator("#result tr")).to_have_count(0)
