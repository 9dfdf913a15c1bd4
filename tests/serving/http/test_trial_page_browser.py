"""The page on which a text is tried, in headless Chromium, served by tiny models."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import expect  # noqa: E402

from deltaw.serving.http.opening import Opening, open_any  # noqa: E402
from deltaw.serving.http.settings import Limits, ServerSettings  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.encoder_models import train_classifier, write_bert  # noqa: E402
from tests.serving.http.running import running  # noqa: E402
from tests.serving.http.test_rerank_route import run  # noqa: E402, F401

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """Serve a model and open its page, which must not complain and must ask nobody else."""
    with contextlib.ExitStack() as stack:

        def opens(base, *keys, width=1440, **how):
            served = open_any(str(base), {}, Opening(precision="fp32", device="cpu"), Limits(), say=lambda line: None)
            stack.callback(served.close)
            server = stack.enter_context(running(served, ServerSettings(port=0, keys=keys)))
            page = browser.new_page(viewport={"width": width, "height": 844}, **how)
            stack.callback(page.close)
            page.set_default_timeout(10_000)
            complaints = []
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda r: r.url.startswith((server.url, "data:")) or complaints.append(r.url))
            page.goto(server.url)
            stack.callback(lambda: check([c for c in complaints if "Failed to load resource" not in c]))
            return page

        def check(complaints):
            assert complaints == []

        yield opens


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return train_classifier(write_bert(folder / "bert"), folder / "mood", ("good", "bad", "fine"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_text_gets_its_classes_with_their_probabilities(opened, classifier, scheme, width):
    page = opened(classifier, width=width, color_scheme=scheme)
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
        found = page.evaluate("axe.run().then((r) => r.violations.map((v) => v.id))")
        assert found == []


def test_texts_are_ordered_by_their_similarity(opened, tmp_path):
    page = opened(write_bert(tmp_path / "bert"))
    page.get_by_label("Text", exact=True).fill("a cat")
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_role("alert")).to_contain_text("there is none")
    page.get_by_label("Texts to compare it with").fill("something else\n\na cat\n")
    page.get_by_role("button", name="Try").click()
    rows = page.locator("#result tr")
    expect(rows).to_have_count(2)
    assert rows.first.inner_text().split("\t")[0] == "a cat" and "1.000" in rows.first.inner_text()


def test_passages_are_ranked_for_a_query(opened, run):  # noqa: F811
    page = opened(run)
    page.get_by_label("Query").fill("good film")
    page.get_by_label("Passages").fill("plot\ngood\nthe")
    page.get_by_role("button", name="Try").click()
    rows = page.locator("#result tr")
    expect(rows).to_have_count(3)
    scores = [float(row.locator(".number").inner_text()) for row in rows.all()]
    assert scores == sorted(scores, reverse=True)


def test_the_page_asks_for_a_key_and_shows_what_the_server_refuses(opened, classifier):
    page = opened(classifier, "long-enough")
    page.get_by_label("API key").fill("long-enough")
    page.get_by_label("Text", exact=True).fill("good")
    page.get_by_role("button", name="Try").click()
    expect(page.locator("#result tr")).to_have_count(3)
    page.get_by_label("Text", exact=True).fill("x" * 5000)
    page.get_by_role("button", name="Try").click()
    expect(page.get_by_role("alert")).to_contain_text("tokens")
    expect(page.locator("#result tr")).to_have_count(0)
