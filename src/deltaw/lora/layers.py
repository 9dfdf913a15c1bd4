"""Adapted layers: frozen layers that add a low-rank update to their output.

``LoRALinear`` is a subclass of ``nn.Linear``. Its ``weight`` and ``bias`` are the frozen parameters, and ``lora_A`` and
``lora_B`` are additional parameters of the same layer. There is no wrapper, so code that reads ``layer.weight`` works
unchanged. There is a class for each combination of layer type and update:

    types:    nn.Linear, transformers' Conv1D, embeddings, convolutions, linear layers quantized by another library
    updates:  plain, with a bias on B (``LoRABias``), with a magnitude (``DoRALayer``)

Classes of types implement shapes and products, and classes of updates implement the additional trained parameters. The
combinations inherit from both. Updates of parameters and of token rows are in ``layers_parts``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import cast_module, direct_parameters
from deltaw.kernels.torch_private import functorch_is_active, version_of
from deltaw.lora import math as closed_form
from deltaw.lora import math_dora
from deltaw.lora.adapted import AdaptedLayer, cast_like, factor_dtype
from deltaw.lora.config import scaling as scaling_of
from deltaw.lora.initialize import ChangedInit, initialize
from deltaw.lora.stored import describe_quantization, frozen_linear, quantization_library, stored_form, weight_scales

_Layer = TypeVar("_Layer", bound="LoRALayer")


class LoRALayer(AdaptedLayer):
    """Base class of layers with low-rank factors.

    Attributes:
        rank, alpha, scaling, dropout, rslora: See :class:`~deltaw.lora.config.LoRAConfig`.
        changed_init: Set if the initialization changed W, which is then a residual (PiSSA, OLoRA).
        experts: Number of weights stacked along the first dimension of the factors, or None.
        is_layer: True if the layer's forward computes with the factors.
        weight_is_in_out: True if W is (in, out) like A·B, False if it is (out, in).
        has_dropout: True if the adapter supports dropout.
        in_features, out_features: Sizes of linear layers.
    """

    trained: tuple[str, ...] = ("lora_A", "lora_B")
    experts: int | None = None
    is_layer: bool = True
    weight_is_in_out: bool = False
    has_dropout: bool = True

    in_features: int
    out_features: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    alpha: float
    scaling: float
    dropout: float
    rslora: bool
    changed_init: ChangedInit | None

    @classmethod
    def from_module(
        cls: type[_Layer],
        module: nn.Module,
        rank: int,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
    ) -> _Layer:
        """Create the adapted layer from ``module``. It shares the weight and bias Parameters, which are frozen."""
        layer = cast_module(cls._class_for(module), module)
        layer._init_from(module)
        layer._setup(rank, alpha, dropout, rslora, init, generator)
        return layer

    from_linear = from_conv1d = from_embedding = from_conv = from_module

    @classmethod
    def _class_for(cls: type[_Layer], module: nn.Module) -> type[_Layer]:
        """Return the class of the adapted layer for ``module``."""
        return cls

    def _setup(
        self, rank: int, alpha: float, dropout: float, rslora: bool, init: str | None, generator: torch.Generator | None
    ) -> None:
        """Freeze the layer's parameters, and add and initialize the factors."""
        if rank < 1:
            raise UserError(f"rank is {rank}, but must be at least 1", location="rank", hint="use for example rank 16")
        if not 0.0 <= dropout < 1.0:
            message = f"dropout is {dropout}, but must be at least 0 and below 1"
            raise UserError(message, location="dropout", hint="use for example 0.05")
        dropout = float(dropout) if self.has_dropout else 0.0
        scaling = scaling_of(rank, float(alpha), rslora)
        self._freeze(rank=rank, alpha=float(alpha), dropout=dropout, rslora=rslora, scaling=scaling, changed_init=None)
        zeros = partial(torch.zeros, dtype=factor_dtype(self.weight), device=self.weight.device)
        self.lora_A, self.lora_B = (nn.Parameter(zeros(shape)) for shape in self._shapes(rank))
        self._add_parameters()
        if init is None:
            self.initialized()
        else:
            initialize(self, init, generator)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B."""
        return (self.in_features, rank), (rank, self.out_features)

    def _add_parameters(self) -> None:
        """Add trained parameters other than the factors."""

    def output_bias(self) -> Tensor | None:
        """Return the bias added to every output while adapting."""
        return cast("Tensor | None", self.bias)

    def initialized(self) -> None:
        """Called when the factors (and the weight) have their initial values."""

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW in the layout of ``weight``, in fp32 (fp64 for an fp64 weight), without a graph.

        ΔW is scaling · A·B of shape (in, out), or its transpose, for each expert.
        """
        delta = self.lora_A @ self.lora_B if self.weight_is_in_out else self.lora_B.mT @ self.lora_A.mT
        return delta.mul_(self.scaling)

    @torch.no_grad()
    def merged_weight(self, *, rounded: bool = True) -> Tensor:
        """Return W + ΔW, summed in fp32 (fp64 for an fp64 weight)."""
        delta = self.delta_weight()
        total = delta.add_(self.weight.to(delta.dtype))
        return total.to(self.weight.dtype) if rounded else total

    def merge_refusal(self) -> str | None:
        """Return the reason why the update cannot be merged, such as a quantized weight, or None."""
        if (quantization := describe_quantization(self)) is not None:
            return f"its weight is {quantization}; load the model with precision bf16 or fp32 to merge"
        return super().merge_refusal()

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """Replace the weight by the merged ``weight``. A permanent merge discards the weight from before the
        initialization.
        """
        super().set_merged(weight, keep_original)
        if not keep_original:
            self.changed_init = None

    @property
    def can_restore_base(self) -> bool:
        """True if the base model's weight is available."""
        return super().can_restore_base or self.changed_init is not None

    def base_weight(self) -> Tensor:
        """Return the base model's weight, from before a merge and from before an initialization that changed it."""
        if self.changed_init is not None:
            return cast_like(self.changed_init.weight, self.weight)
        return super().base_weight()

    def restore_base(self) -> None:
        """Replace the weight by the base model's weight permanently."""
        if self.merged or self.changed_init is not None:
            self.weight.data = self.base_weight()

    def extra_repr(self) -> str:
        """Return the base layer's description with rank and alpha."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


class _LinearUpdate(LoRALayer):
    """y = x·Wᵀ + b + scaling · dropout(x)·A·B for either orientation of W, plain or quantized."""

    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        stored = stored_form(self)
        if not self.adapting:
            if stored is not None:
                return frozen_linear(input, self.weight, self.bias, stored)
            return self._base(input)
        dropout = self.dropout if self.training else 0.0
        in_out = self.weight_is_in_out
        bias = self.output_bias()
        factors = (self.lora_A, self.lora_B, self.scaling, dropout)
        if (mask := self.active_mask) is None:
            return closed_form.linear(input, self.weight, bias, *factors, in_out, stored)
        update = closed_form.masked_update(input, mask, *factors)
        if stored is None:
            return closed_form.linear_with_update(update, input, self.weight, bias, in_out)
        return frozen_linear(input, self.weight, bias, stored) + update

    def _base(self, input: Tensor) -> Tensor:
        """Return the base layer's output for a plain weight."""
        return F.linear(input, self.weight, self.bias)


