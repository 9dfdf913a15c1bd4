"""`deltaw serve` under hostile requests answers valid ones, releases memory and shuts down."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.byte_models import byte_tokenizer, save_model, tiny_llama
from tests.cli.test_serve import HEADERS, SECONDS, start_server, url_of
from tests.serving.http.concurrency import wait_until
from tests.serving.http.hostile import ALLOWED_STATUSES, CHAT, HostileClient, memory

httpx = pytest.importorskip("httpx", reason="requires httpx (extra 'dev')")
pytest.importorskip("llguidance", reason="the extra serve is not installed")

REQUEST: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 32}
REQUEST |= {"temperature": 0}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"], "additionalProperties": False}
JSON_REQUEST = REQUEST | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}


class HonestClient:
    """Client that repeats a request in a thread until the block is left.

    Attributes:
        answered: Number of responses.
        wrong: Responses that are not the expected ones.
    """

    def __init__(self, url: str, request: dict[str, Any] | None) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._url = url
        self._request = request
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._send_requests)

    def __enter__(self) -> HonestClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _send_requests(self) -> None:
        with httpx.Client(base_url=self._url, timeout=SECONDS, headers=HEADERS) as client:
            while not self._done.wait(0.1):
                response = client.post(CHAT, json=self._request) if self._request else client.get("/health")
                if response.status_code != 200 or not self._is_valid(response):
                    self.wrong.append(f"{response.status_code} {response.text}")
                self.answered += 1

    def _is_valid(self, response: httpx.Response) -> bool:
        if self._request is not JSON_REQUEST:
            return True
        return json.loads(response.json()["choices"][0]["message"]["content"]) in ({"a": "b"}, {"a": "c"})


@pytest.mark.slow
def test_honest_requests_are_answered_during_hostile_ones(tmp_path: Path) -> None:
    repeats = 5
    (x,) = byte_tokenizer()("x")["input_ids"]
    base = save_model(tiny_llama(max_position_embeddings=4096), tmp_path / "base")
    with start_server(base, "--cache-memory", "16MB", "--body-seconds", "1", "--write-seconds", "1") as server:
        url = url_of(server)
        kinds = HostileClient(url, "tiny", x, HEADERS).kinds
        assert len(kinds) == 10
        with httpx.Client(base_url=url, timeout=SECONDS, headers=HEADERS) as client:
            for request in (REQUEST, JSON_REQUEST):
                assert client.post(CHAT, json=request).status_code == 200
        before = memory(server.pid)
        with contextlib.ExitStack() as stack:
            clients = [HonestClient(url, request) for request in (None, REQUEST, JSON_REQUEST)]
            probe, chat, constrained = map(stack.enter_context, clients)
            with ThreadPoolExecutor(10 * repeats) as pool:
                futures = {(kind, n): pool.submit(kinds[kind], n) for n in range(repeats) for kind in kinds}
            counts = [client.answered for client in (probe, chat, constrained)]
            assert wait_until(lambda: constrained.answered > counts[2])
        assert all(future.result() in ALLOWED_STATUSES for future in futures.values()), futures
        for kind in ("grammars with & and ~", "grammars that explode later"):
            assert all(futures[kind, n].result() in (400, 429) for n in range(repeats))
        assert min(counts) > 0 and not [client.wrong for client in (probe, chat, constrained) if client.wrong]
        assert wait_until(lambda: memory(server.pid) < 1.1 * before), (before, memory(server.pid))
        started = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        assert server.wait(SECONDS) == 0
        assert wait_until(lambda: not any(process.is_running() for process in started))
        assert "Traceback" not in server.current_output()[1]
