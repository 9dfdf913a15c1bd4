"""Factors as PEFT lays them out, in files and when it draws random numbers, and back.

Ours are A (in, r) and B (r, out), so that y = x·A·B. PEFT has weights of torch layers, (r, in) and (out, r).
For stacked experts, A (experts, in, r) and B (experts, r, out) here, PEFT has one matrix each: the rows of A
are ordered by expert, then rank; the columns of B by rank, then expert. Convolutions are the same in both.
"""

from __future__ import annotations

from torch import Tensor


def to_peft(tensor: Tensor, attribute: str, experts: int | None) -> Tensor:
    """``tensor``, which a layer has as ``attribute``, in PEFT's layout."""
    if experts is not None:
        if attribute == "lora_A":
            return tensor.transpose(1, 2).reshape(-1, tensor.shape[1])
        return tensor.permute(2, 1, 0).reshape(tensor.shape[2], -1)
    return tensor.t() if tensor.dim() == 2 else tensor


def from_peft(tensor: Tensor, attribute: str, experts: int | None) -> Tensor:
    """The inverse of :func:`to_peft`."""
    if experts is not None:
        if attribute == "lora_A":
            return tensor.reshape(experts, -1, tensor.shape[1]).transpose(1, 2)
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 1, 0)
    return tensor.t() if tensor.dim() == 2 else tensor
