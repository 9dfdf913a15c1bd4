"""Open a decoding engine for an inference session.

Depending on the model and its adapter, the engine uses one of four backends:

- a decoder of the base model, with the session's adapter as factors or a soft prompt. Requests select the adapter by
  name or use the base model.
- a decoder of the trained model, if the method trained the model's parameters.
- vLLM, on a GPU, if it is installed and supports the model and the adapter.
- transformers, if neither of them does.

A decoder is verified against the model, including the adapter, each time it is built. So is vLLM.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.decoding.adapters import ActiveAdapter, AdapterInfo, Adapters, FixedAdapters, FolderReader
from deltaw.decoding.attached_adapter import Packer, pack_attached_adapter
from deltaw.decoding.batch import BatchLimits, RunningBatch
from deltaw.decoding.decodable import (
    MAX_POSITIONS,
    Decodable,
    build_decodable,
    eval_mode,
    logit_difference,
    recognized_blocks,
    tolerance,
)
from deltaw.decoding.device_sampling import STEPS_PER_SYNC, DeviceSampler
from deltaw.decoding.engine import Engine
from deltaw.decoding.generation import (
    MAX_CONCURRENT_SAMPLES,
    GeneratedCompletion,
    Progress,
    SampledCompletion,
    SamplingParams,
    TextGenerator,
    decode_with_callback,
    position_limit,
)
from deltaw.decoding.model import AdaptedModel
from deltaw.decoding.probes import NotDecodable
from deltaw.decoding.request import Request, Sampling, TokenLogprob
from deltaw.decoding.sampling import MIN_LOGPROB
from deltaw.decoding.sequences import SequenceScheduler, SequenceState, next_tokens
from deltaw.decoding.vllm_engine import VLLMScheduler, prefers_vllm, session_layers
from deltaw.errors import UserError
from deltaw.hub.terminators import terminators
from deltaw.kernels.layout import to_device
from deltaw.lora.adapt import detach, disabled
from deltaw.lora.files import load_adapter
from deltaw.lora.kinds import get_output_head
from deltaw.lora.stored import weight_shape
from deltaw.machine.memory import free_memory_bytes, release_free_memory
from deltaw.progress import LogFunction, ignore_line, track_progress
from deltaw.runtime import virtual_tokens
from deltaw.runtime.image_tokens import ImageTokens

_MAX_RUNNING = BatchLimits().running
# Number of positions if the model's configuration has no limit.
_DEFAULT_POSITIONS = 1 << 17
# Maximum number of padded tokens and of requests in a batch, by device. A single request may exceed the former.
_BATCH_LIMITS = {"cpu": (4096, 16), "cuda": (16384, 64)}


class FallbackScheduler(SequenceScheduler):
    """Scheduler that decodes with transformers' ``generate``. It supports any model but is slower.

    Queued requests are decoded in batches limited by their tokens. Later requests wait for the next batch. Sampling and
    stop strings behave as in the decoding engine, so all request parameters have the same effect. Prefixes are not
    cached: each prompt is computed from scratch.

    Args:
        session: The inference session.
        session_adapter: Name by which requests select the session's adapter.
    """

    scores_prompts = False  # ``generate`` does not return logits of the prompt

    def __init__(self, session: AdaptedModel, session_adapter: str | None) -> None:
        self._session = session
        self._session_adapter = session_adapter
        num_tokens = weight_shape(session.model.get_input_embeddings())[0]
        head = get_output_head(session.model)
        vocabulary = num_tokens if head is None else weight_shape(head)[0]
        super().__init__(num_tokens, vocabulary, position_limit(session.model) or _DEFAULT_POSITIONS)
        embedding = session.model.get_input_embeddings()
        self.images = embedding if isinstance(embedding, ImageTokens) else None

    def step(self) -> None:
        """Decode the next batch to completion."""
        self.sweep_waiting(time.monotonic())
        self.running = self._next_batch()
        try:
            if self.running:
                self._decode(self.running)
        except Exception as error:  # model code may raise anything; these requests have no valid result
            for sequence in self.running:
                self.end(sequence, error)
        self.running = []

    def _next_batch(self) -> list[SequenceState]:
        """Dequeue the next batch: requests for the same adapter in arrival order, up to the batch limits."""
        chosen: list[SequenceState] = []
        max_tokens, max_rows = _BATCH_LIMITS.get(self._session.model.device.type, _BATCH_LIMITS["cpu"])
        max_prompt = max_new_tokens = 0
        for sequence in list(self.waiting):
            if chosen and sequence.request.adapter != chosen[0].request.adapter:
                continue
            length = len(sequence.request.tokens)
            token_limit = sequence.token_limit
            padded_length = max(max_prompt, length) + max(max_new_tokens, token_limit)
            if chosen and (padded_length * (len(chosen) + 1) > max_tokens or len(chosen) == max_rows):
                break
            # Padding uses positions too, so a short prompt batched with a long one could exceed the limit.
            if chosen and padded_length + self._session.virtual_tokens > self.max_length:
                continue
            max_prompt = max(max_prompt, length)
            max_new_tokens = max(max_new_tokens, token_limit)
            self.waiting.remove(sequence)
            if token_limit:
                chosen.append(sequence)
            else:
                sequence.finish("length")
        return chosen

    def _decode(self, sequences: list[SequenceState]) -> None:
        session = self._session
        use_base = session.adapter and sequences[0].request.adapter is None and self._session_adapter is not None
        for sequence in sequences:
            sequence.prepare(None)
        with session.base() if use_base else contextlib.nullcontext():
            prompts = [session.prompt(np.asarray(sequence.request.tokens, np.int64)) for sequence in sequences]
            max_new_tokens = max(sequence.token_limit for sequence in sequences)
            choose: Callable[[Tensor], Tensor | None] = partial(self._sample_tokens, sequences)
            device = session.model.device
            if device.type == "cuda" and all(map(_samples_on_device, sequences)):
                size = 1 if any(sequence.is_streamed for sequence in sequences) else STEPS_PER_SYNC
                states = [sequence.sampler for sequence in sequences]
                receive = partial(self._append_block, sequences)
                choose = DeviceSampler(states, max_new_tokens, device, receive, size)
            decode_with_callback(session.model, session.tokenizer, prompts, max_new_tokens, choose)

    def _sample_tokens(self, sequences: list[SequenceState], logits: Tensor) -> Tensor | None:
        """Sample the next token of each unfinished sequence on the host."""
        rows = self._unfinished_rows(sequences)
        tokens = torch.zeros(len(sequences), dtype=torch.long)
        if rows:
            chosen = next_tokens([sequences[row] for row in rows], logits.numpy(force=True)[rows])
            for row, (sequence, token, logprob) in zip(rows, chosen, strict=True):
                self.append(sequence, token, logprob)
                tokens[row] = max(token, 0)
        return to_device(tokens, logits.device) if self._unfinished_rows(sequences) else None

    def _append_block(self, sequences: list[SequenceState], tokens: np.ndarray, logprobs: np.ndarray) -> bool:
        """Append tokens (steps, rows) from the device. Return True if all sequences have finished."""
        for index, token in np.ndenumerate(tokens):
            sequence = sequences[index[1]]
            value = max(float(logprobs[index]), MIN_LOGPROB)
            needed = sequence.sampler.sampling.logprobs is not None
            self.append(sequence, int(token), TokenLogprob(int(token), value) if needed else None)
        return not self._unfinished_rows(sequences)

    def _unfinished_rows(self, sequences: list[SequenceState]) -> list[int]:
        """Finish sequences that are complete, and return the rows of the others."""
        now = time.monotonic()
        for sequence in sequences:
            if sequence.matcher is not None and not sequence.handle.done:
                sequence.matcher.wait()
            self.end(sequence, sequence.stop_reason(now))
        return [row for row, sequence in enumerate(sequences) if not sequence.handle.done]


def _samples_on_device(sequence: SequenceState) -> bool:
    """True if :class:`DeviceSampler` supports the sampling parameters of a sequence."""
    return sequence.matcher is None and sequence.sampler.plain and not sequence.sampler.sampling.logprobs


# Name of a session's adapter.
SESSION_ADAPTER = "adapter"
# Default fraction of free memory for keys and values.
CACHE_SHARE = 0.25
# Number of tokens for the verification of a session's adapter, and of prompts for the verification of vLLM.
_SAMPLE = 24
_PROBES = 4
# Relative difference of log-probabilities that rounding explains, because vLLM's attention may use TF32 for fp32.
_MIN_TOLERANCE = 0.01
# Difference from 1 of the adapter's effect in vLLM relative to its effect in the model.
_SHARE_TOLERANCE = 0.25
# Methods with adapters that leave the weights of the base model unchanged.
_SEPARATE_METHODS = ("lora", "prompt")


def open_engine(session: AdaptedModel, *, cache_bytes: int | None = None, log: LogFunction) -> Engine:
    """Open an engine over a session's model and adapter. The model must not change while the engine is open.

    ``engine.session_adapter`` is the name that selects the session's adapter. ``engine.has_base`` is True if requests
    without a name use the base model.

    Args:
        session: The inference session.
        cache_bytes: Memory for keys and values, or None for a quarter of the free memory.
        log: Receives the reason if transformers decodes.

    Raises:
        UserError: if the model does not generate text.
    """
    session.require_generation()
    session_adapter = SESSION_ADAPTER if session.adapter and not session.is_base else None
    cache_size = cache_budget(cache_bytes)
    try:
        with track_progress("preparing the decoder"):
            if prefers_vllm(session):
                return vllm_engine(session, session_adapter, cache_bytes=cache_bytes)
            decodable, adapter = _decoder(session, cache_bytes=cache_size)
    except NotDecodable as reason:
        return fallback_engine(session, session_adapter, reason, log)
    engine = _session_engine(decodable, session, adapter, *_divide_cache(decodable, cache_size, _MAX_RUNNING))
    engine.has_base = adapter is not None or session_adapter is None
    return engine


@contextlib.contextmanager
def base_engine(session: AdaptedModel, engine: Engine, log: LogFunction) -> Iterator[Engine]:
    """Provide an engine whose requests without an adapter name use the base model.

    This is ``engine`` itself if it has the base model, otherwise a new engine that is closed on exit.
    """
    if engine.has_base:
        yield engine
        return
    with session.base():
        opened = open_engine(session, log=log)
        try:
            yield opened
        finally:
            opened.close(drain=False)


class SessionGenerator:
    """Generates greedy completions with a session in its current state: with its adapter, or as the base model.

    Implements :data:`deltaw.decoding.generation.TextGenerator`. The engine is opened at the first use.
    """

    def __init__(self, session: AdaptedModel, log: LogFunction) -> None:
        self._session = session
        self._log = log
        self._engine: Engine | None = None

    def __call__(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, batch_tokens: int, on_progress: Progress
    ) -> list[GeneratedCompletion]:
        """Return a greedy completion per prompt, in order.

        Args:
            prompts: (length,) token ids each. Virtual tokens are removed, because the engine adds them.
            max_new_tokens: Maximum number of new tokens per completion.
            batch_tokens: Ignored. The engine limits its batches itself.
            on_progress: Receives the number of completed prompts and the total.
        """
        return _greedy_completions(*self._opened(), prompts, max_new_tokens, on_progress)

    def sample(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[SampledCompletion]:
        """Sample completions. Implements :data:`deltaw.decoding.generation.Sampler`."""
        return sample_completions(*self._opened(), prompts, params)

    def _opened(self) -> tuple[Engine, str | None]:
        """Return the engine, and the adapter name for requests (None selects the base model)."""
        session = self._session
        engine = self._engine
        if engine is None or (session.is_base and not engine.has_base):
            engine = open_engine(session, log=self._log)
            if not session.is_base:  # an engine opened for the base model has no adapter and is not reused
                self._engine = engine
        return engine, None if session.is_base else engine.session_adapter


def verified_generator(session: AdaptedModel) -> TextGenerator:
    """Return a function that generates greedy completions with a session, using a decoder verified at each call.

    The function returns None if the task does not generate text, the decoder does not support the model, or the method
    trains the base model's parameters. It uses the session in its current state, for example the base model inside a
    method's ``without`` context.
    """

    def write(
        prompts: Sequence[np.ndarray], max_new_tokens: int, batch_tokens: int, on_progress: Progress
    ) -> list[GeneratedCompletion] | None:
        length = max(map(len, prompts)) + max_new_tokens
        supported = session.method is None or session.is_base or session.method.name in _SEPARATE_METHODS
        if not (session.generates_text and supported):
            return None
        release_free_memory()  # release memory cached during training
        try:
            with track_progress("preparing the decoder"):
                decodable, adapter = _decoder(session, positions=length)
        except NotDecodable:
            return None
        pages = max(batch_tokens, length) // decodable.decoder.page_tokens + 1
        engine = _session_engine(decodable, session, adapter, pages, BatchLimits(min(pages, _MAX_RUNNING)))
        try:
            return _greedy_completions(engine, engine.session_adapter, prompts, max_new_tokens, on_progress)
        finally:
            engine.close(drain=False)

    return write


def _greedy_completions(
    engine: Engine, adapter: str | None, prompts: Sequence[np.ndarray], max_new_tokens: int, on_progress: Progress
) -> list[GeneratedCompletion]:
    """Return greedy completions of prompts, in their order."""
    completions = sample_completions(engine, adapter, prompts, SamplingParams(max_new_tokens), on_progress)
    return [GeneratedCompletion(c.tokens, c.text, c.ended, c.terminator) for c in completions]


def sample_completions(
    engine: Engine, name: str | None, prompts: Sequence[np.ndarray], params: SamplingParams, progress: Progress = None
) -> list[SampledCompletion]:
    """Sample a completion per prompt, in order.

    Args:
        engine: Engine that generates the completions.
        name: Adapter of the requests, or None for the base model.
        prompts: (length,) token ids each. Virtual tokens are removed, because the engine adds them.
        params: Sampling parameters.
        progress: Receives the number of completed prompts and the total.
    """
    accepts = engine.scheduler.accepts
    common = Sampling(params.temperature, params.top_k, params.top_p, logprobs=0 if params.logprobs else None)
    requests = [
        Request(prompt[accepts(prompt)], name, replace(common, seed=seed), max_new_tokens=params.max_new_tokens)
        for prompt, seed in zip(prompts, params.seeds or (0,) * len(prompts), strict=True)
    ]
    completions = []
    for result in engine.generate_all(requests, progress):
        logprobs = np.array([token.logprob for token in result.logprobs], np.float32) if params.logprobs else None
        completions.append(SampledCompletion(np.asarray(result.tokens), result.text, result.terminator, logprobs))
    return completions


def build_engine(model: Decodable, session: AdaptedModel, adapters: Adapters, cache_bytes: int, running: int) -> Engine:
    """Build an engine over a decoder.

    Args:
        model: Model with its decoder.
        session: Session of the model.
        adapters: Adapters that requests may use.
        cache_bytes: Memory for keys and values.
        running: Maximum number of running sequences.
    """
    pages, limits = _divide_cache(model, cache_bytes, running)
    scheduler = RunningBatch(model, pages, adapters, limits)
    return Engine(scheduler, session.tokenizer, session_terminator_ids(session), adapters, why=model.why)


def _divide_cache(model: Decodable, cache_bytes: int, running: int) -> tuple[int, BatchLimits]:
    """Return the limits of a batch, and the pages that fit into ``cache_bytes``, at most as many as the batch can use.

    States of recurrent layers get half of the memory. At most half of that is for running sequences, of which there are
    at most ``running``. The rest is for saved states.
    """
    state_bytes = model.decoder.state_bytes
    saved_bytes = 0
    if state_bytes:
        saved_bytes = cache_bytes // 2
        running = max(1, min(running, saved_bytes // 2 // state_bytes))
        saved_bytes = max(0, saved_bytes - running * state_bytes)
        cache_bytes = cache_bytes // 2
    max_pages = running * -(-model.positions // model.decoder.page_tokens)
    pages = max(1, min(max_pages, cache_bytes // model.decoder.bytes_per_page))
    return pages, BatchLimits(running, saved_state_bytes=saved_bytes)


def _session_engine(
    model: Decodable, session: AdaptedModel, adapter: ActiveAdapter | None, pages: int, limits: BatchLimits
) -> Engine:
    """Build an engine over a decoder with the adapter of the session."""
    name = None if adapter is None else SESSION_ADAPTER
    ids = session_terminator_ids(session)
    adapters = FixedAdapters({} if adapter is None else {SESSION_ADAPTER: adapter})
    scheduler = RunningBatch(model, pages, adapters, limits)
    return Engine(scheduler, session.tokenizer, ids, adapters, session_adapter=name, why=model.why)


def vllm_engine(
    session: AdaptedModel, name: str | None, folders: Mapping[str, Path] | None = None, cache_bytes: int | None = None
) -> Engine:
    """Build an engine that generates with vLLM.

    Args:
        session: The inference session.
        name: Name by which requests select the session's adapter, or None.
        folders: Folders of other adapters by name. The session must have none.
        cache_bytes: Memory for keys and values, or None for a fraction of the free GPU memory.

    Raises:
        NotDecodable: if vLLM is not used.
    """
    parts = {}
    try:
        for key, folder in (folders or {}).items():
            parts[key] = FolderReader(session.model, session.text_tokenizer).read(folder)
    except UserError as error:
        raise NotDecodable(error.message) from error
    if any(part.prompt is not None or part.info.invocation is not None for part in parts.values()):
        raise NotDecodable("vLLM supports no soft prompts and activated adapters")
    layers = {key: part.layers for key, part in parts.items()} if name is None else session_layers(session, name)
    engine = scheduler_engine(VLLMScheduler(session, layers, cache_bytes), session, name)
    verify_logprobs(engine, session, name)
    if parts:
        engine.bank = FixedAdapters(
            {key: ActiveAdapter(n, part.info) for n, (key, part) in enumerate(parts.items(), 1)}
        )
    for key in parts:
        load_adapter(session.model, parts[key].info.folder)
        verify_logprobs(engine, session, key)
        detach(session.model)
    return engine


def verify_logprobs(engine: Engine, session: AdaptedModel, name: str | None) -> None:
    """Compare log-probabilities of sampled tokens with those of the session's model in its current state.

    The effect of a weak adapter is smaller than the tolerance. Therefore the change from the base model is compared
    with the adapter's effect.

    Args:
        engine: Engine with another implementation of the model.
        session: The session.
        name: Adapter of the current state, or None for the base model.

    Raises:
        NotDecodable: if they differ by more than the precision explains.
    """
    model = session.model
    generator = np.random.default_rng(1)
    prompts = list(generator.integers(0, engine.scheduler.num_tokens, (_PROBES, _SAMPLE)))
    params = SamplingParams(_SAMPLE, 1.0, seeds=tuple(range(_PROBES)), logprobs=True)
    completions = sample_completions(engine, name, prompts, params)
    rows = [np.append(prompt, c.tokens) for prompt, c in zip(prompts, completions, strict=True)]
    sampled = np.concatenate([completion.logprobs for completion in completions])
    expected, scale = _model_logprobs(model, rows)
    error = float(np.abs(sampled - expected).mean() / scale)
    if not error <= max(_MIN_TOLERANCE, tolerance(model)):
        raise NotDecodable(f"vLLM's log-probabilities differ from the model's by {error:.1e} of their deviation")
    if name is not None:
        with disabled(model):
            base, _ = _model_logprobs(model, rows)
        share, uncertainty = _applied_share(sampled - base, expected - base)
        if abs(share - 1) > _SHARE_TOLERANCE + 5 * uncertainty:
            raise NotDecodable(f"vLLM applies {share:.2f} of the adapter's effect on log-probabilities")
    engine.why = f"vLLM: log-probabilities equal the model's own (relative difference {error:.1e})"


def _applied_share(change: np.ndarray, effect: np.ndarray) -> tuple[float, float]:
    """Return the share of an adapter's effect that a change contains, and its standard error.

    Both arguments are differences from the base model and contain rounding. Its variance is subtracted. The error is
    infinite if the effect is not larger than rounding.
    """
    variance = min(np.mean(change**2), np.mean((change - effect) ** 2)) / 2
    sizes = effect**2 - 2 * variance
    products = change * effect - variance
    if not (total := float(sizes.sum())) > 0:
        return 0.0, float("inf")
    share = float(products.sum()) / total
    return share, float(np.std(products - share * sizes)) * len(sizes) ** 0.5 / total


def _model_logprobs(model: PreTrainedModel, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Return the model's log-probabilities of the tokens after the prompts, and their standard deviation."""
    logprobs = []
    scales = []
    for row in rows:
        tokens = torch.from_numpy(row).to(model.device)
        with eval_mode(model):
            expected = model(tokens[None]).logits[0, _SAMPLE - 1 : -1].float().log_softmax(-1)
        logprobs.append(expected.gather(-1, tokens[_SAMPLE:, None])[:, 0].numpy(force=True))
        scales.append(float(expected.std()))
    return np.concatenate(logprobs), float(np.mean(scales))


