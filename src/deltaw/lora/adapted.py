"""The base class of adapted layers: a frozen weight with an update that can be disabled or merged.

Subclasses define the update (``merged_weight``). The base class swaps the merged weight in and restores the original
weight exactly.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import direct_parameters

# Activated LoRA (Greenewald et al., arXiv 2504.12397).
#
# An activated adapter acts on the tokens from its invocation sequence on. If the sequence occurs several times in a row
# of token ids, the last occurrence counts. Without an occurrence, the adapter does not act, as in PEFT
# (``alora_invocation_tokens``). The keys and values before the sequence are therefore those of the base model.
#
# All adapted layers of a model share one :class:`Activation`, which examines the token ids of each call. A caller can
# pass the active tokens in the keyword ``adapter_active``, which is removed before the model's forward. The result is
# stored until the next call, because activation checkpointing runs layers again in the backward pass.


ACTIVE_KEYWORD = "adapter_active"
"""Keyword argument that sets the active tokens: bools of the shape of ``input_ids``, or one bool."""


class Activation:
    """The tokens on which the activated adapter of a model acts.

    Args:
        tokens: Token ids of the invocation sequence.

    Attributes:
        active_mask: Bool (rows, T), True for active tokens of the current call. True or False if it is the same for all
            tokens, None if it cannot be determined.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.active_mask: Tensor | bool | None = True
        self._parameter_names: list[str] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        # By KV cache, which of its rows contain the invocation sequence.
        self._invoked: weakref.WeakKeyDictionary[Any, Tensor] = weakref.WeakKeyDictionary()
        self._last_invoked: Tensor | None = None

    @property
    def kind(self) -> str:
        """``all``, ``none`` or ``some`` of the tokens are active, or ``unknown``."""
        if isinstance(self.active_mask, Tensor):
            return "some"
        if self.active_mask is None:
            return "unknown"
        return "all" if self.active_mask else "none"

    def register_hooks(self, model: nn.Module) -> None:
        """Examine the tokens of each call of ``model``, or of its inner model if it has one."""
        inner = getattr(model, "base_model", None)
        target = inner if isinstance(inner, nn.Module) else model
        self._parameter_names = list(inspect.signature(type(target).forward).parameters)[1:]
        self._handles = [
            target.register_forward_pre_hook(self._pre_hook, with_kwargs=True),
            target.register_forward_hook(self._post_hook, with_kwargs=True),
        ]

    def _pre_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.pop(ACTIVE_KEYWORD, None)
        arguments = {**dict(zip(self._parameter_names, args, strict=False)), **kwargs}
        self._last_invoked = None
        self.active_mask = self._find_active_tokens(arguments) if mask is None else mask
        return args, kwargs

    def _post_hook(self, module: nn.Module, args: object, kwargs: object, output: object) -> None:
        """Store which rows are active with a KV cache that the model created."""
        cache = _find_cache(output.values() if isinstance(output, Mapping) else ())
        if cache is not None and self._last_invoked is not None:
            self._invoked[cache] = self._last_invoked

    def remove_hooks(self) -> None:
        """Stop examining calls."""
        while self._handles:
            self._handles.pop().remove()

    def _find_active_tokens(self, arguments: Mapping[str, Any]) -> Tensor | bool | None:
        """Return the active tokens of a call with these arguments."""
        if arguments.get("packed_layout") is not None:
            return None  # several packed rows, of which the last occurrence covers only one
        ids = arguments.get("input_ids")
        if not isinstance(ids, Tensor):
            return None
        starts = find_invocation_starts(ids, self.tokens)
        contains = starts < ids.shape[1]
        cache = _find_cache(arguments.values())
        invoked = None if cache is None or not _cache_has_tokens(cache) else self._invoked.get(cache)
        if invoked is not None and invoked.shape[0] == ids.shape[0]:
            # An active adapter remains active. Generated tokens do not activate it.
            if ids.shape[1] == 1:
                self._last_invoked = invoked
                return True if type(invoked) is Tensor and bool(invoked.all()) else invoked[:, None]
            starts = torch.where(invoked, 0, starts)
            contains = contains | invoked
        self._last_invoked = contains
        if cache is not None:
            self._invoked[cache] = contains
        return torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]


