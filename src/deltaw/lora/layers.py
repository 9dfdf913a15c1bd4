"""The adapted layers: a frozen layer that adds a low-rank update to its output.

``LoRALinear`` *is* an ``nn.Linear``: its ``weight`` and ``bias`` are the frozen ones, and ``lora_A`` and
``lora_B`` are further parameters of the same layer. There is no wrapper, so a model's code that looks at
``layer.weight`` finds what it looks for. There is one class for each kind of layer and each update:

    kinds:    nn.Linear, transformers' Conv1D, embeddings, convolutions, linear layers that another library quantized
    updates:  plain, with a bias on B (``LoRABias``), with a magnitude (``DoRALayer``)

A kind knows shapes and products, an update what it trains in addition; a class of both only names the two. What
is adapted below the level of a layer is in ``layers_parts``.

A layer knows its own arithmetic and its merged weight, and nothing of models, files or selection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels.torch_private import adopt, functorch_is_active, own_parameters, version_of
from deltaw.lora import math as closed_form
from deltaw.lora import math_dora
from deltaw.lora.adapted import AdaptedLayer, factor_dtype, like
from deltaw.lora.config import scaling as scaling_of
from deltaw.lora.initialize import ChangedInit, initialize
from deltaw.lora.stored import frozen_linear, library_of, quantized_as, stored_form, weight_scales

_Layer = TypeVar("_Layer", bound="LoRALayer")


class LoRALayer(AdaptedLayer):
    """What all layers with low-rank factors share.

    Attributes:
        rank, alpha, scaling, dropout, rslora: as in :class:`~deltaw.lora.config.LoRAConfig`.
        changed_init: set where the initialization changed W, which then is a residual (PiSSA, OLoRA).
        experts: how many weights are stacked along the first dimension of the factors, or None.
        is_layer: whether its own forward computes with the factors.
        weight_is_in_out: whether W is (in, out) as A·B is, and not (out, in).
        has_dropout: whether the adapter's inputs can be dropped.
        in_features, out_features: of linear layers.
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
        """The adapted layer over ``module``'s own weight and bias: the same Parameters, now frozen."""
        layer = adopt(cls._class_over(module), module)
        layer._take_over(module)
        layer._begin(rank, alpha, dropout, rslora, init, generator)
        return layer

    from_linear = from_conv1d = from_embedding = from_conv = from_module

    @classmethod
    def _class_over(cls: type[_Layer], module: nn.Module) -> type[_Layer]:
        """The class of the layer over ``module``."""
        return cls

    def _begin(
        self, rank: int, alpha: float, dropout: float, rslora: bool, init: str | None, generator: torch.Generator | None
    ) -> None:
        """Freeze what the layer has, and add factors."""
        if rank < 1:
            raise UserError(f"rank is {rank}, and must be at least 1", where="rank", hint="give rank 16, say")
        if not 0.0 <= dropout < 1.0:
            what = f"dropout is {dropout}, and must be at least 0 and below 1"
            raise UserError(what, where="dropout", hint="give 0.05, say")
        dropout, scaling = float(dropout) if self.has_dropout else 0.0, scaling_of(rank, float(alpha), rslora)
        self._freeze(rank=rank, alpha=float(alpha), dropout=dropout, rslora=rslora, scaling=scaling, changed_init=None)
        zeros = partial(torch.zeros, dtype=factor_dtype(self.weight), device=self.weight.device)
        self.lora_A, self.lora_B = (nn.Parameter(zeros(shape)) for shape in self._shapes(rank))
        self._add_parameters()
        if init is None:
            self.initialized()
        else:
            initialize(self, init, generator)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        return (self.in_features, rank), (rank, self.out_features)

    def _add_parameters(self) -> None:
        """Add what an update trains apart from its factors."""

    def output_bias(self) -> Tensor | None:
        """What ``forward`` adds to every output while adapting: the base layer's bias."""
        return self.bias  # type: ignore[return-value]

    def initialized(self) -> None:
        """Called when the factors (and the weight) have their initial values."""

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW in the layout of ``weight``, in fp32 (fp64 for an fp64 weight), without a graph.

        scaling · A·B of shape (in, out), or its transpose; for each expert alike.
        """
        if self.weight_is_in_out:
            return (self.lora_A @ self.lora_B).mul_(self.scaling)
        return (self.lora_B.transpose(-1, -2) @ self.lora_A.transpose(-1, -2)).mul_(self.scaling)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW, summed in fp32 (fp64 for an fp64 weight) and rounded once to the weight's type."""
        delta = self.delta_weight()
        return delta.add_(self.weight.to(delta.dtype)).to(self.weight.dtype)

    def merge_refusal(self) -> str | None:
        """With a quantized weight, a sum with ΔW would have to be quantized again."""
        if (kept := quantized_as(self)) is not None:
            return f"its weight is {kept}; load the model with precision bf16 or fp32 to merge"
        return super().merge_refusal()

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """As in the base class; merged for good, a weight that the initialization changed is gone."""
        super().set_merged(weight, keep_original)
        if not keep_original:
            self.changed_init = None

    @property
    def base_is_known(self) -> bool:
        """Whether the base model's own weight can still be had."""
        return super().base_is_known or self.changed_init is not None

    def base_weight(self) -> Tensor:
        """The base model's own weight: before a merge, and before the initialization took a share out."""
        if self.changed_init is not None:
            return like(self.changed_init.weight, self.weight)
        return super().base_weight()

    def restore_base(self) -> None:
        """Put the base model's own weight in, for good."""
        if self.merged or self.changed_init is not None:
            self.weight.data = self.base_weight()

    def extra_repr(self) -> str:
        """The base layer's line with rank and alpha."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


class _LinearUpdate(LoRALayer):
    """y = x·Wᵀ + b + scaling · dropout(x)·A·B for either orientation of W, plain or stored in another form."""

    bias: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        stored = stored_form(self)
        if not self.adapting:
            if stored is not None:
                return frozen_linear(input, self.weight, self.bias, stored)
            return self._base(input)
        dropout = self.dropout if self.training else 0.0
        in_out, bias = self.weight_is_in_out, self.output_bias()
        factors = (self.lora_A, self.lora_B, self.scaling, dropout)
        if (places := self.active_places) is None:
            return closed_form.linear(input, self.weight, bias, *factors, in_out, stored)
        update = closed_form.update_at(input, places, *factors)
        if stored is None:
            return closed_form.with_update(update, input, self.weight, bias, in_out)
        return frozen_linear(input, self.weight, bias, stored) + update

    def _base(self, input: Tensor) -> Tensor:
        """The base layer's own product with a plain weight."""
        return F.linear(input, self.weight, self.bias)


