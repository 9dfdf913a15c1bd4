"""The studio in a browser, by role and label only, as a user without a terminal.

Requires Playwright and Chromium or Chrome. Tests are skipped if one is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra studio is not installed")
pytest.importorskip("httpx", reason="the extra studio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from tests.byte_models import save_model, tiny_llama  # noqa: E402
from tests.conftest import write_rows  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.encoder_models import write_bert  # noqa: E402
from tests.studio.studio_process import StudioProcess, studio_process  # noqa: E402

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
slow = pytest.mark.slow
# Milliseconds for a training or for loading a model.
LONG = 180_000
WORDS = (("good fine", "praise"), ("bad awful", "blame"))
CHAT = (("Say it", "Ahoy"), ("Greet me", "Ahoy matey"), ("Hello", "Ahoy there"), ("Who are you", "Ahoy, a pirate"))
NARROW = {"width": 400, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=LONG)
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()
    expect.set_options(timeout=5000)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioProcess]:
    """Studio with two tiny models in its folder."""
    folder = tmp_path_factory.mktemp("studio") / "folder"
    write_bert(folder / "models" / "encoder", max_position_embeddings=128)
    save_model(tiny_llama(initializer_range=0.3, max_position_embeddings=512), folder / "models" / "writer")
    with studio_process(folder) as process:
        context = [process]
        yield process
        del context


@contextlib.contextmanager
def connected(browser: Browser, studio: StudioProcess, **options: object) -> Iterator[Page]:
    """Page that is connected to the studio. Errors, and requests to other servers, fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    context.set_default_timeout(LONG)
    problems: list[str] = []
    context.on("console", lambda message: problems.append(message.text))
    context.on("weberror", lambda error: problems.append(str(error.error)))
    allowed = (studio.url, "data:", "blob:")
    context.on("request", lambda request: request.url.startswith(allowed) or problems.append(request.url))
    name, secret = f"deltaw-studio-{studio.port}", studio.folder / ".studio" / "session"
    context.add_cookies([{"name": name, "value": secret.read_text(), "url": studio.url}])
    page = context.new_page()
    page.goto(studio.url)
    yield page
    context.close()
    assert [text for text in problems if "Failed to load resource" not in text] == []


@pytest.fixture
def page(browser: Browser, studio: StudioProcess) -> Iterator[Page]:
    with connected(browser, studio) as new_page:
        yield new_page


def reviews(folder: Path, number: int = 24) -> Path:
    path = folder / "reviews.csv"
    rows = [f"{WORDS[n % 2][0]} {n},{WORDS[n % 2][1]}\n" for n in range(number)]
    path.write_text("review,opinion\n" + "".join(rows))
    return path


def to_settings(page: Page, studio: StudioProcess, file: Path, model: str) -> None:
    """Go from the start page to the settings."""
    page.goto(studio.url)
    page.get_by_label("Choose a file").set_input_files(file)
    expect(page.get_by_text("can be used.").first).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    page.get_by_role("radio", name=model).check()
    expect(page.get_by_text("Fits.")).to_be_visible()
    page.get_by_role("link", name="Continue").click()


def fill(page: Page, **fields: str) -> None:
    """Fill fields of the settings and wait until they are saved."""
    for label, text in fields.items():
        with page.expect_response(lambda response: response.url.endswith("/settings")) as saved:
            page.get_by_label(label.replace("_", " "), exact=True).fill(text)
        assert saved.value.json()["errors"] == {}


def start(page: Page, name: str) -> None:
    page.get_by_label("Name of the result").fill(name)
    page.get_by_role("button", name="Start training").click()
    page.wait_for_url("**/jobs/*")


def start_long_training(page: Page, studio: StudioProcess, folder: Path, name: str) -> None:
    """Start a training that takes minutes, and wait for its first steps."""
    to_settings(page, studio, reviews(folder, 600), "encoder")
    fill(page, Passes_over_the_rows="400", Learning_rate="0.001")
    start(page, name)
    expect(page.get_by_text(re.compile(r"step [1-9]\d* of"))).to_be_visible()


def finish(page: Page) -> None:
    """Wait for the end of a training."""
    expect(page.get_by_role("link", name="Try it")).to_be_visible()


def try_it(page: Page) -> sync_api.FrameLocator:
    """Load a result, and return its frame."""
    page.get_by_role("link", name="Try it").click()
    page.get_by_role("button", name="Load the model").click()
    return page.frame_locator("iframe")


def test_table_becomes_a_classifier(studio, page, tmp_path) -> None:
    to_settings(page, studio, reviews(tmp_path), "encoder")
    fill(page, Passes_over_the_rows="4", Learning_rate="0.01")
    start(page, "Reviews of May")
    expect(page.get_by_role("progressbar")).to_be_visible()
    finish(page)
    expect(page.get_by_role("definition").filter(has_text="→ 100.0%")).to_be_visible()
    frame = try_it(page)
    for text, label in WORDS:
        frame.get_by_label("Text", exact=True).fill(text)
        frame.get_by_role("button", name="Try").click()
        expect(frame.get_by_role("region", name="Result").get_by_role("row").nth(0)).to_contain_text(label)


@slow
def test_chat_becomes_an_adapter_whose_answer_differs(studio, page, tmp_path) -> None:
    rows = [("user", question, "assistant", answer) for question, answer in CHAT]
    messages = [[{"role": q, "content": f"{text} {n}"}, {"role": a, "content": to}] for n in range(8) for q, text, a, to in rows]
    to_settings(page, studio, write_rows(tmp_path / "pirate.jsonl", ({"messages": m} for m in messages)), "writer")
    fill(page, Passes_over_the_rows="4", Learning_rate="0.01")
    page.get_by_text("Advanced").click()
    page.get_by_text("Train:").click()
    fill(page, Samples="2")
    start(page, "pirate")
    finish(page)
    table = page.get_by_role("table", name="Questions that were not used for training")
    expect(table.get_by_role("cell", name=re.compile("^Ahoy")).first).to_be_visible()
    frame = try_it(page)
    frame.get_by_label("Message", exact=True).fill("Greet me 2")
    frame.get_by_role("button", name="Send").click()
    expect(frame.get_by_role("article", name="Answer of pirate")).to_contain_text("Ahoy")
    expect(frame.get_by_role("article", name="Answer of writer")).to_contain_text("token limit reached")
    expect(frame.get_by_role("article", name="Answer of writer")).not_to_contain_text("Ahoy")


@slow
def test_score_and_predict_a_file(studio, page, tmp_path) -> None:
    rows = write_rows(studio.folder / "test.jsonl", ({"review": f"{w} 99", "opinion": label} for w, label in WORDS * 4))
    if not (studio.folder / "runs").exists():
        test_table_becomes_a_classifier(studio, page, tmp_path)
    for button, result in (("Score", "accuracy on 8 rows"), ("Predict", "Open Reviews-of-May-predictions.csv")):
        page.goto(f"{studio.url}runs/try/runs/Reviews-of-May")
        page.get_by_label("File with rows").select_option(rows.name)
        page.get_by_role("button", name=button).click()
        expect(page.get_by_text(result).first).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Open Reviews-of-May").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert len(lines) == 9 and "praise" in lines[1]
