"""An engine without a model. Its completions depend only on the request.

The base model answers with the prompt's last line in capitals. An adapter puts its name before it. Tests can thus
identify the prompt and the adapter of a completion. Some prompts are answered slowly or fail.
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

from deltaw.decoding.request import (
    EngineLoad,
    FinishReason,
    GenerationResult,
    Listener,
    Request,
    TextChunk,
    TokenLogprob,
    UnknownAdapterError,
)
from deltaw.errors import UserError
from deltaw.serving.http.prompts import TokenizerPrompts
from deltaw.serving.http.served import Served
from tests.byte_models import TEMPLATE, byte_tokenizer

POSITIONS = 4096
# Last lines of prompts that select a special behavior.
SLOW = "be slow"
FAIL = "fail"
LONG = "go on"
TOOLS = "{{ tools | tojson }}\nUse <tool_call></tool_call>"
TOOLS_TEMPLATE = f"{{% if tools %}}<|im_start|>system\n{TOOLS}<|im_end|>\n{{% endif %}}{TEMPLATE}"


class FakeGeneration:
    """A generation that produces each chunk when it is read."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._cancelled = threading.Event()
        self._started = time.monotonic()

    def cancel(self) -> None:
        self._engine.cancelled += not self._cancelled.is_set()
        self._cancelled.set()

    def result(self) -> GenerationResult:
        raise RuntimeError("a secret of the engine")

    def __iter__(self) -> Iterator[TextChunk]:
        engine = self._engine
        with engine.lock:
            engine.running += 1
        try:
            yield from self._chunks()
        finally:
            with engine.lock:
                engine.running -= 1
                engine.completed += 1

    def _chunks(self) -> Iterator[TextChunk]:
        request = self._request
        prompt = self._engine.text_of(request.tokens)
        line = prompt.replace("<|im_end|>\n<|im_start|>assistant\n", "").splitlines()[-1]
        if line == FAIL:
            yield TextChunk("", finish="error")
            return
        text = self._text(line)
        for stop in request.stop:
            text = text.partition(stop)[0]
        tokens = self._engine.tokens_of(text)
        is_longer = len(tokens) > request.max_new_tokens or line == LONG or request.stop_ids == ()
        has_logprobs = request.sampling.logprobs is not None
        first = self._logprobs(request.tokens[1:]) if has_logprobs and request.prompt_logprobs else ()
        reused = len(request.tokens) // 2
        # As in a real engine, a character is emitted with its last byte.
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        for count, token in enumerate(itertools.cycle(tokens) if is_longer else tokens):
            if (finish_reason := self._finish_reason()) is not None:
                yield TextChunk("", finish=finish_reason)
                return
            if count == request.max_new_tokens:
                break
            logprobs = first + (self._logprobs([token]) if has_logprobs else ())
            yield TextChunk(decoder.decode(bytes([_BYTE.get(token, 0x3F)])), (token,), logprobs, reused=reused)
            reused = 0
            first = ()
            if line == SLOW:
                self._cancelled.wait(0.05)
        yield TextChunk("", (), first, finish="length" if is_longer else "stop", reused=reused)

    def _finish_reason(self) -> FinishReason | None:
        if self._cancelled.is_set() or self._engine.closed:
            return "cancelled"
        late = self._request.seconds is not None and time.monotonic() > self._started + self._request.seconds
        return "timeout" if late else None

    def _text(self, line: str) -> str:
        request = self._request
        if request.constraint is not None:
            kind = request.constraint.kind
            value = request.constraint.value
            return json.dumps(_instance(json.loads(value or "{}"))) if kind.startswith("json") else "matched"
        if line.startswith("say "):
            return line.removeprefix("say ").replace("\\n", "\n")
        name = f"{request.adapter}: " if request.adapter not in (None, "tools") else ""
        seed_suffix = f" {request.sampling.seed}" if request.sampling.temperature else ""
        return name + (line * 20 if line == SLOW else line.upper()) + seed_suffix

    def _logprobs(self, tokens: Iterable[int]) -> tuple[TokenLogprob, ...]:
        tops = range(self._request.sampling.logprobs or 0)
        return tuple(TokenLogprob(t, -0.5, tuple((t + n, -0.5 - n) for n in tops)) for t in map(int, tokens))


class FakeEngine:
    """Engine that accepts any request with valid tokens."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = list(names)
        self.lock = threading.Lock()
        self.submitted: list[Request] = []
        self.running = self.completed = self.cancelled = 0
        self.closed = False

    def submit(self, request: Request, listener: Listener | None = None) -> FakeGeneration:
        if not len(request.tokens) or int(request.tokens.max()) > 258 or len(request.tokens) > POSITIONS:
            raise UserError("the prompt is not valid for this model", location="the prompt")
        if request.adapter is not None and request.adapter not in self.names:
            raise UnknownAdapterError("no such adapter", location=request.adapter)
        if request.constraint is not None and "impossible" in request.constraint.value:
            raise UserError("the constraint cannot be compiled", location="constraint")
        with self.lock:
            self.submitted.append(request)
        generation = FakeGeneration(self, request)
        if listener is not None:
            threading.Thread(target=lambda: [listener(chunk) for chunk in generation]).start()
        return generation

    def adapters(self) -> tuple[str, ...]:
        return tuple(self.names)

    def cancel_slow(self) -> None:
        """Do nothing, because no constraint is slow."""

    def close(self, *, drain: bool = True) -> None:
        self.closed = True

    def text_of(self, tokens: np.ndarray) -> str:
        return str(_TOKENIZER.decode([int(t) for t in tokens], skip_special_tokens=False))

    @staticmethod
    def tokens_of(text: str) -> list[int]:
        return [_TOKEN[byte] for byte in text.encode()]


class FakeAdapterStore:
    """Adapter store that accepts any folder with an ``adapter_config.json``."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.folders: dict[str, Path] = {}

    def add(self, name: str, folder: Path) -> None:
        if name in self.engine.names:
            raise UserError("the name is already taken", location=name)
        self.swap(name, folder)
        self.engine.names.append(name)

    def swap(self, name: str, folder: Path) -> None:
        if not (folder / "adapter_config.json").is_file():
            raise UserError("this is not an adapter", location=str(folder))
        self.folders[name] = folder

    def remove(self, name: str) -> None:
        self.engine.names.remove(name)


def fake_served(*names: str, **changes: object) -> Served:
    """Return a fake base model "base" with adapters of these names."""
    engine = FakeEngine(names)
    with_tools = byte_tokenizer()
    with_tools.chat_template = TOOLS_TEMPLATE
    prompts = {True: TokenizerPrompts(with_tools), False: _PLAIN}
    values = {"name": "base", "engine": engine, "positions": POSITIONS, "adapter_store": FakeAdapterStore(engine)}
    values["prompts"] = lambda adapter: prompts[adapter == "tools"]
    values["load"] = lambda: EngineLoad(running=engine.running, pages=10, adapters_loaded=len(engine.names))
    return Served(**values | changes)  # type: ignore[arg-type]


_TOKENIZER = byte_tokenizer()
_PLAIN = TokenizerPrompts(_TOKENIZER)
# The first three tokens are special tokens.
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