def find_invocation_starts(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the start of the last occurrence of ``tokens`` in each row.

    Args:
        ids: (rows, T) token ids.
        tokens: Token ids of the sequence.

    Returns:
        (rows,) positions. T for rows without an occurrence.
    """
    length = ids.shape[1]
    size = len(tokens)
    if length < size:
        return torch.full((ids.shape[0],), length, device=ids.device)
    matches = (ids.unfold(1, size, 1) == torch.tensor(tokens, dtype=ids.dtype, device=ids.device)).all(-1)
    last = torch.where(matches, torch.arange(matches.shape[1], device=ids.device), -1).amax(1)
    return torch.where(last < 0, length, last)


def _find_cache(values: Iterable[Any]) -> Any:
    """Return the KV or state cache in arguments or outputs, whose name varies between versions of transformers."""
    return next((v for v in values if hasattr(v, "get_seq_length") or type(v).__name__.endswith("Cache")), None)


def _cache_has_tokens(cache: Any) -> bool:
    """True if a cache contains tokens, or cannot report it."""
    try:
        return int(cache.get_seq_length()) > 0
    except (AttributeError, ValueError):  # a cache that contains only states, of layers without attention
        return True


class AdaptedLayer(nn.Module):
    """A layer with a frozen ``weight`` and a trained update.

    Attributes:
        enabled: If False, ``forward`` returns the base layer's output.
        merged: True if ``weight`` includes the update.
        trained: Names of the layer's trained parameters.
        tied_to: Layer whose update this layer shares because their weights are tied, or None.
        activation: Tokens on which the update acts, or None if it acts on all.
    """

    trained: tuple[str, ...] = ()
    tied_to: AdaptedLayer | None = None
    activation: Activation | None = None

    weight: Tensor
    enabled: bool
    merged: bool
    _unmerged_weight: Tensor | None

    def _freeze(self, **attributes: object) -> None:
        """Freeze the parameters and enable the update, not merged."""
        for parameter in direct_parameters(self).values():
            if parameter is not None:
                parameter.requires_grad_(False)
        # vars() bypasses nn.Module.__setattr__, which is slow for ten thousand layers.
        vars(self).update(attributes, enabled=True, merged=False, _unmerged_weight=None)

    def _init_from(self, module: nn.Module) -> None:
        """Copy properties from the base layer."""

    @property
    def adapting(self) -> bool:
        """True if ``forward`` adds the update."""
        active = self.activation is None or self.activation.active_mask is not False
        return self.enabled and not self.merged and active

    @property
    def is_partially_active(self) -> bool:
        """True if the update acts on only some of the tokens, or on an unknown subset."""
        return self.adapting and self.activation is not None and self.activation.kind != "all"

    @property
    def active_mask(self) -> Tensor | None:
        """Bool (rows, T) of the tokens on which the update acts, or None for all of them.

        Raises:
            UserError: if they cannot be determined.
        """
        if self.activation is None:
            return None
        if (mask := self.activation.active_mask) is None:
            message = "an activated adapter needs the token ids of each row, but none were passed or rows are packed"
            hint = f"call the model with input_ids, or pass the active tokens in {ACTIVE_KEYWORD}"
            raise UserError(message, location="input_ids", hint=hint)
        return mask if isinstance(mask, Tensor) else None

    @property
    def owner(self) -> nn.Module:
        """Module that has ``weight`` as a parameter."""
        return self

    def merged_weight(self, *, rounded: bool = True) -> Tensor:
        """Return the weight with its update, without a graph.

        Args:
            rounded: Round once to the weight's dtype. False: return the sum in the dtype of the computation.
        """
        raise UserError(f"{type(self).__name__} does not define an update", hint="use one of its subclasses")

    def merge_refusal(self) -> str | None:
        """Return the reason why the update cannot be merged, or None if it can."""
        if self.activation is not None:
            return "it is activated: it acts only from its invocation sequence on, which a merged weight cannot do"
        return None

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """Replace the weight by the merged ``weight``. Retains the original if ``keep_original`` is True."""
        if keep_original:
            self._unmerged_weight = self.weight.data
            self.weight.data = weight
        else:
            self.weight.data.copy_(weight)
        self.merged = True

    def unset_merged(self) -> None:
        """Restore the original weight that :meth:`set_merged` retained."""
        if self._unmerged_weight is None:
            raise UserError("the weights from before the merge were not kept", hint="merge with keep_original=True")
        self.weight.data = cast_like(self._unmerged_weight, self.weight)
        self._unmerged_weight = None
        self.merged = False

    @property
    def can_restore_base(self) -> bool:
        """True if the base model's weight is available."""
        return not self.merged or self._unmerged_weight is not None

    def base_weight(self) -> Tensor:
        """Return the base model's weight."""
        return self.weight.data if self._unmerged_weight is None else cast_like(self._unmerged_weight, self.weight)

    def restore_base(self) -> None:
        """Replace the weight by the base model's weight permanently."""
        if self.merged:
            self.weight.data = self.base_weight()

    @contextlib.contextmanager
    def base_weight_active(self) -> Iterator[None]:
        """Context manager in which the layer behaves as the base layer."""
        enabled = self.enabled
        weight = self.weight.data
        self.enabled, self.weight.data = False, self.base_weight()
        try:
            yield
        finally:
            self.enabled = enabled
            self.weight.data = weight


def cast_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return ``tensor`` with the device and dtype of ``other``, since the model may have been moved or cast."""
    return tensor.to(device=other.device, dtype=other.dtype)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the trained parameters for ``weight``: fp64 for an fp64 weight, else fp32.

    16-bit types would lose small updates.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
