"""The adapted layers whose weight is split into magnitude and direction: W' = m∘(W + ΔW) / ‖W + ΔW‖.

Each is the adapted layer of its kind with one more trained parameter, ``lora_magnitude`` (out), which starts
as the norm of every output's weights (DoRA, arXiv 2402.09353, eq. 5). For an embedding the outputs are the
columns of its table, as in PEFT. A row of W that is zero has no direction: it stays zero.

The norm of W alone is kept, since W is frozen; that of W + ΔW is found anew in every forward that needs
gradients, and kept between those that do not, so that generation does not pay for it at every token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels.torch_private import functorch_is_active, version_of
from deltaw.lora import math_dora
from deltaw.lora.adapted import like
from deltaw.lora.layers import LoRAConv1D, LoRAEmbedding, LoRALayer, LoRALinear
from deltaw.lora.layers_conv import LoRAConv


class DoRALayer(LoRALayer):
    """What the layers with a magnitude share. ``delta_weight`` is s·A·B, before the magnitude."""

    trained: tuple[str, ...] = ("lora_A", "lora_B", "lora_magnitude")

    lora_magnitude: nn.Parameter
    _squares: Tensor
    _squares_of: tuple[object, ...]
    _norm: Tensor | None
    _norm_of: tuple[object, ...]

    def _add_parameters(self) -> None:
        vars(self).update(_norm=None, _norm_of=())
        self.lora_magnitude = nn.Parameter(self.lora_A.new_empty(self._matrix(self.weight).shape[0]))

    @torch.no_grad()
    def initialized(self) -> None:
        """Set the magnitude to the norm of W + ΔW."""
        self._measure()
        self.lora_magnitude.copy_(self._fresh_norm())

    def weight_norm(self) -> Tensor:
        """‖W + ΔW‖ of every output, of shape (out), in the factors' type, without a graph."""
        if torch.compiler.is_compiling():
            return self._fresh_norm()
        # Written to in place behind our back, as load_state_dict does.
        if self._squares_of != _state(self.weight):
            self._measure()
        if torch.is_grad_enabled() or functorch_is_active():
            vars(self)["_norm"] = None
            return self._fresh_norm()
        now = (id(self), *self._squares_of, *_state(self.lora_A), *_state(self.lora_B))
        if self._norm is None or self._norm_of != now:
            vars(self).update(_norm=self._fresh_norm(), _norm_of=now)
        return self._fresh_norm() if self._norm is None else self._norm

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """m∘(W + ΔW) / ‖W + ΔW‖, formed in fp32 (fp64 for an fp64 weight) and rounded once."""
        delta = self.delta_weight()
        total = delta.add_(self.weight.to(delta.dtype))
        g = math_dora.gain(self.lora_magnitude, self.weight_norm())
        return total.mul_(self._per_output(g)).to(self.weight.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as a view (out, in)."""
        return weight

    def _per_output(self, values: Tensor) -> Tensor:
        """``values`` (out) such that they broadcast over the weight."""
        return values[:, None]

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (in, r) and B (r, out)."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def _measure(self) -> None:
        """Keep ‖W‖² of every output."""
        weight = self.weight if self._unmerged_weight is None else like(self._unmerged_weight, self.weight)
        squares = math_dora.base_squares(self._matrix(weight), self.lora_A.dtype)
        vars(self).update(_squares=squares, _squares_of=_state(self.weight), _norm=None)

    def _fresh_norm(self) -> Tensor:
        return math_dora.weight_norm(self._matrix(self.weight), self._squares, *self._factors(), self.scaling)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRALayer:
        """Moved or cast: what is kept of W must follow."""
        super()._apply(fn, recurse)
        self._measure()
        return self


def _state(tensor: Tensor) -> tuple[object, ...]:
    """Changes when another tensor stands here, and when this one is written to in place, moved or cast."""
    version = -1 if tensor.is_inference() else version_of(tensor)
    return id(tensor), version, tensor.dtype, tensor.device


class DoRALinear(DoRALayer, LoRALinear):
    """An adapted ``nn.Linear`` with a magnitude."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self.adapting:
            return F.linear(input, self.weight, self.bias)
        return math_dora.dora_linear(
            input,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude,
            self.weight_norm(),
            self.scaling,
            self.dropout if self.training else 0.0,
        )


class DoRAConv1D(DoRALayer, LoRAConv1D):
    """The same over transformers' ``Conv1D``, whose weight is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.adapting:
            return super().forward(x)
        return math_dora.dora_linear(
            x,
            self.weight,
            self.bias,
            self.lora_A,
            self.lora_B,
            self.lora_magnitude,
            self.weight_norm(),
            self.scaling,
            self.dropout if self.training else 0.0,
            weight_is_in_out=True,
        )

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _per_output(self, values: Tensor) -> Tensor:
        return values


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """An adapted embedding with a magnitude for each column of its table."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        rows = super().forward(input)
        if not self.adapting:
            return rows
        return rows * math_dora.gain(self.lora_magnitude, self.weight_norm()).to(rows.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _per_output(self, values: Tensor) -> Tensor:
        return values


class DoRAConv(DoRALayer, LoRAConv):
    """What the adapted convolutions with a magnitude share; a norm is over all of an output's kernel."""

    @classmethod
    def _of_dimensions(cls, dimensions: int) -> type[LoRAConv]:
        return {1: DoRAConv1d, 2: DoRAConv2d, 3: DoRAConv3d}[dimensions]

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.groups > 1:
            raise UserError(
                f"DoRA is not for a convolution of {self.groups} groups, whose ΔW is no kernel of its shape",
                where="dora",
                hint="leave the layer out, or leave dora out",
            )
        return super()._shapes(rank)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, …) to (batch, out_channels, …), the batch may be missing."""
        if not self.adapting:
            return super().forward(input)
        seen = F.dropout(input, self.dropout, self.training) if self.dropout else input
        base = self._convolve(seen, self.weight, None, 1)
        g = math_dora.gain(self.lora_magnitude, self.weight_norm()).to(base.dtype)
        g = g.view(-1, *(1 for _ in self.kernel_size))
        y = g * (base + self._update(seen))
        if seen is not input:
            return y + self._convolve(input, self.weight, self.bias, 1) - base
        return y if self.bias is None else y + self.bias.to(y.dtype).view(g.shape)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _per_output(self, values: Tensor) -> Tensor:
        return values.view(-1, *(1 for _ in self.weight.shape[1:]))

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.flatten(1).t(), self.lora_B.flatten(1).t()


class DoRAConv1d(DoRAConv, nn.Conv1d):
    """An adapted ``nn.Conv1d`` with a magnitude."""


class DoRAConv2d(DoRAConv, nn.Conv2d):
    """An adapted ``nn.Conv2d`` with a magnitude."""


class DoRAConv3d(DoRAConv, nn.Conv3d):
    """An adapted ``nn.Conv3d`` with a magnitude."""
