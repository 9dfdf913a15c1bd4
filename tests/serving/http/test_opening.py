"""Tests of a real model with adapters behind the server: each name returns the texts of its model."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import deltaw
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer, save_model, tiny_llama
from tests.serving.adapter_folders import write_lora
from tests.serving.engines import greedy
from tests.serving.http.api_requests import CHAT, chat_body, load, unload
from tests.serving.http.concurrency import run_in_threads, wait_until

REQUEST = chat_body(max_tokens=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and adapters. The adapter ``poet`` has its own chat template."""
    root = tmp_path_factory.mktemp("served")
    save_model(tiny_llama(), root / "base")
    for seed, name in enumerate(("clerk", "poet"), start=1):
        write_lora(tiny_llama(), root / "adapters" / name, seed=seed, size=0.5)
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (root / "adapters" / "poet" / "chat_template.jinja").write_text(template)
    (root / "adapters" / "broken").mkdir()
    (root / "adapters" / "broken" / "adapter_config.json").write_text("{}")
    return root


def open_model(base: Path, adapters: dict[str, Path], log: Any = lambda line: None, **changes: Any) -> Any:
    """Open a base model with adapters for serving."""
    from deltaw.serving.http.opening import OpenOptions, open_served

    options = {"name": "base", "precision": "fp32", "cache_bytes": 1 << 22, **changes}
    return open_served(str(base), adapters, OpenOptions(**options), log=log)


@contextlib.contextmanager
def serve_model(folders: Path, log: Any = lambda line: None, **settings: Any):
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.server_thread import run_server

    opened_model = open_model(folders / "base", {"clerk": folders / "adapters" / "clerk"}, log)
    with contextlib.closing(opened_model), run_server(opened_model, ServerSettings(port=0, **settings)) as server:
        yield server


@pytest.fixture(scope="module")
def server(packages, folders):
    with serve_model(folders, adapters_from=folders / "adapters") as server:
        yield server


RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def expected(folders):
    """Return the expected completion of a prompt with a named adapter or the base model."""

    @functools.cache
    def complete(name: str, prompt: str = RENDERED) -> str:
        model = tiny_llama()
        if name != "base":
            deltaw.load_adapter(model, folders / "adapters" / name)
        tokens = byte_tokenizer()(prompt)["input_ids"]
        completion = greedy(model, tokens, 16, (0, 2))  # end of text and end of turn
        return str(byte_tokenizer().decode(completion, skip_special_tokens=True))

    return complete


def completion_of(server, name: str) -> str:
    return str(server.post(CHAT, json=REQUEST | {"model": name}).json()["choices"][0]["message"]["content"])


def test_each_name_returns_texts_of_its_model(server, expected):
    long = chat_body("x" * 70, max_tokens=16, model="clerk")
    texts = {name: completion_of(server, name) for name in ("base", "clerk")}
    assert texts == {"base": expected("base"), "clerk": expected("clerk")} and len(set(texts.values())) == 2
    first, second = (server.post(CHAT, json=long).json() for _ in "ab")
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_loaded_adapter_uses_its_template(server, expected):
    loaded = load(server, "poet", "poet")
    assert loaded.status_code == 200, loaded.text
    assert completion_of(server, "poet") == expected("poet", "<hi><")  # "<" opens an answer in this template
    assert "deltaw_adapters_loaded 2.0" in server.get("/metrics").text
    assert load(server, "poet", "clerk").status_code == 400, "the name is already used"
    assert load(server, "poet", "clerk", load_inplace=True).status_code == 200
    assert completion_of(server, "poet") == expected("clerk")
    assert unload(server, "poet").status_code == 200
    assert server.post(CHAT, json=REQUEST | {"model": "poet"}).status_code == 404
    assert load(server, "b", "broken").status_code == 400


def test_hostile_adapters_are_rejected_without_blocking_requests(server, folders, monkeypatch):
    monkeypatch.setattr("deltaw.lora.expressions.SECONDS", 0.3)
    monkeypatch.setattr("deltaw.data.rendering.SECONDS", 0.3)
    expression, template = (shutil.copytree(folders / "adapters" / "poet", folders / "adapters" / n) for n in "et")
    settings = json.loads((expression / "adapter_config.json").read_text())
    (expression / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": "(([a-z_0-9]+)[.]?)+!"}))
    loop = "{% for i in range(99999) %}"
    (template / "chat_template.jinja").write_text(loop * 2 + "{% endfor %}" * 2)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, server, "e", "e")
        while not loading.done():
            assert server.get("/health").status_code == 200
    for response, message in (
        (loading.result(), "was stopped after 0.3 s"),
        (load(server, "t", "t"), "template was stopped"),
    ):
        assert response.status_code == 400 and message in response.text
    assert server.post(CHAT, json=REQUEST | {"model": "clerk"}).status_code == 200


