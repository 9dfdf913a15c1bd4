"""Many clients of one server at once: some go away in between, adapters come and go, every answer is checked.

An answer is right if it equals what the server wrote for the same request when it had nothing else to do; of
a request that its client gave up, what came so far must be the beginning of it. A guest adapter, which is
loaded and unloaded meanwhile, may also be unknown to the server.
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
    """One request: which model continues which prompt, by how many tokens."""

    model: str
    prompt: str
    tokens: int

    def body(self, stream: bool) -> dict[str, object]:
        told = {"model": self.model, "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0}
        return {**told, "stream": True} if stream else told


@dataclass
class Counts:
    """What became of the requests.

    Attributes:
        right, cancelled, unknown: answers that were right, given up, and of a guest that was not loaded.
        wrong, lost: what must not be, each with words.
        first: seconds to the first token of streamed answers. memory: (seconds, bytes of the server).
        loads: times that an adapter was loaded and unloaded.
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


async def written_alone(url: str, cases: list[Case]) -> dict[Case, str]:
    """The answers of a server that has nothing else to do, one after another."""
    answers = {}
    async with client_of(url) as client:
        for case in cases:
            told = await client.post("/v1/completions", json=case.body(False))
            told.raise_for_status()
            answers[case] = told.json()["choices"][0]["text"]
    return answers


def client_of(url: str) -> httpx.AsyncClient:
    """A client that waits long, since it is the server's order that is measured."""
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))


class LoadTest:
    """Clients that ask at random until a number of requests is made.

    Args:
        answers: of each case, as written alone. guests: folders of adapters that come and go, by name; they
            are loaded now.
        requests, clients: how many. cancel: share of the requests that are given up.
        process: of the server, for its memory.
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
        self._left = requests
        self._clients = clients
        self._cancel = cancel
        self._process = process
        self._random = random.Random(seed)
        self._began = 0.0
        self.counts = Counts()

    async def run(self) -> Counts:
        """Make all requests."""
        self._began = time.perf_counter()
        aside = [asyncio.create_task(self._watch()), asyncio.create_task(self._come_and_go())]
        await asyncio.gather(*(self._one_client() for _ in range(self._clients)))
        self.counts.seconds = time.perf_counter() - self._began
        for task in aside:
            task.cancel()
        for error in await asyncio.gather(*aside, return_exceptions=True):
            if isinstance(error, Exception):
                self.counts.lost.append(f"beside the clients: {error!r}")
        return self.counts

    async def _one_client(self) -> None:
        async with client_of(self._url) as client:
            while self._left > 0:
                self._left -= 1
                case = self._random.choice(self._cases)
                try:
                    await self._one(client, case)
                except Exception as error:  # counted, and told at the end
                    self.counts.lost.append(f"{case}: {error!r}")

    async def _one(self, client: httpx.AsyncClient, case: Case) -> None:
        give_up = self._random.random() < self._cancel
        if give_up and self._random.random() < 0.3:
            await self._abandon(client, case)
        elif give_up or self._random.random() < 0.7:
            await self._streamed(client, case, self._random.randrange(case.tokens) if give_up else None)
        else:
            self._whole(case, await client.post("/v1/completions", json=case.body(False)))

    async def _abandon(self, client: httpx.AsyncClient, case: Case) -> None:
        """Go away while waiting, wherever the request is by then."""
        post = client.post("/v1/completions", json=case.body(False), timeout=self._random.uniform(0.001, 0.2))
        try:
            answer = await post
        except httpx.TimeoutException:
            self.counts.cancelled += 1
            return
        self._whole(case, answer)

    async def _streamed(self, client: httpx.AsyncClient, case: Case, leave_after: int | None) -> None:
        """Read an answer in events; with ``leave_after`` go away after so many."""
        text, events, ended = "", 0, False
        began = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=case.body(True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._refused(case, answer)
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    continue
                told = json.loads(line[5:])
                if "error" in told:
                    self._away(case, told["error"]["message"])
                    return
                if not events:
                    self.counts.first.append(time.perf_counter() - began)
                events += 1
                text += told["choices"][0]["text"] if told["choices"] else ""
                if leave_after is not None and events > leave_after:
                    break
        if ended:
            self._check(case, text)
        elif leave_after is None:
            raise RuntimeError("the stream ended before its end")
        elif not self._answers[case].startswith(text):
            self.counts.wrong.append(f"{case}: {text!r} does not begin {self._answers[case]!r}")
        else:
            self.counts.cancelled += 1

    def _check(self, case: Case, text: str) -> None:
        if text == self._answers[case]:
            self.counts.right += 1
            self.counts.tokens += case.tokens
        else:
            self.counts.wrong.append(f"{case}: {text!r} instead of {self._answers[case]!r}")

    def _whole(self, case: Case, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            self._check(case, answer.json()["choices"][0]["text"])
        else:
            self._refused(case, answer)

    def _refused(self, case: Case, answer: httpx.Response) -> None:
        self._away(case, f"{answer.status_code}: {answer.json()['error']['message']}")

    def _away(self, case: Case, message: str) -> None:
        """Only a guest may be refused, while it is away."""
        known = any(words in message for words in ("there is no", "has been removed"))
        if case.model not in self._guests or not known:
            raise RuntimeError(message)
        self.counts.unknown += 1

    async def _come_and_go(self) -> None:
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
            now = time.perf_counter() - self._began
            self.counts.memory.append((now, self._process.memory_info().rss))
            await asyncio.sleep(0.25)


async def load_guest(client: httpx.AsyncClient, name: str, folder: Path) -> None:
    """Let the server load an adapter."""
    body = {"lora_name": name, "lora_path": str(folder)}
    (await client.post("/v1/load_lora_adapter", json=body)).raise_for_status()


def growth(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """The median of the second quarter of the time, and what the last quarter's has more, in MiB.

    In the first quarter caches fill up.
    """
    sizes = [size / 2**20 for _, size in memory]
    quarter = max(1, len(sizes) // 4)
    early, late = sorted(sizes[quarter : 2 * quarter] or sizes), sorted(sizes[-quarter:])
    middle = early[len(early) // 2]
    return middle, late[len(late) // 2] - middle
