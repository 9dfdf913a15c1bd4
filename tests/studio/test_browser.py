"""The studio in a browser, by role and label only, as a user without a terminal.

Requires Playwright and Chromium or Chrome. Tests are skipped if one is missing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("fastapi", reason="the extra studio is not installed")
pytest.importorskip("httpx", reason="the extra studio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from deltaw.cli.studio import redirect_page  # noqa: E402
from deltaw.studio.workspace import Workspace  # noqa: E402
from tests.byte_models import byte_tokenizer, save_model, tiny_llama  # noqa: E402
from tests.conftest import write_rows  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.encoder_models import write_bert  # noqa: E402
from tests.studio.studio_process import StudioProcess, studio_process  # noqa: E402
from tests.studio.test_data import open_document  # noqa: E402

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
        yield process


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
    name = f"deltaw-studio-{studio.port}"
    secret = Workspace(studio.folder).state / "session"
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
    wait_for_progress(page, 9)


def finish(page: Page) -> None:
    """Wait for the end of a training."""
    expect(page.get_by_role("link", name="Try it")).to_be_visible()


def try_it(page: Page) -> sync_api.FrameLocator:
    """Load a result, and return its frame."""
    page.get_by_role("link", name="Try it").click()
    page.get_by_role("button", name="Load the model").click()
    return page.frame_locator("iframe")


def train_classifier(page: Page, studio: StudioProcess, folder: Path, name: str) -> None:
    to_settings(page, studio, reviews(folder), "encoder")
    fill(page, Passes_over_the_rows="4", Learning_rate="0.01")
    start(page, name)
    expect(page.get_by_role("progressbar")).to_be_visible()
    finish(page)


def test_page_of_a_file_connects_the_browser(browser, tmp_path):
    with studio_process(tmp_path / "folder") as studio:
        page = browser.new_context().new_page()
        page.goto(redirect_page(tmp_path / "open.html", studio.address))
        page.wait_for_url(studio.url)
        expect(page.get_by_role("link", name="Results")).to_be_visible()
        page.context.close()


@slow
def test_table_becomes_a_classifier(studio, page, tmp_path) -> None:
    train_classifier(page, studio, tmp_path, "Reviews of May")
    expect(page.get_by_role("definition").filter(has_text="→ 100.0%")).to_be_visible()
    frame = try_it(page)
    for text, label in WORDS:
        frame.get_by_label("Text", exact=True).fill(text)
        frame.get_by_role("button", name="Try").click()
        expect(frame.get_by_role("region", name="Result").get_by_role("row").nth(0)).to_contain_text(label)


@slow
def test_sheet_and_column_are_used_although_only_continue_is_pressed(studio, page, tmp_path) -> None:
    labels = ["Praise", "praise ", "Blame"]
    rows: list[list[object]] = [["text", "topic", "urgent"]]
    rows += [[f"a message of some words {n}", labels[n % 3], ("yes", "no")[n % 2]] for n in range(24)]
    file = tmp_path / "tickets.ods"
    file.write_bytes(open_document({"Notes": [["text", "who"], ["hello", "Ann"], ["bye", "Bob"]], "Tickets": rows}))
    page.goto(studio.url)
    page.get_by_label("Choose a file").set_input_files(file)
    page.get_by_label("Sheet of the spreadsheet").select_option("Tickets")
    expect(page.get_by_text("24 rows can be used.")).to_be_visible()
    page.get_by_label("Column with the classes").select_option("topic")
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_text("“topic” the classes")).to_be_visible()
    page.get_by_role("button", name="Merge the selected classes").click()
    expect(page.get_by_text("There are 2 classes: Blame, Praise.")).to_be_visible()
    tokens = page.get_by_role("link", name="Tokens of row 1", exact=True).bounding_box()
    assert tokens is not None and tokens["x"] + tokens["width"] < 1280
    page.get_by_role("link", name="Continue").click()
    expect(page.get_by_role("heading", name="Choose a model")).to_be_visible()


@slow
def test_chat_becomes_an_adapter_whose_answer_differs(studio, page, tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{question} {n}"}, {"role": "assistant", "content": answer}]}
        for n in range(8)
        for question, answer in CHAT
    ]
    to_settings(page, studio, write_rows(tmp_path / "pirate.jsonl", rows), "writer")
    fill(page, Passes_over_the_rows="4", Learning_rate="0.01")
    page.get_by_text("Advanced").click()
    page.get_by_text(re.compile("^Train: ")).click()
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
    rows = write_rows(tmp_path / "test.jsonl", ({"review": f"{w} 99", "opinion": label} for w, label in WORDS * 4))
    train_classifier(page, studio, tmp_path, "scored")
    address = page.url
    for button, result in (("Score", "accuracy on 8 rows"), ("Predict", "Download scored-predictions.csv")):
        page.goto(address)
        page.get_by_role("link", name="Try it").click()
        if button == "Score":
            page.get_by_label("Choose a file").set_input_files(rows)
            expect(page.get_by_text("test.jsonl is selected below.")).to_be_visible()
        else:
            page.get_by_label("File with rows").select_option(rows.name)
        page.get_by_role("button", name=button).click()
        expect(page.get_by_text(result).first).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download scored").click()
    lines = Path(download.value.path()).read_text().splitlines()
    assert len(lines) == 9 and "praise" in lines[1]


def steps_done(page: Page) -> int:
    """Return the number of steps that a job page shows."""
    match = re.search(r"([\d,]+) of [\d,]+", page.get_by_role("main").inner_text())
    return int(match[1].replace(",", "")) if match else 0


def wait_for_progress(page: Page, beyond: int) -> None:
    """Wait until more steps are done."""
    deadline = time.monotonic() + LONG / 1000
    while steps_done(page) <= beyond:
        assert time.monotonic() < deadline
        page.wait_for_timeout(200)


def stop(page: Page) -> None:
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


@slow
def test_stopped_training_continues_from_the_same_step(studio, page, tmp_path) -> None:
    to_settings(page, studio, reviews(tmp_path, 600), "encoder")
    fill(page, Passes_over_the_rows="8", Learning_rate="0.001")
    start(page, "paused")
    wait_for_progress(page, 9)
    stop(page)
    stopped_at = steps_done(page)
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
    assert stopped_at > 9
    finish(page)
    lines = (studio.folder / "runs" / "paused" / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


@slow
def test_training_continues_while_the_page_is_closed(studio, browser, tmp_path) -> None:
    with connected(browser, studio) as page:
        start_long_training(page, studio, tmp_path, "closed")
        before = steps_done(page)
    with connected(browser, studio) as page:
        page.get_by_role("link", name="closed").first.click()
        wait_for_progress(page, before + 10)
        stop(page)


@slow
def test_training_survives_a_killed_server(browser, studio, tmp_path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(studio.folder / "models", folder / "models")
    with studio_process(folder) as first, connected(browser, first) as page:
        start_long_training(page, first, tmp_path, "survivor")
        before = steps_done(page)
        first.kill()
        expect(page.get_by_text("The studio does not answer.")).to_be_visible()
        metrics = folder / "runs" / "survivor" / "metrics.jsonl"
        size = metrics.stat().st_size
        deadline = time.monotonic() + LONG / 1000
        while metrics.stat().st_size == size:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        again = StudioProcess(folder, first.port)
        try:
            expect(page.get_by_text("The studio does not answer.")).to_be_hidden()
            wait_for_progress(page, before + 10)
            stop(page)
            page.get_by_role("link", name="Jobs").click()
            expect(page.get_by_role("listitem").filter(has_text="survivor")).to_have_count(1)
        finally:
            again.close()


@slow
def test_two_tabs_show_the_same_state(studio, browser, tmp_path) -> None:
    with connected(browser, studio) as first:
        start_long_training(first, studio, tmp_path, "front")
        second = first.context.new_page()
        to_settings(second, studio, reviews(tmp_path), "encoder")
        fill(second, Passes_over_the_rows="4")
        other = first.context.new_page()
        other.goto(second.url)
        expect(other.get_by_label("Passes over the rows")).to_have_value(re.compile("^4"))
        start(second, "behind")
        expect(second.get_by_text("Starts when front is finished")).to_be_visible()
        third = first.context.new_page()
        third.goto(first.url)
        stop(third)
        expect(first.get_by_role("button", name="Continue")).to_be_visible()
        finish(second)


WRONG = {
    "binary.csv": (bytes(range(256)) * 20, "another encoding than UTF-8"),
    "empty.csv": (b"", "it is empty"),
    "titles.csv": (b"text,label\n", "only blank lines, a header"),
    "one.csv": (b"text\nfirst\nsecond\n", "2 rows can be used"),
    "quotes.csv": (b'text,label\n"first,a\nsecond,b\nthird,c\n', "A quote inside a quoted cell"),
    "broken.jsonl": (
        b'{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n{"text": \n',
        "will be left out: row 3",
    ),
    "picture.xlsx": (b"\x89PNG\r\n\x1a\n" + bytes(500), "not a spreadsheet of the type of its name"),
}


@slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_explained(studio, page, tmp_path, name) -> None:
    content, expected = WRONG[name]
    (tmp_path / name).write_bytes(content)
    page.get_by_label("Choose a file").set_input_files(tmp_path / name)
    expect(page.get_by_text(expected).filter(visible=True).first).to_be_visible(timeout=LONG / 3)
    for text in ("Traceback", "Error:", "something went wrong"):
        expect(page.get_by_text(text)).to_have_count(0)


@slow
def test_huge_file_is_refused_by_the_upload_and_explained_in_the_folder(studio, page, tmp_path) -> None:
    for path in (tmp_path / "huge.csv", studio.folder / "huge.csv"):
        with path.open("wb") as file:
            file.truncate(10**9)
    page.get_by_label("Choose a file").set_input_files(tmp_path / "huge.csv")
    expect(page.get_by_text("This file is too large.")).to_be_visible()
    page.reload()
    page.get_by_label("Or use a file that is already here").select_option("huge.csv")
    page.get_by_role("button", name="Use this file").click()
    expect(page.get_by_role("alert").filter(visible=True).first).to_be_visible()
    (studio.folder / "huge.csv").unlink()


def write_huge_model(folder: Path) -> None:
    """Write a model that is larger than the memory in a sparse file."""
    width = 1024
    layers = 12
    inner = int(psutil.virtual_memory().total * 1.2) // (6 * width * layers)
    config = LlamaConfig(
        vocab_size=259, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, eos_token_id=0, bos_token_id=None, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        weights = {name: list(weight.shape) for name, weight in LlamaForCausalLM(config).named_parameters()}
    header = {}
    end = 0
    for name, shape in weights.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@slow
def test_model_that_does_not_fit_is_explained(studio, page, tmp_path) -> None:
    write_huge_model(studio.folder / "models" / "huge")
    page.get_by_label("Choose a file").set_input_files(reviews(tmp_path))
    expect(page.get_by_text("can be used.").first).to_be_visible()
    page.get_by_role("link", name="Continue").click()
    page.get_by_role("radio", name="huge").check()
    expect(page.get_by_text("does not fit").first).to_be_visible()
    expect(page.get_by_text("Choose a smaller model")).to_be_visible()
    shutil.rmtree(studio.folder / "models" / "huge")


@slow
@pytest.mark.skipif(AXE is None, reason="axe-core is not installed (pip install axe-playwright-python)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit_a_narrow_window(studio, browser, tmp_path, scheme) -> None:
    assert AXE is not None
    with connected(browser, studio, color_scheme=scheme, bypass_csp=True) as page:
        visited: list[str] = []

        def look(name: str) -> None:
            """Check the page, with all details open, and take screenshots if a folder for them is given."""
            page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
            page.evaluate(AXE.read_text(encoding="utf-8"))
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            found = [violation for violation in found if violation["impact"] in ("serious", "critical")]
            assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == [], name
            shots = os.environ.get("DELTAW_SCREENSHOTS")
            if shots:
                page.screenshot(path=f"{shots}/{name}-{scheme}.png", full_page=True)
            page.set_viewport_size(NARROW)
            if shots and scheme == "light":
                page.screenshot(path=f"{shots}/{name}-narrow.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"], name
            page.set_viewport_size({"width": 1280, "height": 900})
            visited.append(name)

        look("start")
        page.get_by_label("Choose a file").set_input_files(reviews(tmp_path))
        expect(page.get_by_text("can be used.").first).to_be_visible()
        page.get_by_role("link", name="Tokens of row 1", exact=True).click()
        expect(page.get_by_role("heading", name="Row 1 as the model reads it")).to_be_in_viewport()
        look("data")
        page.get_by_role("link", name="Continue").click()
        page.get_by_role("radio", name="encoder").check()
        expect(page.get_by_text("Fits.")).to_be_visible()
        look("model")
        page.get_by_role("link", name="Continue").click()
        expect(page.get_by_text("Fits.")).to_be_visible()
        look("settings")
        fill(page, Passes_over_the_rows="2", Learning_rate="0.01")
        start(page, f"look-{scheme}")
        look("preparing")
        finish(page)
        look("finished")
        page.get_by_role("link", name="Result and download").click()
        look("result")
        try_it(page).get_by_label("Text", exact=True).fill("good")
        look("try")
        page.get_by_label("File with rows").select_option(index=1)
        page.get_by_role("button", name="Score").click()
        expect(page.get_by_text("All values")).to_be_visible()
        look("score")
        for name in ("Start", "Jobs", "Results"):
            page.get_by_role("link", name=name, exact=name != "Jobs").click()
            look(name)
        page.goto(f"{studio.url}missing")
        look("error")
        assert len(visited) == 13


def tab_to(page: Page, name: str, role: str = "") -> None:
    """Press Tab until an element with this text, label or role has the visible focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => { const e = document.activeElement, shown = e.closest(".drop") ?? e;
            const name = e === document.body ? "" : e.ariaLabel || e.labels?.[0]?.textContent || e.textContent;
            return [name, e.type || e.tagName.toLowerCase(), getComputedStyle(shown).outlineStyle]; }"""
        )
        if name in focused[0] and role in focused[1]:
            assert focused[2] != "none", f"the focus is not visible: {name}"
            return
    raise AssertionError(f"{name} cannot be reached with the keyboard")


@slow
def test_classifier_is_started_and_stopped_with_the_keyboard_only(studio, page, tmp_path) -> None:
    keys = page.keyboard
    tab_to(page, "Skip to content")
    keys.press("Enter")
    tab_to(page, "Choose a file", "file")
    with page.expect_file_chooser() as chooser:
        keys.press("Enter")
    chooser.value.set_files(reviews(tmp_path, 600))
    expect(page.get_by_text("can be used.").first).to_be_visible()
    expect(page.locator("#check")).to_have_attribute("aria-busy", "false")
    tab_to(page, "Change the goal")
    keys.press("Enter")
    tab_to(page, "Goal", "select")
    tab_to(page, "Continue")
    keys.press("Enter")
    page.wait_for_url("**/model")
    tab_to(page, "", "radio")
    for _ in range(9):
        if page.get_by_role("radio", name="encoder").is_checked():
            break
        keys.press("ArrowDown")
    expect(page.get_by_text("Fits.")).to_be_visible()
    tab_to(page, "Continue")
    keys.press("Enter")
    page.wait_for_url("**/settings")
    for label, text in (
        ("Passes over the rows", "400"),
        ("Learning rate", "0.001"),
        ("Name of the result", "by keyboard"),
    ):
        tab_to(page, label)
        keys.press("Control+A")
        keys.type(text)
    expect(page.locator("#plan")).to_have_attribute("aria-busy", "false")
    tab_to(page, "Start training")
    keys.press("Space")
    page.wait_for_url("**/jobs/*")
    wait_for_progress(page, 1)
    for name in ("Values: Loss", "Stop"):  # the focus and an open detail survive new values
        tab_to(page, name)
        if name != "Stop":
            keys.press("Enter")
        wait_for_progress(page, steps_done(page))
        assert name in page.evaluate("document.activeElement.textContent")
    expect(page.get_by_role("table", name="Loss by step")).to_be_visible()
    keys.press("Enter")
    expect(page.get_by_role("button", name="Continue")).to_be_visible()
    tab_to(page, "Continue")
