"""Adapted convolutions: y = conv(x, W) + b + scaling · conv1×1(conv(x, A), B).

A is a convolution of W's kernel, stride, padding, dilation and padding mode onto r channels; B is one of
kernel 1 that carries W's groups. That is the layout of PEFT's files. Both passes are composed of torch's
own convolutions under plain autograd: A·x is a convolution, so a closed form would call the same kernels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels.torch_private import adopt
from deltaw.lora.layers import LoRALayer
from deltaw.lora.math import autocast_is_on

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRAConv(LoRALayer):
    """What the three adapted convolutions share; make a ``LoRAConv1d``, ``LoRAConv2d`` or ``LoRAConv3d``.

    With ``groups`` g, B is (out, r/g, 1, …) and each group of outputs sees its own r/g channels of A, which
    sees all inputs: so ΔW is no grouped kernel and cannot be merged into one.
    """

    # What torch's convolutions have in common.
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        alpha: float = 1.0,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # LoRAConv is not made itself: the next class in line is the torch convolution of the subclass.
        options = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)  # type: ignore[arg-type]
        self._begin(self._shapes(rank), rank, alpha, dropout, rslora, init, None)

    @classmethod
    def from_conv(
        cls,
        conv: Convolution,
        rank: int,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
    ) -> LoRAConv:
        """The adapted layer over ``conv``'s own weight and bias: the same Parameters, now frozen."""
        layer = adopt(cls._of_dimensions(conv.weight.dim() - 2), conv)
        layer._begin(layer._shapes(rank), rank, alpha, dropout, rslora, init, generator)
        return layer

    @classmethod
    def _of_dimensions(cls, dimensions: int) -> type[LoRAConv]:
        return {1: LoRAConv1d, 2: LoRAConv2d, 3: LoRAConv3d}[dimensions]

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if rank % self.groups:
            raise UserError(
                f"a convolution of {self.groups} groups needs a rank that they divide, not {rank}",
                where="rank",
                hint=f"use {-(-rank // self.groups) * self.groups}, or leave the layer out",
            )
        kernel = tuple(self.kernel_size)
        return ((rank, self.in_channels, *kernel), (self.out_channels, rank // self.groups, *(1 for _ in kernel)))

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, …) to (batch, out_channels, …), the batch may be missing."""
        bias = self.output_bias() if self.adapting else self.bias
        y = self._convolve(input, self.weight, bias, self.groups)
        if not self.adapting:
            return y
        return y + self._update(F.dropout(input, self.dropout, self.training) if self.dropout else input)

    def _update(self, seen: Tensor) -> Tensor:
        """scaling · conv1(conv(seen, A), B)."""
        # Autocast casts the factors itself; without it they take the input's type.
        autocast = autocast_is_on(seen.device.type)
        factor_A = self.lora_A if autocast else self.lora_A.to(seen.dtype)
        factor_B = self.lora_B if autocast else self.lora_B.to(seen.dtype)
        h = self._convolve(seen, factor_A, None, 1) * self.scaling
        return _CONVOLVE[len(self.kernel_size)](h, factor_B, groups=self.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The base layer's convolution with another kernel."""
        convolve = _CONVOLVE[len(self.kernel_size)]
        if self.padding_mode == "zeros":
            return convolve(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        padded = F.pad(x, self._padding_of_sides(), mode=self.padding_mode)
        return convolve(padded, weight, bias, self.stride, 0, self.dilation, groups)

    def _padding_of_sides(self) -> list[int]:
        """As ``F.pad`` takes it: from the last dimension to the first, before and behind."""
        sides: list[int] = []
        for place in reversed(range(len(self.kernel_size))):
            if isinstance(self.padding, str):
                total = self.dilation[place] * (self.kernel_size[place] - 1) if self.padding == "same" else 0
                sides += [total // 2, total - total // 2]
            else:
                sides += [self.padding[place]] * 2
        return sides

    def merge_refusal(self) -> str | None:
        """A grouped convolution's ΔW is no grouped kernel."""
        return f"it is a convolution of {self.groups} groups" if self.groups > 1 else None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling · Σ_r B[o, r]·A[r, i, k…] of shape (out, in, k…); with groups the dense kernel."""
        grouped = self.lora_B.view(self.groups, self.out_channels // self.groups, -1)
        factor_A = self.lora_A.reshape(self.groups, self.rank // self.groups, -1)
        return (grouped @ factor_A).mul_(self.scaling).view(self.out_channels, *self.lora_A.shape[1:])


class LoRAConv1d(LoRAConv, nn.Conv1d):
    """An adapted ``nn.Conv1d``."""


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """An adapted ``nn.Conv2d``."""


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """An adapted ``nn.Conv3d``."""
