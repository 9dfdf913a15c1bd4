"""Texts by an inference session's adapter or its base model, for the verbs that write some.

One engine serves both wherever the adapter stands beside the base model's weights. Where a method trained the
weights themselves, an engine is opened for each of the two in turn.

Knows sessions and engines; not how prompts are rendered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np

from deltaw.serving.engine import Engine
from deltaw.serving.opening import open_engine
from deltaw.serving.request import Piece, Request, Written
from deltaw.training.evaluation.causal import Write
from deltaw.training.inference import InferenceSession


class SessionTexts:
    """Writes texts; a context manager, and the model must not be changed before it is left.

    Args:
        say: told once how texts are computed: by the decoding engine, or by transformers and why.
    """

    def __init__(self, session: InferenceSession, *, say: Callable[[str], None]) -> None:
        self._session, self._say = session, say
        self._engine: Engine | None = None
        self._context = contextlib.ExitStack()
        self._of_base = False
        self._told: set[str] = set()

    def __enter__(self) -> SessionTexts:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(
        self,
        requests: Sequence[Request],
        *,
        base: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Written]:
        """Write many texts at once, in the order of the requests.

        Args:
            requests: with prompts rendered and without virtual tokens, and without an adapter's name.
            base: by the base model instead of the adapter.
            on_progress: told (texts done, texts).

        Raises:
            UserError: a request cannot be served.
        """
        engine, adapter = self._engine_for(base)
        return engine.write_all([replace(one, adapter=adapter) for one in requests], on_progress)

    def check(self, request: Request) -> None:
        """Open the engine, and check what a request says; its prompt does not count.

        Raises:
            UserError: it is out of range.
        """
        self.write([replace(request, tokens=np.zeros(1, dtype=np.int64), max_new_tokens=0)])

    def stream(self, request: Request, *, base: bool = False) -> Generator[Piece]:
        """Write one text, a piece at a time. Closing the iterator ends it.

        Raises:
            UserError: the request cannot be served.
            Exception: what the engine failed with.
        """
        engine, adapter = self._engine_for(base)
        writing = engine.submit(replace(request, adapter=adapter))
        try:
            yield from writing
        finally:
            writing.cancel()
            writing.result()

    def _engine_for(self, base: bool) -> tuple[Engine, str | None]:
        """An engine for one of the two, and the name to ask it with."""
        engine = self._engine
        if engine is not None and base != self._of_base and not self._has_both(engine):
            self._close()
            engine = None
        if engine is None:
            engine = self._opened()
            if base and not engine.has_base:
                self._close()
                self._context.enter_context(self._session.base())
                engine = self._opened()
            self._of_base = base
        return engine, None if base else engine.own_adapter

    def _has_both(self, engine: Engine) -> bool:
        return not self._session.adapter or (engine.has_base and engine.own_adapter is not None)

    def _opened(self) -> Engine:
        told: list[str] = []
        engine = self._engine = open_engine(self._session, say=told.append)
        for line in told or [f"the decoding engine writes: {engine.why}"]:
            if line not in self._told:
                self._told.add(line)
                self._say(line)
        return engine

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close(drain=False)
        self._engine = None
        self._context.close()


def answer_writer(session: InferenceSession, *, say: Callable[[str], None]) -> Write:
    """What writes the answers of an evaluation: the session's adapter, or within its ``base`` the base model.

    Args:
        say: told once how texts are computed.
    """
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    def write(
        prompts: Sequence[np.ndarray],
        *,
        max_new_tokens: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> list[str]:
        virtual = session.virtual_tokens
        requests = [Request(prompt[virtual:], max_new_tokens=max_new_tokens) for prompt in prompts]
        # An engine for each evaluation: between them the weights may become another model's.
        with SessionTexts(session, say=once) as texts:
            return [text.text for text in texts.write(requests, on_progress=on_progress)]

    return write
