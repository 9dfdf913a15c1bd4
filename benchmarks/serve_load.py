"""Load test of a server: clients cancel requests, adapters are unloaded and reloaded, and every answer is checked.

An answer is correct if it equals the server's answer to the same request without other load. The partial text of a
canceled request must be a prefix of it. A guest adapter, which is unloaded and reloaded during the test, may be unknown
to the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil


@dataclass(frozen=True)
class Case:
    """A request: model, prompt and maximum number of tokens."""

    model: str
    prompt: str
    tokens: int

    def body(self, stream: bool) -> dict[str, object]:
        body = {"model": self.model, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0}
        return {**body, "stream": True} if stream else body


@dataclass
class Counts:
    """Outcomes of the requests.

    Attributes:
        right: Number of correct answers.
        cancelled: Number of requests canceled by their clients.
        unknown: Number of requests for a guest adapter that was not loaded.
        loads: Number of times that an adapter was unloaded and reloaded.
        tokens: Tokens of correct answers.
        wrong: Descriptions of wrong answers.
        lost: Descriptions of failed requests.
        first: Seconds to the first token of streamed answers.
        memory: (seconds, resident bytes of the server).
        seconds: Duration of the test.
    """

    right: int = 0
    cancelled: int = 0
    unknown: int = 0
    loads: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0


async def answer_sequentially(url: str, cases: list[Case]) -> dict[Case, str]:
    """Return the server's answers to sequential requests."""
    answers = {}
    async with client_of(url) as client:
        for case in cases:
            response = await client.post("/v1/completions", json=case.body(False))
            response.raise_for_status()
            answers[case] = response.json()["choices"][0]["text"]
    return answers


def client_of(url: str) -> httpx.AsyncClient:
    """Return a client with a long timeout, because requests may be queued."""
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))


class LoadTest:
    """Clients that send random cases until a number of requests is reached.

    Args:
        answers: Expected answer of each case.
        guests: Folders of guest adapters by name. They must be loaded.
        requests: Total number of requests.
        clients: Number of concurrent clients.
        process: Process of the server, for measuring its memory.
        cancel: Fraction of the requests that are canceled.
    """

    def __init__(
        self,
        url: str,
        answers: dict[Case, str],
        guests: dict[str, Path],
        *,
        requests: int,
        clients: int,
        process: psutil.Process,
        cancel: float = 0.15,
        seed: int = 0,
    ) -> None:
        self._url = url
        self._answers = answers
        self._cases = list(answers)
        self._guests = guests
        self._remaining = requests
        self._clients = clients
        self._cancel = cancel
        self._process = process
        self._random = random.Random(seed)
        self._start = 0.0
        self.counts = Counts()

    async def run(self) -> Counts:
        """Send all requests and return their outcomes."""
        self._start = time.perf_counter()
        background = [asyncio.create_task(self._watch()), asyncio.create_task(self._reload_guests())]
        await asyncio.gather(*(self._run_client() for _ in range(self._clients)))
        self.counts.seconds = time.perf_counter() - self._start
        for task in background:
            task.cancel()
        for error in await asyncio.gather(*background, return_exceptions=True):
            if isinstance(error, Exception):
                self.counts.lost.append(f"background task: {error!r}")
        return self.counts

    async def _run_client(self) -> None:
        async with client_of(self._url) as client:
            while self._remaining > 0:
                self._remaining -= 1
                case = self._random.choice(self._cases)
                try:
                    await self._send(client, case)
                except Exception as error:  # reported at the end
                    self.counts.lost.append(f"{case}: {error!r}")

    async def _send(self, client: httpx.AsyncClient, case: Case) -> None:
        give_up = self._random.random() < self._cancel
        if give_up and self._random.random() < 0.3:
            await self._abandon(client, case)
        elif give_up or self._random.random() < 0.7:
            await self._streamed(client, case, self._random.randrange(case.tokens) if give_up else None)
        else:
            self._check_response(case, await client.post("/v1/completions", json=case.body(False)))

    async def _abandon(self, client: httpx.AsyncClient, case: Case) -> None:
        """Disconnect after a short time, in any state of the request."""
        post = client.post("/v1/completions", json=case.body(False), timeout=self._random.uniform(0.001, 0.2))
        try:
            answer = await post
        except httpx.TimeoutException:
            self.counts.cancelled += 1
            return
        self._check_response(case, answer)

    async def _streamed(self, client: httpx.AsyncClient, case: Case, max_events: int | None) -> None:
        """Read a streamed answer. Disconnect after ``max_events`` events unless it is None."""
        text = ""
        events = 0
        is_done = False
        start = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=case.body(True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._count_rejected(case, answer)
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                if line == "data: [DONE]":
                    is_done = True
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    self._count_unknown(case, event["error"]["message"])
                    return
                if not events:
                    self.counts.first.append(time.perf_counter() - start)
                events += 1
                text += event["choices"][0]["text"] if event["choices"] else ""
                if max_events is not None and events > max_events:
                    break
        if is_done:
            self._check(case, text)
        elif max_events is None:
            raise RuntimeError("the stream ended without [DONE]")
        elif not self._answers[case].startswith(text):
            self.counts.wrong.append(f"{case}: {text!r} is not a prefix of {self._answers[case]!r}")
        else:
            self.counts.cancelled += 1

    def _check(self, case: Case, text: str) -> None:
        if text == self._answers[case]:
            self.counts.right += 1
            self.counts.tokens += case.tokens
        else:
            self.counts.wrong.append(f"{case}: {text!r} instead of {self._answers[case]!r}")

    def _check_response(self, case: Case, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            self._check(case, answer.json()["choices"][0]["text"])
        else:
            self._count_rejected(case, answer)

    def _count_rejected(self, case: Case, answer: httpx.Response) -> None:
        self._count_unknown(case, f"{answer.status_code}: {answer.json()['error']['message']}")

    def _count_unknown(self, case: Case, message: str) -> None:
        """Count a rejected request. Only requests for guest adapters may be rejected."""
        is_expected = any(words in message for words in ("there is no", "was removed"))
        if case.model not in self._guests or not is_expected:
            raise RuntimeError(message)
        self.counts.unknown += 1

    async def _reload_guests(self) -> None:
        """Unload and load guests in turn."""
        async with client_of(self._url) as client:
            while self._guests:
                for name, folder in self._guests.items():
                    await asyncio.sleep(self._random.uniform(0.0, 0.3))
                    (await client.post("/v1/unload_lora_adapter", json={"lora_name": name})).raise_for_status()
                    await asyncio.sleep(self._random.uniform(0.0, 0.3))
                    await load_guest(client, name, folder)
                    self.counts.loads += 1

    async def _watch(self) -> None:
        while True:
            now = time.perf_counter() - self._start
            self.counts.memory.append((now, self._process.memory_info().rss))
            await asyncio.sleep(0.25)


async def load_guest(client: httpx.AsyncClient, name: str, folder: Path) -> None:
    """Load an adapter into the server."""
    body = {"lora_name": name, "lora_path": str(folder)}
    (await client.post("/v1/load_lora_adapter", json=body)).raise_for_status()


def growth(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """Return the median memory of the second quarter of the test and its growth until the last quarter, in MiB.

    The first quarter is ignored because caches fill up.
    """
    sizes = [size / 2**20 for _, size in memory]
    quarter = max(1, len(sizes) // 4)
    second_quarter = sorted(sizes[quarter : 2 * quarter] or sizes)
    last_quarter = sorted(sizes[-quarter:])
    middle = second_quarter[len(second_quarter) // 2]
    return middle, last_quarter[len(last_quarter) // 2] - middle
