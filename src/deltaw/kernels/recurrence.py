"""Linear recurrences over a prefix tree of segments: the gated delta rule, and the state-space scan of Mamba-2.

A head carries a state S (d, d_v). Each token t decays the state, adds a product of key and value, and reads an output:

    S ← exp(g_t)·S
    u_t = β_t·(v_t − Sᵀk_t)        gated delta rule (arXiv 2412.06464, equation 10)
    u_t = v_t                       state-space scan (arXiv 2405.21060, section 3; k = B, q = C, v = Δ·x, g = Δ·A)
    S ← S + k_t u_tᵀ
    y_t = Sᵀq_t

A segment starts with the last state of its parent, so packed rows do not mix and a shared prefix is computed once.

Chunks: Let G be the cumulative sum of g in a chunk, D_ij = exp(G_i − G_j) for i ≥ j, and S the state before the chunk.
The rows of Q, K, V, U and Y are the chunk's vectors, and ∘ is the elementwise product. The corrected values U solve a
triangular system (arXiv 2406.06484, section 3). In a state-space scan, U = V.

    (I + tril(β·KKᵀ∘D, −1)) U = β·(V − exp(G)·K S)
    Y = exp(G)·Q S + (QKᵀ∘D) U
    S ← exp(G_C)·S + (exp(G_C − G)·K)ᵀ U

The backward pass recomputes the states and passes the gradient of a chunk's initial state to the chunk that
computed this state. The compiled kernels (``csrc/recurrence.cpp``) and the torch implementation below compute the same
formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.chunks import ChunkLevel, Chunks, chunks_of, count_chunks
from deltaw.kernels.layout import Layout
from deltaw.kernels.operators import accumulation_dtype, define

# Added to the squared norm of queries and keys of the gated delta rule.
NORM_EPS = 1e-6
CHUNK_SIZES = (16, 32, 64)
# Fixed cost of a level (about ten calls of torch operators), expressed in multiply-adds of one head.
WORK_PER_LEVEL = 200_000
# Number of elements of the intermediate results of a group of heads. Groups are processed one after the other.
ELEMENTS_PER_GROUP = 2**23


@dataclass(frozen=True)
class RecurrenceOptions:
    """Options of a recurrence.

    Attributes:
        scaling: Factor on the queries.
        unit_vectors: True to divide queries and keys by their norms first.
    """

    scaling: float = 1.0
    unit_vectors: bool = False


def packed_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor | None,
    layout: Layout,
    *,
    scaling: float = 1.0,
    unit_vectors: bool = False,
) -> Tensor:
    """Return the outputs y of a linear recurrence.

    Args:
        query: (T, key heads, d). Heads ``i·g … i·g + g - 1`` of the values share key head ``i``.
        key: (T, key heads, d).
        value: (T, heads, d_v).
        decay: (T, heads) logarithms g of the decay, at most 0.
        rate: (T, heads) β of the gated delta rule, or None for a state-space scan.
        layout: Layout of the T tokens.
        scaling: Factor on the queries.
        unit_vectors: True to divide queries and keys by their norms first.

    Returns:
        (T, heads, d_v) in the dtype of ``value``. States and sums are in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_shapes(query, key, value, decay, rate, layout)
    return _Recurrence.apply(query, key, value, decay, rate, layout, RecurrenceOptions(scaling, unit_vectors))


def continue_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor | None,
    layout: Layout,
    states: Tensor,
    rows: np.ndarray,
    *,
    scaling: float = 1.0,
    unit_vectors: bool = False,
) -> Tensor:
    """Return the outputs of :func:`packed_recurrence` for segments that continue given states. No autograd.

    Args:
        query, key, value, decay, rate, scaling, unit_vectors: See :func:`packed_recurrence`.
        layout: Layout of the T tokens, S segments without parents.
        states: (slots, heads·d·d_v) fp32 states before the segments, which are replaced by the states after them. A new
            sequence starts with zeros. The layout of a state depends on the implementation.
        rows: (S,) int64 index in ``states`` of each segment's state.
    """
    _check_shapes(query, key, value, decay, rate, layout)
    if is_compiled(query, key, value):
        addresses = states.data_ptr() + rows * (states.stride(0) * states.itemsize)
        segments = layout.segments()
        tensors = [query.contiguous(), key.contiguous(), value.contiguous(), *_fp32(decay, rate)]
        out = value.new_empty(value.shape)
        loader.kernels().dw_recurrence(
            loader.dtype_code(value.dtype), segments.data_ptr(), segments.shape[1], *value.shape[:2], *key.shape[1:],
            value.shape[2], scaling, unit_vectors, *map(loader.address, tensors), addresses.ctypes.data, out.data_ptr(),
        )  # fmt: skip
        return out
    inputs = _Inputs(query, key, value, decay, rate)
    run = _chunked_recurrence(inputs, layout, RecurrenceOptions(scaling, unit_vectors))
    indices = torch.from_numpy(rows)
    shape = (value.shape[1], key.shape[2], value.shape[2])
    outputs, last_states = run.continue_from(states.index_select(0, indices).unflatten(1, shape), layout)
    states.index_copy_(0, indices, last_states.flatten(1).to(states.dtype))
    return outputs


