"""Adaptation below the level of layers: parameters used by a module's forward, and token rows of embeddings.

**Parameters** of fused experts, or of ``nn.MultiheadAttention``, have no layer whose forward could be replaced. While
the module runs, the attribute is therefore W + ΔW instead of W:

    weight (out, in):                  W + scaling · (A·B)ᵀ          A (in, r), B (r, out)
    weight (experts, out, in):         the same for each expert      A (experts, in, r), B (experts, r, out)
    weight (experts, in, out):         W + scaling · A·B for each expert

A replaced forward of the module can compute with A and B itself (:mod:`deltaw.runtime.experts`). Otherwise W + ΔW is
one product added to W (``addmm``), so ΔW is never stored separately. The sum lives until the backward if the module
saves its weight for it. Gradients of A and B are computed from the gradient of the sum. Adapter dropout is not
supported, because the inputs of the update are not known.

**Token rows** of a frozen embedding, and of an output head tied to it, are trained as ``trained_tokens`` (k, dim) in
fp32. W is not modified, so no gradient of W's size is allocated:

    embedding:   y[i] = trained[j] if ids[i] is trained token j, else W[ids[i]]
    linear head: y = x·Wᵀ + b, and y[:, token j] = x·trained[j] + b[token j]

The rows are PEFT's ``trainable_token_indices``: values, not differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.kernels.torch_modules import cast_module, direct_parameters, remove_forward_hooks
from deltaw.lora.adapted import AdaptedLayer, factor_dtype
from deltaw.lora.layers import LoRALayer, ScaledEmbedding
from deltaw.lora.math_dora import without_autocast

_Tokens = TypeVar("_Tokens", bound="TrainedTokens")


class LoRAParameter(LoRALayer):
    """The update of one parameter.

    Not called as a layer: :meth:`register_hooks` makes a module compute with W + ΔW, and :meth:`remove_hooks` reverts
    it.

    Args:
        owner: Module that has the parameter.
        attribute: Name of the parameter in the module. It has two dimensions, or three with the experts first.
        rank, alpha, rslora, init, generator: See :class:`~deltaw.lora.layers.LoRALinear`.
        is_in_out: True if a three-dimensional parameter is (experts, in, out), False if it is (experts, out, in).

    Raises:
        UserError: if rank or init is invalid.
    """

    is_layer = False

    attribute: str
    _owner: nn.Module
    _runner: nn.Module | None
    _hooks: tuple[int, ...]

    def __init__(
        self,
        owner: nn.Module,
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
        # vars() avoids registering the module as a child.
        vars(self).update(_owner=owner, attribute=attribute, _runner=None, _hooks=())
        experts = self.weight.shape[0] if self.weight.dim() == 3 else None
        vars(self).update(experts=experts, weight_is_in_out=is_in_out and experts is not None)
        self._setup(rank, alpha, 0.0, rslora, init, generator)

    def _shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *stack, n_in, n_out = self.weight.shape
        n_in, n_out = (n_in, n_out) if self.weight_is_in_out else (n_out, n_in)
        return (*stack, n_in, rank), (*stack, rank, n_out)

    @property
    def owner(self) -> nn.Module:
        """Module that has ``weight`` as a parameter."""
        return self._owner

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W: the frozen parameter."""
        parameter = direct_parameters(self._owner)[self.attribute]
        assert parameter is not None
        return parameter

    def effective_weight(self) -> Tensor:
        """Return W + ΔW in the dtype of W, with a graph to A and B."""
        weight = self.weight
        dtype = weight.dtype
        # Autocast would round W and the product separately, and the module's product casts the sum in any case.
        with without_autocast(weight.device.type):
            factor_A = self.lora_A.to(dtype)
            factor_B = self.lora_B.to(dtype)
            left, right = (factor_A, factor_B) if self.weight_is_in_out else (factor_B.mT, factor_A.mT)
            return (torch.baddbmm if weight.dim() == 3 else torch.addmm)(weight, left, right, alpha=self.scaling)

    def register_hooks(self, runner: nn.Module) -> None:
        """Make ``runner``, whose forward reads the parameter, compute with W + ΔW."""
        pre_handle = runner.register_forward_pre_hook(self._pre_hook)
        post_handle = runner.register_forward_hook(self._post_hook, always_call=True)
        vars(self).update(_runner=runner, _hooks=(pre_handle.id, post_handle.id))

    def remove_hooks(self) -> None:
        """Restore the module."""
        if self._runner is not None:
            # By id, since the handles of a copied model would refer to the hooks of the original model.
            remove_forward_hooks(self._runner, self._hooks)
        vars(self._owner).pop(self.attribute, None)
        vars(self).update(_runner=None, _hooks=())

    def _pre_hook(self, module: nn.Module, inputs: object) -> None:
        if not getattr(vars(module).get("forward"), "applies_updates", False):
            self.apply_to_weight()

    def apply_to_weight(self) -> None:
        """Let the module compute with W + ΔW until the end of its forward."""
        # An instance attribute takes precedence over the registered parameter with the same name.
        if self.adapting:
            vars(self._owner)[self.attribute] = self.effective_weight()
        else:
            vars(self._owner).pop(self.attribute, None)

    def _post_hook(self, module: nn.Module, inputs: object, output: object) -> None:
        vars(self._owner).pop(self.attribute, None)

    def extra_repr(self) -> str:
        """Return the parameter's name and shape, rank and alpha."""
        return f"{self.attribute}: {tuple(self.weight.shape)}, rank={self.rank}, alpha={self.alpha:g}"


