"""Tests of the chat page in headless Chromium, with mouse and keyboard, at narrow and wide window sizes.

Requires Playwright and Chromium or Chrome. axe-core is part of axe-playwright-python. Tests are skipped if a package is
missing.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from deltaw.inference.prompting import Prompting  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.http.page_server import ANSWERS, BASE, PageServer, serve_app  # noqa: E402
from tests.serving.http.test_images import RED  # noqa: E402
from tests.vision_models import png, save_vision_model  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")]
SIZES = {390: 844, 1440: 900}
FINISHED = re.compile("finished|token limit reached")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    instance = PageServer()
    with serve_app(instance.app()) as url:
        instance.url = url
        yield instance
        instance.gate.set()


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """Page with its security policy. The test fails if it logs errors or sends requests to other servers."""
    new_page = browser.new_page(viewport={"width": 1440, "height": 900})
    new_page.set_default_timeout(10_000)
    errors: list[str] = []
    new_page.on("console", lambda message: errors.append(message.text))
    new_page.on("pageerror", lambda error: errors.append(str(error)))
    new_page.on("request", lambda r: r.url.startswith((server.url, "data:")) or errors.append(r.url))
    new_page.goto(server.url)
    yield new_page
    new_page.close()
    unexpected = [c for c in errors if "Failed to load resource" not in c]  # expected for status 400 and 401
    assert unexpected == []


def wait_for_models(page: Page) -> None:
    """Wait for the list of models."""
    expect(page.locator("#model-list input")).to_have_count(3)


def send(page: Page, text: str, answers: int = 0) -> None:
    """Send a message and wait until the page contains ``answers`` answers in total, if nonzero."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    if answers:
        wait_for_answers(page, answers)


def wait_for_answers(page: Page, answers: int = 2) -> None:
    expect(page.locator(".state")).to_have_count(answers)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def options(body: dict) -> tuple[float, ...]:
    return tuple(body[name] for name in ("temperature", "top_p", "max_tokens", "seed"))


def answer(page: Page, model: str) -> sync_api.Locator:
    return page.get_by_role("article", name=f"Answer of {model}")


def assert_finished(page: Page, model: str, text: str, tokens: int) -> None:
    assert answer(page, model).locator(".text").evaluate("e => e.textContent") == text
    expect(answer(page, model).locator(".state")).to_have_text("finished")
    expect(answer(page, model).locator(".count")).to_have_text(str(tokens))


def text_of(model: str) -> str:
    return b"".join(t if isinstance(t, bytes) else t.encode() for t in ANSWERS[model]).decode()


def test_answers_of_selected_models_are_side_by_side(page, server):
    page.get_by_label("pirate").check()
    send(page, "What is it?", 3)
    boxes = [answer(page, model).bounding_box() for model in ANSWERS]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    for model in ANSWERS:
        assert_finished(page, model, text_of(model), len(ANSWERS[model]))
        assert re.fullmatch(r"\d+ ms", answer(page, model).locator(".first").inner_text())
        assert float(answer(page, model).locator(".rate").inner_text()) > 0
    assert {body["model"] for body in server.chat_requests} == set(ANSWERS)
    for body in server.chat_requests:
        assert body["messages"] == [{"role": "user", "content": "What is it?"}]
        assert body["stream"] and body["logprobs"] and body["top_logprobs"] == 5
        assert options(body) == (0, 1, 256, 0)