def scheduler_engine(scheduler: SequenceScheduler, session: AdaptedModel, adapter: str | None, why: str = "") -> Engine:
    """Build an engine over a scheduler that applies the session's adapter itself."""
    terminator_ids = session_terminator_ids(session)
    info = AdapterInfo(session.virtual_tokens, None, tuple(terminator_ids))
    adapters = FixedAdapters({} if adapter is None else {adapter: ActiveAdapter(1, info)})
    return Engine(scheduler, session.tokenizer, terminator_ids, adapters, session_adapter=adapter, why=why)


def fallback_engine(session: AdaptedModel, adapter: str | None, reason: NotDecodable, log: LogFunction) -> Engine:
    """Build an engine that decodes with transformers, and log the reason.

    Args:
        session: The inference session.
        adapter: Name by which requests select the session's adapter, or None.
        reason: Explains why the decoder does not support the model.
        log: Receives the reason as a message.
    """
    if session.sampler == "vllm":
        hint = "use sampler: auto or transformers"
        raise UserError(f"vLLM does not generate: {reason}", location="sampler", hint=hint) from reason
    description = f"transformers decodes: {reason}"
    log(description)
    return scheduler_engine(FallbackScheduler(session, adapter), session, adapter, description)


def cache_budget(cache_bytes: int | None) -> int:
    """Return the memory for keys and values: ``cache_bytes``, or a fraction of the free memory."""
    return int(free_memory_bytes() * CACHE_SHARE) if cache_bytes is None else cache_bytes


