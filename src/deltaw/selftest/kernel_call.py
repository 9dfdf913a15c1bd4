"""Calls of kernels with inputs that are the same on all machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class Inputs:
    """Random inputs of a call.

    Args:
        dtype: Type that the values are rounded to.
        is_exact: Return the rounded values in fp64, for which the reference implementations compute in fp64.
    """

    def __init__(self, dtype: torch.dtype, is_exact: bool) -> None:
        self.dtype = dtype
        self._is_exact = is_exact
        self._generator = np.random.default_rng(0)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """Return normally distributed values."""
        return self._converted(self._generator.standard_normal(shape, np.float32) * np.float32(std), self.dtype)

    def normal_fp32(self, *shape: int, std: float = 1.0) -> Tensor:
        """Return normally distributed values that are rounded to fp32."""
        return self._converted(self._generator.standard_normal(shape, np.float32) * np.float32(std), torch.float32)

    def uniform(self, *shape: int) -> Tensor:
        """Return values from 0 to 1 that are rounded to fp32."""
        return self._converted(self._generator.random(shape, np.float32), torch.float32)

    def integers(self, bound: int, *shape: int) -> Tensor:
        """Return int64 numbers from 0 to ``bound - 1``."""
        return torch.from_numpy(self._generator.integers(0, bound, shape))

    def _converted(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        rounded = torch.from_numpy(values).to(dtype)
        return rounded.double() if self._is_exact else rounded


@dataclass(frozen=True)
class KernelCall:
    """A call of one or a few kernels.

    Attributes:
        name: Name for the report.
        compute: Returns the results for inputs. It calls kernels, or without compiled kernels their references.
        types: Types of the inputs.
        is_exact: Compare with the reference in fp64. False for kernels whose results include the rounding to int8,
            which has to be the same: they are compared with the reference in the type of the inputs.
        slack: Factor of the tolerance, for results of several rounded steps.
    """

    name: str
    compute: Callable[[Inputs], Sequence[Tensor]]
    types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    is_exact: bool = True
    slack: float = 1.0


# Largest difference of an element, relative to its size plus the root mean square of the result. fp32 sums of a
# thousand products differ by some dozen roundings. In bf16, factors and results are rounded once each.
_TOLERANCE = {torch.float32: 64 * 2.0**-23, torch.bfloat16: 4 * 2.0**-8}


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> tuple[float, str]:
    """Return the largest difference between results as a multiple of the tolerance of ``dtype``, and its place.

    A result that is not finite where the other is, or of another shape, differs infinitely.
    """
    worst = (0.0, "")
    for number, (ours, reference) in enumerate(zip(actual, expected, strict=True)):
        if ours.shape != reference.shape:
            return float("inf"), f"result {number} has the shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
        if not ours.numel():
            continue
        exact = reference.double()
        allowed = _TOLERANCE[dtype] * (exact.abs() + exact.square().mean().sqrt().clamp_min(1e-30))
        ratios = ((ours.double() - exact).abs() / allowed).nan_to_num(float("inf")).flatten()
        index = int(ratios.argmax())
        if (ratio := float(ratios[index])) > worst[0]:
            place = f"element {index} of result {number} is {float(ours.flatten()[index]):.6g}"
            worst = ratio, f"{place} instead of {float(exact.flatten()[index]):.6g}"
    return worst
