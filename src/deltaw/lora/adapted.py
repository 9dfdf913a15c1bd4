"""What every adapted layer has: a frozen weight, whether the update is on, and whether it is merged.

A subclass says what its update is (``merged_weight``); here stands how a weight is exchanged for the merged
one and given back to the bit. It knows no factors, models, files or selection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.activation import PLACES, Activation

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
        places = self.activation.places
        if places is None:
            raise UserError(
                "an activated adapter finds by the token ids of each row where it begins to act, and there "
                "are none, or several rows are packed into one",
                where="input_ids",
                hint=f"call the model with input_ids, or name the places in {PLACES}",
            )
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
            raise UserError(
                "the weights from before the merge were not kept", hint="merge with keep_original=True"
            )
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