class LoRALinear(_LinearUpdate, nn.Linear):
    """y = x·Wᵀ + b + scaling · dropout(x)·A·B, with W and b frozen (arXiv 2106.09685, eq. 3).

    Args:
        in_features, out_features: Sizes of x and y.
        rank: Rank r of the update.
        alpha: The scaling is alpha / rank, or alpha / √rank with ``rslora``.
        bias: True if the layer has a b.
        dropout: Share of the adapter's inputs that is set to zero in training.
        init: Initialization of the factors (see ``initialize``). None sets both to zero, to be loaded.

    Raises:
        UserError: if rank, dropout or init is invalid.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 1.0,
        bias: bool = False,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._setup(rank, alpha, dropout, rslora, init, None)


class LoRAConv1D(_LinearUpdate):
    """:class:`LoRALinear` for transformers' ``Conv1D``, a linear layer with weight (in, out), as in GPT-2.

    In int8 the weight is (out, in), see :class:`~deltaw.lora.layers_quantized.Int8Conv1D`.
    """

    nf: int
    nx: int

    def _init_from(self, module: nn.Module) -> None:
        in_out = weight_scales(self) is None
        rows, columns = self.weight.shape
        inputs, outputs = (rows, columns) if in_out else (columns, rows)
        vars(self).update(weight_is_in_out=in_out, in_features=inputs, out_features=outputs)

    def _base(self, input: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, input.reshape(-1, input.shape[-1]), self.weight)
        return flat.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return sizes, rank and alpha."""
        return f"nf={self.out_features}, nx={self.in_features}, rank={self.rank}, alpha={self.alpha:g}"


