"""Single weights of the model's parameters, trained: optimizer state exists for the chosen ones alone.

A weight matrix stays dense and in the model's precision. The optimizer trains the values (fp32) at the chosen
positions (int32). The backward pass computes each matrix's gradient, takes the chosen entries out of it, and
frees it before it computes the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.lora.places import ParameterPlace
from deltaw.methods.parameters import names_of

INDICES, VALUES = ".indices", ".values"


@dataclass
class _Part:
    """Chosen positions of one parameter, their trained values, and the values there before."""

    name: str
    weight: nn.Parameter
    indices: Tensor
    values: nn.Parameter
    before: Tensor


class Subset:
    """The chosen weights of a model; empty at first."""

    def __init__(self) -> None:
        self._parts: list[_Part] = []

    def __len__(self) -> int:
        return sum(part.indices.numel() for part in self._parts)

    def begin(self, place: ParameterPlace, indices: Tensor) -> None:
        """Train the entries of ``place``'s parameter at ``indices``, ascending flat positions (k,)."""
        weight = place.current
        at = indices.to(device=weight.device, dtype=torch.int32)
        with torch.no_grad():
            before = weight.data.view(-1).index_select(0, at)
        values = nn.Parameter(before.to(_value_type(weight), copy=True))
        self._parts.append(_Part(place.name, weight, at, values, before))

        def take(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            chosen = grad.reshape(-1).index_select(0, at).to(values.dtype)
            values.grad = chosen if values.grad is None else values.grad.add_(chosen)

        weight.register_post_accumulate_grad_hook(take)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained values, by name."""
        return [(part.name + VALUES, part.values) for part in self._parts]

    @torch.no_grad()
    def write(self) -> None:
        """Write the values into the weights, rounded to their dtype."""
        for part in self._parts:
            _write(part.weight, part.indices, part.values)

    @contextlib.contextmanager
    def without(self, others: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """Within the block the weights are the base model's; so are those of ``others``."""
        with others:
            for part in self._parts:
                _write(part.weight, part.indices, part.before)
            try:
                yield
            finally:
                self.write()

    def tensors(self) -> dict[str, Tensor]:
        """Positions and values of each parameter, as stored in a file."""
        kept: dict[str, Tensor] = {}
        for part in self._parts:
            kept[part.name + INDICES] = part.indices
            kept[part.name + VALUES] = part.values.detach()
        return kept

    def put(self, model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """Write a file's values into the weights, and return the tensors that are not of this kind.

        Raises:
            UserError: a position is outside its parameter, or the model has no such parameter.
        """
        parameters = names_of(model)
        others = {k: t for k, t in tensors.items() if not k.endswith((INDICES, VALUES))}
        parts = []
        for key in (k for k in tensors if k.endswith(INDICES)):
            name = key.removesuffix(INDICES)
            weight, indices, values = parameters.get(name), tensors[key], tensors.get(name + VALUES)
            fits = (
                weight is not None
                and values is not None
                and indices.dim() == 1
                and indices.shape == values.shape
                and (indices.numel() == 0 or 0 <= int(indices.min()) <= int(indices.max()) < weight.numel())
            )
            if not fits or weight is None or values is None:
                raise UserError(
                    f"the adapter trains weights of '{name}' that the model does not have",
                    where=where,
                    hint="load it onto the base model that it was trained on",
                )
            indices = indices.to(device=weight.device, dtype=torch.int32)
            before = weight.data.view(-1).index_select(0, indices)
            trained = nn.Parameter(values.to(device=weight.device), requires_grad=False)
            parts.append(_Part(name, weight, indices, trained, before))
        self._parts = parts
        self.write()
        return others


@torch.no_grad()
def _write(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """weight.flatten()[indices] = values, rounded to the weight's dtype."""
    weight.data.view(-1).index_copy_(0, indices.long(), values.detach().to(weight.dtype))


def _value_type(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