def test_page_shows_name_prompt_and_examples_of_run(page, server):
    server.names = ["/models/SmolLM2.gguf", "legal", "pirate"]
    server.prompting["legal"] = Prompting("You are a lawyer.", examples=("Is it legal?", "<b>May</b> I?"))
    page.goto(server.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat with legal")
    expect(page).to_have_title("Chat with legal · deltaw")
    expect(page.locator("#model-list label").first).to_have_text("SmolLM2 base model")
    system = page.get_by_label("System prompt")
    examples = page.locator("#example-list button")
    expect(system).to_have_value("You are a lawyer.")
    assert examples.all_inner_texts() == ["Is it legal?", "<b>May</b> I?"]
    page.get_by_label("pirate").check()
    page.get_by_label("legal").uncheck()  # the other run has no system prompt
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat with pirate")
    expect(system).to_have_value("")
    expect(examples).to_have_count(0)
    page.get_by_label("legal").check()
    expect(system).to_have_value("You are a lawyer.")
    examples.nth(1).click()
    wait_for_answers(page, 3)
    expect(answer(page, "SmolLM2").locator(".name")).to_have_text("SmolLM2")
    expected_messages = [{"role": "system", "content": "You are a lawyer."}]
    expected_messages += [{"role": "user", "content": "<b>May</b> I?"}]
    assert [body["messages"] for body in server.chat_requests] == [expected_messages] * 3
    assert {body["model"] for body in server.chat_requests} == {*server.names}
    page.get_by_role("button", name="New chat").click()
    system.fill("Mine.")  # text entered by the user is not replaced
    page.get_by_label("legal").uncheck()
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat with pirate")
    expect(system).to_have_value("Mine.")
    system.fill("")
    send(page, "Go", 2)
    assert server.chat_requests[-1]["messages"] == [{"role": "user", "content": "Go"}]


def test_settings_are_sent_to_server(page, server):
    for label, value in {"Temperature": "0.7", "Top-p": "0.9", "Max tokens": "4", "Seed": "11"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    send(page, "Go", 2)
    assert options(server.chat_requests[0]) == (0.7, 0.9, 4, 11)
    assert server.chat_requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(answer(page, "legal").locator(".state")).to_have_text("token limit reached")
    page.get_by_label("Temperature").fill("-1")
    send(page, "Again")
    expect(page.get_by_role("alert")).to_contain_text("Temperature")
    assert len(server.chat_requests) == 2


def test_columns_stream_concurrently_until_stopped(page, server):
    server.hold_after = 2
    send(page, "Go")
    for model in (BASE, "legal"):
        expect(answer(page, model).locator(".token")).to_have_count(2)
        expect(answer(page, model).locator(".state")).to_have_text("writing …")
    page.get_by_role("button", name="Stop").click()
    wait_for_answers(page)
    expect(answer(page, "legal").locator(".state")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    while len(server.disconnected) < 2:
        page.wait_for_timeout(10)
    server.hold_after = None
    send(page, "Go on", 4)
    last = next(b for b in server.chat_requests[2:] if b["model"] == "legal")
    assert last["messages"][1] == {"role": "assistant", "content": "A low"}, "the partial answer must be in the history"


def test_each_model_continues_its_own_chat(page, server):
    send(page, "one", 2)
    send(page, "two", 4)
    for model in (BASE, "legal"):
        second = [b for b in server.chat_requests if b["model"] == model][1]
        assert [m["content"] for m in second["messages"]] == ["one", text_of(model), "two"]
    expect(page.get_by_label("pirate")).to_be_disabled()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_label("pirate").check()
    send(page, "three", 3)
    assert all(len(body["messages"]) == 1 for body in server.chat_requests[4:])


def test_different_tokens_are_underlined_and_summarized(page, server):
    send(page, "Go", 2)
    marked = answer(page, "legal").locator(".differs")
    assert marked.all_inner_texts() == [",", " hereinafter", ","]
    assert answer(page, BASE).locator(".differs").all_inner_texts() == [" added", " to"]
    assert marked.first.evaluate("e => getComputedStyle(e).borderBottomWidth") == "2px"
    summary = f"3 of 18 tokens differ from {BASE}, the first is token 12."
    expect(answer(page, "legal").locator(".difference")).to_have_text(summary)
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("legal").uncheck()
    send(page, "Alone", 1)
    expect(page.locator(".differs:visible")).to_have_count(0)


def test_hovered_token_shows_alternatives(page, server):
    page.get_by_label("pirate").check()
    send(page, "Go", 3)
    alternatives = page.locator("#alternatives")
    token = answer(page, "legal").locator(".token").nth(4)
    token.hover()
    expect(alternatives).to_be_visible()
    rows = alternatives.locator("tbody tr").all_inner_texts()
    assert [r.split("\t")[0] for r in rows][:2] == ["␣other0", "␣changes ✓"], "the most likely token must be first"
    assert len(rows) == 5 and "20.0 %" in rows[1] and "−1.61" in rows[1]
    assert token.get_attribute("aria-describedby") == "alternatives"
    alternatives.hover()  # it remains visible while the pointer is on it
    page.wait_for_timeout(300)
    expect(alternatives).to_be_visible()
    page.keyboard.press("Escape")
    expect(alternatives).to_be_hidden()
    # A character of two tokens is a single element.
    answer(page, "pirate").get_by_text("☃").hover()
    expect(alternatives).to_contain_text("one character of 2 tokens")


def test_errors_are_shown_in_their_column(page, server):
    server.fail = {"legal"}
    send(page, "Go", 2)
    expect(answer(page, "legal")).to_contain_text("out of memory")
    expect(answer(page, "legal").locator(".state")).to_have_text("failed")
    expect(answer(page, BASE).locator(".state")).to_have_text("finished")
    send(page, "x" * 6000, 4)
    expect(answer(page, BASE).last).to_contain_text("the prompt is too long")


def test_page_requests_api_key_if_required(page, server):
    server.key = "secret"
    page.goto(server.url)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not accept this API key")
    field.fill("secret")
    field.press("Enter")
    expect(page.get_by_label("legal")).to_be_checked()
    send(page, "Go", 2)
    page.reload()
    expect(page.get_by_label("legal")).to_be_checked()
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
    assert page.evaluate("Object.keys(sessionStorage)") == ["deltaw-api-key"]


@pytest.mark.parametrize("width", SIZES)
def test_page_is_usable_with_keyboard(page, server, width):
    page.set_viewport_size({"width": width, "height": SIZES[width]})
    page.goto(server.url)
    wait_for_models(page)
    press = page.keyboard.press
    alternatives = page.locator("#alternatives")
    message = page.get_by_label("Message", exact=True)

    def reach(key: str, stop: sync_api.Locator) -> None:
        press(key)
        expect(stop).to_be_focused()

    def tokens(model: str) -> sync_api.Locator:
        return answer(page, model).locator(".token")

    reach("Tab", page.get_by_role("link", name="To the message field"))
    reach("Tab", page.get_by_role("button", name="New chat"))
    reach("Tab", page.locator("summary"))
    if width == 390:
        press("Enter")  # opens the settings
    for name in ANSWERS:
        reach("Tab", page.get_by_label(name))
    press("Space")  # selects pirate
    for label in ("System prompt", "Temperature", "Top-p", "Max tokens", "Seed", "Message"):
        reach("Tab", page.get_by_label(label, exact=True))
    server.hold_after = 12
    page.keyboard.type("first line")
    press("Shift+Enter")
    page.keyboard.type("second")
    press("Enter")
    expect(tokens("legal")).to_have_count(12)
    assert server.chat_requests[0]["messages"][0]["content"] == "first line\nsecond"
    reach("Tab", page.get_by_role("button", name="Stop"))  # Send is disabled during generation
    press("Enter")
    wait_for_answers(page, 3 if width == 1440 else 2)  # a narrow page initially selects only the adapter
    expect(message).to_be_focused()
    reach("Shift+Tab", tokens("pirate").first)  # back to the last answer, which is a single tab stop
    expect(alternatives).to_be_visible()
    press("Escape")
    expect(alternatives).to_be_hidden()
    reach("ArrowRight", tokens("pirate").nth(1))
    expect(alternatives).to_contain_text("Token 2 of pirate")
    reach("End", tokens("pirate").last)
    reach("ArrowUp", answer(page, "pirate").locator(".differs").last)
    reach("Shift+Tab", tokens("legal").first)
    box = alternatives.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0


def test_live_region_announces_progress(page, server):
    live_region = page.get_by_role("log")
    assert live_region.get_attribute("aria-live") == "polite"
    server.hold_after = 1
    send(page, "Go")
    expect(live_region).to_have_text(f"{BASE}, legal: writing")
    server.gate.set()
    wait_for_answers(page)
    for model in (BASE, "legal"):
        expect(live_region).to_contain_text(f"{model} finished: A low-rank update")


def test_page_works_with_real_server(browser, packages):
    from deltaw.serving.http.page import page_router
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.fake_engine import fake_served
    from tests.serving.http.server_thread import run_server

    serve_app = fake_served("clerk", "poet", routers=(page_router(),), open_paths=frozenset({"/"}))
    with run_server(serve_app, ServerSettings(port=0, keys=("long-enough",))) as live_server:
        new_page = browser.new_page()
        new_page.set_default_timeout(10_000)
        new_page.goto(live_server.url)
        new_page.get_by_label("API key").fill("long-enough")
        new_page.get_by_label("API key").press("Enter")
        wait_for_models(new_page)
        send(new_page, "say ☃ it", 2)
        for model in ("base", "clerk"):
            assert_finished(new_page, model, "☃ it", len("☃ it".encode()))
        answer(new_page, "base").get_by_text("☃").hover()
        expect(new_page.locator("#alternatives")).to_contain_text("one character of 3 tokens")
        expect(new_page.locator("#alternatives tbody tr")).to_have_count(5)
        send(new_page, "hello", 4)
        assert answer(new_page, "clerk").last.locator(".text").inner_text() == "clerk: HELLO"
        expect(answer(new_page, "base").last.locator(".differs")).to_have_count(0)
        expect(answer(new_page, "clerk").last.locator(".differs")).to_have_count(len("clerk: "))
        send(new_page, "be slow")
        expect(answer(new_page, "base").last.locator(".token").nth(5)).to_be_visible()
        new_page.get_by_role("button", name="Stop").click()
        wait_for_answers(new_page, 6)
        new_page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_images_are_attached_removed_and_sent(browser, packages, tmp_path, scheme, width):
    from tests.serving.http.test_images import serve

    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "large.png").write_bytes(png((10, 10, 220), (3000, 1500)))
    (tmp_path / "no.png").write_bytes(b"no image")
    context = browser.new_context(viewport={"width": width, "height": SIZES[width]}, color_scheme=scheme)
    with serve(save_vision_model("llava", tmp_path / "model")) as live_server:
        new_page = context.new_page()
        new_page.set_default_timeout(10_000)
        errors: list[str] = []
        new_page.on("console", lambda message: errors.append(message.text))
        bodies: list[dict] = []
        new_page.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data or "")))
        new_page.goto(live_server.url)
        button = new_page.get_by_role("button", name="Add image")
        attached = new_page.locator("#image-list img")
        with new_page.expect_file_chooser() as chooser:
            button.press("Enter")
        chooser.value.set_files([tmp_path / name for name in ("red.png", "large.png", "no.png")])
        expect(attached).to_have_count(2)
        expect(new_page.get_by_role("alert")).to_contain_text("no.png is not an image")
        expect(new_page.get_by_label("Message", exact=True)).to_be_focused()
        new_page.get_by_role("button", name="Remove red.png").press("Enter")
        expect(attached).to_have_count(1)
        with new_page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(tmp_path / "red.png")
        expect(attached).to_have_count(2)
        assert new_page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        new_page.evaluate("document.getElementById('max-tokens').value = 8")
        send(new_page, "color?", 1)
        expect(new_page.locator(".state").last).to_have_text(FINISHED)
        expect(attached).to_have_count(0)
        pictures = new_page.locator(".question img")
        sizes = pictures.evaluate_all("images => images.map((image) => [image.naturalWidth, image.naturalHeight])")
        assert sizes == [[1280, 640], [28, 28]]
        assert [picture.get_attribute("alt") for picture in pictures.all()] == ["large.png", "red.png"]
        send(new_page, "and now?", 2)
        expect(new_page.locator(".state").last).to_have_text(FINISHED)
        parts = bodies[-1]["messages"][0]["content"]
        assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
        assert base64.b64decode(parts[1]["image_url"]["url"].partition(",")[2]) == RED
        assert errors == []
        context.close()


