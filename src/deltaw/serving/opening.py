"""An engine for an inference session: the decoder where the model has one, transformers otherwise.

Three ways, and each is said:

- a decoder of the base model, and the session's adapter beside it as factors or a soft prompt: a request
  names
  the adapter, or gets the base;
- a decoder of the model as it is, where the method trained the model's own parameters;
- transformers' ``generate``, where the model, or its adapter, is not one that a decoder computes.

Whether a decoder says what the model says is verified each time, with the adapter too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.hub.terminators import terminators
from deltaw.machine.memory import free_memory_bytes, release_free_memory
from deltaw.runtime import virtual_tokens
from deltaw.runtime.generation import Completion, Drawing, Drawn, Progress, Writer, decode_by, position_limit
from deltaw.serving.adapters import ActiveAdapter, AdapterFacts, Adapters, FixedAdapters
from deltaw.serving.bank import Packer, packed_from_model
from deltaw.serving.batch import Batch, BatchLimits
from deltaw.serving.decodable import Decodable, decodable, difference, evaluating, recognized_blocks, tolerance
from deltaw.serving.engine import Engine
from deltaw.serving.probes import NotDecodable
from deltaw.serving.request import Request, Sampling
from deltaw.serving.running import Run, Work, next_tokens
from deltaw.training.origin import InferenceSession
from deltaw.working import working

_LIMITS = BatchLimits()
# Positions of a model that does not say how many it has.
_UNSAID = 1 << 17
# Tokens of a batch's prompts and texts, at most, unless one request alone exceeds it; and its texts.
_BATCH_TOKENS, _BATCH_ROWS = 4096, 16


class FallbackWork(Work):
    """Computes requests of a session by transformers' ``generate``: correct for any model, and slower.

    Requests that wait are decoded together, as many as their tokens allow; later ones wait for the next batch.
    Tokens are chosen and texts cut as in the decoding engine, so that all settings of a request mean the same.
    Prompts are computed anew each time.

    Args:
        own_adapter: the name that a request gives to get the session's adapter.
    """

    scores_prompts = False  # ``generate`` gives no logits of them

    def __init__(self, session: InferenceSession, own_adapter: str | None) -> None:
        self._session, self._own = session, own_adapter
        known = int(session.model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
        head = session.model.get_output_embeddings()
        vocabulary = known if head is None else int(head.weight.shape[0])  # type: ignore[union-attr, index]
        super().__init__(known, vocabulary, position_limit(session.model) or _UNSAID)

    def step(self) -> None:
        """Write the texts of the next batch, to their ends."""
        self.sweep_waiting(time.monotonic())
        self.running = self._next()
        try:
            if self.running:
                self._write(self.running)
        except Exception as error:  # whatever foreign code raises: these requests have no right result
            for run in self.running:
                self.end(run, error)
        self.running = []

    def _next(self) -> list[Run]:
        """The requests of the next batch: those for the same model, in order, as far as they fit."""
        chosen: list[Run] = []
        longest = most = 0
        for run in list(self.waiting):
            if chosen and run.request.adapter != chosen[0].request.adapter:
                continue
            length, allowance = len(run.request.tokens), run.allowance
            wide = (max(longest, length) + max(most, allowance)) * (len(chosen) + 1)
            if chosen and (wide > _BATCH_TOKENS or len(chosen) == _BATCH_ROWS):
                break
            # Padding takes positions too, so that short prompts beside long ones could run out of them.
            if chosen and max(longest, length) + max(most, allowance) + self._session.virtual_tokens > self.longest:
                continue
            longest, most = max(longest, length), max(most, allowance)
            self.waiting.remove(run)
            if allowance:
                chosen.append(run)
            else:
                run.finish("length")
        return chosen

    def _write(self, runs: list[Run]) -> None:
        session = self._session
        bare = session.adapter and runs[0].request.adapter is None and self._own is not None
        for run in runs:
            run.place(None)
        with session.base() if bare else contextlib.nullcontext():
            prompts = [session.prompt(np.asarray(run.request.tokens, np.int64)) for run in runs]
            most = max(run.allowance for run in runs)
            decode_by(session.model, session.tokenizer, prompts, most, lambda logits: self._chosen(runs, logits))

    def _chosen(self, runs: list[Run], logits: Tensor) -> list[int | None]:
        """The next token of each text that goes on."""
        rows = self._going(runs)
        self.tokens += len(rows)
        tokens: dict[int, int] = {}
        if rows:
            chosen = next_tokens([runs[row] for row in rows], logits.numpy(force=True)[rows])
            for row, (run, token, logprob) in zip(rows, chosen, strict=True):
                try:
                    run.take(token, logprob)
                    tokens[row] = token
                except Exception as error:  # of this text alone
                    self.end(run, error)
        going = self._going(runs)
        return [tokens[row] if row in going else None for row in range(len(runs))]

    def _going(self, runs: list[Run]) -> list[int]:
        """The rows of the texts that go on; those that end here are ended."""
        now = time.monotonic()
        for run in runs:
            if run.matcher is not None and not run.writing.done:
                run.matcher.wait()
            self.end(run, run.ended_by(now))
        return [row for row, run in enumerate(runs) if not run.writing.done]


# The name of a session's own adapter.
OWN = "adapter"
# The share of free memory that keys and values may take, where nothing else is said.
CACHE_SHARE = 0.25
# Tokens on which a session's adapter is verified.
_SAMPLE = 24
# Methods whose adapter stands beside the base model, which itself stays as it is.
_BESIDE = ("lora", "prompt")


def open_engine(session: InferenceSession, *, cache_bytes: int | None = None, say: Callable[[str], None]) -> Engine:
    """An engine that writes texts with a session's model and its adapter.

    ``engine.own_adapter`` is the name by which requests ask for the session's adapter, and
    ``engine.has_base`` says whether requests without a name get the base model. While the engine is open, the
    model must not be changed.

    Args:
        cache_bytes: memory for keys and values; None for a quarter of what is free.
        say: told how texts are computed, where it is not by the decoder.

    Raises:
        UserError: the model writes no text.
    """
    session.require_generation()
    own = OWN if session.adapter and not session.bare else None
    room = cache_room(cache_bytes)
    try:
        with working("preparing the decoder"):
            made, adapter = _decoder(session, cache_bytes=room)
    except NotDecodable as reason:
        return fallback_engine(session, own, reason, say)
    how: dict[str, Any] = {"cache_bytes": room, "has_base": adapter is not None or own is None}
    named = {} if adapter is None else {OWN: adapter}
    return engine_over(made, session, FixedAdapters(named), own_adapter=OWN if named else None, **how)


@contextlib.contextmanager
def base_engine(session: InferenceSession, engine: Engine, say: Callable[[str], None]) -> Iterator[Engine]:
    """An engine whose requests without a name get the base model: ``engine`` itself where it can, else one
    that is open within the block."""
    if engine.has_base:
        yield engine
        return
    with session.base():
        other = open_engine(session, say=say)
        try:
            yield other
        finally:
            other.close(drain=False)


class SessionWriter:
    """Writes greedy texts of a session as it is at the moment: with its adapter, or as the base model.

    Implements :data:`deltaw.runtime.generation.Writer`; the engine is opened when it is first needed.
    """

    def __init__(self, session: InferenceSession, say: Callable[[str], None]) -> None:
        self._session, self._say = session, say
        self._engine: Engine | None = None

    def __call__(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, batch_tokens: int, on_progress: Progress
    ) -> list[Completion]:
        """The texts behind prompts (each (length,) token ids, virtual ones left out), in their order."""
        return _written(*self._opened(), prompts, max_new_tokens, on_progress)

    def draw(self, prompts: Sequence[np.ndarray], drawing: Drawing) -> list[Drawn]:
        """Completions that are drawn: a :data:`deltaw.runtime.generation.Sampler`."""
        return drawn(*self._opened(), prompts, drawing)

    def _opened(self) -> tuple[Engine, str | None]:
        """The engine, and the name by which it has the session's adapter; None where the base model is to write."""
        session = self._session
        engine = self._engine
        if engine is None or (session.bare and not engine.has_base):
            engine = open_engine(session, say=self._say)
            if not session.bare:  # an engine of the base model alone does not outlive this
                self._engine = engine
        return engine, None if session.bare else engine.own_adapter


