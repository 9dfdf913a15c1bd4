"""The adapted layers: a frozen layer that adds a low-rank update to its output.

``LoRALinear`` *is* an ``nn.Linear``: its ``weight`` and ``bias`` are the frozen ones, and ``lora_A`` and
``lora_B`` are further parameters of the same layer. There is no wrapper, so a model's code that looks at
``layer.weight`` finds what it looks for. ``LoRAConv1D`` is the same for transformers' layer of that name,
whose weight is (in, out); ``LoRAEmbedding`` for embeddings; convolutions are in ``layers_conv``.

A layer knows its own arithmetic and its merged weight, and nothing of models, files or selection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels.torch_private import adopt, own_parameters
from deltaw.lora import math as closed_form
from deltaw.lora.adapted import AdaptedLayer, factor_dtype, like
from deltaw.lora.config import scaling as scaling_of
from deltaw.lora.initialize import ChangedInit, initialize
from deltaw.lora.stored import frozen_linear, quantized_as, stored_form, weight_scales


class LoRALayer(AdaptedLayer):
    """What all layers with low-rank factors share.

    Attributes:
        rank, alpha, scaling, dropout, rslora: as in :class:`~deltaw.lora.config.LoRAConfig`.
        changed_init: set where the initialization changed W, which then is a residual (PiSSA, OLoRA).
        experts: how many weights are stacked along the first dimension of the factors, or None.
        is_layer: whether its own forward computes with the factors.
    """

    trained: tuple[str, ...] = ("lora_A", "lora_B")
    experts: int | None = None
    is_layer: bool = True

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    alpha: float
    scaling: float
    dropout: float
    rslora: bool
    changed_init: ChangedInit | None

    def _begin(
        self,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        rank: int,
        alpha: float,
        dropout: float,
        rslora: bool,
        init: str | None,
        generator: torch.Generator | None,
    ) -> None:
        """Freeze what the layer has, and add factors of ``shapes``."""
        if rank < 1:
            raise UserError(
                f"rank must be a whole number of at least 1, not {rank}", where="rank", hint="give rank 16, say"
            )
        if not 0.0 <= dropout < 1.0:
            raise UserError(
                f"dropout must be at least 0 and below 1, not {dropout}", where="dropout", hint="give 0.05, say"
            )
        for parameter in own_parameters(self).values():
            if parameter is not None:
                parameter.requires_grad_(False)
        # Plain attributes go past nn.Module's own bookkeeping, which takes its time over ten thousand layers.
        vars(self).update(
            rank=rank,
            alpha=float(alpha),
            dropout=float(dropout),
            rslora=rslora,
            scaling=scaling_of(rank, float(alpha), rslora),
            enabled=True,
            merged=False,
            changed_init=None,
            _unmerged_weight=None,
        )
        weight = self.weight
        dtype = factor_dtype(weight)
        self.lora_A = nn.Parameter(torch.zeros(shapes[0], dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(shapes[1], dtype=dtype, device=weight.device))
        self._add_parameters()
        if init is None:
            self.initialized()
        else:
            initialize(self, init, generator)

    def _add_parameters(self) -> None:
        """Add what a kind of layer trains apart from its factors."""

    def output_bias(self) -> Tensor | None:
        """What ``forward`` adds to every output while adapting: the base layer's bias."""
        return self.bias  # type: ignore[return-value]

    def initialized(self) -> None:
        """Called when the factors (and the weight) have their initial values."""

    def delta_weight(self) -> Tensor:
        """ΔW in the layout of ``weight``, in fp32 (fp64 for an fp64 weight), without a graph."""
        raise UserError(f"{type(self).__name__} has no ΔW of its own", hint="use one of its subclasses")

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW, summed in fp32 (fp64 for an fp64 weight) and rounded once to the weight's type."""
        delta = self.delta_weight()
        return delta.add_(self.weight.to(delta.dtype)).to(self.weight.dtype)

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