@pytest.mark.skipif(AXE is None, reason="axe-core is not installed (pip install axe-playwright-python)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_axe_reports_no_violations(browser, server, scheme, width):
    # The page's policy does not allow the script of axe.
    viewport = {"width": width, "height": SIZES[width]}
    context = browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True)
    new_page = context.new_page()

    def check_state(state: str) -> list[str]:
        fits = "document.documentElement.scrollWidth <= window.innerWidth"
        assert new_page.evaluate(fits), f"{state}: wider than the window"
        new_page.evaluate(AXE.read_text(encoding="utf-8"))
        violations = new_page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert len(violations["passes"]) > 10
        return [f"{state}: {v['id']}: {json.dumps(v['nodes'])[:300]}" for v in violations["violations"]]

    server.prompting["legal"] = Prompting("You are a lawyer.", examples=("Is it legal?", "May I?"))
    new_page.goto(server.url)
    wait_for_models(new_page)
    expect(new_page.get_by_role("button", name="May I?")).to_be_visible()
    violations = check_state("start")
    if width == 390:
        new_page.locator("summary").click()
        violations += check_state("settings")
    server.hold_after = 13
    server.fail = {"pirate"}
    new_page.get_by_label("pirate").check()
    send(new_page, "Go")
    expect(answer(new_page, "legal").locator(".token")).to_have_count(13)
    violations += check_state("writing")
    server.gate.set()
    wait_for_answers(new_page, 3 if width == 1440 else 2)
    answer(new_page, "legal").locator(".differs").first.focus()
    expect(new_page.locator("#alternatives")).to_be_visible()
    violations += check_state("answers")
    server.key = "secret"
    new_page.reload()
    expect(new_page.get_by_label("API key")).to_be_visible()
    violations += check_state("key")
    context.close()
    assert violations == []


