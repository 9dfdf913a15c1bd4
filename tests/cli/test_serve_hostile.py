"""`deltaw serve` while it gets hostile requests: honest ones are answered, memory comes back, and it ends."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.byte_models import byte_tokenizer, saved, tiny_llama
from tests.cli.test_serve import HEADERS, SECONDS, serving, url_of
from tests.serving.http.hostile import ANSWERS, CHAT, Hostile, memory
from tests.serving.http.waiting import until

httpx = pytest.importorskip("httpx", reason="the tests of the server ask it with httpx: it is in 'dev'")
pytest.importorskip("llguidance", reason="the extra serve is not installed")

ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 32,
    "temperature": 0,
}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"], "additionalProperties": False}
AS_JSON = ASKED | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}


class Honest:
    """A client that asks again and again, in a thread while the block is open.

    Attributes:
        answered: how often it got what it asked for. wrong: answers that were something else.
    """

    def __init__(self, url: str, asked: dict[str, Any] | None) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._url, self._asked = url, asked
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=SECONDS, headers=HEADERS) as client:
            while not self._done.wait(0.1):
                response = client.post(CHAT, json=self._asked) if self._asked else client.get("/health")
                if response.status_code != 200 or not self._right(response):
                    self.wrong.append(f"{response.status_code} {response.text}")
                self.answered += 1

    def _right(self, response: httpx.Response) -> bool:
        if self._asked is not AS_JSON:
            return True
        return json.loads(response.json()["choices"][0]["message"]["content"]) in ({"a": "b"}, {"a": "c"})


@pytest.mark.parametrize("each", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_honest_requests_are_answered_beside_hostile_ones(tmp_path: Path, each: int) -> None:
    (x,) = byte_tokenizer()("x")["input_ids"]
    base = saved(tiny_llama(max_position_embeddings=4096), tmp_path / "base")
    with serving(base, "--cache-memory", "16MB", "--body-seconds", "1", "--write-seconds", "1") as server:
        url = url_of(server)
        kinds = Hostile(url, "tiny", x, HEADERS).kinds
        assert len(kinds) == 10
        with httpx.Client(base_url=url, timeout=SECONDS, headers=HEADERS) as client:
            for asked in (ASKED, AS_JSON):
                assert client.post(CHAT, json=asked).status_code == 200
        before = memory(server.pid)
        with contextlib.ExitStack() as stack:
            probe, chat, constrained = (stack.enter_context(Honest(url, asked)) for asked in (None, ASKED, AS_JSON))
            with ThreadPoolExecutor(10 * each) as pool:
                sent = {(kind, n): pool.submit(kinds[kind], n) for n in range(each) for kind in kinds}
            during = [one.answered for one in (probe, chat, constrained)]
            assert until(lambda: constrained.answered > during[2])
        assert all(one.result() in ANSWERS for one in sent.values()), sent
        for kind in ("grammars with & and ~", "grammars that explode later"):
            assert all(sent[kind, n].result() in (400, 429) for n in range(each))
        assert min(during) > 0 and not [one.wrong for one in (probe, chat, constrained) if one.wrong]
        assert until(lambda: memory(server.pid) < 1.1 * before), (before, memory(server.pid))
        started = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        assert server.wait(SECONDS) == 0
        assert until(lambda: not any(one.is_running() for one in started))
        assert "Traceback" not in server.said()[1]
