"""The chat page in headless Chromium: what it shows, by pointer and by keyboard alone, at both widths.

Needs Playwright's Python package and a Chromium or Chrome; axe-core comes with axe-playwright-python. Skipped
where they are missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

from deltaw.training.prompting import Prompting  # noqa: E402
from tests.reports.test_page_browser import AXE, BROWSER  # noqa: E402
from tests.serving.http.page_server import ANSWERS, BASE, PageServer, served  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]
SIZES = {390: 844, 1440: 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def server() -> Iterator[PageServer]:
    one = PageServer()
    with served(one.app()) as url:
        one.url = url
        yield one
        one.gate.set()


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """The page as it is sent, policy and all; it must not complain and must ask nobody else."""
    opened = browser.new_page(viewport={"width": 1440, "height": 900})
    opened.set_default_timeout(10_000)
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda r: r.url.startswith((server.url, "data:")) or complaints.append(r.url))
    opened.goto(server.url)
    yield opened
    opened.close()
    refused = [c for c in complaints if "Failed to load resource" not in c]  # statuses 400 and 401, as asked
    assert refused == []


def listed(page: Page) -> None:
    """Wait for the list of models."""
    expect(page.locator("#model-list input")).to_have_count(3)


def send(page: Page, text: str, answers: int = 0) -> None:
    """Send a message, and wait until there are so many answers in all, if any."""
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    if answers:
        done(page, answers)


def done(page: Page, answers: int = 2) -> None:
    expect(page.locator(".state")).to_have_count(answers)
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def options(body: dict) -> tuple[float, ...]:
    return tuple(body[name] for name in ("temperature", "top_p", "max_tokens", "seed"))


def answer(page: Page, model: str) -> sync_api.Locator:
    return page.get_by_role("article", name=f"Answer of {model}")


def finished(page: Page, model: str, text: str, tokens: int) -> None:
    assert answer(page, model).locator(".text").evaluate("e => e.textContent") == text
    expect(answer(page, model).locator(".state")).to_have_text("finished")
    expect(answer(page, model).locator(".count")).to_have_text(str(tokens))


def text_of(model: str) -> str:
    return b"".join(t if isinstance(t, bytes) else t.encode() for t in ANSWERS[model]).decode()


def test_answers_of_all_chosen_models_stand_side_by_side(page, server):
    page.get_by_label("pirate").check()
    send(page, "What is it?", 3)
    boxes = [answer(page, model).bounding_box() for model in ANSWERS]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    for model in ANSWERS:
        finished(page, model, text_of(model), len(ANSWERS[model]))
        assert re.fullmatch(r"\d+ ms", answer(page, model).locator(".first").inner_text())
        assert float(answer(page, model).locator(".rate").inner_text()) > 0
    assert {body["model"] for body in server.asked} == set(ANSWERS)
    for body in server.asked:
        assert body["messages"] == [{"role": "user", "content": "What is it?"}]
        assert body["stream"] and body["logprobs"] and body["top_logprobs"] == 5
        assert options(body) == (0, 1, 256, 0)


def test_the_page_is_named_after_the_run_and_begins_as_its_rows_do(page, server):
    server.names = ["/models/SmolLM2.gguf", "legal", "pirate"]
    server.prompting["legal"] = Prompting("You are a lawyer.", examples=("Is it legal?", "<b>May</b> I?"))
    page.goto(server.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat with legal")
    expect(page).to_have_title("Chat with legal · deltaw")
    expect(page.locator("#model-list label").first).to_have_text("SmolLM2 base model")
    system, examples = page.get_by_label("System prompt"), page.locator("#example-list button")
    expect(system).to_have_value("You are a lawyer.")
    assert examples.all_inner_texts() == ["Is it legal?", "<b>May</b> I?"]
    page.get_by_label("pirate").check()
    page.get_by_label("legal").uncheck()  # another run, whose rows have none
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat with pirate")
    expect(system).to_have_value("")
    expect(examples).to_have_count(0)
    page.get_by_label("legal").check()
    expect(system).to_have_value("You are a lawyer.")
    examples.nth(1).click()
    done(page, 3)
    expect(answer(page, "SmolLM2").locator(".name")).to_have_text("SmolLM2")
    asked = [{"role": "system", "content": "You are a lawyer."}, {"role": "user", "content": "<b>May</b> I?"}]
    assert [body["messages"] for body in server.asked] == [asked] * 3
    assert {body["model"] for body in server.asked} == {*server.names}
    page.get_by_role("button", name="New chat").click()
    system.fill("Mine.")  # what somebody wrote stays
    page.get_by_label("legal").uncheck()
    expect(page.get_by_role("heading", level=1)).to_have_text("Chat with pirate")
    expect(system).to_have_value("Mine.")
    system.fill("")
    send(page, "Go", 2)
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Go"}]


def test_answers_that_differ_throughout_are_not_covered_with_marks(page, server):
    page.get_by_label("legal").uncheck()
    page.get_by_label("pirate").check()
    ANSWERS["pirate"], whole = ["Arr"] * 9, ANSWERS["pirate"]
    send(page, "Go", 2)
    ANSWERS["pirate"] = whole
    first = answer(page, "pirate").locator(".differs").first
    assert first.evaluate("e => getComputedStyle(e).borderBottomWidth") == "0px"
    expect(answer(page, "pirate").locator(".difference")).to_contain_text("9 of 9 tokens differ")


def test_settings_reach_the_server(page, server):
    for label, value in {"Temperature": "0.7", "Top-p": "0.9", "Max tokens": "4", "Seed": "11"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    send(page, "Go", 2)
    assert options(server.asked[0]) == (0.7, 0.9, 4, 11)
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(answer(page, "legal").locator(".state")).to_have_text("at the limit")
    page.get_by_label("Temperature").fill("-1")
    send(page, "Again")
    expect(page.get_by_role("alert")).to_contain_text("Temperature")
    assert len(server.asked) == 2


def test_all_columns_stream_at_once_and_stop_ends_them(page, server):
    server.hold_after = 2
    send(page, "Go")
    for model in (BASE, "legal"):
        expect(answer(page, model).locator(".token")).to_have_count(2)
        expect(answer(page, model).locator(".state")).to_have_text("writing …")
    page.get_by_role("button", name="Stop").click()
    done(page)
    expect(answer(page, "legal").locator(".state")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    while len(server.gone) < 2:
        page.wait_for_timeout(10)
    server.hold_after = None
    send(page, "Go on", 4)
    last = next(b for b in server.asked[2:] if b["model"] == "legal")
    assert last["messages"][1] == {"role": "assistant", "content": "A low"}, "what was written is kept"


def test_each_model_goes_on_from_its_own_answer_until_a_new_chat(page, server):
    send(page, "one", 2)
    send(page, "two", 4)
    for model in (BASE, "legal"):
        second = [b for b in server.asked if b["model"] == model][1]
        assert [m["content"] for m in second["messages"]] == ["one", text_of(model), "two"]
    expect(page.get_by_label("pirate")).to_be_disabled()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_label("pirate").check()
    send(page, "three", 3)
    assert all(len(body["messages"]) == 1 for body in server.asked[4:])


def test_differing_tokens_are_marked_by_more_than_color_and_told_in_words(page, server):
    send(page, "Go", 2)
    marked = answer(page, "legal").locator(".differs")
    assert marked.all_inner_texts() == [",", " hereinafter", ","]
    assert answer(page, BASE).locator(".differs").all_inner_texts() == [" added", " to"]
    assert marked.first.evaluate("e => getComputedStyle(e).borderBottomWidth") == "2px"
    told = f"3 of 18 tokens differ from {BASE}, the first is token 12."
    expect(answer(page, "legal").locator(".difference")).to_have_text(told)
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("legal").uncheck()
    send(page, "Alone", 1)
    expect(page.locator(".differs:visible")).to_have_count(0)


def test_a_token_shows_its_alternatives_when_pointed_at(page, server):
    page.get_by_label("pirate").check()
    send(page, "Go", 3)
    shown = page.locator("#alternatives")
    token = answer(page, "legal").locator(".token").nth(4)
    token.hover()
    expect(shown).to_be_visible()
    rows = shown.locator("tbody tr").all_inner_texts()
    assert [r.split("\t")[0] for r in rows][:2] == ["␣other0", "␣changes ✓"], "the likeliest first"
    assert len(rows) == 5 and "20.0 %" in rows[1] and "−1.61" in rows[1]
    assert token.get_attribute("aria-describedby") == "alternatives"
    shown.hover()  # it stays while the pointer is on it
    page.wait_for_timeout(300)
    expect(shown).to_be_visible()
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    # One character of two tokens is one place.
    answer(page, "pirate").get_by_text("☃").hover()
    expect(shown).to_contain_text("one character of 2 tokens")


def test_failures_are_said_in_their_column(page, server):
    server.fail = {"legal"}
    send(page, "Go", 2)
    expect(answer(page, "legal")).to_contain_text("out of memory")
    expect(answer(page, "legal").locator(".state")).to_have_text("failed")
    expect(answer(page, BASE).locator(".state")).to_have_text("finished")
    send(page, "x" * 6000, 4)
    expect(answer(page, BASE).last).to_contain_text("the prompt is too long")


def test_an_api_key_is_asked_for_where_the_server_wants_one(page, server):
    server.key = "secret"
    page.goto(server.url)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("does not take this API key")
    field.fill("secret")
    field.press("Enter")
    expect(page.get_by_label("legal")).to_be_checked()
    send(page, "Go", 2)
    page.reload()
    expect(page.get_by_label("legal")).to_be_checked()
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
    assert page.evaluate("Object.keys(sessionStorage)") == ["deltaw-api-key"]


def test_no_more_columns_than_a_browser_has_connections(page, server):
    server.names = [BASE, *(f"a{n}" for n in range(8))]
    page.goto(server.url)
    for n in range(7):
        page.get_by_label(f"a{n}").check()
    page.get_by_label("Message", exact=True).fill("Go")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(page.get_by_text("At most 6")).to_be_visible()


@pytest.mark.parametrize("width", SIZES)
def test_everything_can_be_done_by_keyboard_alone(page, server, width):
    page.set_viewport_size({"width": width, "height": SIZES[width]})
    page.goto(server.url)
    listed(page)
    press, shown, message = page.keyboard.press, page.locator("#alternatives"), page.get_by_label("Message", exact=True)

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
    press("Space")  # the last one, pirate
    for label in ("System prompt", "Temperature", "Top-p", "Max tokens", "Seed", "Message"):
        reach("Tab", page.get_by_label(label, exact=True))
    server.hold_after = 12
    page.keyboard.type("first line")
    press("Shift+Enter")
    page.keyboard.type("second")
    press("Enter")
    expect(tokens("legal")).to_have_count(12)
    assert server.asked[0]["messages"][0]["content"] == "first line\nsecond"
    reach("Tab", page.get_by_role("button", name="Stop"))  # Send is disabled while answers are written
    press("Enter")
    done(page, 3 if width == 1440 else 2)  # a narrow page begins with the adapter alone
    expect(message).to_be_focused()
    reach("Shift+Tab", tokens("pirate").first)  # back to the last answer, which is one stop
    expect(shown).to_be_visible()
    press("Escape")
    expect(shown).to_be_hidden()
    reach("ArrowRight", tokens("pirate").nth(1))
    expect(shown).to_contain_text("Token 2 of pirate")
    reach("End", tokens("pirate").last)
    reach("ArrowUp", answer(page, "pirate").locator(".differs").last)
    reach("Shift+Tab", tokens("legal").first)
    box = shown.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] >= 0


def test_a_screen_reader_hears_what_happens_politely(page, server):
    said = page.get_by_role("log")
    assert said.get_attribute("aria-live") == "polite"
    server.hold_after = 1
    send(page, "Go")
    expect(said).to_have_text(f"{BASE}, legal: writing")
    server.gate.set()
    done(page)
    for model in (BASE, "legal"):
        expect(said).to_contain_text(f"{model} finished: A low-rank update")


def test_the_page_works_with_the_server_of_the_project(browser, packages):
    from deltaw.serving.http.page.document import page_router
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.fake_engine import fake_served
    from tests.serving.http.running import running

    served = fake_served("clerk", "poet", routers=(page_router(),), open_paths=frozenset({"/"}))
    with running(served, ServerSettings(port=0, keys=("long-enough",))) as real:
        opened = browser.new_page()
        opened.set_default_timeout(10_000)
        opened.goto(real.url)
        opened.get_by_label("API key").fill("long-enough")
        opened.get_by_label("API key").press("Enter")
        listed(opened)
        send(opened, "say ☃ it", 2)
        for model in ("base", "clerk"):
            finished(opened, model, "☃ it", len("☃ it".encode()))
        answer(opened, "base").get_by_text("☃").hover()
        expect(opened.locator("#alternatives")).to_contain_text("one character of 3 tokens")
        expect(opened.locator("#alternatives tbody tr")).to_have_count(5)
        send(opened, "hello", 4)
        assert answer(opened, "clerk").last.locator(".text").inner_text() == "clerk: HELLO"
        expect(answer(opened, "base").last.locator(".differs")).to_have_count(0)
        expect(answer(opened, "clerk").last.locator(".differs")).to_have_count(len("clerk: "))
        send(opened, "be slow")
        expect(answer(opened, "base").last.locator(".token").nth(5)).to_be_visible()
        opened.get_by_role("button", name="Stop").click()
        done(opened, 6)
        opened.close()


def test_motion_is_reduced_where_that_is_asked(browser, server):
    server.hold_after = 1
    for asked, name in (("reduce", "none"), ("no-preference", "blink")):
        opened = browser.new_page(reduced_motion=asked)
        opened.goto(server.url)
        listed(opened)
        send(opened, "Go")
        style = "e => getComputedStyle(e, '::after').animationName"
        assert opened.locator(".writing-now").first.evaluate(style) == name
        opened.close()


@pytest.mark.skipif(AXE is None, reason="axe-core is not installed (pip install axe-playwright-python)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", SIZES)
def test_axe_finds_nothing(browser, server, scheme, width):
    # axe is a script that the page's policy does not name.
    viewport = {"width": width, "height": SIZES[width]}
    context = browser.new_context(viewport=viewport, color_scheme=scheme, bypass_csp=True)
    opened = context.new_page()

    def objections(state: str) -> list[str]:
        fits = "document.documentElement.scrollWidth <= window.innerWidth"
        assert opened.evaluate(fits), f"{state}: wider than the window"
        opened.evaluate(AXE.read_text(encoding="utf-8"))
        found = opened.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert len(found["passes"]) > 10
        return [f"{state}: {v['id']}: {json.dumps(v['nodes'])[:300]}" for v in found["violations"]]

    server.prompting["legal"] = Prompting("You are a lawyer.", examples=("Is it legal?", "May I?"))
    opened.goto(server.url)
    listed(opened)
    expect(opened.get_by_role("button", name="May I?")).to_be_visible()
    found = objections("start")
    if width == 390:
        opened.locator("summary").click()
        found += objections("settings")
    server.hold_after, server.fail = 13, {"pirate"}
    opened.get_by_label("pirate").check()
    send(opened, "Go")
    expect(answer(opened, "legal").locator(".token")).to_have_count(13)
    found += objections("writing")
    server.gate.set()
    done(opened, 3 if width == 1440 else 2)
    answer(opened, "legal").locator(".differs").first.focus()
    expect(opened.locator("#alternatives")).to_be_visible()
    found += objections("answers")
    server.key = "secret"
    opened.reload()
    expect(opened.get_by_label("API key")).to_be_visible()
    found += objections("key")
    context.close()
    assert found == []


def test_tokens_that_are_in_both_are_not_marked(page):
    from deltaw.serving.http.page.document import _read

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


def test_the_adapter_is_first_on_a_narrow_screen_and_its_name_stays_in_view(page):
    listed(page)
    send(page, "Explain LoRA", answers=2)
    tops = {name: page.locator(".answer", has_text=name).first.bounding_box() for name in (BASE, "legal")}
    assert tops[BASE]["x"] < tops["legal"]["x"] and tops[BASE]["y"] == tops["legal"]["y"]
    page.set_viewport_size({"width": 390, "height": 500})
    adapter, base = (page.locator(".answer.adapter"), page.locator(".answer:not(.adapter)"))
    assert adapter.bounding_box()["y"] < base.bounding_box()["y"]
    adapter.locator(".text").evaluate("text => { text.style.minHeight = '2000px' }")
    adapter.evaluate("one => window.scrollTo(0, one.getBoundingClientRect().top + window.scrollY + 900)")
    expect(adapter.get_by_role("heading", name="legal")).to_be_in_viewport()