def test_equal_tokens_are_not_marked(page):
    from deltaw.serving.http.page import _read

    page.goto("about:blank")
    compare = "return differences([[...a], [...b]], false).map(marks => [...marks].join(''))"
    for a, b, *expected in (
        ("abcd", "abcd", "0000", "0000"),
        ("abcd", "abxd", "0010", "0010"),
        ("abc", "xabc", "000", "1000"),
        ("", "ab", "", "11"),
        ("abab", "baba", "1000", "0001"),
    ):
        assert page.evaluate(f"(([a, b]) => {{ {_read('difference.js')}; {compare}; }})", [a, b]) == expected


def test_adapter_is_first_on_narrow_screen_with_sticky_name(page):
    wait_for_models(page)
    send(page, "Explain LoRA", answers=2)
    tops = {name: page.locator(".answer", has_text=name).first.bounding_box() for name in (BASE, "legal")}
    assert tops[BASE]["x"] < tops["legal"]["x"] and tops[BASE]["y"] == tops["legal"]["y"]
    page.set_viewport_size({"width": 390, "height": 500})
    adapter = page.locator(".answer.adapter")
    base = page.locator(".answer:not(.adapter)")
    assert adapter.bounding_box()["y"] < base.bounding_box()["y"]
    adapter.locator(".text").evaluate("text => { text.style.minHeight = '2000px' }")
    adapter.evaluate("one => window.scrollTo(0, one.getBoundingClientRect().top + window.scrollY + 900)")
    expect(adapter.get_by_role("heading", name="legal")).to_be_in_viewport()


