"""Images in chat requests to a vision-language model."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.byte_models import save_model, tiny_llama
from tests.serving.http.api_requests import CHAT, COMPLETIONS, chat_body, expect_error
from tests.serving.http.concurrency import run_in_threads, wait_until
from tests.vision_models import chat_prompt, png, reference_text, save_vision_model

RED = png((220, 10, 10))
BLUE = png((10, 10, 220))


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def image_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def question(*images: bytes, text: str = "color?") -> dict[str, Any]:
    """Return a chat request with images before the text."""
    parts = [*(image_part(data_url(image)) for image in images), {"type": "text", "text": text}]
    return chat_body(parts, max_tokens=6)


def answer(server: Any, *images: bytes, text: str = "color?") -> str:
    response = server.post(CHAT, json=question(*images, text=text))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Any]:
    from deltaw.serving.http.opening import OpenOptions, open_served
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.server_thread import run_server

    options = OpenOptions(name="base", precision="fp32", cache_bytes=1 << 22)
    opened = open_served(str(folder), {}, options, log=lambda line: None)
    with contextlib.closing(opened), run_server(opened, ServerSettings(port=0)) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model("llava", tmp_path_factory.mktemp("vision") / "model")


@pytest.fixture(scope="module")
def server(packages: None, folder: Path) -> Iterator[Any]:
    with serve(folder) as server:
        yield server


def test_answers_equal_those_of_the_complete_model(server: Any, folder: Path) -> None:
    for image in (RED, BLUE):
        assert answer(server, image) == reference_text(folder, chat_prompt("<image>color?"), image)
    assert answer(server, BLUE, RED) == reference_text(folder, chat_prompt("<image><image>color?"), BLUE, RED)
    assert answer(server) == reference_text(folder, chat_prompt("color?"))


def test_later_questions_about_an_image_reuse_its_prefix(server: Any) -> None:
    image = png((10, 220, 10))
    usages = [server.post(CHAT, json=question(image, text="x" * 100 + end)).json()["usage"] for end in "ab"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] < 10 and cached[1] > 100


def bomb(side: int) -> bytes:
    """Return a small file of a white image with this many rows and columns."""
    file = io.BytesIO()
    Image.new("1", (side, side), 1).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/a.png", "not downloaded"),
        ("http://127.0.0.1/a.png", "not downloaded"),
        ("file:///etc/hostname", "not downloaded"),
        ("file:/etc/hostname", "not allowed"),
        ("/etc/hostname", "not allowed"),
        ("a.png", "not allowed"),
        ("", "empty"),
        ("data:image/png;base64,????", "not valid base64"),
        ("data:image/png,abc", "not valid base64"),
        (data_url(b""), "cannot be decoded"),
        (data_url(RED[:200]), "cannot be decoded"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "SVG is not a supported image format"),
    ],
)
def test_unusable_images_are_refused(server: Any, url: str, words: str) -> None:
    body = chat_body([image_part(url), {"type": "text", "text": "color?"}])
    assert words in expect_error(server.post(CHAT, json=body), 400)["message"]


def test_part_of_another_type_names_the_supported_types(server: Any) -> None:
    message = expect_error(server.post(CHAT, json=chat_body([{"type": "image", "image": "x"}])), 400)["message"]
    assert "'image' is not supported" in message and "'image_url'" in message


def test_large_images_are_refused_before_decoding(server: Any) -> None:
    for side in (20_000, 6_000):
        assert "more than " in (message := expect_error(server.post(CHAT, json=question(bomb(side))), 400)["message"])
        assert " pixels" in message
    message = expect_error(server.post(CHAT, json=question(bomb(5_000), bomb(5_000))), 400)["message"]
    assert "pixels" in message
    assert "at most 64 images" in expect_error(server.post(CHAT, json=question(*[RED] * 65)), 400)["message"]
    assert server.is_responsive()


def test_images_in_other_messages_and_missing_images_are_refused(server: Any) -> None:
    parts = [image_part(data_url(RED))]
    for role in ("system", "tool"):
        messages = [{"role": role, "content": parts}, {"role": "user", "content": "color?"}]
        expect_error(server.post(CHAT, json={"model": "base", "messages": messages}), 400)


def test_markers_in_texts_are_text(server: Any, folder: Path) -> None:
    prompt = "is this <\u200bimage>?"
    assert answer(server, text="is this <image>?") == reference_text(folder, chat_prompt(prompt))
    assert answer(server, RED, text="is this <image>?") == reference_text(folder, chat_prompt("<image>" + prompt), RED)
    response = server.post(CHAT, json=chat_body("is this <image>?", max_tokens=6))
    assert response.json()["choices"][0]["message"]["content"] == reference_text(folder, chat_prompt(prompt))


def test_text_models_refuse_images(packages: None, tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path / "base")
    with serve(tmp_path / "base") as server:
        assert "text only" in expect_error(server.post(CHAT, json=question(RED)), 400)["message"]
        assert server.is_responsive()


def test_removed_images_do_not_change_answers(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = server.served.images
    pictures = [png((20 * number, 10, 10)) for number in range(8)]
    expected = [answer(server, picture) for picture in pictures]
    assert len(set(expected)) > 1
    monkeypatch.setattr(images, "limit_bytes", 2 * 4 * 32 * 4)  # two images
    assert [answer(server, picture) for picture in pictures * 2] == expected * 2
    assert len(images) <= 3 and images._table.count <= 6 * 4
    monkeypatch.setattr(images, "limit_bytes", 8 * 4 * 32 * 4)
    assert run_in_threads(lambda picture: answer(server, picture), pictures * 3) == expected * 3


def test_images_above_the_limit_are_refused_while_others_run(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = server.served.images
    prompts = server.served.prompts(None)
    monkeypatch.setattr(images, "limit_bytes", 2 * 4 * 32 * 4)
    running = prompts.chat(question(RED, BLUE)["messages"], [])
    expect_error(server.post(CHAT, json=question(png((10, 220, 10)))), 429)
    expect_error(server.post(CHAT, json=question(RED, BLUE, png((10, 220, 10)))), 400)
    assert images.contains(running[running >= images.first_id]).all()
    del running
    answer(server, png((10, 220, 10)))


def test_waiting_images_count_as_pending(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaw.serving.http import prompts
    from deltaw.serving.http.settings import Limits

    finish = threading.Event()
    decode = prompts.decoded_images
    monkeypatch.setattr(prompts, "decoded_images", lambda images: finish.wait(60) and decode(images))
    monkeypatch.setattr(server.request_queue, "_limits", Limits(queue=2))
    with ThreadPoolExecutor(2) as pool:
        try:
            answers = [pool.submit(answer, server, image) for image in (RED, BLUE)]
            assert wait_until(lambda: server.request_queue.pending == 2)
            assert expect_error(server.post(CHAT, json=question(RED)), 429)["code"] == "queue_full"
        finally:
            finish.set()
        assert all(len(text.result()) > 0 for text in answers)
    assert server.is_responsive()
    expect_error(server.post(CHAT, json=question(RED[:200])), 400)
    assert wait_until(lambda: not server.request_queue.pending), "a request that fails is still pending"


def test_prompts_of_token_ids_cannot_contain_images(server: Any) -> None:
    answer(server, RED)
    tokens = server.served.prompts(None).chat(question(RED)["messages"], [])
    assert server.served.engine.scheduler.accepts(tokens).all()
    body = {"model": "base", "prompt": np.asarray(tokens).tolist(), "max_tokens": 2}
    assert "does not exist" in expect_error(server.post(COMPLETIONS, json=body), 400)["message"]
