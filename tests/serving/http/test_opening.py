"""A real model and real adapters behind the server: each name gets texts equal to its model's own."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM

import deltaw
from deltaw.errors import UserError
from deltaw.runtime.generation import generate
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.serving.http.waiting import until

if TYPE_CHECKING:
    from tests.serving.http.running import Running

MESSAGES = [{"role": "user", "content": "hi"}]
ASKED: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 16}
CHAT = "/v1/chat/completions"


def adapted(seed: int) -> LlamaForCausalLM:
    """The base with an adapter that says something else."""
    model = tiny_llama()
    deltaw.attach(model, deltaw.LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and adapters beside it: ``poet`` with a chat template of its own."""
    root = tmp_path_factory.mktemp("served")
    tiny_llama().save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    for seed, name in enumerate(("clerk", "poet"), start=1):
        deltaw.save_adapter(adapted(seed), root / "adapters" / name)
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


@pytest.fixture(scope="module")
def server(packages: None, folders: Path) -> Iterator[Running]:
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.running import running

    settings = ServerSettings(port=0, adapters_from=folders / "adapters")
    served = opening(folders / "base", {"clerk": folders / "adapters" / "clerk"})
    with contextlib.closing(served), running(served, settings) as server:
        yield server


def expected(model: LlamaForCausalLM, prompt: str) -> str:
    tokenizer = byte_tokenizer()
    tokens = torch.tensor(tokenizer(prompt)["input_ids"]).numpy()
    [answer] = generate(model, tokenizer, [tokens], max_new_tokens=16)
    return answer.text


def answer_of(client: Any, name: str) -> str:
    return str(client.post(CHAT, json=ASKED | {"model": name}).json()["choices"][0]["message"]["content"])


RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_each_name_gets_its_own_texts(server: Running) -> None:
    long = ASKED | {"model": "clerk", "messages": [{"role": "user", "content": "x" * 70}]}
    with server.client() as client:
        texts = {name: answer_of(client, name) for name in ("base", "clerk")}
        first, second = (client.post(CHAT, json=long).json() for _ in "ab")
    assert texts["base"] == expected(tiny_llama(), RENDERED)
    assert texts["clerk"] == expected(adapted(1), RENDERED) != texts["base"]
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_an_adapter_loaded_by_request_has_its_own_template(server: Running) -> None:
    with server.client() as client:
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
        assert loaded.status_code == 200, loaded.text
        assert answer_of(client, "poet") == expected(adapted(2), "<hi>")
        assert "deltaw_adapters_loaded 2.0" in client.get("/metrics").text
        asked = {"lora_name": "poet", "lora_path": "clerk"}
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 400, "the name is taken"
        assert client.post("/v1/load_lora_adapter", json=asked | {"load_inplace": True}).status_code == 200
        assert answer_of(client, "poet") == expected(adapted(1), RENDERED)
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        assert gone.status_code == 200
        assert client.post(CHAT, json=ASKED | {"model": "poet"}).status_code == 404
        broken = client.post("/v1/load_lora_adapter", json={"lora_name": "b", "lora_path": "broken"})
        assert broken.status_code == 400, broken.text


def test_hostile_adapters_are_refused_while_others_are_answered(
    server: Running, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaw.lora.expressions.SECONDS", 0.5)
    monkeypatch.setattr("deltaw.data.rendering.STEPS", 1 << 16)
    expression, template = (shutil.copytree(folders / "adapters" / "poet", folders / "adapters" / n) for n in "et")
    settings = json.loads((expression / "adapter_config.json").read_text())
    settings["target_modules"] = "(([a-z_0-9]+)[.]?)+!"
    (expression / "adapter_config.json").write_text(json.dumps(settings))
    loop = "{% for i in range(99999) %}"
    (template / "chat_template.jinja").write_text(loop * 2 + "{% endfor %}" * 2)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        asked = {"lora_name": "e", "lora_path": "e"}
        loading = pool.submit(client.post, "/v1/load_lora_adapter", json=asked)
        while not loading.done():
            assert client.get("/health").status_code == 200
        refused = loading.result()
        assert refused.status_code == 400 and "was ended after 0.5 seconds" in refused.text
        refused = client.post("/v1/load_lora_adapter", json={"lora_name": "t", "lora_path": "t"})
        assert refused.status_code == 400 and "the chat template was ended" in refused.text
        assert client.post(CHAT, json=ASKED | {"model": "clerk"}).status_code == 200


def test_a_schema_binds_the_text(server: Running) -> None:
    pytest.importorskip("llguidance", reason="constraints need llguidance: it is in the extra 'serve'")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}}}
    asked = ASKED | {"model": "clerk", "response_format": form, "max_tokens": 60, "temperature": 1, "seed": 5}
    with server.client() as client:
        choice = client.post(CHAT, json=asked).json()["choices"][0]
        unknown = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}
        refused = client.post(CHAT, json=asked | {"response_format": unknown})
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["message"]["content"])["a"] in ("x", "y")
    else:
        assert choice["message"]["content"].lstrip().startswith("{")
    assert refused.status_code == 400