def session_terminator_ids(session: AdaptedModel) -> list[int]:
    return terminators(session.model, session.tokenizer)


def verified_decoder(session: AdaptedModel, *, positions: int) -> Decodable:
    """Build a verified decoder of a session's base model.

    Raises:
        NotDecodable: if the model is not supported, or the method changes the base model's weights.
    """
    if session.method is None or session.method.name not in _SEPARATE_METHODS:
        raise NotDecodable("the method trains the base model's parameters")
    with session.base():
        return build_decodable(session.model, positions=positions)


def _decoder(
    session: AdaptedModel, cache_bytes: int | None = None, positions: int = MAX_POSITIONS
) -> tuple[Decodable, ActiveAdapter | None]:
    """Build a verified decoder for a session.

    Args:
        session: The session.
        cache_bytes, positions: See :func:`deltaw.decoding.decodable.build_decodable`.

    Returns:
        The decoder and the session's adapter. The adapter is None if there is none, or if the decoder's weights include
        it.

    Raises:
        NotDecodable: if the model or its adapter is not supported.
    """
    build = partial(build_decodable, session.model, cache_bytes=cache_bytes, positions=positions)
    if session.method is None or session.is_base:
        return build(), None
    if session.method.name not in _SEPARATE_METHODS:
        with session.base(), contextlib.suppress(NotDecodable):  # recognition does not support added biases
            build = partial(build, fused=recognized_blocks(session.model))
        return build(), None
    with session.base():
        result = build()
    return result, _pack_adapter(session, result)


