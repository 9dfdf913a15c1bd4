"""A frozen embedding of which the rows of a few tokens are trained, and an output head that is tied to it.

``trained_tokens`` (k, dim) holds the rows' new values, in fp32 whatever the weight is; W keeps the old ones
and is never written to, so no gradient of W's size is ever made:

    embedding:   y[i] = trained[j] if ids[i] is trained token j, else W[ids[i]]
    linear head: y = x·Wᵀ + b, and y[:, token j] = x·trained[j] + b[token j]

The rows are PEFT's ``trainable_token_indices``: values, not differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.kernels.torch_private import adopt, own_parameters
from deltaw.lora import math as closed_form
from deltaw.lora.adapted import AdaptedLayer, factor_dtype


class TrainedTokens(AdaptedLayer):
    """What an embedding and a head with trained rows share.

    Attributes:
        tokens: (k), whose rows are trained, on the CPU.
        trained_tokens: (k, dim), their rows.
    """

    trained: tuple[str, ...] = ("trained_tokens",)

    tokens: Tensor
    trained_tokens: nn.Parameter

    def _begin(self, tokens: Sequence[int]) -> None:
        weight = self.weight
        for parameter in own_parameters(self).values():
            if parameter is not None:
                parameter.requires_grad_(False)
        vars(self).update(enabled=True, merged=False, _unmerged_weight=None)
        # On the meta device too, it is known which rows are trained.
        device = "cpu" if weight.is_meta else weight.device
        self.register_buffer("tokens", torch.tensor(list(tokens), dtype=torch.long, device=device), persistent=False)
        with torch.no_grad():
            rows = weight.detach().index_select(0, self.tokens.to(weight.device)).to(factor_dtype(weight))
        self.trained_tokens = nn.Parameter(rows)

    def _follow(self, other: TrainedTokens) -> None:
        for parameter in own_parameters(self).values():
            if parameter is not None:
                parameter.requires_grad_(False)
        vars(self).update(enabled=True, merged=False, follows=other, _unmerged_weight=None)
        self.register_buffer("tokens", other.tokens, persistent=False)
        self.trained_tokens = other.trained_tokens

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


class TrainedTokensEmbedding(TrainedTokens, nn.Embedding):
    """An embedding with trained rows; a scale of the base layer's own applies to them too."""

    multiplies: bool = False

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, tokens: Sequence[int], follows: TrainedTokens | None = None
    ) -> TrainedTokensEmbedding:
        """The layer over ``embedding``'s own weight; with ``follows`` it takes that layer's rows."""
        layer = adopt(cls, embedding)
        vars(layer)["multiplies"] = type(embedding).forward is not nn.Embedding.forward
        layer._begin(tokens) if follows is None else layer._follow(follows)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., dim)."""
        scale: float | Tensor | None = getattr(self, "embed_scale", None) if self.multiplies else None
        rows = closed_form.embedding_rows(input, self.weight, scale, self.padding_idx, self.scale_grad_by_freq)
        if not self.adapting:
            return rows
        # (..., k): at most one of a token's entries is set.
        which = input.unsqueeze(-1) == self.tokens
        own = F.embedding(which.to(torch.uint8).argmax(-1), self.trained_tokens.to(self.weight.dtype))
        if scale is not None:
            own = own * (scale.to(own.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(which.any(-1, keepdim=True), own, rows)


class TrainedTokensLinear(TrainedTokens, nn.Linear):
    """A linear layer of which the rows of a few outputs are trained."""

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, tokens: Sequence[int], follows: TrainedTokens | None = None
    ) -> TrainedTokensLinear:
        """The layer over ``linear``'s own weight; with ``follows`` it takes that layer's rows."""
        layer = adopt(cls, linear)
        layer._begin(tokens) if follows is None else layer._follow(follows)
        return layer

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
    if isinstance(module, nn.Embedding):
        return TrainedTokensEmbedding.from_embedding(module, tokens, follows)
    if isinstance(module, nn.Linear):
        return TrainedTokensLinear.from_linear(module, tokens, follows)
    raise TypeError(f"a {type(module).__name__} has no rows of tokens")