class LoRALinear(_LinearUpdate, nn.Linear):
    """y = x·Wᵀ + b + scaling · dropout(x)·A·B, with W and b frozen (arXiv 2106.09685, eq. 3).

    Args:
        in_features, out_features: sizes of x and y.
        rank: r.
        alpha: scaling is alpha / rank, or alpha / √rank with ``rslora``.
        bias: whether there is a b.
        dropout: share of the adapter's inputs set to zero while training.
        init: how the factors are initialized (see ``initialize``); None leaves both zero, to be loaded.

    Raises:
        UserError: rank, dropout or init cannot be used.
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
        self._begin(rank, alpha, dropout, rslora, init, None)


class LoRAConv1D(_LinearUpdate):
    """The same over transformers' ``Conv1D``: a linear layer whose weight is (in, out), as in GPT-2; in int8
    it is (out, in), see :class:`~deltaw.lora.layers_quantized.Int8Conv1D`."""

    nf: int
    nx: int

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Size of x."""
        return int(self.weight.shape[0 if self.weight_is_in_out else 1])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Size of y."""
        return int(self.weight.shape[1 if self.weight_is_in_out else 0])

    @property
    def weight_is_in_out(self) -> bool:  # type: ignore[override]
        """Whether the weight is (in, out), as in ``Conv1D``; else (out, in)."""
        return weight_scales(self) is None

    def _base(self, input: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, input.reshape(-1, input.shape[-1]), self.weight)
        return flat.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, rank and alpha."""
        return f"nf={self.out_features}, nx={self.in_features}, rank={self.rank}, alpha={self.alpha:g}"


