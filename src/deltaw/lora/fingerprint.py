"""A short name for a base model's weights, so that an adapter can tell a foreign one.

It is made of every parameter's name and shape and a few of its values rounded to bf16: a model loaded in
fp32 and the same one in bf16 agree. It is a check against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.lora.stored import library_of_tensor

SAMPLES = 8
"""Values read per parameter, evenly spread."""


_ATTRIBUTE = "of_base"


@dataclass(frozen=True)
class Sample:
    """What the fingerprint takes of one parameter: its shape, and some of its values where they count."""

    name: str
    shape: tuple[int, ...]
    values: Tensor | None


def places(numel: int) -> range:
    """The flat positions of the values that are read of a parameter."""
    step = max(1, numel // SAMPLES)
    return range(0, numel, step)[:SAMPLES]


@torch.no_grad()
def base_fingerprint(parameters: Iterable[tuple[str, Tensor]], replaced: Iterable[Tensor] = ()) -> str | None:
    """The fingerprint of a base model's ``named_parameters()``; None without the values it came with.

    ``replaced`` are those whose values the adapter has itself, such as a new classifier's, which are random
    each time: only their names and shapes count. A weight that was quantized to int8 counts with the values
    that it had before (:func:`note_base`).

    Takes about ten microseconds for each parameter tensor, whatever its size.
    """
    samples = []
    without_value = {id(parameter) for parameter in replaced}
    for name, parameter in parameters:
        noted = getattr(parameter, _ATTRIBUTE, None)
        if isinstance(noted, Sample):
            samples.append(Sample(name, noted.shape, noted.values))
            continue
        quantized = parameter.dtype in (torch.int8, torch.uint8) or library_of_tensor(parameter) is not None
        if not has_values(parameter) or quantized:
            return None  # quantized weights are no longer the values that the model came with
        values = None
        if parameter.numel() and parameter.is_floating_point() and id(parameter) not in without_value:
            values = _values(parameter)
        samples.append(Sample(name, tuple(parameter.shape), values))
    return fingerprint_of(samples)


def fingerprint_of(samples: Iterable[Sample]) -> str | None:
    """The fingerprint of all of a model's parameters in their order; None without any values."""
    digest = hashlib.sha256()
    values = []
    for sample in samples:
        digest.update(f"{sample.name}:{sample.shape};".encode())
        if sample.values is not None:
            values.append(sample.values)
    if not values:
        return None
    rounded = torch.cat([v.cpu() for v in values]).to(torch.bfloat16)
    digest.update(bytes(rounded.view(torch.uint8).tolist()))
    return digest.hexdigest()[:32]


@torch.no_grad()
def note_base(quantized: Tensor, weight: Tensor) -> None:
    """Note on a ``quantized`` parameter what the fingerprint takes of the ``weight`` that it stands for."""
    if has_values(weight):
        note_values(quantized, tuple(weight.shape), _values(weight).clone())


def note_values(quantized: Tensor, shape: tuple[int, ...], values: Tensor) -> None:
    """Note on a ``quantized`` parameter the shape that it stands for, and its values at :func:`places`."""
    vars(quantized)[_ATTRIBUTE] = Sample("", shape, values)


def put_sample(parameter: Tensor, sample: Sample) -> None:
    """Note on a parameter whose values are not at hand what the fingerprint takes of them."""
    vars(parameter)[_ATTRIBUTE] = sample


def _values(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
    at = places(flat.numel())
    return flat[at.start : at.stop : at.step]


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and under torch's FakeTensorMode, where tensors have shapes alone."""
    return not (tensor.is_meta or type(tensor).__name__ == "FakeTensor")
