"""The adapted layers whose B has a bias: y = x·Wᵀ + b + scaling · (dropout(x)·A·B + c), with c trained.

Each is the adapted layer of its kind with one more trained parameter, ``lora_bias`` (out), which starts at
zero (PEFT's ``lora_bias``). Merging adds c to the base layer's bias and exchanges that together with the
weight; a layer without a bias cannot be merged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.adapted import like
from deltaw.lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from deltaw.lora.layers_conv import LoRAConv


class LoRABias(LoRALayer):
    """What the layers with a bias on B share."""

    trained: tuple[str, ...] = ("lora_A", "lora_B", "lora_bias")

    lora_bias: nn.Parameter
    _unmerged_bias: Tensor | None

    def _add_parameters(self) -> None:
        self._unmerged_bias = None
        outputs = self.weight.shape[0] if isinstance(self, LoRAConv) else self.lora_B.shape[1]
        self.lora_bias = nn.Parameter(self.lora_B.new_zeros(outputs))

    def output_bias(self) -> Tensor:
        """b + scaling·c, in the type of b, or of the weight where there is no b."""
        update = self.lora_bias * self.scaling
        bias = own_parameters(self).get("bias")
        if bias is not None:
            return bias + update.to(bias.dtype)
        return update.to(self.weight.dtype) if self.weight.is_floating_point() else update

    def merge_refusal(self) -> str | None:
        """Without a bias in the base layer there is nothing to merge c into."""
        if own_parameters(self).get("bias") is None:
            return "its update has a bias (lora_bias), and the base layer has none to merge it into"
        return super().merge_refusal()

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """Take ``weight`` as W + ΔW, and b + scaling·c as the bias."""
        bias = own_parameters(self)["bias"]
        assert bias is not None  # else the merge was refused
        with torch.no_grad():
            merged = (bias.to(self.lora_bias.dtype) + self.lora_bias * self.scaling).to(bias.dtype)
        if keep_original:
            self._unmerged_bias = bias.data
            bias.data = merged
        else:
            bias.data.copy_(merged)
        super().set_merged(weight, keep_original)

    def unset_merged(self) -> None:
        """Give back the weight and the bias from before."""
        super().unset_merged()
        self._put_bias(self._base_bias())
        self._unmerged_bias = None

    def restore_base(self) -> None:
        """Put the base model's own weight and bias in, for good."""
        super().restore_base()
        self._put_bias(self._base_bias())

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within the block the layer is the base model's own."""
        bias = own_parameters(self).get("bias")
        before = None if bias is None else bias.data
        self._put_bias(self._base_bias())
        try:
            with super().as_base():
                yield
        finally:
            self._put_bias(before)

    def _base_bias(self) -> Tensor | None:
        bias = own_parameters(self).get("bias")
        if bias is None or self._unmerged_bias is None:
            return None if bias is None else bias.data
        return like(self._unmerged_bias, bias)

    def _put_bias(self, values: Tensor | None) -> None:
        bias = own_parameters(self).get("bias")
        if bias is not None and values is not None:
            bias.data = values


class LoRABiasLinear(LoRABias, LoRALinear):
    """An adapted ``nn.Linear`` with a bias on B."""


class LoRABiasConv1D(LoRABias, LoRAConv1D):
    """An adapted ``Conv1D`` of transformers with a bias on B."""


class LoRABiasConv(LoRABias, LoRAConv):
    """What the adapted convolutions with a bias on B share."""

    @classmethod
    def _of_dimensions(cls, dimensions: int) -> type[LoRAConv]:
        return {1: LoRABiasConv1d, 2: LoRABiasConv2d, 3: LoRABiasConv3d}[dimensions]


class LoRABiasConv1d(LoRABiasConv, nn.Conv1d):
    """An adapted ``nn.Conv1d`` with a bias on B."""


class LoRABiasConv2d(LoRABiasConv, nn.Conv2d):
    """An adapted ``nn.Conv2d`` with a bias on B."""


class LoRABiasConv3d(LoRABiasConv, nn.Conv3d):
    """An adapted ``nn.Conv3d`` with a bias on B."""