class LoRAForeignLinear(LoRALayer):
    """An adapter on a linear layer that bitsandbytes or torchao has quantized; imports neither.

    It is put before the layer's class, whose forward it calls, by torch's autograd:

        y = layer(x) + scaling · dropout(x)·A·B
    """

    @classmethod
    def _class_over(cls: type[_Layer], module: nn.Module) -> type[_Layer]:
        base = type(module)
        if base not in _FOREIGN:
            _FOREIGN[base] = type(f"LoRA{base.__name__}", (LoRAForeignLinear, base), {})
        return _FOREIGN[base]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            UserError: gradients are wanted, and the library's product has none.
        """
        y: Tensor = super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad and not y.requires_grad:
            what = f"{library_of(self)}'s product with a {type(self.weight).__name__} gives its input no gradient"
            hint = "quantize the weights alone, not what they are multiplied with, or use precision: nf4"
            raise UserError(what, where="a layer that is adapted", hint=hint)
        if not self.adapting:
            return y
        dropout = self.dropout if self.training else 0.0
        factors = self.lora_A, self.lora_B
        if (places := self.active_places) is not None:
            return y + closed_form.update_at(input, places, *factors, self.scaling, dropout).to(y.dtype)
        seen = F.dropout(input, dropout) if dropout > 0.0 else input
        update = (seen @ self.lora_A.to(input.dtype)) @ (self.lora_B * self.scaling).to(input.dtype)
        return y + update.to(y.dtype)

    def merge_refusal(self) -> str | None:
        """A sum with ΔW would have to be quantized again, by the library that did it first."""
        return f"its weight is quantized by {library_of(self)}; load the model unquantized to merge"


_FOREIGN: dict[type[nn.Module], type[Any]] = {}


class ScaledEmbedding(AdaptedLayer, nn.Embedding):
    """An embedding whose base layer may multiply its rows by its ``embed_scale``."""

    multiplies: bool = False
    """Whether it does. The attribute alone says nothing: some models keep it there and scale elsewhere."""

    def _take_over(self, module: nn.Module) -> None:
        vars(self)["multiplies"] = type(module).forward is not nn.Embedding.forward

    @property
    def lookup(self) -> closed_form.Lookup:
        """How the base layer looks its rows up, and what it multiplies them by."""
        scale = getattr(self, "embed_scale", None) if self.multiplies else None
        return closed_form.Lookup(scale, self.padding_idx, self.scale_grad_by_freq)

    def base_rows(self, ids: Tensor) -> Tensor:
        """The base layer's own output."""
        lookup = self.lookup
        return lookup.scaled(lookup(ids, self.weight))