class LoRAForeignLinear(LoRALayer):
    """An adapter on a linear layer quantized by bitsandbytes or torchao. Imports neither library.

    A subclass of this class and the layer's class is created, which calls the layer's forward and uses autograd:

        y = layer(x) + scaling · dropout(x)·A·B
    """

    @classmethod
    def _class_for(cls: type[_Layer], module: nn.Module) -> type[_Layer]:
        base = type(module)
        if base not in _FOREIGN_CLASSES:
            _FOREIGN_CLASSES[base] = type(f"LoRA{base.__name__}", (LoRAForeignLinear, base), {})
        return _FOREIGN_CLASSES[base]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            UserError: if gradients are required, but the library's product does not support them.
        """
        y: Tensor = super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad and not y.requires_grad:
            message = f"{quantization_library(self)}: {type(self.weight).__name__} gives its input no gradient"
            hint = "quantize only the weights, not the activations, or use precision: nf4"
            raise UserError(message, location="an adapted layer", hint=hint)
        if not self.adapting:
            return y
        dropout = self.dropout if self.training else 0.0
        if (mask := self.active_mask) is not None:
            factors = self.lora_A, self.lora_B, self.scaling
            return y + closed_form.masked_update(input, mask, *factors, dropout).to(y.dtype)
        adapter_input = F.dropout(input, dropout) if dropout > 0.0 else input
        update = (adapter_input @ self.lora_A.to(input.dtype)) @ (self.lora_B * self.scaling).to(input.dtype)
        return y + update.to(y.dtype)

    def merge_refusal(self) -> str | None:
        """Return the reason why the update cannot be merged: the library would have to quantize the sum again."""
        return f"its weight is quantized by {quantization_library(self)}; load the model unquantized to merge"


_FOREIGN_CLASSES: dict[type[nn.Module], type[Any]] = {}


class ScaledEmbedding(AdaptedLayer, nn.Embedding):
    """An embedding with a base layer that may multiply its rows by ``embed_scale``."""

    scales_rows: bool = False
    """True if it does. Some models have the attribute but apply the scale in another module."""

    def _init_from(self, module: nn.Module) -> None:
        vars(self)["scales_rows"] = type(module).forward is not nn.Embedding.forward

    @property
    def lookup(self) -> closed_form.Lookup:
        """Options of the base layer's lookup, including its scale."""
        scale = getattr(self, "embed_scale", None) if self.scales_rows else None
        return closed_form.Lookup(scale, self.padding_idx, self.scale_grad_by_freq)

    def base_rows(self, ids: Tensor) -> Tensor:
        """Return the base layer's output."""
        lookup = self.lookup
        return lookup.scaled(lookup(ids, self.weight))


