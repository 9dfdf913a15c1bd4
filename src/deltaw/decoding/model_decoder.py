"""A decoder that runs the model's own code over pages and states, for models whose blocks have no compiled decoder.

A step is one forward pass of the model over the tokens of all sequences as one row. These parts are replaced during the
pass, as for packed rows in training:

- attention, which writes keys and values to pages and reads those of each token's sequence
- the functions of recurrent layers, which continue the states of each sequence
- linear layers, which read their weights once for all tokens and add the update of each token's adapter
- norms, which run fused

Everything else is the model's code, so no list of model families is needed. When a decoder is created, a forward pass
of a few tokens records the calls. The attention layers are called in the same order in every step.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from deltaw.decoding.probes import NotDecodable
from deltaw.hub.transformers_private import attention_name, set_attention_name
from deltaw.kernels.continued import ContinuedRows
from deltaw.kernels.decode import PAGE_TOKENS, LinearDecoder, PackedAdapter, Pages, adapter_table
from deltaw.kernels.decode_reference import HEAD, AttentionForm, DecoderLinear
from deltaw.kernels.huge_pages import empty_in_huge_pages
from deltaw.kernels.paged_attention import PagedAttention, PagedRows, page_numbers
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, get_output_head, is_conv1d
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.lora.stored import stored_form, weight_shape
from deltaw.runtime.attention_choice import use_attention
from deltaw.runtime.block_roles import forward_replaced, norm_form
from deltaw.runtime.fused import FusedNorm
from deltaw.runtime.image_tokens import ImageTokens
from deltaw.runtime.recurrent_layers import use_packed_operators

ATTENTION = "deltaw_paged"
# Number of tokens of the recorded pass.
_TRACED_TOKENS = 5


@dataclass(frozen=True)
class ModelInputs:
    """Embeddings of tokens, with the interface of :class:`deltaw.decoding.probes.InputProbe`.

    Attributes:
        embedding: Embedding of the model, without virtual tokens.
        limit: Maximum number of positions of a sequence.
        outer: Factor applied to embeddings that are passed instead of tokens.
        positions: Always None. The model's code adds learned positions.
    """

    embedding: nn.Module
    limit: int
    outer: float = 1.0
    positions: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens V, without virtual tokens and image tokens."""
        return int(weight_shape(self.embedding)[0])

    @property
    def images(self) -> ImageTokens | None:
        """Embedding that also maps image tokens, or None."""
        return self.embedding if isinstance(self.embedding, ImageTokens) else None

    def rows(self, tokens: Tensor) -> Tensor:
        """Return (n, D) fp32 rows of (n,) token ids."""
        rows: Tensor = self.embedding(tokens)
        return rows.float()


@dataclass(frozen=True, eq=False)
class ModelAdapter:
    """An adapter's factors by layer name, packed for the layers of a :class:`ModelDecoder`."""

    layers: Mapping[str, PackedAdapter]

    @property
    def bytes(self) -> int:
        return sum(packed.bytes for packed in self.layers.values())


class _TracedRows(ContinuedRows):
    """Rows of the recorded pass: records attention calls and returns zeros."""

    def __init__(self) -> None:
        super().__init__([_TRACED_TOKENS], [0], None)
        self.forms: list[AttentionForm] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        self.forms.append(AttentionForm(query.shape[1], key.shape[1], query.shape[2], **options))
        return torch.zeros_like(query)


class _StepRows(ContinuedRows):
    """Rows of a step, which the layers of a model receive as ``packed_layout``.

    Args:
        rows: Rows of the step. Rows of a sequence are contiguous.
        attention: Attention of each layer, in the order of the calls.
    """

    def __init__(self, rows: PagedRows, attention: Sequence[PagedAttention]) -> None:
        sequence = rows.sequence.numpy()
        starts = np.flatnonzero(np.diff(sequence, prepend=-1))
        lengths = np.diff(starts, append=len(sequence))
        states = rows.pages.states
        slots = sequence[starts]
        if states is not None:  # sequences that begin at position 0
            states[slots[rows.positions.numpy()[starts] == 0]] = 0.0
        super().__init__(lengths.tolist(), slots.tolist(), states)
        self._rows = rows
        self._attention = iter(attention)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        return next(self._attention)(query, key, value, self._rows)


