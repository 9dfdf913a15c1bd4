"""Changes of weights put into a model that is in memory, without rounding to a narrower type.

Weights that are tied to one that the changes leave alone are untied, and biases are added where a model has
none. Knows changes and modules; not adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.export.adapters import Trained
from deltaw.export.changes import Change
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.places import spots_of
from deltaw.methods.parameters import names_of
from deltaw.tensor_files import row_blocks


@torch.no_grad()
def apply_changes(model: nn.Module, trained: Sequence[Trained]) -> None:
    """Change the parameters of ``model`` in place.

    Raises:
        UserError: it has no place for one.
    """
    for one in trained:
        own = names_of(model)
        inside = [name for name in one.names if name in own]
        try:
            spots = spots_of(model, one.names)
        except AttributeError as error:
            raise UserError(
                f"the model has no '{one.names[0]}'",
                where=one.names[0],
                hint="use the base model that the adapter was trained on",
            ) from error
        if inside:
            parameter = own[inside[0]]
            if any(p is parameter and name not in one.names for name, p in own.items()):
                parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        else:
            weight = own_parameters(spots[0][0])["weight"]
            assert weight is not None
            parameter = nn.Parameter(weight.new_zeros(one.shape), requires_grad=False)
        for module, attribute in spots:
            setattr(module, attribute, parameter)
        change_in_place(parameter, one.change)


@torch.no_grad()
def change_in_place(parameter: Tensor, change: Change, *, rounded: torch.dtype | None = None) -> None:
    """Apply a change to a parameter, in fp32 (fp64 for fp64), and round to its type.

    Args:
        rounded: a narrower type that the values are rounded to first; None for the parameter's own.
    """
    data = parameter.data if parameter.dim() else parameter.data.view(1)
    wide = torch.float64 if data.dtype == torch.float64 else torch.float32

    def blocks(whole: bool = False) -> Iterator[tuple[int, Tensor]]:
        for start, stop in [(0, len(data))] if whole else row_blocks(data.shape):
            yield start, data[start:stop].to(wide, copy=True)

    change.prepare(blocks)
    for start, rows in blocks(change.whole):
        made = change.apply(rows, start)
        data[start : start + len(rows)] = made if rounded is None else made.to(rounded)