@pytest.mark.parametrize("width", SIZES)
def test_short_answer_stays_visible_beside_a_long_one(page, server, monkeypatch, width):
    server.token_seconds = 0.01
    monkeypatch.setitem(ANSWERS, BASE, ["line\n"] * 120)
    page.set_viewport_size({"width": width, "height": SIZES[width]})
    wait_for_models(page)
    for answers in (2, 4):
        send(page, "Go", answers)
    assert page.evaluate("document.documentElement.scrollHeight > 2 * window.innerHeight")
    expect(answer(page, "legal").last.locator(".token").first).to_be_in_viewport()
    expect(page.locator(".question-text").last).to_be_in_viewport()


def test_frame_of_the_studio_selects_base_model_and_adapter_in_a_narrow_window(page, server):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(server.url)
    expect(page.locator("#model-list input:checked")).to_have_count(1)
    page.route("**/frame", lambda route: route.fulfill(content_type="text/html", body='<iframe src="/"></iframe>'))
    page.route(server.url, lambda route: route.fulfill(response=(original := route.fetch()), headers={
        name: text for name, text in original.headers.items() if name != "content-security-policy"}))  # fmt: skip
    page.goto(server.url + "frame")
    expect(page.frame_locator("iframe").locator("#model-list input:checked")).to_have_count(2)
