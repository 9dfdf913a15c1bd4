"""An engine that writes texts without a model: what it writes follows from the request alone.

The base answers a prompt with the prompt's last line in capitals, an adapter with its own name before it, so
that a test sees which prompt and which adapter a text came from. Some prompts make it slow, or fail.
"""

from __future__ import annotations

import codecs
import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from deltaw.errors import UserError
from deltaw.serving.http.preparing import TokenizerPrompts
from deltaw.serving.http.served import Served
from deltaw.serving.request import (
    EngineLoad,
    FinishReason,
    Listener,
    Piece,
    Request,
    TokenLogprob,
    UnknownAdapterError,
    Written,
)
from tests.byte_models import TEMPLATE, byte_tokenizer

POSITIONS = 4096
# Texts that a prompt's last line asks for.
SLOW, FAIL, LONG = "be slow", "fail", "go on"
TOOLS = "{{ tools | tojson }}\nUse <tool_call></tool_call>"
TOOLS_TEMPLATE = f"{{% if tools %}}<|im_start|>system\n{TOOLS}<|im_end|>\n{{% endif %}}{TEMPLATE}"


class FakeWriting:
    """One text, made when it is read."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._cancelled, self._began = threading.Event(), time.monotonic()

    def cancel(self) -> None:
        self._engine.cancelled += not self._cancelled.is_set()
        self._cancelled.set()

    def result(self) -> Written:
        raise RuntimeError("a secret of the engine")

    def __iter__(self) -> Iterator[Piece]:
        engine = self._engine
        with engine.lock:
            engine.running += 1
        try:
            yield from self._pieces()
        finally:
            with engine.lock:
                engine.running -= 1
                engine.ended += 1

    def _pieces(self) -> Iterator[Piece]:
        request = self._request
        prompt = self._engine.text_of(request.tokens)
        line = prompt.replace("<|im_end|>\n<|im_start|>assistant\n", "").splitlines()[-1]
        if line == FAIL:
            yield Piece("", finish="error")
            return
        text = self._text(line)
        for stop in request.stop:
            text = text.partition(stop)[0]
        tokens = self._engine.tokens_of(text)
        more = len(tokens) > request.max_new_tokens or line == LONG or request.stop_ids == ()
        told = request.sampling.logprobs is not None
        first = self._logprobs(request.tokens[1:]) if told and request.prompt_logprobs else ()
        reused = len(request.tokens) // 2
        # As in a real engine, a character comes with its last byte.
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        for done, token in enumerate(itertools.cycle(tokens) if more else tokens):
            if (ended := self._ended()) is not None:
                yield Piece("", finish=ended)
                return
            if done == request.max_new_tokens:
                break
            logprobs = first + (self._logprobs([token]) if told else ())
            yield Piece(decoder.decode(bytes([_BYTE.get(token, 0x3F)])), (token,), logprobs, reused=reused)
            reused, first = 0, ()
            if line == SLOW:
                self._cancelled.wait(0.05)
        yield Piece("", (), first, finish="length" if more else "stop", reused=reused)

    def _ended(self) -> FinishReason | None:
        if self._cancelled.is_set() or self._engine.closed:
            return "cancelled"
        late = self._request.seconds is not None and time.monotonic() > self._began + self._request.seconds
        return "timeout" if late else None

    def _text(self, line: str) -> str:
        request = self._request
        if request.constraint is not None:
            kind, value = request.constraint.kind, request.constraint.value
            return json.dumps(_instance(json.loads(value or "{}"))) if kind.startswith("json") else "matched"
        if line.startswith("say "):
            return line.removeprefix("say ").replace("\\n", "\n")
        name = f"{request.adapter}: " if request.adapter not in (None, "tools") else ""
        drawn = f" {request.sampling.seed}" if request.sampling.temperature else ""
        return name + (line * 20 if line == SLOW else line.upper()) + drawn

    def _logprobs(self, tokens: Iterable[int]) -> tuple[TokenLogprob, ...]:
        tops = range(self._request.sampling.logprobs or 0)
        return tuple(TokenLogprob(t, -0.5, tuple((t + n, -0.5 - n) for n in tops)) for t in map(int, tokens))


class FakeEngine:
    """Takes any request whose tokens it knows."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = list(names)
        self.lock = threading.Lock()
        self.submitted: list[Request] = []
        self.running = self.ended = self.cancelled = 0
        self.closed = False

    def submit(self, request: Request, listener: Listener | None = None) -> FakeWriting:
        if not len(request.tokens) or int(request.tokens.max()) > 258 or len(request.tokens) > POSITIONS:
            raise UserError("the prompt is not one of this model's", where="the prompt")
        if request.adapter is not None and request.adapter not in self.names:
            raise UnknownAdapterError("there is no such adapter", where=request.adapter)
        if request.constraint is not None and "impossible" in request.constraint.value:
            raise UserError("the constraint cannot be compiled", where="constraint")
        with self.lock:
            self.submitted.append(request)
        writing = FakeWriting(self, request)
        if listener is not None:
            threading.Thread(target=lambda: [listener(piece) for piece in writing]).start()
        return writing

    def adapters(self) -> tuple[str, ...]:
        return tuple(self.names)

    def hurry(self) -> None:
        """Nothing takes long."""

    def close(self, *, drain: bool = True) -> None:
        self.closed = True

    def text_of(self, tokens: np.ndarray) -> str:
        return str(_TOKENIZER.decode([int(t) for t in tokens], skip_special_tokens=False))

    @staticmethod
    def tokens_of(text: str) -> list[int]:
        return [_TOKEN[byte] for byte in text.encode()]


class FakeShelf:
    """Adapters of an engine are names; a folder is one if it holds a file."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.folders: dict[str, Path] = {}

    def add(self, name: str, folder: Path) -> None:
        if name in self.engine.names:
            raise UserError("the name is taken", where=name)
        self.swap(name, folder)
        self.engine.names.append(name)

    def swap(self, name: str, folder: Path) -> None:
        if not (folder / "adapter_config.json").is_file():
            raise UserError("this is no adapter", where=str(folder))
        self.folders[name] = folder

    def remove(self, name: str) -> None:
        self.engine.names.remove(name)


def fake_served(*names: str, **changes: object) -> Served:
    """A base model "base" with adapters of these names."""
    engine, with_tools = FakeEngine(names), byte_tokenizer()
    with_tools.chat_template = TOOLS_TEMPLATE
    prompts = {True: TokenizerPrompts(with_tools), False: _PLAIN}
    values = {"name": "base", "engine": engine, "positions": POSITIONS, "shelf": FakeShelf(engine)}
    values["prompts"] = lambda adapter: prompts[adapter == "tools"]
    values["load"] = lambda: EngineLoad(running=engine.running, pages=10, adapters_loaded=len(engine.names))
    return Served(**values | changes)  # type: ignore[arg-type]


_TOKENIZER = byte_tokenizer()
_PLAIN = TokenizerPrompts(_TOKENIZER)
# The first tokens are special ones.
_BYTE = {token: _PLAIN.token_bytes(token)[0] for token in range(3, 259)}
_TOKEN = {byte: token for token, byte in _BYTE.items()}


def _instance(schema: dict) -> object:
    if "anyOf" in schema:
        return _instance(schema["anyOf"][0])
    if "const" in schema:
        return schema["const"]
    if schema.get("type", "object") == "object":
        return {key: _instance(value) for key, value in schema.get("properties", {}).items()}
    return {"integer": 7, "number": 0.5, "boolean": True, "array": []}.get(schema.get("type", ""), "text")