def verified_writer(session: InferenceSession) -> Writer:
    """What writes greedy texts of a session as it is at each call, by a decoder that is verified each time; it gives
    None where there is none. Without a method, the session's model writes as it is, within a method's ``without`` as
    the base model."""
    method = session.method

    def write(
        prompts: Sequence[np.ndarray], max_new_tokens: int, batch_tokens: int, on_progress: Progress
    ) -> list[Completion] | None:
        longest = max(map(len, prompts)) + max_new_tokens
        beside = method is None or session.bare or method.name in _BESIDE
        if not session.task.writes_text or not beside:
            return None
        release_free_memory()  # of a training, which the decoder has no use for
        try:
            with working("preparing the decoder"):
                made, adapter = _decoder(session, positions=longest)
        except NotDecodable:
            return None
        bank = FixedAdapters({} if adapter is None else {OWN: adapter})
        pages = max(batch_tokens, longest) // made.decoder.page_tokens + 1
        engine = Engine(Batch(made, pages, bank, _LIMITS), session.tokenizer, ends_of(session), bank)
        try:
            return _written(engine, None if adapter is None else OWN, prompts, max_new_tokens, on_progress)
        finally:
            engine.close(drain=False)

    return write


def _written(
    engine: Engine, adapter: str | None, prompts: Sequence[np.ndarray], max_new_tokens: int, on_progress: Progress
) -> list[Completion]:
    """Greedy texts behind prompts, in their order."""
    found = drawn(engine, adapter, prompts, Drawing(max_new_tokens), on_progress)
    return [Completion(one.tokens, one.text, one.ended, one.terminator) for one in found]


