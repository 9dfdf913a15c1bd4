"""What is adapted below the level of a layer: a parameter that a module's own code uses, and rows of embeddings.

**A parameter** of fused experts, or of ``nn.MultiheadAttention``, has no layer whose forward could be replaced. So
while the module runs, its attribute is W + ΔW in place of W:

    weight (out, in):                  W + scaling · (A·B)ᵀ          A (in, r), B (r, out)
    weight (experts, out, in):         for each expert alike         A (experts, in, r), B (experts, r, out)
    weight (experts, in, out):         W + scaling · A·B for each expert

W + ΔW is one product added to W (``addmm``), so that ΔW alone is never kept; it stays until the backward if
the module's own code keeps its weight for that. Its gradient is what the module's code gives for a trained
weight, and A and B take theirs from it. There is no adapter dropout: an input of the update is not known
here.

**Rows of a few tokens** of a frozen embedding, and of an output head that is tied to it, are trained as
``trained_tokens`` (k, dim), in fp32 whatever the weight is; W keeps the old ones and is never written to, so no
gradient of W's size is ever made:

    embedding:   y[i] = trained[j] if ids[i] is trained token j, else W[ids[i]]
    linear head: y = x·Wᵀ + b, and y[:, token j] = x·trained[j] + b[token j]

The rows are PEFT's ``trainable_token_indices``: values, not differences.

It knows one parameter and the module that runs; nothing of names, files or selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.kernels.torch_private import adopt, own_parameters, remove_forward_hooks
from deltaw.lora.adapted import AdaptedLayer, factor_dtype
from deltaw.lora.layers import LoRALayer, ScaledEmbedding
from deltaw.lora.math_dora import without_autocast

_Tokens = TypeVar("_Tokens", bound="TrainedTokens")

ATTENTION_KEYS = ("lora_in_proj_weight", "lora_out_proj_weight")
"""What the updates of an ``nn.MultiheadAttention`` are called as its children."""


class LoRAParameter(LoRALayer):
    """The update of one parameter, with its factors.

    It is no layer in the forward: :meth:`watch` has a module compute with W + ΔW, :meth:`unwatch` ends that.

    Args:
        holder: the module that has the parameter.
        attribute: the parameter's name there; it has two dimensions, or three with the experts first.
        rank, alpha, rslora, init, generator: as for :class:`~deltaw.lora.layers.LoRALinear`.
        is_in_out: whether a parameter of three dimensions is (experts, in, out) and not (experts, out, in).

    Raises:
        UserError: rank or init cannot be used.
    """

    is_layer = False

    attribute: str
    _holder: nn.Module
    _runner: nn.Module | None
    _hooks: tuple[int, ...]

    def __init__(
        self,
        holder: nn.Module,
        attribute: str,
        rank: int,
        alpha: float = 1.0,
        *,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
        is_in_out: bool = False,
    ) -> None:
        super().__init__()
        # Not as a child: the parameter stays where it is.
        vars(self).update(_holder=holder, attribute=attribute, _runner=None, _hooks=())
        experts = self.weight.shape[0] if self.weight.dim() == 3 else None
        vars(self).update(experts=experts, weight_is_in_out=is_in_out and experts is not None)
        self._begin(rank, alpha, 0.0, rslora, init, generator)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *stack, n_in, n_out = self.weight.shape
        n_in, n_out = (n_in, n_out) if self.weight_is_in_out else (n_out, n_in)
        return (*stack, n_in, rank), (*stack, rank, n_out)

    @property
    def holder(self) -> nn.Module:
        """The module that ``weight`` is a parameter of."""
        return self._holder

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W: the frozen parameter itself."""
        parameter = own_parameters(self._holder)[self.attribute]
        assert parameter is not None
        return parameter

    def effective_weight(self) -> Tensor:
        """W + ΔW in the type of W, with a graph to A and B."""
        weight = self.weight
        dtype = weight.dtype
        # Autocast would round W and the product apart, and the module's own product casts the sum anyway.
        with without_autocast(weight.device.type):
            factor_A, factor_B = self.lora_A.to(dtype), self.lora_B.to(dtype)
            left, right = (factor_A, factor_B) if self.weight_is_in_out else (factor_B.mT, factor_A.mT)
            add = torch.baddbmm if weight.dim() == 3 else torch.addmm
            return add(weight, left, right, alpha=self.scaling)

    def watch(self, runner: nn.Module) -> None:
        """From now on ``runner``, whose forward reads the parameter, computes with W + ΔW."""
        before = runner.register_forward_pre_hook(self._before)
        after = runner.register_forward_hook(self._after, always_call=True)
        vars(self).update(_runner=runner, _hooks=(before.id, after.id))

    def unwatch(self) -> None:
        """Leave the module as it was."""
        if self._runner is not None:
            # By number, since the handles of a copied model would still point to the first one's hooks.
            remove_forward_hooks(self._runner, self._hooks)
        vars(self._holder).pop(self.attribute, None)
        vars(self).update(_runner=None, _hooks=())

    def _before(self, module: nn.Module, inputs: Any) -> None:
        # An instance's own attribute is found before a parameter of that name, which stays registered.
        if self.adapting:
            vars(self._holder)[self.attribute] = self.effective_weight()
        else:
            vars(self._holder).pop(self.attribute, None)

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        vars(self._holder).pop(self.attribute, None)

    def extra_repr(self) -> str:
        """The parameter's name and shape, rank and alpha."""
        return f"{self.attribute}: {tuple(self.weight.shape)}, rank={self.rank}, alpha={self.alpha:g}"


