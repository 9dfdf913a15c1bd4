"""Completions of a model that is being trained, drawn by the decoding engine over the training's own weights.

The decoder is prepared and verified once; what a step changes, the adapter, is packed anew at each call. Where there is
no decoder, transformers computes the logits behind the same engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.machine.memory import release_free_memory
from deltaw.runtime.generation import DRAWN_AT_ONCE, Drawing, Drawn
from deltaw.serving.adapters import ActiveAdapter, AdapterFacts, FixedAdapters
from deltaw.serving.batch import Batch, BatchLimits
from deltaw.serving.decodable import Decodable
from deltaw.serving.engine import Engine
from deltaw.serving.opening import OWN, FallbackWork, drawn, ends_of, own_adapter, verified_decoder
from deltaw.serving.probes import NotDecodable
from deltaw.training.origin import InferenceSession


class SessionSampler:
    """Draws completions of a session's model, with its adapter, as it is at each call.

    Implements :data:`deltaw.runtime.generation.Sampler`.

    Attributes:
        why: how texts are computed, once they were.
    """

    def __init__(self, session: InferenceSession) -> None:
        self._session = session
        self._made: Decodable | None = None
        self._number = 0
        self.why = ""

    def __call__(self, prompts: Sequence[np.ndarray], drawing: Drawing) -> list[Drawn]:
        """Completions of prompts (each (length,) token ids), in their order."""
        if not prompts:
            return []
        release_free_memory()
        engine = self._engine(max(map(len, prompts)) + drawing.max_new_tokens, len(prompts))
        try:
            return drawn(engine, engine.own_adapter, prompts, drawing)
        finally:
            engine.close(drain=False)
            del engine  # and its cache, before the update needs memory
            release_free_memory()

    def _engine(self, longest: int, count: int) -> Engine:
        """An engine over the weights as they are now, for sequences of at most ``longest`` tokens."""
        session = self._session
        method, ends = session.method, ends_of(session)
        try:
            if self._made is None or self._made.positions < longest:
                self._made = verified_decoder(session, positions=longest)
            made, self._number = self._made, self._number + 1
            adapter = own_adapter(session, made, self._number, verify=self._number == 1)
        except NotDecodable as reason:
            self.why = f"transformers decodes: {reason}"
            beside = method is not None
            facts = AdapterFacts(session.virtual_tokens, None, tuple(ends))
            bank = FixedAdapters({OWN: ActiveAdapter(1, facts)} if beside else {})
            own = OWN if beside else None
            return Engine(FallbackWork(session, own), session.tokenizer, ends, bank, own_adapter=own)
        bank = FixedAdapters({} if adapter is None else {OWN: adapter})
        running = min(count, DRAWN_AT_ONCE)
        pages = running * -(-longest // made.decoder.page_tokens) + running
        work = Batch(made, pages, bank, BatchLimits(running=running))
        own = None if adapter is None else OWN
        return Engine(work, session.tokenizer, ends, bank, own_adapter=own, why=made.why)