def drawn(
    engine: Engine, adapter: str | None, prompts: Sequence[np.ndarray], drawing: Drawing, on_progress: Progress = None
) -> list[Drawn]:
    """Completions of prompts (each (length,) token ids, virtual ones left out), in their order."""
    known, most = engine.work.known, drawing.max_new_tokens
    how: dict[str, Any] = {name: getattr(drawing, name) for name in ("temperature", "top_k", "top_p")}
    how["logprobs"] = 0 if drawing.logprobs else None
    requests = [
        Request(prompt[prompt < known], adapter, Sampling(**how, seed=seed), max_new_tokens=most)
        for prompt, seed in zip(prompts, drawing.seeds or (0,) * len(prompts), strict=True)
    ]
    found = []
    for one in engine.write_all(requests, on_progress):
        logprobs = np.array([token.logprob for token in one.logprobs], np.float32) if drawing.logprobs else None
        found.append(Drawn(np.asarray(one.tokens), one.text, one.terminator, logprobs))
    return found


def engine_over(
    made: Decodable,
    session: InferenceSession,
    adapters: Adapters,
    *,
    cache_bytes: int,
    limits: BatchLimits = _LIMITS,
    **how: Any,
) -> Engine:
    """An engine over a decoder and any adapters.

    Args:
        cache_bytes: memory for keys and values. how: ``own_adapter`` and ``has_base`` of the engine.
    """
    decoder = made.decoder
    most = limits.running * -(-made.positions // decoder.page_tokens)
    pages = max(1, min(most, cache_bytes // decoder.bytes_per_page))
    work = Batch(made, pages, adapters, limits)
    return Engine(work, session.tokenizer, ends_of(session), adapters, why=made.why, **how)


def fallback_engine(
    session: InferenceSession, own: str | None, reason: NotDecodable, say: Callable[[str], None]
) -> Engine:
    """An engine that writes by transformers, since there is no decoder; says so.

    Args:
        own: the name that a request gives to get the session's adapter.
    """
    why = f"transformers decodes: {reason}"
    say(why)
    ends = ends_of(session)
    facts = AdapterFacts(session.virtual_tokens, None, tuple(ends))
    bank = FixedAdapters({} if own is None else {own: ActiveAdapter(1, facts)})
    return Engine(FallbackWork(session, own), session.tokenizer, ends, bank, own_adapter=own, why=why)


def cache_room(cache_bytes: int | None) -> int:
    """Memory for keys and values, as asked, or a share of what is free."""
    return int(free_memory_bytes() * CACHE_SHARE) if cache_bytes is None else cache_bytes


def ends_of(session: InferenceSession) -> list[int]:
    return terminators(session.model, session.tokenizer)


def verified_decoder(session: InferenceSession, *, positions: int) -> Decodable:
    """A verified decoder of a session's base model, beside which its adapter stands.

    Raises:
        NotDecodable: it cannot be had, or the method changes the base model itself.
    """
    if session.method is None or session.method.name not in _BESIDE:
        raise NotDecodable("the method trains the model's own parameters")
    with session.base():
        return decodable(session.model, positions=positions)


def _decoder(session: InferenceSession, **how: Any) -> tuple[Decodable, ActiveAdapter | None]:
    """A verified decoder, and the session's adapter beside it; None where there is none, or where the
    decoder's weights hold it.

    Args:
        how: bounds of :func:`deltaw.serving.decodable.decodable`.

    Raises:
        NotDecodable: neither can be had.
    """
    method, model = session.method, session.model
    if method is None or session.bare:
        return decodable(model, **how), None
    if method.name not in _BESIDE:
        with session.base():  # its own code knows nothing of biases that were added
            fused = recognized_blocks(model)
        return decodable(model, fused=fused, **how), None
    with session.base():
        made = decodable(model, **how)
    return made, own_adapter(session, made)


def own_adapter(session: InferenceSession, made: Decodable, number: int = 1, *, verify: bool = True) -> ActiveAdapter:
    """The session's adapter as it is now, for the decoder of its base model.

    Args:
        number: that no other adapter of the decoder has. verify: whether its logits are compared with the model's.

    Raises:
        NotDecodable: it does something else than factors and soft prompts do.
    """
    model, method = session.model, session.method
    assert method is not None
    packed = packed_from_model(model, Packer(model, made))
    if isinstance(packed, str):
        raise NotDecodable(packed)
    layer = virtual_tokens.attached(model)
    prompt = None if layer is None else layer.prompt.detach()
    invocation = None if method.invocation is None else tuple(method.invocation)
    facts = AdapterFacts(session.virtual_tokens, invocation, tuple(ends_of(session)))
    adapter = ActiveAdapter(number, facts, packed, prompt)
    if not verify:
        return adapter
    sample = torch.randint(0, made.entry.known, (_SAMPLE,), generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([*(invocation or ()), *sample.tolist()])[: made.positions - session.virtual_tokens]
    with evaluating(model):
        off = difference(made, model, adapter=adapter, tokens=tokens)
    if not off < tolerance(model):
        raise NotDecodable(f"with its adapter, logits differ from the model's own by {off:.1e}")
    return adapter