class LoRALinear(LoRALayer, nn.Linear):
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
        self._begin(((in_features, rank), (rank, out_features)), rank, alpha, dropout, rslora, init, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
    ) -> LoRALinear:
        """The adapted layer over ``linear``'s own weight and bias: the same Parameters, now frozen."""
        layer = adopt(cls, linear)
        shapes = ((linear.in_features, rank), (rank, linear.out_features))
        layer._begin(shapes, rank, alpha, dropout, rslora, init, generator)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        stored = stored_form(self)
        if not self.adapting:
            if stored is not None:
                return frozen_linear(input, self.weight, self.bias, stored)
            return F.linear(input, self.weight, self.bias)
        dropout = self.dropout if self.training else 0.0
        bias = self.output_bias()
        if (places := self.active_places) is not None:
            factors = (self.lora_A, self.lora_B, self.scaling)
            update = closed_form.update_at(input, places, *factors, dropout)
            if stored is None:
                return closed_form.with_update(update, input, self.weight, bias)
            return frozen_linear(input, self.weight, bias, stored) + update
        return closed_form.linear(
            input, self.weight, bias, self.lora_A, self.lora_B, self.scaling, dropout, stored=stored
        )

    def merge_refusal(self) -> str | None:
        """A sum with ΔW would have to be quantized again."""
        return _quantized_refusal(self) or super().merge_refusal()

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling · (A·B)ᵀ of shape (out, in)."""
        return (self.lora_B.t() @ self.lora_A.t()).mul_(self.scaling)


def _quantized_refusal(layer: nn.Module) -> str | None:
    kept = quantized_as(layer)
    return None if kept is None else f"its weight is {kept}; load the model with precision bf16 or fp32 to merge"


class LoRAConv1D(LoRALayer):
    """The same over transformers' ``Conv1D``: a linear layer whose weight is (in, out), as in GPT-2; in int8
    it is (out, in), see :class:`~deltaw.lora.layers_int8.Int8Conv1D`."""

    bias: nn.Parameter
    nf: int
    nx: int

    @classmethod
    def from_conv1d(
        cls,
        module: nn.Module,
        rank: int,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
    ) -> LoRAConv1D:
        """The adapted layer over ``module``'s own weight and bias (out)."""
        layer = adopt(cls, module)
        n_in, n_out = layer.in_features, layer.out_features
        layer._begin(((n_in, rank), (rank, n_out)), rank, alpha, dropout, rslora, init, generator)
        return layer

    @property
    def in_features(self) -> int:
        """Size of x."""
        return int(self.weight.shape[0 if self.weight_is_in_out else 1])

    @property
    def out_features(self) -> int:
        """Size of y."""
        return int(self.weight.shape[1 if self.weight_is_in_out else 0])

    @property
    def weight_is_in_out(self) -> bool:
        """Whether the weight is (in, out), as in ``Conv1D``; else (out, in)."""
        return weight_scales(self) is None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        scales = weight_scales(self)
        dropout = self.dropout if self.training else 0.0
        places = self.active_places if self.adapting else None
        factors = self.lora_A, self.lora_B
        update = None if places is None else closed_form.update_at(x, places, *factors, self.scaling, dropout)
        if update is not None and scales is None:
            return closed_form.with_update(update, x, self.weight, self.bias, True)
        if not self.adapting or update is not None:
            if scales is not None:
                y = frozen_linear(x, self.weight, self.bias, scales)
            else:
                flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
                y = flat.view(*x.shape[:-1], self.out_features)
            return y if update is None else y + update
        bias = self.output_bias()
        return closed_form.linear(x, self.weight, bias, *factors, self.scaling, dropout, self.weight_is_in_out, scales)

    def merge_refusal(self) -> str | None:
        """As of a linear layer."""
        return _quantized_refusal(self) or super().merge_refusal()

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling · A·B of shape (in, out); (out, in) for a weight in int8."""
        delta = (self.lora_A @ self.lora_B).mul_(self.scaling)
        return delta if self.weight_is_in_out else delta.t()

    def extra_repr(self) -> str:
        """Sizes, rank and alpha."""
        return f"nf={self.out_features}, nx={self.in_features}, rank={self.rank}, alpha={self.alpha:g}"


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """y = c · (W[ids] + scaling · A[ids]·B), with W frozen and c the base layer's own scale, or 1.

    A row of A belongs to a token; the row of ``padding_idx`` is zero and stays so. There is no dropout on
    an adapted embedding: its input is a token, not a number. ``sparse`` concerns the gradient of W, which
    has none.

    Raises:
        UserError: ``max_norm`` is set (it rewrites W while reading it), or as in :class:`LoRALinear`.
    """

    multiplies: bool = False
    """Whether the base layer multiplies its rows by its ``embed_scale``."""

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
        self._begin(((num_embeddings, rank), (rank, embedding_dim)), rank, alpha, 0.0, rslora, init, None)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        rank: int,
        alpha: float = 1.0,
        *,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
    ) -> LoRAEmbedding:
        """The adapted layer over ``embedding``'s own weight.

        A subclass with a forward of its own is taken to multiply by its scalar ``embed_scale``; ``attach``
        makes sure of that before.
        """
        if embedding.max_norm is not None:
            raise UserError(
                "an embedding with max_norm rewrites its weight while it is read, so it cannot stay frozen",
                hint="leave it out of target_modules",
            )
        layer = adopt(cls, embedding)
        # The attribute alone says nothing: some models keep it there and scale elsewhere.
        vars(layer)["multiplies"] = type(embedding).forward is not nn.Embedding.forward
        shapes = ((embedding.num_embeddings, rank), (rank, embedding.embedding_dim))
        layer._begin(shapes, rank, alpha, 0.0, rslora, init, generator)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        scale: float | Tensor | None = getattr(self, "embed_scale", None) if self.multiplies else None
        if not self.adapting:
            return closed_form.embedding_rows(input, self.weight, scale, self.padding_idx, self.scale_grad_by_freq)
        return closed_form.embedding(
            input, self.weight, self.lora_A, self.lora_B, self.scaling, scale, self.padding_idx, self.scale_grad_by_freq
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling · A·B of shape (vocabulary, dim), before the base layer's own scale."""
        return (self.lora_A @ self.lora_B).mul_(self.scaling)