def recurrence_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor | None,
    layout: Layout,
    *,
    scaling: float = 1.0,
    unit_vectors: bool = False,
) -> Tensor:
    """Reference implementation of :func:`packed_recurrence`, token by token. Supports autograd."""
    dtype = accumulation_dtype(value)
    group = value.shape[1] // key.shape[1]
    q = query.to(dtype)
    k = key.to(dtype)
    if unit_vectors:
        q = _normalize(q)[0]
        k = _normalize(k)[0]
    q = (q * scaling).repeat_interleave(group, 1)
    k = k.repeat_interleave(group, 1)
    v = value.to(dtype)
    g = decay.to(dtype).exp()[..., None, None]
    beta = None if rate is None else rate.to(dtype)[..., None]
    last_states: list[Tensor] = []
    outputs = [v[:0]]
    for start, stop, parent in zip(layout.starts.tolist(), layout.stops.tolist(), layout.parents.tolist(), strict=True):
        state = last_states[parent] if parent >= 0 else v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        for t in range(start, stop):
            state = state * g[t]
            added = v[t]
            if beta is not None:
                added = beta[t] * (added - (state * k[t][..., None]).sum(1))
            state = state + k[t][..., None] * added[:, None]
            outputs.append((state * q[t][..., None]).sum(1)[None])
        last_states.append(state)
    return torch.cat(outputs).to(value.dtype)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, decay, rate, layout, options):  # type: ignore[override]
        ctx.save_for_backward(query, key, value, decay, rate)
        ctx.layout = layout
        ctx.options = options
        if not layout.length:
            return torch.empty_like(value)
        if is_compiled(query, key, value):
            return _recurrence(query, key, value, decay, rate, layout.segments(), options.scaling, options.unit_vectors)
        inputs = _Inputs(query, key, value, decay, rate)
        return torch.cat([_chunked_recurrence(part, layout, options).outputs() for part in _head_groups(inputs)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        options = ctx.options
        inputs = _Inputs(*ctx.saved_tensors)  # read once, because activation checkpointing recomputes them
        tensors = (inputs.query, inputs.key, inputs.value, inputs.decay, inputs.rate)
        if not ctx.layout.length:
            return *(None if tensor is None else torch.empty_like(tensor) for tensor in tensors), None, None
        if is_compiled(inputs.query, inputs.key, inputs.value):
            arguments = (ctx.layout.segments(), options.scaling, options.unit_vectors)
            *grads, grad_rate = _recurrence_backward(grad, *tensors, *arguments)
            return *grads, None if inputs.rate is None else grad_rate, None, None
        grads = []
        first = 0
        for part in _head_groups(inputs):
            heads = part.value.shape[1]
            grads.append(_chunked_recurrence(part, ctx.layout, options).gradients(grad[:, first : first + heads]))
            first += heads
        merged = (None if tensors[0] is None else torch.cat(tensors, 1) for tensors in zip(*grads, strict=True))
        return *merged, None, None


# The compiled kernels process this many columns of a matrix at a time.
KERNEL_COLUMNS = 32


def is_compiled(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if the compiled kernels support these tensors: same supported type, and head sizes in multiples of 32."""
    sizes = (key.shape[2], value.shape[2])
    return loader.supports(query, key, value) and not any(size % KERNEL_COLUMNS for size in sizes)


def _operations(query: Tensor, key: Tensor, value: Tensor, *_: object) -> int:
    """Return the operations of a forward pass in chunks of 64 tokens."""
    length, heads, d_v = value.shape
    d = key.shape[2]
    return 2 * length * heads * (3 * d * d_v + 64 * (d + 2 * d_v))


@define(
    "recurrence(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? rate, Tensor segments, float scaling, "
    "bool unit_vectors) -> Tensor",
    lambda query, key, value, *_: value.new_empty(value.shape),
    _operations,
)
def _recurrence(query, key, value, decay, rate, segments, scaling, unit_vectors):  # type: ignore[no-untyped-def]
    tensors = [query.contiguous(), key.contiguous(), value.contiguous(), *_fp32(decay, rate)]
    out = torch.empty_like(tensors[2])
    loader.kernels().dw_recurrence(
        loader.dtype_code(value.dtype), segments.data_ptr(), segments.shape[1], *value.shape[:2], *key.shape[1:],
        value.shape[2], scaling, unit_vectors, *map(loader.address, tensors), None, out.data_ptr(),
    )  # fmt: skip
    return out


@define(
    "recurrence_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? rate, "
    "Tensor segments, float scaling, bool unit_vectors) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, query, key, value, decay, rate, *_: (
        *(t.new_empty(t.shape) for t in (query, key, value, decay)),
        decay.new_empty(0) if rate is None else rate.new_empty(rate.shape),
    ),
    lambda grad, *arguments: 4 * _operations(*arguments),
)
def _recurrence_backward(  # type: ignore[no-untyped-def]
    grad, query, key, value, decay, rate, segments, scaling, unit_vectors
):
    tensors = [query.contiguous(), key.contiguous(), value.contiguous(), *_fp32(decay, rate)]
    grad = grad.to(value.dtype).contiguous()
    grads = [torch.empty_like(t) for t in tensors if t is not None]
    grad_rate = grads[4].data_ptr() if rate is not None else None
    loader.kernels().dw_recurrence_backward(
        loader.dtype_code(value.dtype), segments.data_ptr(), segments.shape[1], *value.shape[:2], *key.shape[1:],
        value.shape[2], scaling, unit_vectors, *map(loader.address, tensors),
        grad.data_ptr(), *(g.data_ptr() for g in grads[:4]), grad_rate,
    )  # fmt: skip
    grads[3] = grads[3].to(decay.dtype)
    return *grads[:4], grads[4].to(rate.dtype) if rate is not None else decay.new_empty(0)


def _fp32(decay: Tensor, rate: Tensor | None) -> list[Tensor | None]:
    return [decay.float().contiguous(), None if rate is None else rate.float().contiguous()]


@dataclass(frozen=True)
class _Inputs:
    """Arguments of :func:`packed_recurrence`."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    rate: Tensor | None


def _head_groups(inputs: _Inputs) -> list[_Inputs]:
    """Split the inputs by heads to limit the memory of intermediate results."""
    length, heads, d_v = inputs.value.shape
    key_heads, d = inputs.key.shape[1:]
    group_size = max(1, ELEMENTS_PER_GROUP // (length * (4 * d + 6 * d_v)) * key_heads // heads)
    if group_size >= key_heads:
        return [inputs]
    heads_per_key = heads // key_heads
    parts = []
    for low in range(0, key_heads, group_size):
        keys = slice(low, low + group_size)
        values = slice(low * heads_per_key, (low + group_size) * heads_per_key)
        rate = None if inputs.rate is None else inputs.rate[:, values]
        part = _Inputs(
            query=inputs.query[:, keys],
            key=inputs.key[:, keys],
            value=inputs.value[:, values],
            decay=inputs.decay[:, values],
            rate=rate,
        )
        parts.append(part)
    return parts


def _chunked_recurrence(inputs: _Inputs, layout: Layout, options: RecurrenceOptions) -> _ChunkedRecurrence:
    """Cut the inputs into chunks of the size with the least estimated work."""
    d = inputs.key.shape[2]
    size = _chunk_size(layout, d, inputs.value.shape[2])
    return _ChunkedRecurrence(inputs, chunks_of(layout, size), options)


def _chunk_size(layout: Layout, d: int, d_v: int) -> int:
    """Return the chunk size with the least estimated work."""

    def work(size: int) -> int:
        chunks, levels = count_chunks(layout, size)
        return chunks * size * (3 * d * d_v + size * 2 * (d + d_v)) + levels * WORK_PER_LEVEL

    return min(CHUNK_SIZES, key=work)


class _ChunkedRecurrence:
    """A recurrence in N chunks of C tokens. The symbols are those of the formulas at the top of the file.

    Attributes:
        query: Q (N, key heads, C, d), with scaling.
        key: K (N, key heads, C, d).
        value: V (N, heads, C, d_v).
        rate: β (N, heads, C, 1), or None.
        heads_per_key: Number of heads that share a key head.
        pair_decay: D (N, heads, C, C).
        decay_before: exp(G) (N, heads, C, 1), the decay of the chunk's initial state at each token.
        decay_after: exp(G_C − G) (N, heads, C, 1), the decay from each token to the end of the chunk.
        chunk_decay: exp(G_C) (N, heads, 1, 1).
        scores: QKᵀ∘D.
        similarity: KKᵀ∘D of the gated delta rule.
        system: tril(β·KKᵀ∘D, −1) of the gated delta rule.
        state: State after the last level that was computed, or None before the first level.
        states: State before the chunks of each level (n, heads, d, d_v), None in the first level.
        corrected: U of the chunks of each level (n, heads, C, d_v).
        recalled: K S of the chunks of each level, None in the first level and in a state-space scan.
    """

    def __init__(self, inputs: _Inputs, chunks: Chunks, options: RecurrenceOptions) -> None:
        dtype = accumulation_dtype(inputs.value)
        self.inputs = inputs
        self.chunks = chunks
        self.options = options
        self.query = chunks.gather(inputs.query, dtype)
        self.key = chunks.gather(inputs.key, dtype)
        if options.unit_vectors:
            self.query, self.query_rnorm = _normalize(self.query)
            self.key, self.key_rnorm = _normalize(self.key)
        self.query = self.query * options.scaling
        self.value = chunks.gather(inputs.value, dtype)
        self.rate = None if inputs.rate is None else chunks.gather(inputs.rate[..., None], dtype)
        self.heads_per_key = self.value.shape[1] // self.key.shape[1]
        decay = chunks.gather(inputs.decay[..., None], dtype)
        # The logarithm of D_ij is the sum of g from token j + 1 to i. A difference of cumulative sums would be
        # inaccurate after a strong decay and NaN after an infinite one.
        steps = decay.expand(*decay.shape[:-1], decay.shape[-2]).tril(-1)
        self.pair_decay = steps.cumsum(-2).exp_().tril_()
        self.decay_before = decay.cumsum(-2).exp_()
        self.decay_after = self.pair_decay[..., -1, :, None]
        self.chunk_decay = self.decay_before[..., -1:, :]
        self.scores = self._per_head(self.query @ self.key.mT) * self.pair_decay
        self.states: list[Tensor | None] = []
        self.corrected: list[Tensor] = []
        self.recalled: list[Tensor | None] = []
        if self.rate is not None:
            self.similarity = self._per_head(self.key @ self.key.mT) * self.pair_decay
            self.system = (self.similarity * self.rate).tril_(-1)

    def _per_head(self, values: Tensor) -> Tensor:
        """Expand (N, key heads, …) to (N, heads, …)."""
        return values if self.heads_per_key == 1 else values.repeat_interleave(self.heads_per_key, 1)

    def _per_key_head(self, values: Tensor) -> Tensor:
        """Sum (N, heads, …) to (N, key heads, …)."""
        return values if self.heads_per_key == 1 else values.unflatten(1, (-1, self.heads_per_key)).sum(2)

    def outputs(self) -> Tensor:
        """Return the outputs (T, heads, d_v)."""
        outputs = torch.cat([self._run_level(level, keep=False) for level in self._start()])
        return self.chunks.scatter(outputs).to(self.inputs.value.dtype)

    def continue_from(self, states: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the outputs (T, heads, d_v), and the states (S, heads, d, d_v) after the segments.

        Args:
            states: (S, heads, d, d_v) states before the segments. Segments have no parents.
            layout: Layout of the chunks.
        """
        counts = torch.from_numpy(-(-(layout.stops - layout.starts) // self.value.shape[2]))
        last_states = states.clone()
        outputs = []
        for index, level in enumerate(self._start(states)):
            outputs.append(self._run_level(level, keep=False))
            assert self.state is not None
            is_last = counts[counts > index] == index + 1
            last_states[counts == index + 1] = self.state[is_last]
        return self.chunks.scatter(torch.cat(outputs)).to(self.inputs.value.dtype), last_states

    def _start(self, state: Tensor | None = None) -> tuple[ChunkLevel, ...]:
        """Set the state before the first level, and return the levels to run."""
        self.state = state
        return self.chunks.levels

    def _run_level(self, level: ChunkLevel, *, keep: bool) -> Tensor:
        """Return the outputs (n, heads, C, d_v) of a level, and replace ``state`` by the state after it.

        Args:
            keep: True to store intermediate results for the backward pass.
        """
        part = slice(level.start, level.stop)
        state = self.state if level.parents is None or self.state is None else self.state[level.parents]
        key = self._per_head(self.key[part])
        values = self.value[part]
        recalled = None
        if self.rate is not None:
            if state is not None:
                recalled = key @ state
                values = values - self.decay_before[part] * recalled
            values = _solve(self.system[part], values * self.rate[part])
        output = self.scores[part] @ values
        new_state = (key * self.decay_after[part]).mT @ values
        if state is not None:
            output += self.decay_before[part] * (self._per_head(self.query[part]) @ state)
            new_state += self.chunk_decay[part] * state
        self.state = new_state
        if keep:
            self.states.append(state)
            self.corrected.append(values)
            self.recalled.append(recalled)
        return output

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return the gradients of the inputs from the gradient (T, heads, d_v) of the outputs."""
        for level in self._start():
            self._run_level(level, keep=True)
        grad_output = self.chunks.gather(grad, self.value.dtype)
        sums = _Gradients(self)
        grad_state: Tensor | None = None
        for index in reversed(range(len(self.chunks.levels))):
            grad_state = sums.add_level(index, grad_output, grad_state)
        return sums.finish(grad_output)


class _Gradients:
    """Gradients of a :class:`_ChunkedRecurrence`. Attributes are named after the recurrence's attributes.

    Attributes:
        values: Gradient of the right-hand side of the triangular system, or of V in a state-space scan.
    """

    def __init__(self, run: _ChunkedRecurrence) -> None:
        self.run = run
        heads = run.value.shape[1]
        shape = (*run.key.shape[:1], heads, *run.key.shape[2:])
        self.query = run.key.new_zeros(shape)
        self.key = run.key.new_zeros(shape)
        self.values = torch.empty_like(run.value)
        self.decay_before = torch.zeros_like(run.decay_before)
        self.decay_after = torch.zeros_like(run.decay_after)
        self.chunk_decay = torch.zeros_like(run.chunk_decay)

    def add_level(self, index: int, grad_output: Tensor, grad_after: Tensor | None) -> Tensor | None:
        """Add the gradients that pass through the states of a level.

        Args:
            grad_output: (N, heads, C, d_v).
            grad_after: (n, heads, d, d_v) gradient of the states after the level. None if nothing reads them.

        Returns:
            Gradient of the states after the previous level, or None in the first level.
        """
        run = self.run
        level = run.chunks.levels[index]
        state = run.states[index]
        corrected = run.corrected[index]
        recalled = run.recalled[index]
        part = slice(level.start, level.stop)
        key = run._per_head(run.key[part])
        values = run.scores[part].mT @ grad_output[part]
        if grad_after is not None:
            values += run.decay_after[part] * (key @ grad_after)
            from_state = corrected @ grad_after.mT
            self.key[part] += run.decay_after[part] * from_state
            self.decay_after[part] = (from_state * key).sum(-1, keepdim=True)
        if run.rate is not None:
            values = _solve_transposed(run.system[part], values)
        self.values[part] = values
        if state is None or level.parents is None:
            return None
        query = run._per_head(run.query[part])
        read = grad_output[part] @ state.mT
        self.query[part] += run.decay_before[part] * read
        self.decay_before[part] += (read * query).sum(-1, keepdim=True)
        grad_state = query.mT @ (run.decay_before[part] * grad_output[part])
        if grad_after is not None:
            grad_state += run.chunk_decay[part] * grad_after
            self.chunk_decay[part] = (grad_after * state).sum((-1, -2))[..., None, None]
        if run.rate is not None and recalled is not None:
            scaled = run.rate[part] * values
            self.decay_before[part] -= (scaled * recalled).sum(-1, keepdim=True)
            grad_recalled = -run.decay_before[part] * scaled
            self.key[part] += grad_recalled @ state.mT
            grad_state += key.mT @ grad_recalled
        previous = run.chunks.levels[index - 1]
        summed = grad_state.new_zeros(previous.stop - previous.start, *grad_state.shape[1:])
        return summed.index_add_(0, level.parents, grad_state)

    def finish(self, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Add the gradients inside the chunks, and return the gradients of the inputs."""
        run = self.run
        corrected = torch.cat(run.corrected)
        grad_scores = grad_output @ corrected.mT
        grad_pair_log = grad_scores * run.scores  # gradient of log(pair_decay)
        grad_products = run._per_key_head(grad_scores * run.pair_decay)
        query = run._per_key_head(self.query) + grad_products @ run.key
        key = run._per_key_head(self.key) + grad_products.mT @ run.query
        value = self.values
        rate = None
        if run.rate is not None:
            grad_system = -(self.values @ corrected.mT).tril_(-1)
            grad_pair_log += grad_system * run.system
            grad_similarity = run._per_key_head(grad_system * run.pair_decay * run.rate)
            key += (grad_similarity + grad_similarity.mT) @ run.key
            residuals = [self._residual(index) for index in range(len(run.chunks.levels))]
            rate = (grad_system * run.similarity).sum(-1, keepdim=True)
            rate += (self.values * torch.cat(residuals)).sum(-1, keepdim=True)
            value = self.values * run.rate
        query = query * run.options.scaling
        if run.options.unit_vectors:
            query = _normalize_backward(query, run.query / run.options.scaling, run.query_rnorm)
            key = _normalize_backward(key, run.key, run.key_rnorm)
        scatter = run.chunks.scatter
        inputs = run.inputs
        return (
            scatter(query).to(inputs.query.dtype),
            scatter(key).to(inputs.key.dtype),
            scatter(value).to(inputs.value.dtype),
            scatter(self._grad_decay(grad_pair_log)[..., None])[..., 0].to(inputs.decay.dtype),
            None if rate is None or inputs.rate is None else scatter(rate)[..., 0].to(inputs.rate.dtype),
        )

    def _residual(self, index: int) -> Tensor:
        """Return V − exp(G)·K S of a level."""
        level = self.run.chunks.levels[index]
        recalled = self.run.recalled[index]
        value = self.run.value[level.start : level.stop]
        return value if recalled is None else value - self.run.decay_before[level.start : level.stop] * recalled

    def _grad_decay(self, grad_pair_log: Tensor) -> Tensor:
        """Return the gradient (N, heads, C) of g from the gradients of the decay factors."""
        run = self.run
        after = (self.decay_after * run.decay_after)[..., 0]
        from_before = _reverse_cumsum(self.decay_before * run.decay_before)[..., 0]
        from_after = after.cumsum(-1) - after
        # D_ij depends on g_t if j < t ≤ i.
        from_pairs = _reverse_cumsum(grad_pair_log).tril_(-1).sum(-1)
        return from_pairs + from_before + from_after + (self.chunk_decay * run.chunk_decay)[..., 0]


def _reverse_cumsum(values: Tensor) -> Tensor:
    """Return, for each row, the sum of that row and all later rows."""
    return values.flip(-2).cumsum(-2).flip(-2)


def _solve(system: Tensor, values: Tensor) -> Tensor:
    """Return (I + system)⁻¹ values for a strictly lower triangular system."""
    return torch.linalg.solve_triangular(system, values, upper=False, unitriangular=True)


def _solve_transposed(system: Tensor, values: Tensor) -> Tensor:
    """Return (I + systemᵀ)⁻¹ values."""
    return torch.linalg.solve_triangular(system.mT, values, upper=True, unitriangular=True)


def _normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x divided by its norm over the last dimension, and the reciprocal norm."""
    rnorm = torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
    return x * rnorm, rnorm


def _normalize_backward(grad: Tensor, unit: Tensor, rnorm: Tensor) -> Tensor:
    return rnorm * (grad - unit * (grad * unit).sum(-1, keepdim=True))


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor | None, layout: Layout
) -> None:
    if value.dim() != 3 or key.dim() != 3 or query.shape != key.shape:
        raise ValueError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} do not match"
        )
    if value.shape[0] != layout.length or key.shape[0] != layout.length:
        got = f"{value.shape[0]} values and {key.shape[0]} keys"
        raise ValueError(f"got {got}, but the layout has {layout.length} tokens")
    if key.shape[1] == 0 or value.shape[1] % key.shape[1]:
        raise ValueError(f"{value.shape[1]} heads cannot share {key.shape[1]} key heads")
    for name, tensor in (("decays", decay), ("rates", rate)):
        if tensor is not None and tensor.shape != value.shape[:2]:
            raise ValueError(f"{name} must have the shape {tuple(value.shape[:2])}, not {tuple(tensor.shape)}")