def parameter_refusal(owner: nn.Module, attribute: str) -> str | None:
    """Return the reason why a parameter cannot be adapted, or None if it can."""
    if (parameter := direct_parameters(owner).get(attribute)) is None:
        return "it does not exist"
    if parameter.dim() not in (2, 3):
        return f"it has {parameter.dim()} dimensions, not two or three"
    if not parameter.is_floating_point():
        return f"it is {str(parameter.dtype).removeprefix('torch.')}, not floating-point"
    if isinstance(owner, nn.Embedding) and owner.max_norm is not None:
        return "an embedding with max_norm modifies its weight during lookup"
    if type(owner).forward is nn.Module.forward:
        return f"a {type(owner).__name__} has no forward that uses it"
    return None


def attention_refusal(attention: nn.MultiheadAttention) -> str | None:
    """Return the reason why an attention module cannot be adapted, or None if it can."""
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"{type(attention).__name__} overrides forward"
    if attention.in_proj_weight is None:
        return "its query, key and value have different sizes, so it has no in_proj_weight"
    return None


class TrainedTokens(AdaptedLayer):
    """Base class of embeddings and heads with trained token rows.

    Attributes:
        tokens: (k) ids of the tokens.
        trained_tokens: (k, dim) their rows.
    """

    trained: tuple[str, ...] = ("trained_tokens",)

    tokens: Tensor
    trained_tokens: nn.Parameter

    @classmethod
    def from_module(
        cls: type[_Tokens], module: nn.Module, tokens: Sequence[int], tied_to: TrainedTokens | None = None
    ) -> _Tokens:
        """Create the layer from ``module``, sharing its weight. With ``tied_to`` it shares that layer's rows."""
        layer = cast_module(cls, module)
        layer._init_from(module)
        layer._setup(tokens, tied_to)
        return layer

    def _setup(self, tokens: Sequence[int], tied_to: TrainedTokens | None) -> None:
        """Initialize the trained rows from W, or share those of ``tied_to``."""
        self._freeze(tied_to=tied_to)
        if tied_to is not None:
            self.register_buffer("tokens", tied_to.tokens, persistent=False)
            self.trained_tokens = tied_to.trained_tokens
            return
        weight = self.weight
        # Token ids have values even on the meta device.
        device = "cpu" if weight.is_meta else weight.device
        self.register_buffer("tokens", torch.tensor(list(tokens), dtype=torch.long, device=device), persistent=False)
        with torch.no_grad():
            rows = weight.detach().index_select(0, self.tokens.to(weight.device)).to(factor_dtype(weight))
        self.trained_tokens = nn.Parameter(rows)

    @property
    def adapting(self) -> bool:
        """True if ``forward`` uses the trained rows."""
        leader = self.tied_to or self
        return leader.enabled and not leader.merged

    @torch.no_grad()
    def merged_weight(self, *, rounded: bool = True) -> Tensor:
        """Return W with the trained rows."""
        weight = self.weight if rounded else self.weight.to(self.trained_tokens.dtype)
        return weight.index_copy(0, self.tokens, self.trained_tokens.to(weight.dtype))

    def extra_repr(self) -> str:
        """Return the base layer's description and the number of trained rows."""
        return f"{super().extra_repr()}, trained_tokens={len(self.tokens)}"


class TrainedTokensEmbedding(TrainedTokens, ScaledEmbedding):
    """An embedding with trained token rows. The base layer's scale applies to them too."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., dim)."""
        rows = self.base_rows(input)
        if not self.adapting:
            return rows
        # (..., k), with at most one True entry per token.
        is_token = input.unsqueeze(-1) == self.tokens
        trained_rows = F.embedding(is_token.to(torch.uint8).argmax(-1), self.trained_tokens.to(self.weight.dtype))
        return torch.where(is_token.any(-1, keepdim=True), self.lookup.scaled(trained_rows), rows)


class TrainedTokensLinear(TrainedTokens, nn.Linear):
    """A linear layer with trained weight rows of some outputs."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y = F.linear(input, self.weight, self.bias)
        if not self.adapting:
            return y
        bias = None if self.bias is None else self.bias.index_select(0, self.tokens)
        trained_outputs = F.linear(input, self.trained_tokens.to(self.weight.dtype), bias)
        return y.index_copy(-1, self.tokens, trained_outputs.to(y.dtype))


def trained_tokens_of(module: nn.Module, tokens: Sequence[int], tied_to: TrainedTokens | None = None) -> TrainedTokens:
    """Create the layer with trained token rows for an embedding or a linear layer. With ``tied_to`` it shares that
    layer's rows.
    """
    kind = TrainedTokensEmbedding if isinstance(module, nn.Embedding) else TrainedTokensLinear
    return kind.from_module(module, tokens, tied_to)
