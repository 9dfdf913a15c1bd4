"""A server for the page's tests: it streams made-up answers with log-probabilities, as the OpenAI API does.

Each model's answer is a list of tokens, some of them parts of one character. Requests are kept for a test to
look at, and a gate holds answers back until a test opens it.
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

from deltaw.serving.http.page.document import page_router
from deltaw.training.prompting import Prompting

COMMON = ["A", " low", "-rank", " update", " changes", " few", " numbers", ".", "\n\n", "It", " is"]
SNOWMAN = "☃".encode()
ANSWERS: dict[str, list[str | bytes]] = {
    "SmolLM2-135M-Instruct": [*COMMON, " added", " to", " the", " frozen", " weight", "."],
    "legal": [*COMMON, ",", " hereinafter", ",", " the", " frozen", " weight", "."],
    "pirate": ["Arr", ",", *COMMON[1:], " the", " booty", " ", SNOWMAN[:2], SNOWMAN[2:], "."],
}
BASE = "SmolLM2-135M-Instruct"


def entry(token: str | bytes, logprob: float) -> dict[str, Any]:
    raw = token if isinstance(token, bytes) else token.encode()
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def with_alternatives(token: str | bytes, place: int) -> dict[str, Any]:
    """The chosen token is the likeliest, but at every fifth place the second."""
    chosen = entry(token, math.log(0.2 if place % 5 == 4 else 0.6))
    others = [entry(f" other{n}", math.log(0.3 / 2**n)) for n in range(4)]
    return {**chosen, "top_logprobs": sorted([chosen, *others], key=lambda e: -e["logprob"])}


@dataclass
class PageServer:
    """What the server is to do, and what it was asked.

    Attributes:
        key: the API key that it wants; None for none. asked: bodies of the chat requests.
        prompting: how the rows of a model are prompted.
        hold_after: tokens after which an answer waits for the gate; None never.
        fail: models that fail half-way. gone: models whose reader went away.
    """

    key: str | None = None
    hold_after: int | None = None
    fail: set[str] = field(default_factory=set)
    asked: list[dict[str, Any]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    prompting: dict[str, Prompting] = field(default_factory=dict)
    names: list[str] = field(default_factory=lambda: list(ANSWERS))
    url: str = ""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_router(lambda model: self.prompting.get(model, Prompting())))

        @app.middleware("http")
        async def keys(request: Request, call: Any) -> Any:
            told = request.headers.get("authorization")
            if request.url.path.startswith("/v1") and self.key and told != f"Bearer {self.key}":
                return JSONResponse({"error": {"message": "wrong API key", "type": "auth"}}, 401)
            return await call(request)

        @app.get("/v1/models")
        def models() -> Any:
            data = [
                {"id": n, "object": "model", "parent": None if n == self.names[0] else self.names[0]}
                for n in self.names
            ]
            return {"object": "list", "data": data}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            if len(body["messages"][-1]["content"]) > 5000:
                return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
            return StreamingResponse(self._events(body), media_type="text/event-stream")

        return app

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        model = body["model"]
        whole_answer = ANSWERS.get(model, ANSWERS[BASE])
        tokens = whole_answer[: body["max_tokens"]]
        raw, sent = b"", ""
        for place, token in enumerate(tokens):
            while self.hold_after == place and not self.gate.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:  # the reader went away
                    self.gone.append(model)
                    raise
            if model in self.fail and place == 3:
                yield f"data: {json.dumps({'error': {'message': 'out of memory'}})}\n\n"
                return
            raw += token if isinstance(token, bytes) else token.encode()
            whole = raw.decode(errors="ignore")
            delta, sent = whole[len(sent) :], whole
            yield event({"content": delta}, None, with_alternatives(token, place))
            await asyncio.sleep(0)
        yield event({}, "length" if len(tokens) < len(whole_answer) else "stop", None)
        usage = {"prompt_tokens": 9, "completion_tokens": len(tokens), "total_tokens": 9 + len(tokens)}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def event(delta: dict[str, str], finish: str | None, logprob: dict[str, Any] | None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    choice["logprobs"] = {"content": [logprob]} if logprob else None
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of a server of this application on a free port, until left."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