def _attend_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: _TracedRows | _StepRows | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention with the signature of transformers: query (1, heads, T, d) to output (1, T, heads, d)."""
    if packed_layout is None or query.shape[2] != packed_layout.length or key.shape[2] != packed_layout.length:
        raise RuntimeError(f"{type(module).__name__} does not pass the rows of a step to its attention")
    if not getattr(module, "is_causal", True):
        raise RuntimeError("its attention is bidirectional")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"scaling": scale, "window": sliding_window, "softcap": softcap}
    size = value.shape[-1]
    v = F.pad(value, (0, query.shape[-1] - size))
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, v))
    out = packed_layout.attend(q, k, v, options)
    return out[None, ..., :size], None


AttentionInterface.register(ATTENTION, _attend_paged)


class _StepLinear:
    """Forward of a linear layer during steps.

    Args:
        layer: The layer without low-rank factors.
        is_head: True for the output head, whose rows are the output rows. Its outputs remain in fp32.
    """

    def __init__(self, layer: DecoderLinear, is_head: bool) -> None:
        self.decoder = LinearDecoder(layer)
        self.is_head = is_head
        self.rows: Tensor | None = None  # index in ``adapters`` for each row of the step
        self.adapters: list[PackedAdapter] = []

    def __call__(self, x: Tensor) -> Tensor:
        y = self.decoder.product(x.reshape(-1, x.shape[-1]), self.rows, self.adapters).view(*x.shape[:-1], -1)
        return y if self.is_head else y.to(x.dtype)


class ModelDecoder:
    """Decoder over the modules of a model. It has the interface of :class:`deltaw.kernels.decode.Decoder`.

    Args:
        model: Causal language model on the CPU, in evaluation mode.
        embedding: Token embedding of the model.
        linear: Converts a linear module to the decoder's form.
        cache_dtype: Type of keys and values, fp32 or bf16.

    Attributes:
        names: Names of the linear layers that adapters can change. Maps every name of a shared layer to the first one.

    Raises:
        NotDecodable: if the model's code does not support steps.
    """

    page_tokens = PAGE_TOKENS

    def __init__(
        self,
        model: PreTrainedModel,
        embedding: nn.Module,
        linear: Callable[[nn.Module], DecoderLinear],
        cache_dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.cache_dtype = cache_dtype
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise NotDecodable("its forward method computes the logits of all tokens")
        use_packed_operators(model)
        head = get_output_head(model)
        self._modules = {name: module for name, module in model.named_modules() if _is_linear(module)}
        self._calls: dict[nn.Module, list[int]] = {module: [] for module in self._modules.values()}
        hidden = embedding(torch.arange(_TRACED_TOKENS)).detach()
        self._dtype = hidden.dtype
        traced = self._trace(hidden)
        self._linears = {
            name: _StepLinear(linear(module), module is head)
            for name, module in self._modules.items()
            if self._calls[module]
        }
        # The adapter indices of a step fit only layers that are called once, with all rows.
        adaptable = {
            id(m): n for n, m in self._modules.items() if self._calls[m] == [1 if m is head else _TRACED_TOKENS]
        }
        all_names = model.named_modules(remove_duplicate=False)
        self.names = {name: adaptable[id(module)] for name, module in all_names if id(module) in adaptable}
        self._state_size = traced.state_size
        sizes = [page_numbers(form, cache_dtype) for form in traced.forms]
        offsets = np.cumsum([0, *sizes]).tolist()
        self._page_numbers = offsets[-1]
        self._attention = [
            PagedAttention(form, offset, self._page_numbers, cache_dtype)
            for form, offset in zip(traced.forms, offsets, strict=False)
        ]
        self._configs = _configs(model)
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._forwards += [(self._modules[name], linear) for name, linear in self._linears.items()]
        self._forwards += [(m, FusedNorm(m)) for m in model.modules() if norm_form(m) is not None]

    def _trace(self, hidden: Tensor) -> _TracedRows:
        """Run a few tokens, and record the calls of attention and the number of rows in each call of a linear layer."""
        rows = _TracedRows()

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._calls[module].append(args[0].numel() // args[0].shape[-1])

        hooks = [module.register_forward_pre_hook(record) for module in self._calls]
        try:
            with torch.no_grad(), use_attention(self.model, ATTENTION):
                self._run(hidden, torch.arange(_TRACED_TOKENS), rows, torch.tensor([_TRACED_TOKENS - 1]))
        finally:
            for hook in hooks:
                hook.remove()
        return rows

    def _run(self, hidden: Tensor, positions: Tensor, rows: ContinuedRows, output_rows: Tensor) -> Tensor:
        """Run rows ``hidden`` (n, D), and return the logits (k, V) of ``output_rows`` (k,)."""
        inputs = {"inputs_embeds": hidden[None], "position_ids": positions[None], "packed_layout": rows}
        logits: Tensor = self.model(**inputs, use_cache=False, logits_to_keep=output_rows).logits
        return logits[0]

    @property
    def bytes_per_page(self) -> int:
        """Bytes of the keys and values of ``page_tokens`` tokens. Never 0, even if the model has no attention."""
        numbers: int = max(1, self._page_numbers)
        return numbers * self.cache_dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of recurrent layers, per sequence."""
        return self._state_size * 4

    def new_pages(self, count: int, sequences: int = 1) -> Pages:
        """Return uninitialized pages and states.

        Args:
            count: Number of pages.
            sequences: Number of sequences that have states.
        """
        pages = Pages(count, self._page_numbers, self.cache_dtype)
        if self._state_size:
            pages.states = empty_in_huge_pages(sequences * self._state_size, torch.float32).view(sequences, -1)
        return pages

    def pack_adapter(self, factors: Mapping[str, tuple[Tensor, Tensor, float]]) -> ModelAdapter:
        """Pack an adapter for :meth:`step`.

        Args:
            factors: A (in, r), B (r, out) and the scaling, by layer name.
        """
        layers = {}
        for name, layer_factors in factors.items():
            layers[name] = self._linears[name].decoder.pack_adapter({(-1, HEAD): layer_factors})
        return ModelAdapter(layers)

    def step(
        self,
        pages: Pages,
        hidden: Tensor,
        positions: Tensor,
        sequence: Tensor,
        page_table: Tensor,
        adapter: Tensor | None = None,
        adapters: Sequence[ModelAdapter] = (),
        output_rows: Tensor | None = None,
    ) -> tuple[None, Tensor]:
        """Run rows of tokens through the model. Arguments are those of :meth:`deltaw.kernels.decode.Decoder.step`.

        Rows of a sequence are contiguous. A sequence has the same index in the states and in ``page_table``. Its states
        are set to zero at position 0.

        Returns:
            None, and logits (k, V) in fp32.
        """
        outputs = torch.arange(len(hidden)) if output_rows is None else output_rows.long()
        rows = _StepRows(PagedRows(pages, positions, sequence, page_table.contiguous()), self._attention)
        # A model computes the logits of at least one row.
        computed = outputs if len(outputs) else outputs.new_zeros(1)
        with self._step_context(adapter, adapters, computed):
            logits = self._run(hidden.to(self._dtype), positions.long(), rows, computed)
        return None, logits[: len(outputs)].float()

    @contextlib.contextmanager
    def _step_context(
        self, adapter: Tensor | None, adapters: Sequence[ModelAdapter], output_rows: Tensor
    ) -> Iterator[None]:
        """Context in which attention, norms and linear layers of the model are replaced for a step."""
        previous = [(config, attention_name(config)) for config in self._configs]
        for name, linear in self._linears.items():
            updates = [model_adapter.layers.get(name, _NO_UPDATE) for model_adapter in adapters]
            linear.adapters = updates if any(update is not _NO_UPDATE for update in updates) else []
            if linear.adapters and adapter is not None:
                linear.rows = adapter[output_rows] if linear.is_head else adapter
        with contextlib.ExitStack() as stack:
            for module, forward in self._forwards:
                stack.enter_context(forward_replaced(module, forward))
            stack.callback(self._restore_attention, previous)
            for config in self._configs:
                set_attention_name(config, ATTENTION)
            yield

    @staticmethod
    def _restore_attention(previous: Sequence[tuple[PretrainedConfig, str | None]]) -> None:
        for config, attention in previous:
            if attention is not None:
                set_attention_name(config, attention)


_NO_UPDATE = PackedAdapter({}, adapter_table({}, 0))


def _is_linear(module: nn.Module) -> bool:
    """True for linear layers whose weights the kernels can read."""
    kind = type(module)
    if kind in (nn.Linear, LoRALinear, LoRAConv1D) or kind.__name__ in PLAIN_LINEAR_CLASSES or is_conv1d(module):
        return True
    return isinstance(module, nn.Linear) and stored_form(module) is not None


def _configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return the configurations that the model's modules read."""
    configs = (vars(module).get("config") for module in model.modules())
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())