class LoRAEmbedding(LoRALayer, ScaledEmbedding):
    """y = c · (W[ids] + scaling · A[ids]·B), with W frozen and c the base layer's scale or 1.

    A row of A belongs to a token. The row of ``padding_idx`` is zero and has no gradient. Dropout is not supported,
    since the input is a token id. ``sparse`` has no effect, because it concerns the gradient of W. A subclass that
    overrides forward is assumed to multiply by its scalar ``embed_scale``, which ``attach`` verifies.

    Raises:
        UserError: if ``max_norm`` is set, which modifies W during lookup, or as in :class:`LoRALinear`.
    """

    weight_is_in_out = True
    has_dropout = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        alpha: float = 1.0,
        padding_idx: int | None = None,
        *,
        rslora: bool = False,
        init: str | None = "uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._setup(rank, alpha, 0.0, rslora, init, None)

    def _init_from(self, module: nn.Module) -> None:
        if self.max_norm is not None:
            message = "an embedding with max_norm modifies its weight during lookup, so it cannot be frozen"
            raise UserError(message, hint="remove it from target_modules")
        super()._init_from(module)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.num_embeddings, rank), (rank, self.embedding_dim)

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        if not self.adapting:
            return self.base_rows(input)
        return closed_form.embedding(input, self.weight, self.lora_A, self.lora_B, self.scaling, self.lookup)


Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoRAConv(LoRALayer):
    """Base class of adapted convolutions: y = conv(x, W) + b + scaling · conv1×1(conv(x, A), B).

    Use ``LoRAConv1d``, ``LoRAConv2d`` or ``LoRAConv3d``. A is a convolution onto r channels with W's kernel size,
    stride, padding, dilation and padding mode. B has kernel size 1 and W's groups. This is the layout of PEFT's files.

    With ``groups`` g, B is (out, r/g, 1, …), and each group of outputs reads r/g channels of A, which reads all inputs.
    ΔW is therefore not a grouped kernel and cannot be merged into one. Forward and backward are composed of torch's
    convolutions with autograd. A closed form would call the same kernels, since A·x is a convolution.
    """

    # Attributes of torch's convolutions.
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
        # LoRAConv is never instantiated directly: the next class in the MRO is the subclass's torch convolution.
        options = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *options)
        self._setup(rank, alpha, dropout, rslora, init, None)

    @classmethod
    def _class_for(cls: type[_Layer], module: nn.Module) -> type[_Layer]:
        """Return the subclass with the dimensionality of ``module``."""
        kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
        return next(subclass for subclass in (cls, *cls.__subclasses__()) if issubclass(subclass, kind))

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if rank % self.groups:
            message = f"a convolution of {self.groups} groups needs a rank divisible by {self.groups}, not {rank}"
            hint = f"use {-(-rank // self.groups) * self.groups}, or exclude the layer"
            raise UserError(message, location="rank", hint=hint)
        kernel = tuple(self.kernel_size)
        return (rank, self.in_channels, *kernel), (self.out_channels, rank // self.groups, *(1 for _ in kernel))

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, …) to (batch, out_channels, …). The batch dimension is optional."""
        y = self._convolve(input, self.weight, self.output_bias() if self.adapting else self.bias, self.groups)
        if not self.adapting:
            return y
        return y + self._update(F.dropout(input, self.dropout, self.training) if self.dropout else input)

    def _update(self, x: Tensor) -> Tensor:
        """Return scaling · conv1(conv(x, A), B)."""
        # Without autocast, which casts the factors itself, they are cast to the input's dtype.
        autocast = closed_form.is_autocast_enabled(x.device.type)
        factor_A, factor_B = (f if autocast else f.to(x.dtype) for f in (self.lora_A, self.lora_B))
        h = self._convolve(x, factor_A, None, 1) * self.scaling
        return _CONVOLVE[len(self.kernel_size)](h, factor_B, groups=self.groups)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Apply the base layer's convolution with another kernel."""
        convolve = _CONVOLVE[len(self.kernel_size)]
        if self.padding_mode == "zeros":
            return convolve(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        padded = F.pad(x, self._pad_widths(), mode=self.padding_mode)
        return convolve(padded, weight, bias, self.stride, 0, self.dilation, groups)

    def _pad_widths(self) -> list[int]:
        """Return the padding in the format of ``F.pad``: last dimension first, before and after."""
        widths: list[int] = []
        for dim in reversed(range(len(self.kernel_size))):
            if isinstance(self.padding, str):
                total = self.dilation[dim] * (self.kernel_size[dim] - 1) if self.padding == "same" else 0
                widths += [total // 2, total - total // 2]
            else:
                widths += [self.padding[dim]] * 2
        return widths

    def merge_refusal(self) -> str | None:
        """Return the reason why the update cannot be merged: ΔW of a grouped convolution is not a grouped kernel."""
        return f"it is a convolution of {self.groups} groups" if self.groups > 1 else None

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW = scaling · Σ_r B[o, r]·A[r, i, k…] of shape (out, in, k…). With groups it is the dense kernel."""
        grouped = self.lora_B.view(self.groups, self.out_channels // self.groups, -1)
        factor_A = self.lora_A.reshape(self.groups, self.rank // self.groups, -1)
        return (grouped @ factor_A).mul_(self.scaling).view(self.out_channels, *self.lora_A.shape[1:])


class LoRAConv1d(LoRAConv, nn.Conv1d):
    """An adapted ``nn.Conv1d``."""


class LoRAConv2d(LoRAConv, nn.Conv2d):
    """An adapted ``nn.Conv2d``."""


class LoRAConv3d(LoRAConv, nn.Conv3d):
    """An adapted ``nn.Conv3d``."""


class LoRABias(LoRALayer):
    """An update with a bias on B: y = x·Wᵀ + b + scaling · (dropout(x)·A·B + c), with c trained.

    The additional parameter ``lora_bias`` (out) is initialized with zeros (PEFT's ``lora_bias``). Merging adds c to the
    base layer's bias, so a layer without a bias cannot be merged.
    """

    trained: tuple[str, ...] = ("lora_A", "lora_B", "lora_bias")

    lora_bias: nn.Parameter
    _unmerged_bias: Tensor | None

    def _add_parameters(self) -> None:
        self._unmerged_bias = None
        outputs = self.weight.shape[0] if isinstance(self, LoRAConv) else self.lora_B.shape[1]
        self.lora_bias = nn.Parameter(self.lora_B.new_zeros(outputs))

    def output_bias(self) -> Tensor:
        """Return b + scaling·c in the dtype of b, or of the weight without a b."""
        update = self.lora_bias * self.scaling
        bias = self._base_bias
        if bias is not None:
            return bias + update.to(bias.dtype)
        return update.to(self.weight.dtype) if self.weight.is_floating_point() else update

    def merge_refusal(self) -> str | None:
        """Return the reason why the update cannot be merged, such as a base layer without a bias, or None."""
        if self._base_bias is None:
            return "its update has a bias (lora_bias), but the base layer has no bias to merge it into"
        return super().merge_refusal()

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """Set W + ΔW as the weight, and b + scaling·c as the bias."""
        bias = self._base_bias
        assert bias is not None  # checked by merge_refusal
        with torch.no_grad():
            merged = (bias.to(self.lora_bias.dtype) + self.lora_bias * self.scaling).to(bias.dtype)
        if keep_original:
            self._unmerged_bias = bias.data
            bias.data = merged
        else:
            bias.data.copy_(merged)
        super().set_merged(weight, keep_original)

    def unset_merged(self) -> None:
        """Restore the original weight and bias."""
        super().unset_merged()
        self._restore_bias()
        self._unmerged_bias = None

    def restore_base(self) -> None:
        """Replace weight and bias by the base model's permanently."""
        super().restore_base()
        self._restore_bias()

    @contextlib.contextmanager
    def base_weight_active(self) -> Iterator[None]:
        """Context manager in which the layer behaves as the base layer."""
        bias = self._base_bias
        original = None if bias is None else bias.data
        self._restore_bias()
        try:
            with super().base_weight_active():
                yield
        finally:
            if bias is not None and original is not None:
                bias.data = original

    @property
    def _base_bias(self) -> nn.Parameter | None:
        return direct_parameters(self).get("bias")

    def _restore_bias(self) -> None:
        bias = self._base_bias
        if bias is not None and self._unmerged_bias is not None:
            bias.data = cast_like(self._unmerged_bias, bias)


class LoRABiasLinear(LoRABias, LoRALinear):
    """An adapted ``nn.Linear`` with a bias on B."""


class LoRABiasConv1D(LoRABias, LoRAConv1D):
    """An adapted ``Conv1D`` of transformers with a bias on B."""


class LoRABiasConv(LoRABias, LoRAConv):
    """Base class of adapted convolutions with a bias on B."""


class LoRABiasConv1d(LoRABiasConv, nn.Conv1d):
    """An adapted ``nn.Conv1d`` with a bias on B."""


class LoRABiasConv2d(LoRABiasConv, nn.Conv2d):
    """An adapted ``nn.Conv2d`` with a bias on B."""


class LoRABiasConv3d(LoRABiasConv, nn.Conv3d):
    """An adapted ``nn.Conv3d`` with a bias on B."""


class DoRALayer(LoRALayer):
    """An update with weights split into magnitude and direction: W' = m∘(W + ΔW) / ‖W + ΔW‖.

    The additional parameter ``lora_magnitude`` (out) is initialized with the norms of each output's weights (DoRA,
    arXiv 2402.09353, eq. 5). For an embedding, outputs are the columns of its table, as in PEFT. A zero row of W has no
    direction and remains zero. ``delta_weight`` returns s·A·B, before the magnitude.

    The norm of W is cached, since W is frozen. The norm of W + ΔW is computed in every forward that needs gradients,
    and cached for forwards that do not, so that generation does not recompute it for each token.
    """

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
        self._update_squares()
        self.lora_magnitude.copy_(self._compute_norm())

    def weight_norm(self) -> Tensor:
        """Return ‖W + ΔW‖ of every output, of shape (out), in the factors' dtype, without a graph."""
        if torch.compiler.is_compiling():
            return self._compute_norm()
        # Detect in-place modification of W, for example by load_state_dict.
        if self._squares_of != _tensor_state(self.weight):
            self._update_squares()
        if torch.is_grad_enabled() or functorch_is_active():
            vars(self)["_norm"] = None
            return self._compute_norm()
        state = (id(self), *self._squares_of, *_tensor_state(self.lora_A), *_tensor_state(self.lora_B))
        if self._norm is None or self._norm_of != state:
            vars(self).update(_norm=self._compute_norm(), _norm_of=state)
        return self._compute_norm() if self._norm is None else self._norm

    def gain(self) -> Tensor:
        """Return m / ‖W + ΔW‖ of every output."""
        return math_dora.gain(self.lora_magnitude, self.weight_norm())

    @torch.no_grad()
    def merged_weight(self, *, rounded: bool = True) -> Tensor:
        """Return m∘(W + ΔW) / ‖W + ΔW‖, computed in fp32 (fp64 for an fp64 weight)."""
        delta = self.delta_weight()
        gain = self.gain()
        gain = gain if self.weight_is_in_out else gain.view(-1, *(1 for _ in self.weight.shape[1:]))
        total = delta.add_(self.weight.to(delta.dtype)).mul_(gain)
        return total.to(self.weight.dtype) if rounded else total

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return ``weight`` as a view (out, in)."""
        return weight.t() if self.weight_is_in_out else weight.flatten(1)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A (in, r) and B (r, out)."""
        return self.lora_A, self.lora_B

    @torch.no_grad()
    def _update_squares(self) -> None:
        """Cache ‖W‖² of every output."""
        weight = self.weight if self._unmerged_weight is None else cast_like(self._unmerged_weight, self.weight)
        squares = math_dora.base_squares(self._matrix(weight), self.lora_A.dtype)
        vars(self).update(_squares=squares, _squares_of=_tensor_state(self.weight), _norm=None)

    def _compute_norm(self) -> Tensor:
        return math_dora.weight_norm(self._matrix(self.weight), self._squares, *self._factors(), self.scaling)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DoRALayer:
        """Recompute cached norms after the module is moved or cast."""
        nn.Module._apply(self, fn, recurse)
        self._update_squares()
        return self


def _tensor_state(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that changes if the tensor is replaced, modified in place, moved or cast."""
    return id(tensor), -1 if tensor.is_inference() else version_of(tensor), tensor.dtype, tensor.device


class _DoRALinearBase(DoRALayer, _LinearUpdate):
    """Base class of linear layers with a magnitude, for either orientation of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.adapting:
            return super().forward(input)
        dropout = self.dropout if self.training else 0.0
        trained = self.lora_A, self.lora_B, self.lora_magnitude, self.weight_norm(), self.scaling
        return math_dora.dora_linear(input, self.weight, self.bias, *trained, dropout, self.weight_is_in_out)


class DoRALinear(_DoRALinearBase, LoRALinear):
    """An adapted ``nn.Linear`` with a magnitude."""


class DoRAConv1D(_DoRALinearBase, LoRAConv1D):
    """An adapted ``Conv1D`` of transformers with a magnitude."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """An adapted embedding with a magnitude per column of its table."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        rows = super().forward(input)
        return rows * self.gain().to(rows.dtype) if self.adapting else rows


class DoRAConv(DoRALayer, LoRAConv):
    """Base class of adapted convolutions with a magnitude. Norms are over all kernel elements of an output."""

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.groups > 1:
            message = f"DoRA does not support a convolution of {self.groups} groups, because ΔW is not a grouped kernel"
            raise UserError(message, location="dora", hint="exclude the layer, or remove dora")
        return super()._shapes(rank)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, …) to (batch, out_channels, …). The batch dimension is optional."""
        if not self.adapting:
            return super().forward(input)
        adapter_input = F.dropout(input, self.dropout, self.training) if self.dropout else input
        base = self._convolve(adapter_input, self.weight, None, 1)
        g = self.gain().to(base.dtype).view(-1, *(1 for _ in self.kernel_size))
        y = g * (base + self._update(adapter_input))
        if adapter_input is not input:
            return y + self._convolve(input, self.weight, self.bias, 1) - base
        return y if self.bias is None else y + self.bias.to(y.dtype).view(g.shape)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.flatten(1).t(), self.lora_B.flatten(1).t()


class DoRAConv1d(DoRAConv, nn.Conv1d):
    """An adapted ``nn.Conv1d`` with a magnitude."""


class DoRAConv2d(DoRAConv, nn.Conv2d):
    """An adapted ``nn.Conv2d`` with a magnitude."""


class DoRAConv3d(DoRAConv, nn.Conv3d):
    """An adapted ``nn.Conv3d`` with a magnitude."""