def parameter_refusal(holder: nn.Module, attribute: str) -> str | None:
    """Why a parameter cannot be adapted, or None where it can be."""
    if (parameter := own_parameters(holder).get(attribute)) is None:
        return "it is not there"
    if parameter.dim() not in (2, 3):
        return f"it has {parameter.dim()} dimensions, not two or three"
    if not parameter.is_floating_point():
        return f"it is {str(parameter.dtype).removeprefix('torch.')}, not floating-point"
    if isinstance(holder, nn.Embedding) and holder.max_norm is not None:
        return "an embedding with max_norm rewrites its weight while it is read"
    if type(holder).forward is nn.Module.forward:
        return f"a {type(holder).__name__} has no forward of its own that would compute with it"
    return None


def attention_refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention module cannot be adapted, or None where it can be."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"{type(attention).__name__} has a forward of its own"
    if attention.in_proj_weight is None:
        return "its query, key and value have different sizes, so that it has no in_proj_weight"
    return None


def adapt_attention(
    attention: nn.MultiheadAttention, rank: int, alpha: float, **how: Any
) -> tuple[LoRAParameter, LoRAParameter]:
    """The updates of ``in_proj_weight`` (3·dim, dim), and of ``out_proj``'s weight (dim, dim); ``how`` is
    :class:`LoRAParameter`'s ``rslora``, ``init`` and ``generator``."""
    out = LoRAParameter(attention.out_proj, "weight", rank, alpha, **how)
    into = LoRAParameter(attention, "in_proj_weight", rank, alpha, **how)
    if how["init"] is not None:
        # PEFT draws the output projection's factors a second time; so one seed gives the same ones.
        out = LoRAParameter(attention.out_proj, "weight", rank, alpha, **how)
    return into, out


class TrainedTokens(AdaptedLayer):
    """What an embedding and a head with trained rows share.

    Attributes:
        tokens: (k), whose rows are trained, on the CPU.
        trained_tokens: (k, dim), their rows.
    """

    trained: tuple[str, ...] = ("trained_tokens",)

    tokens: Tensor
    trained_tokens: nn.Parameter

    @classmethod
    def from_module(
        cls: type[_Tokens], module: nn.Module, tokens: Sequence[int], follows: TrainedTokens | None = None
    ) -> _Tokens:
        """The layer over ``module``'s own weight; with ``follows`` it takes that layer's rows."""
        layer = adopt(cls, module)
        layer._take_over(module)
        layer._begin(tokens, follows)
        return layer

    from_embedding = from_linear = from_module

    def _begin(self, tokens: Sequence[int], follows: TrainedTokens | None) -> None:
        """Take the rows that W has, or with ``follows`` that layer's."""
        self._freeze(follows=follows)
        if follows is not None:
            self.register_buffer("tokens", follows.tokens, persistent=False)
            self.trained_tokens = follows.trained_tokens
            return
        weight = self.weight
        # On the meta device too, it is known which rows are trained.
        device = "cpu" if weight.is_meta else weight.device
        self.register_buffer("tokens", torch.tensor(list(tokens), dtype=torch.long, device=device), persistent=False)
        with torch.no_grad():
            rows = weight.detach().index_select(0, self.tokens.to(weight.device)).to(factor_dtype(weight))
        self.trained_tokens = nn.Parameter(rows)

    @property
    def adapting(self) -> bool:
        """Whether ``forward`` takes the trained rows itself."""
        leader = self.follows or self
        return leader.enabled and not leader.merged

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W with the trained rows, rounded once to its type."""
        return self.weight.index_copy(0, self.tokens, self.trained_tokens.to(self.weight.dtype))

    def extra_repr(self) -> str:
        """The base layer's line and the number of trained rows."""
        return f"{super().extra_repr()}, trained_tokens={len(self.tokens)}"


class TrainedTokensEmbedding(TrainedTokens, ScaledEmbedding):
    """An embedding with trained rows; a scale of the base layer's own applies to them too."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., dim)."""
        rows = self.base_rows(input)
        if not self.adapting:
            return rows
        # (..., k): at most one of a token's entries is set.
        which = input.unsqueeze(-1) == self.tokens
        own = F.embedding(which.to(torch.uint8).argmax(-1), self.trained_tokens.to(self.weight.dtype))
        return torch.where(which.any(-1, keepdim=True), self.lookup.scaled(own), rows)


class TrainedTokensLinear(TrainedTokens, nn.Linear):
    """A linear layer of which the rows of a few outputs are trained."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y = F.linear(input, self.weight, self.bias)
        if not self.adapting:
            return y
        bias = None if self.bias is None else self.bias.index_select(0, self.tokens)
        own = F.linear(input, self.trained_tokens.to(self.weight.dtype), bias)
        return y.index_copy(-1, self.tokens, own.to(y.dtype))


def trained_tokens_of(module: nn.Module, tokens: Sequence[int], follows: TrainedTokens | None = None) -> TrainedTokens:
    """The layer over an embedding or a linear layer; with ``follows`` it takes that layer's rows."""
    kind = TrainedTokensEmbedding if isinstance(module, nn.Embedding) else TrainedTokensLinear
    return kind.from_module(module, tokens, follows)