def _pack_adapter(session: AdaptedModel, decodable: Decodable, number: int = 1, verify: bool = True) -> ActiveAdapter:
    """Pack the session's current adapter for the decoder of its base model.

    Args:
        session: The session.
        decodable: Decoder of the base model.
        number: Unique number of the adapter.
        verify: Compare the decoder's logits with the model's.

    Raises:
        NotDecodable: if the adapter contains anything other than low-rank factors or a soft prompt, or the decoder's
            logits differ from the model's.
    """
    model = session.model
    method = session.method
    assert method is not None
    packed = pack_attached_adapter(model, Packer(model, decodable))
    if isinstance(packed, str):
        raise NotDecodable(packed)
    layer = virtual_tokens.attached(model)
    invocation = None if method.invocation is None else tuple(method.invocation)
    info = AdapterInfo(session.virtual_tokens, invocation, tuple(session_terminator_ids(session)))
    adapter = ActiveAdapter(number, info, packed, None if layer is None else layer.prompt.detach())
    if not verify:
        return adapter
    sample = torch.randint(0, decodable.entry.num_tokens, (_SAMPLE,), generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([*(invocation or ()), *sample.tolist()])[: decodable.positions - session.virtual_tokens]
    with eval_mode(model):
        error = logit_difference(decodable, model, adapter=adapter, tokens=tokens)
    if not error < tolerance(model):
        raise NotDecodable(f"with its adapter, the decoder's logits differ from the model's by {error:.1e}")
    return adapter


class SessionSampler:
    """Samples completions during training, with a session's current model and adapter.

    Implements :data:`deltaw.decoding.generation.Sampler`. The decoder is built and verified once. The adapter, which
    each training step changes, is packed again at each call. With ``sampler: vllm``, vLLM is loaded once and loads the
    adapter again at each call. If the decoder does not support the model, transformers computes the logits in the same
    engine.

    Attributes:
        why: Description of the decoding implementation, after the first call.
    """

    def __init__(self, session: AdaptedModel) -> None:
        self._session = session
        self._decodable: Decodable | None = None
        self._vllm: VLLMScheduler | None = None
        self._failure: NotDecodable | None = None
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
        try:
            if self._failure is not None:
                raise self._failure
            if session.sampler == "vllm":  # not by default: plans do not contain vLLM's memory
                return self._vllm_engine()
            if self._decodable is None or self._decodable.positions < max_length:
                self._decodable = verified_decoder(session, positions=max_length)
            decodable = self._decodable
            self._number = self._number + 1
            adapter = _pack_adapter(session, decodable, self._number, verify=self._number == 1)
        except NotDecodable as reason:
            self._failure = reason
            engine = fallback_engine(session, SESSION_ADAPTER if session.adapter else None, reason, ignore_line)
            self.why = engine.why
            return engine
        running = min(count, MAX_CONCURRENT_SAMPLES)
        pages = running * -(-max_length // decodable.decoder.page_tokens) + running
        return _session_engine(decodable, session, adapter, pages, BatchLimits(running))

    def _vllm_engine(self) -> Engine:
        """Return an engine that samples with vLLM and the current adapter.

        Raises:
            NotDecodable: if vLLM is not used.
        """
        session = self._session
        name = SESSION_ADAPTER if self._session.adapter else None
        layers = session_layers(session, name)
        if self._vllm is None:
            self._vllm = VLLMScheduler(session, layers)
        else:
            for key, factors in layers.items():
                self._vllm.set_adapter(key, factors)
        engine = scheduler_engine(self._vllm, session, name)
        verify_logprobs(engine, session, name)
        self.why = engine.why
        return engine
