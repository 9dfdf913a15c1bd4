"""What every adapted layer has: a frozen weight, whether the update is on, and whether it is merged.

A subclass says what its update is (``merged_weight``); here stands how a weight is exchanged for the merged
one and given back to the bit. It knows no factors, models, files or selection.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_private import own_parameters

# Activated LoRA: the tokens on which an adapter acts (Greenewald et al., arXiv 2504.12397).
#
# An activated adapter is off before its invocation sequence and on from the sequence's first token; of several
# occurrences in a row the last one counts, and a row without one is the base model's own, as in PEFT
# (``alora_invocation_tokens``). So keys and values of all that precedes the sequence are those of the base
# model.
#
# All adapted layers of a model share one :class:`Activation`. It looks at the token ids whenever the model is
# called. A caller that knows better names the places in the keyword ``adapter_active``, which the model itself
# never sees. What was found stays until the next call, for activation checkpointing runs layers again in the
# backward. Knows token ids and caches by their names alone; no tokenizer and no layout of rows.


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
    return next((v for v in values if hasattr(v, "get_seq_length") or type(v).__name__.endswith("Cache")), None)


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache is in use already; one that does not say so is taken to be."""
    try:
        return int(cache.get_seq_length()) > 0
    except (AttributeError, ValueError):  # a cache of states alone, of layers without attention
        return True


_Layer = TypeVar("_Layer", bound=nn.Module)


class AdaptedLayer(nn.Module):
    """A layer whose frozen ``weight`` has a trained update.

    Attributes:
        enabled: False lets ``forward`` give the base layer's own output.
        merged: whether ``weight`` already holds the update.
        trained: the names of the layer's own trained parameters.
        follows: the layer whose update this one shares, where the weights are tied; else None.
        activation: where in a row the update acts; None where it acts on all of it.
    """

    trained: tuple[str, ...] = ()
    follows: AdaptedLayer | None = None
    activation: Activation | None = None

    weight: Tensor
    enabled: bool
    merged: bool
    _unmerged_weight: Tensor | None

    def _freeze(self, **attributes: object) -> None:
        """Freeze what the layer has, and begin with an update that is on and not merged."""
        for parameter in own_parameters(self).values():
            if parameter is not None:
                parameter.requires_grad_(False)
        # Plain attributes go past nn.Module's own bookkeeping, which takes its time over ten thousand layers.
        vars(self).update(attributes, enabled=True, merged=False, _unmerged_weight=None)

    def _take_over(self, module: nn.Module) -> None:
        """Note what only ``module``, the base layer, knows."""

    @property
    def adapting(self) -> bool:
        """Whether ``forward`` adds the update itself."""
        acts = self.activation is None or self.activation.places is not False
        return self.enabled and not self.merged and acts

    @property
    def acts_in_part(self) -> bool:
        """Whether the update acts on some of the tokens alone, or nobody knows on which."""
        return self.adapting and self.activation is not None and self.activation.kind != "all"

    @property
    def active_places(self) -> Tensor | None:
        """Bool (rows, T): the tokens that the update acts on; None for all of them.

        Raises:
            UserError: they cannot be told.
        """
        if self.activation is None:
            return None
        if (places := self.activation.places) is None:
            what = "an activated adapter needs the token ids of each row: there are none, or several rows are packed"
            hint = f"call the model with input_ids, or name the places in {PLACES}"
            raise UserError(what, where="input_ids", hint=hint)
        return places if isinstance(places, Tensor) else None

    @property
    def holder(self) -> nn.Module:
        """The module that ``weight`` is a parameter of."""
        return self

    def merged_weight(self) -> Tensor:
        """The weight with its update, rounded once to the weight's type, without a graph."""
        raise UserError(f"{type(self).__name__} has no update of its own", hint="use one of its subclasses")

    def merge_refusal(self) -> str | None:
        """Why the update cannot be put into this weight, or None where it can."""
        if self.activation is not None:
            return "it is activated, and acts only from its invocation sequence on, which no one weight does"
        return None

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """Take ``weight`` as the merged one; the weight before is kept if it is to be restored later."""
        if keep_original:
            self._unmerged_weight = self.weight.data
            self.weight.data = weight
        else:
            self.weight.data.copy_(weight)
        self.merged = True

    def unset_merged(self) -> None:
        """Give back the very weight that :meth:`set_merged` kept."""
        if self._unmerged_weight is None:
            raise UserError("the weights from before the merge were not kept", hint="merge with keep_original=True")
        self.weight.data = like(self._unmerged_weight, self.weight)
        self._unmerged_weight, self.merged = None, False

    @property
    def base_is_known(self) -> bool:
        """Whether the base model's own weight can still be had."""
        return not self.merged or self._unmerged_weight is not None

    def base_weight(self) -> Tensor:
        """The base model's own weight."""
        return self.weight.data if self._unmerged_weight is None else like(self._unmerged_weight, self.weight)

    def restore_base(self) -> None:
        """Put the base model's own weight in, for good."""
        if self.merged:
            self.weight.data = self.base_weight()

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within the block the layer is the base model's own."""
        enabled, weight = self.enabled, self.weight.data
        self.enabled, self.weight.data = False, self.base_weight()
        try:
            yield
        finally:
            self.enabled, self.weight.data = enabled, weight


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` with the device and type of ``other``: the model may have been moved or cast meanwhile."""
    return tensor.to(device=other.device, dtype=other.dtype)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """The type of what is trained for ``weight``: fp32, since half precision loses small updates; fp64 for
    an fp64 weight."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