class LoRAEmbedding(LoRALayer, ScaledEmbedding):
    """y = c · (W[ids] + scaling · A[ids]·B), with W frozen and c the base layer's own scale, or 1.

    A row of A belongs to a token; the row of ``padding_idx`` is zero and stays so. There is no dropout on
    an adapted embedding: its input is a token, not a number. ``sparse`` concerns the gradient of W, which
    has none. Over a subclass with a forward of its own it is taken to multiply by its scalar ``embed_scale``;
    ``attach`` makes sure of that before.

    Raises:
        UserError: ``max_norm`` is set (it rewrites W while reading it), or as in :class:`LoRALinear`.
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
        self._begin(rank, alpha, 0.0, rslora, init, None)

    def _take_over(self, module: nn.Module) -> None:
        if self.max_norm is not None:
            what = "an embedding with max_norm rewrites its weight while it is read, so it cannot stay frozen"
            raise UserError(what, hint="leave it out of target_modules")
        super()._take_over(module)

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
    """An adapted convolution: y = conv(x, W) + b + scaling · conv1×1(conv(x, A), B).

    What the three share; make a ``LoRAConv1d``, ``LoRAConv2d`` or ``LoRAConv3d``. A is a convolution of W's
    kernel, stride, padding, dilation and padding mode onto r channels; B is one of kernel 1 that carries W's
    groups. That is the layout of PEFT's files. With ``groups`` g, B is (out, r/g, 1, …) and each group of outputs
    sees its own r/g channels of A, which sees all inputs: so ΔW is no grouped kernel and cannot be merged into
    one. Both passes are composed of torch's own convolutions under plain autograd: A·x is a convolution, so a
    closed form would call the same kernels.
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
        self._begin(rank, alpha, dropout, rslora, init, None)

    @classmethod
    def _class_over(cls: type[_Layer], module: nn.Module) -> type[_Layer]:
        """The subclass for as many dimensions as ``module`` has."""
        kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
        return next(found for found in (cls, *cls.__subclasses__()) if issubclass(found, kind))

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if rank % self.groups:
            what = f"a convolution of {self.groups} groups needs a rank that they divide, not {rank}"
            hint = f"use {-(-rank // self.groups) * self.groups}, or leave the layer out"
            raise UserError(what, where="rank", hint=hint)
        kernel = tuple(self.kernel_size)
        return (rank, self.in_channels, *kernel), (self.out_channels, rank // self.groups, *(1 for _ in kernel))

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
        autocast = closed_form.autocast_is_on(seen.device.type)
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


class LoRABias(LoRALayer):
    """The update with a bias on B: y = x·Wᵀ + b + scaling · (dropout(x)·A·B + c), with c trained.

    One more trained parameter, ``lora_bias`` (out), starts at zero (PEFT's ``lora_bias``). Merging adds c to
    the base layer's bias and exchanges that together with the weight; a layer without a bias cannot be merged.
    """

    trained: tuple[str, ...] = ("lora_A", "lora_B", "lora_bias")

    lora_bias: nn.Parameter
    _unmerged_bias: Tensor | None

    def _add_parameters(self) -> None:
        self._unmerged_bias = None
        outputs = self.weight.shape[0] if isinstance(self, LoRAConv) else self.lora_B.shape[1]
        self.lora_bias = nn.Parameter(self.lora_B.new_zeros(outputs))

    def output_bias(self) -> Tensor:
        """b + scaling·c, in the type of b, or of the weight where there is no b."""
        update, bias = self.lora_bias * self.scaling, self._base_bias
        if bias is not None:
            return bias + update.to(bias.dtype)
        return update.to(self.weight.dtype) if self.weight.is_floating_point() else update

    def merge_refusal(self) -> str | None:
        """Without a bias in the base layer there is nothing to merge c into."""
        if self._base_bias is None:
            return "its update has a bias (lora_bias), and the base layer has none to merge it into"
        return super().merge_refusal()

    def set_merged(self, weight: Tensor, keep_original: bool) -> None:
        """Take ``weight`` as W + ΔW, and b + scaling·c as the bias."""
        bias = self._base_bias
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
        self._restore_bias()
        self._unmerged_bias = None

    def restore_base(self) -> None:
        """Put the base model's own weight and bias in, for good."""
        super().restore_base()
        self._restore_bias()

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within the block the layer is the base model's own."""
        bias = self._base_bias
        before = None if bias is None else bias.data
        self._restore_bias()
        try:
            with super().as_base():
                yield
        finally:
            if bias is not None and before is not None:
                bias.data = before

    @property
    def _base_bias(self) -> nn.Parameter | None:
        return own_parameters(self).get("bias")

    def _restore_bias(self) -> None:
        bias = self._base_bias
        if bias is not None and self._unmerged_bias is not None:
            bias.data = like(self._unmerged_bias, bias)


class LoRABiasLinear(LoRABias, LoRALinear):
    """An adapted ``nn.Linear`` with a bias on B."""


class LoRABiasConv1D(LoRABias, LoRAConv1D):
    """An adapted ``Conv1D`` of transformers with a bias on B."""


class LoRABiasConv(LoRABias, LoRAConv):
    """What the adapted convolutions with a bias on B share."""


class LoRABiasConv1d(LoRABiasConv, nn.Conv1d):
    """An adapted ``nn.Conv1d`` with a bias on B."""


class LoRABiasConv2d(LoRABiasConv, nn.Conv2d):
    """An adapted ``nn.Conv2d`` with a bias on B."""


class LoRABiasConv3d(LoRABiasConv, nn.Conv3d):
    """An adapted ``nn.Conv3d`` with a bias on B."""


class DoRALayer(LoRALayer):
    """The update with weights split into magnitude and direction: W' = m∘(W + ΔW) / ‖W + ΔW‖.

    One more trained parameter, ``lora_magnitude`` (out), starts as the norm of every output's weights (DoRA,
    arXiv 2402.09353, eq. 5). For an embedding the outputs are the columns of its table, as in PEFT. A row of W
    that is zero has no direction: it stays zero. ``delta_weight`` is s·A·B, before the magnitude.

    The norm of W alone is kept, since W is frozen; that of W + ΔW is found anew in every forward that needs
    gradients, and kept between those that do not, so that generation does not pay for it at every token.
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

    def gain(self) -> Tensor:
        """m / ‖W + ΔW‖ of every output."""
        return math_dora.gain(self.lora_magnitude, self.weight_norm())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """m∘(W + ΔW) / ‖W + ΔW‖, formed in fp32 (fp64 for an fp64 weight) and rounded once."""
        delta = self.delta_weight()
        total = delta.add_(self.weight.to(delta.dtype))
        gain = self.gain()
        gain = gain if self.weight_is_in_out else gain.view(-1, *(1 for _ in self.weight.shape[1:]))
        return total.mul_(gain).to(self.weight.dtype)

    def _matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as a view (out, in)."""
        return weight.t() if self.weight_is_in_out else weight.flatten(1)

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


class _DoRAOfLinear(DoRALayer, _LinearUpdate):
    """A magnitude on either orientation of a linear layer's weight."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.adapting:
            return super().forward(input)
        dropout = self.dropout if self.training else 0.0
        trained = self.lora_A, self.lora_B, self.lora_magnitude, self.weight_norm()
        how = self.scaling, dropout, self.weight_is_in_out
        return math_dora.dora_linear(input, self.weight, self.bias, *trained, *how)


class DoRALinear(_DoRAOfLinear, LoRALinear):
    """An adapted ``nn.Linear`` with a magnitude."""


class DoRAConv1D(_DoRAOfLinear, LoRAConv1D):
    """The same over transformers' ``Conv1D``, whose weight is (in, out)."""


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """An adapted embedding with a magnitude for each column of its table."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        rows = super().forward(input)
        return rows * self.gain().to(rows.dtype) if self.adapting else rows


class DoRAConv(DoRALayer, LoRAConv):
    """What the adapted convolutions with a magnitude share; a norm is over all of an output's kernel."""

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.groups > 1:
            what = f"DoRA is not for a convolution of {self.groups} groups, whose ΔW is no kernel of its shape"
            raise UserError(what, where="dora", hint="leave the layer out, or leave dora out")
        return super()._shapes(rank)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, …) to (batch, out_channels, …), the batch may be missing."""
        if not self.adapting:
            return super().forward(input)
        seen = F.dropout(input, self.dropout, self.training) if self.dropout else input
        base = self._convolve(seen, self.weight, None, 1)
        g = self.gain().to(base.dtype).view(-1, *(1 for _ in self.kernel_size))
        y = g * (base + self._update(seen))
        if seen is not input:
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
