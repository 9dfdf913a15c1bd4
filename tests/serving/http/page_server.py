"""A server for the page's tests that streams fixed answers with log-probabilities, as in the OpenAI API.

An answer is a list of tokens, some of which are parts of a character. Requests are recorded, and a gate delays answers
until a test opens it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from deltaw.inference.prompting import Prompting
from deltaw.serving.http.page import page_router

COMMON = ["A", " low", "-rank", " update", " changes", " few", " numbers", ".", "\n\n", "It", " is"]
SNOWMAN = "☃".encode()
ANSWERS: dict[str, list[str | bytes]] = {
    "SmolLM2-135M-Instruct": [*COMMON, " added", " to", " the", " frozen", " weight", "."],
    "legal": [*COMMON, ",", " hereinafter", ",", " the", " frozen", " weight", "."],
    "pirate": ["Arr", ",", *COMMON[1:], " the", " booty", " ", SNOWMAN[:2], SNOWMAN[2:], "."],
}
BASE = "SmolLM2-135M-Instruct"


def token_entry(token: str | bytes, logprob: float) -> dict[str, Any]:
    raw = token if isinstance(token, bytes) else token.encode()
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def with_alternatives(token: str | bytes, position: int) -> dict[str, Any]:
    """Return a token entry with alternatives. The chosen token is the most likely, except at every fifth position."""
    chosen = token_entry(token, math.log(0.2 if position % 5 == 4 else 0.6))
    others = [token_entry(f" other{n}", math.log(0.3 / 2**n)) for n in range(4)]
    return {**chosen, "top_logprobs": sorted([chosen, *others], key=lambda e: -e["logprob"])}


@dataclass
class PageServer:
    """Configuration of the server and its recorded requests.

    Attributes:
        key: Required API key, or None.
        hold_after: Number of tokens after which an answer waits for the gate, or None.
        token_seconds: Pause after each token.
        fail: Models that fail after three tokens.
        chat_requests: Bodies of the chat requests.
        disconnected: Models with disconnected clients.
        prompting: Prompt format of a model's rows.
    """

    key: str | None = None
    hold_after: int | None = None
    token_seconds: float = 0.0
    fail: set[str] = field(default_factory=set)
    chat_requests: list[dict[str, Any]] = field(default_factory=list)
    disconnected: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    prompting: dict[str, Prompting] = field(default_factory=dict)
    names: list[str] = field(default_factory=lambda: list(ANSWERS))
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_router(lambda model: self.prompting.get(model, Prompting())))

        @app.middleware("http")
        async def keys(request: Request, call: Any) -> Any:
            authorization = request.headers.get("authorization")
            if request.url.path.startswith("/v1") and self.key and authorization != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "wrong API key", "type": "auth"}}, 401)
            return await call(request)

        @app.get("/v1/models")
        def models() -> Any:
            base = self.names[0]
            data = [{"id": n, "object": "model", "parent": None if n == base else base} for n in self.names]
            return {"object": "list", "data": data}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            self.chat_requests.append(body)
            if len(body["messages"][-1]["content"]) > 5000:
                return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
            return StreamingResponse(self._watched_events(body), media_type="text/event-stream")

        return app

    async def _watched_events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Yield the events, and record a client that disconnects at any point of them."""
        async with contextlib.aclosing(self._events(body)) as events:
            try:
                async for text in events:
                    yield text
            except (asyncio.CancelledError, GeneratorExit):
                self.disconnected.append(body["model"])
                raise

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        model = body["model"]
        all_tokens = ANSWERS.get(model, ANSWERS[BASE])
        tokens = all_tokens[: body["max_tokens"]]
        raw = b""
        sent = ""
        for position, token in enumerate(tokens):
            while self.hold_after == position and not self.gate.is_set():
                await asyncio.sleep(0.01)
            if model in self.fail and position == 3:
                yield f"data: {json.dumps({'error': {'message': 'out of memory'}})}\n\n"
                return
            raw += token if isinstance(token, bytes) else token.encode()
            text = raw.decode(errors="ignore")
            delta = text[len(sent) :]
            sent = text
            yield event({"content": delta}, None, with_alternatives(token, position))
            await asyncio.sleep(self.token_seconds)
        yield event({}, "length" if len(tokens) < len(all_tokens) else "stop", None)
        usage = {"prompt_tokens": 9, "completion_tokens": len(tokens), "total_tokens": 9 + len(tokens)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def event(delta: dict[str, str], finish: str | None, logprob: dict[str, Any] | None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    choice["logprobs"] = {"content": [logprob]} if logprob else None
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


@contextlib.contextmanager
def serve_app(app: Any) -> Iterator[str]:
    """Serve an application on a free port and yield its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
