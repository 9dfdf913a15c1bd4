"""Activated LoRA: the tokens on which an adapter acts (Greenewald et al., arXiv 2504.12397).

An activated adapter is off before its invocation sequence and on from the sequence's first token; of several
occurrences in a row the last one counts, and a row without one is the base model's own, as in PEFT
(``alora_invocation_tokens``). So keys and values of all that precedes the sequence are those of the base
model.

All adapted layers of a model share one :class:`Activation`. It looks at the token ids whenever the model is
called. A caller that knows better names the places in the keyword ``adapter_active``, which the model itself
never sees. What was found stays until the next call, for activation checkpointing runs layers again in the
backward. Knows token ids and caches by their names alone; no tokenizer and no layout of rows.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLACES = "adapter_active"
"""The keyword with which a caller names the places: bools of the shape of ``input_ids``, or one bool."""


class Activation:
    """Where the adapter of a model acts, as its layers ask for it.

    Args:
        tokens: the invocation sequence, ids.

    Attributes:
        places: bool (rows, T) of the tokens that the model runs at the moment; True for all of them, False
            for none, None where they cannot be told.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.places: Tensor | bool | None = True
        self._names: list[str] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # Of each cache, which of its rows are invoked already.
        self._invoked: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self._last: Tensor | None = None

    @property
    def kind(self) -> str:
        """``all``, ``none``, or ``some`` of the places; ``unknown`` where they cannot be told."""
        if isinstance(self.places, Tensor):
            return "some"
        if self.places is None:
            return "unknown"
        return "all" if self.places else "none"

    def watch(self, model: nn.Module) -> None:
        """Look at the tokens of each call of ``model``, or of the part of it that takes them."""
        inner = getattr(model, "base_model", None)
        taker = inner if isinstance(inner, nn.Module) else model
        self._names = list(inspect.signature(type(taker).forward).parameters)[1:]
        self._handles = [
            taker.register_forward_pre_hook(self._before, with_kwargs=True),
            taker.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop(PLACES, None)
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        self._last = None
        self.places = self._looked_up(named) if given is None else given
        return args, kwargs

    def _after(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        """Note which rows are invoked with a cache that the model made itself."""
        cache = _cache_among(output.values() if isinstance(output, Mapping) else ())
        if cache is not None and self._last is not None:
            self._invoked[cache] = self._last

    def unwatch(self) -> None:
        """Look at nothing any more."""
        while self._handles:
            self._handles.pop().remove()

    def _looked_up(self, named: Mapping[str, Any]) -> Tensor | bool | None:
        """The places of a call with these arguments."""
        if named.get("packed_layout") is not None:
            return None  # several rows in one: the last occurrence says nothing of those before
        ids = named.get("input_ids")
        if not isinstance(ids, Tensor):
            return None
        starts = invocation_starts(ids, self.tokens)
        found = starts < ids.shape[1]
        cache = _cache_among(named.values())
        invoked = None if cache is None or not _holds_tokens(cache) else self._invoked.get(cache)
        if invoked is not None and invoked.shape[0] == ids.shape[0]:
            # Once on, an adapter stays on; what a model writes itself does not switch it on.
            if ids.shape[1] == 1:
                self._last = invoked
                return True if type(invoked) is Tensor and bool(invoked.all()) else invoked[:, None]
            starts = torch.where(invoked, 0, starts)
            found = found | invoked
        self._last = found
        if cache is not None:
            self._invoked[cache] = found
        return torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]


def invocation_starts(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Where the last occurrence of ``tokens`` begins in each row of ids (rows, T): (rows,), T where there is
    none."""
    length, size = ids.shape[1], len(tokens)
    if length < size:
        return torch.full((ids.shape[0],), length, device=ids.device)
    wanted = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
    hits = (ids.unfold(1, size, 1) == wanted).all(-1)
    last = torch.where(hits, torch.arange(hits.shape[1], device=ids.device), -1).amax(1)
    return torch.where(last < 0, length, last)


def _cache_among(values: Iterable[Any]) -> Any:
    """The cache of keys and values, or of states, among arguments or outputs; transformers' versions give it
    different names."""
    return next(
        (v for v in values if hasattr(v, "get_seq_length") or type(v).__name__.endswith("Cache")), None
    )


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache is in use already; one that does not say so is taken to be."""
    try:
        return int(cache.get_seq_length()) > 0
    except (AttributeError, ValueError):  # a cache of states alone, of layers without attention
        return True
