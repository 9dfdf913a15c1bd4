"""Sample completions during training with the decoding engine, using the weights being trained.

The decoder is built and verified once. The adapter, which each training step changes, is packed again at each call. If
the decoder does not support the model, transformers computes the logits in the same engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.machine.memory import release_free_memory
from deltaw.runtime.generation import MAX_CONCURRENT_SAMPLES, SampledCompletion, SamplingParams
from deltaw.serving.adapters import ActiveAdapter, AdapterInfo, FixedAdapters
from deltaw.serving.batch import BatchLimits, RunningBatch
from deltaw.serving.decodable import Decodable
from deltaw.serving.engine import Engine
from deltaw.serving.opening import (
    SESSION_ADAPTER,
    FallbackScheduler,
    pack_session_adapter,
    sample_completions,
    session_terminator_ids,
    verified_decoder,
)
from deltaw.serving.probes import NotDecodable
from deltaw.training.open_run import AdaptedModel


class SessionSampler:
    """Samples completions with a session's current model and adapter.

    Implements :data:`deltaw.runtime.generation.Sampler`.

    Attributes:
        why: Description of the decoding implementation, after the first call.
    """

    def __init__(self, session: AdaptedModel) -> None:
        self._session = session
        self._decodable: Decodable | None = None
        self._number = 0
        self.why = ""

    def __call__(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[SampledCompletion]:
        """Sample completions of prompts (each (length,) token ids), in their order."""
        if not prompts:
            return []
        release_free_memory()
        engine = self._engine(max(map(len, prompts)) + params.max_new_tokens, len(prompts))
        try:
            return sample_completions(engine, engine.session_adapter, prompts, params)
        finally:
            engine.close(drain=False)
            del engine  # free the cache before the training step
            release_free_memory()

    def _engine(self, max_length: int, count: int) -> Engine:
        """Build an engine over the current weights, for sequences of at most ``max_length`` tokens."""
        session = self._session
        method, ids = session.method, session_terminator_ids(session)
        try:
            if self._decodable is None or self._decodable.positions < max_length:
                self._decodable = verified_decoder(session, positions=max_length)
            decodable, self._number = self._decodable, self._number + 1
            adapter = pack_session_adapter(session, decodable, self._number, verify=self._number == 1)
        except NotDecodable as reason:
            self.why = f"transformers decodes: {reason}"
            has_adapter = method is not None
            info = AdapterInfo(session.virtual_tokens, None, tuple(ids))
            adapters = FixedAdapters({SESSION_ADAPTER: ActiveAdapter(1, info)} if has_adapter else {})
            session_adapter = SESSION_ADAPTER if has_adapter else None
            fallback = FallbackScheduler(session, session_adapter)
            return Engine(fallback, session.tokenizer, ids, adapters, session_adapter=session_adapter)
        adapters = FixedAdapters({} if adapter is None else {SESSION_ADAPTER: adapter})
        running = min(count, MAX_CONCURRENT_SAMPLES)
        pages = running * -(-max_length // decodable.decoder.page_tokens) + running
        scheduler = RunningBatch(decodable, pages, adapters, BatchLimits(running=running))
        session_adapter = None if adapter is None else SESSION_ADAPTER
        return Engine(scheduler, session.tokenizer, ids, adapters, session_adapter=session_adapter, why=decodable.why)
