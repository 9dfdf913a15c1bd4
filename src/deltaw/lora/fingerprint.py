"""A short name for a base model's weights, so that an adapter can tell a foreign one.

It is made of every parameter's name and shape and a few of its values rounded to bf16: a model loaded in
fp32 and the same one in bf16 agree. It is a check against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLES = 8
"""Values read per parameter, evenly spread."""


@torch.no_grad()
def base_fingerprint(parameters: Iterable[tuple[str, Tensor]], replaced: Iterable[Tensor] = ()) -> str | None:
    """The fingerprint of a base model's ``named_parameters()``; None without the values it
    came with.

    ``replaced`` are those whose values the adapter has itself, such as a new classifier's, which are random
    each time: only their names and shapes count.

    Takes about ten microseconds for each parameter tensor, whatever its size.
    """
    digest = hashlib.sha256()
    values = []
    without_value = {id(parameter) for parameter in replaced}
    for name, parameter in parameters:
        if not has_values(parameter) or parameter.dtype == torch.int8:
            return None  # weights in int8 are no longer the values that the model came with
        digest.update(f"{name}:{tuple(parameter.shape)};".encode())
        if parameter.numel() and parameter.is_floating_point() and id(parameter) not in without_value:
            flat = (
                parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
            )
            step = max(1, flat.numel() // SAMPLES)
            values.append(flat[::step][:SAMPLES])
    if not values:
        return None
    rounded = torch.cat([v.cpu() for v in values]).to(torch.bfloat16)
    digest.update(bytes(rounded.view(torch.uint8).tolist()))
    return digest.hexdigest()[:32]


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and under torch's FakeTensorMode, where tensors have shapes alone."""
    return not (tensor.is_meta or type(tensor).__name__ == "FakeTensor")