def test_schema_constrains_completion(server):
    pytest.importorskip("llguidance", reason="constraints require llguidance (extra 'serve')")

    def send(**schema: Any) -> Any:
        response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        fields = {"model": "clerk", "max_tokens": 60, "temperature": 1, "seed": 5}
        return server.post(CHAT, json=REQUEST | fields | {"response_format": response_format})

    object_schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    choice = send(**object_schema, additionalProperties=False).json()["choices"][0]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["message"]["content"])["a"] in ("x", "y")
    else:
        assert choice["message"]["content"].lstrip().startswith("{")
    assert send(type="nothing").status_code == 400


def test_run_is_served_under_folder_name(folders, packages):
    clerk = folders / "adapters" / "clerk"
    with contextlib.closing(open_model(clerk, {}, model=str(folders / "base"))) as served:
        assert served.name == "base" and served.adapters() == ("clerk",)


def test_invalid_combinations_are_rejected(folders, packages):
    base = folders / "base"
    clerk = folders / "adapters" / "clerk"
    broken = folders / "adapters" / "broken"
    for reference, adapters, changes, match in (
        (base, {"a": clerk}, {"name": "a"}, "base model's name"),
        (clerk, {"clerk": clerk}, {"model": str(base)}, "two adapters"),
        (base, {"a": broken}, {}, "broken|adapter"),
        (broken, {}, {}, "does not say which model"),
    ):
        with pytest.raises(UserError, match=match):
            open_model(reference, adapters, **changes)


def test_unsupported_model_is_decoded_by_transformers(folders, packages, expected, monkeypatch):
    from deltaw.decoding.probes import NotDecodable

    def raise_not_decodable(*_: object, **__: object) -> None:
        raise NotDecodable("simulated unsupported model")

    monkeypatch.setattr("deltaw.serving.http.opening.build_decodable", raise_not_decodable)
    lines: list[str] = []
    with serve_model(folders, lines.append) as server:
        assert any("simulated unsupported model" in line for line in lines)
        assert all(completion_of(server, name) == expected(name) for name in ("base", "clerk"))
    two_adapters = dict.fromkeys("ab", folders / "adapters" / "clerk")
    with pytest.raises(UserError, match="serves one adapter"):
        open_model(folders / "base", two_adapters)


def test_concurrent_clients_receive_correct_answers_during_reloads(server, expected):
    """Clients send, stream and disconnect while an adapter is loaded and unloaded repeatedly."""
    expected_texts = {"base": expected("base"), "clerk": expected("clerk"), "poet": expected("poet", "<hi><")}
    errors: list[object] = []
    completed_names: list[str] = []
    stopped = threading.Event()

    def send_requests(number: int) -> None:
        random_state = random.Random(number)
        for _ in range(10):
            name = random_state.choice(["base", "clerk", "poet"])
            body = REQUEST | {"model": name, "stream": random_state.random() < 0.5}
            if body["stream"] and random_state.random() < 0.4:
                with server.http.stream("POST", CHAT, json=body) as response:
                    next(response.iter_raw(), None)  # then disconnect
                continue
            response = server.post(CHAT, json=body)
            if name == "poet" and "model_not_found" in response.text:
                continue  # it was unloaded before the request started
            completed_names.append(name)
            if response.status_code != 200 or text_of(response.text) != expected_texts[name]:
                errors.append((name, response.status_code, response.text))

    def reload_adapter() -> None:
        while not stopped.is_set():
            loaded = load(server, "poet", "poet")
            wait_until(lambda: "poet" in completed_names or stopped.is_set())
            stopped.wait(0.02)
            unloaded = unload(server, "poet")
            if (loaded.status_code, unloaded.status_code) != (200, 200):
                errors.append((loaded.text, unloaded.text))

    reloader = threading.Thread(target=reload_adapter)
    reloader.start()
    try:
        run_in_threads(send_requests, range(12))
    finally:
        stopped.set()
        reloader.join()
    assert not errors, errors[:3]
    assert len(completed_names) > 50 and set(completed_names) == set(expected_texts)
    assert wait_until(lambda: not server.request_queue.pending)


def text_of(body: str) -> str:
    """Return the text of a response, either in one body or in events."""
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events or [json.loads(body)] for choice in event.get("choices", ())]
    return "".join(choice.get("delta", choice.get("message")).get("content") or "" for choice in choices)