def test_a_run_is_served_under_its_folders_name(folders: Path, packages: None) -> None:
    clerk = folders / "adapters" / "clerk"
    with contextlib.closing(opening(clerk, {}, model=str(folders / "base"))) as served:
        assert served.name == "base" and served.adapters() == ("clerk",)


def test_what_cannot_be_served_is_refused(folders: Path, packages: None) -> None:
    base, clerk, broken = folders / "base", folders / "adapters" / "clerk", folders / "adapters" / "broken"
    for reference, adapters, changes, match in (
        (base, {"a": clerk}, {"name": "a"}, "base model's name"),
        (clerk, {"clerk": clerk}, {"model": str(base)}, "two adapters"),
        (base, {"a": broken}, {}, "broken|adapter"),
        (broken, {}, {}, "does not say which model"),
    ):
        with pytest.raises(UserError, match=match):
            opening(reference, adapters, **changes)


def test_a_model_without_a_decoder_is_run_by_transformers(
    folders: Path, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaw.serving.http.settings import ServerSettings
    from deltaw.serving.probes import NotDecodable
    from tests.serving.http.running import running

    def none(*_: object, **__: object) -> None:
        raise NotDecodable("it has wheels")

    monkeypatch.setattr("deltaw.serving.http.opening.decodable", none)
    said: list[str] = []
    clerk = folders / "adapters" / "clerk"
    with contextlib.closing(opening(folders / "base", {"clerk": clerk}, said.append)) as served:
        assert any("it has wheels" in line for line in said)
        with running(served, ServerSettings(port=0)) as server, server.client() as client:
            texts = {name: answer_of(client, name) for name in ("base", "clerk")}
    assert texts == {"base": expected(tiny_llama(), RENDERED), "clerk": expected(adapted(1), RENDERED)}
    with pytest.raises(UserError, match="serves one adapter"):
        opening(folders / "base", {"a": clerk, "b": folders / "adapters" / "poet"})


def test_no_answer_is_wrong_or_lost_among_many_clients(server: Running) -> None:
    """Clients that ask, stream and leave, while an adapter comes and goes."""
    import random
    import threading

    right = {"base": expected(tiny_llama(), RENDERED), "clerk": expected(adapted(1), RENDERED)}
    right["poet"] = expected(adapted(2), "<hi>")
    wrong: list[object] = []
    answered: list[str] = []
    done = threading.Event()

    def ask(number: int) -> None:
        chance = random.Random(number)
        with server.client() as client:
            for _ in range(10):
                name = chance.choice(["base", "clerk", "poet"])
                asked = ASKED | {"model": name, "stream": chance.random() < 0.5}
                if asked["stream"] and chance.random() < 0.4:
                    with client.stream("POST", CHAT, json=asked) as response:
                        next(response.iter_raw(), None)  # and leave
                    continue
                response = client.post(CHAT, json=asked)
                if name == "poet" and "model_not_found" in response.text:
                    continue  # it was gone when the request came, or before its text began
                answered.append(name)
                text = text_of(response.text)
                if response.status_code != 200 or text != right[name]:
                    wrong.append((name, response.status_code, response.text))

    def come_and_go() -> None:
        with server.client() as client:
            while not done.is_set():
                loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "poet", "lora_path": "poet"})
                done.wait(0.02)
                gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
                if (loaded.status_code, gone.status_code) != (200, 200):
                    wrong.append((loaded.text, gone.text))

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    changing = threading.Thread(target=come_and_go)
    for thread in (changing, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    done.set()
    changing.join()
    assert not wrong, wrong[:3]
    assert len(answered) > 50 and set(answered) == set(right)
    assert until(lambda: not server.desk.in_hand)


def text_of(body: str) -> str:
    """The text of an answer, whole or in events."""
    if not body.startswith("data:"):
        choices = json.loads(body).get("choices") or [{"message": {"content": body}}]
        return str(choices[0]["message"]["content"])
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] if "choices" in event else {"delta": {"content": body}} for event in events]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
