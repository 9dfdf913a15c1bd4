"""A real model and real adapters behind the server: each name gets texts equal to its model's own."""

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
from tests.byte_models import byte_tokenizer, saved, tiny_llama
from tests.serving.adapter_folders import write_lora
from tests.serving.engines import greedy
from tests.serving.http.asking import CHAT, load, said, unload
from tests.serving.http.waiting import at_once, until

ASKED = said(max_tokens=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and adapters beside it: ``poet`` with a chat template of its own."""
    root = tmp_path_factory.mktemp("served")
    saved(tiny_llama(), root / "base")
    for seed, name in enumerate(("clerk", "poet"), start=1):
        write_lora(tiny_llama(), root / "adapters" / name, seed=seed, size=0.5)
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    (root / "adapters" / "poet" / "chat_template.jinja").write_text(template)
    (root / "adapters" / "broken").mkdir()
    (root / "adapters" / "broken" / "adapter_config.json").write_text("{}")
    return root


def opening(base: Path, adapters: dict[str, Path], say: Any = lambda line: None, **changes: Any) -> Any:
    """What a base and adapters serve."""
    from deltaw.serving.http.opening import Opening, open_served

    how = {"name": "base", "precision": "fp32", "cache_bytes": 1 << 22, **changes}
    return open_served(str(base), adapters, Opening(**how), say=say)


@contextlib.contextmanager
def serving(folders: Path, say: Any = lambda line: None, **settings: Any):
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.running import running

    opened = opening(folders / "base", {"clerk": folders / "adapters" / "clerk"}, say)
    with contextlib.closing(opened), running(opened, ServerSettings(port=0, **settings)) as server:
        yield server


@pytest.fixture(scope="module")
def server(packages, folders):
    with serving(folders, adapters_from=folders / "adapters") as server:
        yield server


RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def expected(folders):
    """What the model with an adapter says to a prompt, or the one without; the poet renders it in its own way."""

    @functools.cache
    def told(name: str, prompt: str = RENDERED) -> str:
        model = tiny_llama()
        if name != "base":
            deltaw.load_adapter(model, folders / "adapters" / name)
        tokens = byte_tokenizer()(prompt)["input_ids"]
        written = greedy(model, tokens, 16, (0, 2))  # the ends of a text and of a turn
        return str(byte_tokenizer().decode(written, skip_special_tokens=True))

    return told


def answer_of(server, name: str) -> str:
    return str(server.post(CHAT, json=ASKED | {"model": name}).json()["choices"][0]["message"]["content"])


def test_each_name_gets_its_own_texts(server, expected):
    long = said("x" * 70, max_tokens=16, model="clerk")
    texts = {name: answer_of(server, name) for name in ("base", "clerk")}
    assert texts == {"base": expected("base"), "clerk": expected("clerk")} and len(set(texts.values())) == 2
    first, second = (server.post(CHAT, json=long).json() for _ in "ab")
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_an_adapter_loaded_by_request_has_its_own_template(server, expected):
    loaded = load(server, "poet", "poet")
    assert loaded.status_code == 200, loaded.text
    assert answer_of(server, "poet") == expected("poet", "<hi>")
    assert "deltaw_adapters_loaded 2.0" in server.get("/metrics").text
    assert load(server, "poet", "clerk").status_code == 400, "the name is taken"
    assert load(server, "poet", "clerk", load_inplace=True).status_code == 200
    assert answer_of(server, "poet") == expected("clerk")
    assert unload(server, "poet").status_code == 200
    assert server.post(CHAT, json=ASKED | {"model": "poet"}).status_code == 404
    assert load(server, "b", "broken").status_code == 400


def test_hostile_adapters_are_refused_while_others_are_answered(server, folders, monkeypatch):
    monkeypatch.setattr("deltaw.lora.expressions.SECONDS", 0.3)
    monkeypatch.setattr("deltaw.data.rendering.STEPS", 1 << 16)
    expression, template = (shutil.copytree(folders / "adapters" / "poet", folders / "adapters" / n) for n in "et")
    settings = json.loads((expression / "adapter_config.json").read_text())
    (expression / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": "(([a-z_0-9]+)[.]?)+!"}))
    loop = "{% for i in range(99999) %}"
    (template / "chat_template.jinja").write_text(loop * 2 + "{% endfor %}" * 2)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load, server, "e", "e")
        while not loading.done():
            assert server.get("/health").status_code == 200
    for refused, says in (loading.result(), "was ended after 0.3 s"), (load(server, "t", "t"), "template was ended"):
        assert refused.status_code == 400 and says in refused.text
    assert server.post(CHAT, json=ASKED | {"model": "clerk"}).status_code == 200


def test_a_schema_binds_the_text(server):
    pytest.importorskip("llguidance", reason="constraints need llguidance: it is in the extra 'serve'")

    def ask(**schema: Any) -> Any:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        drawn = {"model": "clerk", "max_tokens": 60, "temperature": 1, "seed": 5}
        return server.post(CHAT, json=ASKED | drawn | {"response_format": form})

    one = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    choice = ask(**one, additionalProperties=False).json()["choices"][0]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["message"]["content"])["a"] in ("x", "y")
    else:
        assert choice["message"]["content"].lstrip().startswith("{")
    assert ask(type="nothing").status_code == 400


def test_a_run_is_served_under_its_folders_name(folders, packages):
    clerk = folders / "adapters" / "clerk"
    with contextlib.closing(opening(clerk, {}, model=str(folders / "base"))) as served:
        assert served.name == "base" and served.adapters() == ("clerk",)


def test_what_cannot_be_served_is_refused(folders, packages):
    base, clerk, broken = folders / "base", folders / "adapters" / "clerk", folders / "adapters" / "broken"
    for reference, adapters, changes, match in (
        (base, {"a": clerk}, {"name": "a"}, "base model's name"),
        (clerk, {"clerk": clerk}, {"model": str(base)}, "two adapters"),
        (base, {"a": broken}, {}, "broken|adapter"),
        (broken, {}, {}, "does not say which model"),
    ):
        with pytest.raises(UserError, match=match):
            opening(reference, adapters, **changes)


def test_a_model_without_a_decoder_is_run_by_transformers(folders, packages, expected, monkeypatch):
    from deltaw.serving.probes import NotDecodable

    def none(*_: object, **__: object) -> None:
        raise NotDecodable("it has wheels")

    monkeypatch.setattr("deltaw.serving.http.opening.decodable", none)
    told: list[str] = []
    with serving(folders, told.append) as server:
        assert any("it has wheels" in line for line in told)
        assert all(answer_of(server, name) == expected(name) for name in ("base", "clerk"))
    two = dict.fromkeys("ab", folders / "adapters" / "clerk")
    with pytest.raises(UserError, match="serves one adapter"):
        opening(folders / "base", two)


def test_no_answer_is_wrong_or_lost_among_many_clients(server, expected):
    """Clients that ask, stream and leave, while an adapter comes and goes."""
    right = {"base": expected("base"), "clerk": expected("clerk"), "poet": expected("poet", "<hi>")}
    wrong: list[object] = []
    answered: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        chance = random.Random(number)
        for _ in range(10):
            name = chance.choice(["base", "clerk", "poet"])
            asked = ASKED | {"model": name, "stream": chance.random() < 0.5}
            if asked["stream"] and chance.random() < 0.4:
                with server.http.stream("POST", CHAT, json=asked) as response:
                    next(response.iter_raw(), None)  # and leave
                continue
            response = server.post(CHAT, json=asked)
            if name == "poet" and "model_not_found" in response.text:
                continue  # it was gone when the request came, or before its text began
            answered.append(name)
            if response.status_code != 200 or text_of(response.text) != right[name]:
                wrong.append((name, response.status_code, response.text))

    def come_and_go() -> None:
        while not done.is_set():
            loaded = load(server, "poet", "poet")
            done.wait(0.02)
            gone = unload(server, "poet")
            if (loaded.status_code, gone.status_code) != (200, 200):
                wrong.append((loaded.text, gone.text))

    changing = threading.Thread(target=come_and_go)
    changing.start()
    try:
        at_once(ask, range(12))
    finally:
        done.set()
        changing.join()
    assert not wrong, wrong[:3]
    assert len(answered) > 50 and set(answered) == set(right)
    assert until(lambda: not server.desk.in_hand)


def text_of(body: str) -> str:
    """The text of an answer, whole or in events."""
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    choices = [one for event in events or [json.loads(body)] for one in event.get("choices", ())]
    return "".join(one.get("delta", one.get("message")).get("content") or "" for one in choices)
