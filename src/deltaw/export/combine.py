"""Combination of several adapters' updates ΔW with weights, and rank reduction.

    concat   Σ wᵢ·ΔWᵢ, exact: factors are concatenated and ranks add up
    svd      best approximation of that sum with a given rank
    linear   Σ wᵢ·ΔWᵢ, computed in full; supports all kinds of changes
    ties     keep the largest fraction ``density`` of each wᵢ·ΔWᵢ by magnitude, elect the sign with the larger sum per
             element, and average the values that agree with it (arXiv 2306.01708, section 3)
    dare     keep a random fraction ``density`` of each ΔWᵢ, divide by it, and sum (arXiv 2311.03099, eq. 1)

All methods operate on ΔW. Combining A and B separately would add cross terms. Errors are relative to the weighted sum
Σ wᵢ·ΔWᵢ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, Blocks, LowRankChange, ParameterChange, WeightChange, WeightFactors
from deltaw.lora.math import relative_errors

# Norms, inner products, angles and rank reductions do not compute ΔW: for a weight of n rows and m columns they cost
# O((n + m)·r²), in float64. With L = Q_L·R_L and Rᵀ = Q_R·R_R (QR decompositions), the singular values of L·R are those
# of the r × r matrix R_L·R_Rᵀ, and the truncated SVD is the best approximation of its rank (Eckart and Young, 1936).


@dataclass(frozen=True)
class TruncatedSVD:
    """Best approximation of a lower rank.

    Attributes:
        factor_L, factor_R: (n, k) and (k, m) fp32 factors. Each includes the square root of the singular values.
        retained, discarded: Singular values, descending.
    """

    factor_L: Tensor
    factor_R: Tensor
    retained: Tensor
    discarded: Tensor


@dataclass(frozen=True)
class ReducedFactors:
    """Approximate factors, their squared error, and the squared norm of the exact update."""

    factors: WeightFactors
    squared_error: float
    squared_norm: float


def truncate(factor_L: Tensor, factor_R: Tensor, rank: int) -> TruncatedSVD:
    """Return the best approximation of L·R with at most ``rank``.

    Args:
        factor_L: (n, r) factor L.
        factor_R: (r, m) factor R.
        rank: Maximum rank.
    """
    q_L, r_L = torch.linalg.qr(factor_L.double())
    q_R, r_R = torch.linalg.qr(factor_R.double().T)
    inner_L, inner_R, retained, discarded = _cut(r_L @ r_R.T, rank)
    return TruncatedSVD((q_L @ inner_L).float(), (inner_R @ q_R.T).float(), retained, discarded)


def truncate_dense(delta: Tensor, rank: int) -> TruncatedSVD:
    """Return the best approximation of a dense (n, m) ΔW, computed by a full SVD."""
    factor_L, factor_R, retained, discarded = _cut(delta.double(), rank)
    return TruncatedSVD(factor_L.float(), factor_R.float(), retained, discarded)


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors of the truncated SVD, and its retained and discarded singular values."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    retained = values[:rank]
    half = retained.sqrt()
    return u[:, : len(retained)] * half, half[:, None] * v[: len(retained)], retained, values[rank:]


def inner_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩_F = tr((L₁ᵀ·L₂)·(R₂·R₁ᵀ)) of two pairs (L, R)."""
    l1, r1 = first
    l2, r2 = second
    # tr(X·Yᵀ) is the sum of the elementwise product.
    return float(((l1.double().T @ l2.double()) * (r1.double() @ r2.double().T)).sum())


def norm(factor_L: Tensor, factor_R: Tensor) -> float:
    """Return ‖L·R‖_F."""
    return max(inner_product((factor_L, factor_R), (factor_L, factor_R)), 0.0) ** 0.5


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of the principal angles between the column spaces of two matrices, in descending order.

    The matrices are (n, r₁) and (n, r₂). Null directions are ignored (Björck and Golub, 1973).
    """
    bases = [_basis(matrix) for matrix in (first, second)]
    if not all(basis.shape[1] for basis in bases):
        return torch.zeros(0, dtype=torch.float64)
    return torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(0.0, 1.0)


def _basis(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis (n, k) of the column space."""
    u, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not values.numel():
        return u
    # Threshold of numpy.linalg.matrix_rank for values trained in fp32.
    threshold = values.max() * max(matrix.shape) * torch.finfo(torch.float32).eps
    return u[:, values > threshold]


METHODS = ("concat", "svd", "linear", "ties", "dare")
FACTORED = ("concat", "svd")


@dataclass(frozen=True)
class Recipe:
    """Combination of several adapters.

    Attributes:
        method: One of :data:`METHODS`.
        weights: Weight of each adapter.
        rank: Rank for ``svd``, or None for the largest rank of the adapters.
        density: Fraction of elements that ``ties`` and ``dare`` keep.
        seed: Random seed of ``dare``.

    Raises:
        UserError: if a value is out of range.
    """

    method: str
    weights: tuple[float, ...]
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method '{self.method}'", location="--method", hint=f"use {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise UserError(f"the density {self.density:g} must be above 0 and at most 1", location="--density")
        require_rank(self.rank)
        invalid = [weight for weight in self.weights if not abs(weight) < float("inf")]
        if invalid:
            raise UserError(f"the weight {invalid[0]} is not finite", location="--with", hint="use a finite number")


def require_rank(rank: int | None) -> None:
    """Raise a UserError if the rank is below 1."""
    if rank is not None and rank < 1:
        raise UserError(f"the rank {rank} must be at least 1", location="--rank")


@dataclass
class CombinedChange(WeightChange):
    """Combination of several changes of a weight. Measures its error when it is applied.

    Attributes:
        name: Name of the parameter, which seeds the random numbers of ``dare``.
        parts: Change by each adapter, if the adapter changes this weight.
        recipe: Combination method and weights.
        squared_error: Sum of squares of the difference to the weighted sum.
        squared_norm: Sum of squares of the weighted sum.
    """

    name: str
    parts: Sequence[WeightChange | None]
    recipe: Recipe
    squared_error: float = 0.0
    squared_norm: float = 0.0

    def __post_init__(self) -> None:
        self.needs_all_rows = self.recipe.method == "ties"  # the magnitude threshold depends on all of ΔW

    def prepare(self, blocks: Blocks) -> None:
        self.squared_error = self.squared_norm = 0.0
        for part in self.parts:
            if part is not None:
                part.prepare(blocks)

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.delta(rows, start).to(rows.dtype))

    def delta(self, rows: Tensor, start: int) -> Tensor:
        """Return the given rows of the combined ΔW."""
        deltas = [_delta(part, rows, start) for part in self.parts]
        weighted = [w * d for w, d in zip(self.recipe.weights, deltas, strict=True) if d is not None]
        exact = torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]
        if self.recipe.method == "ties":
            combined = ties(weighted, self.recipe.density)
        elif self.recipe.method == "dare":
            combined = torch.zeros_like(exact)
            for adapter_index, (weight, delta) in enumerate(zip(self.recipe.weights, deltas, strict=True)):
                if delta is not None:
                    # The seed depends only on these values, not on the order of tensors.
                    text = f"{self.recipe.seed}:{adapter_index}:{self.name}:{start}"
                    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
                    combined += weight * dare(delta, self.recipe.density, seed)
        else:
            combined = exact
        self.squared_error += float((combined - exact).double().square().sum())
        self.squared_norm += float(exact.double().square().sum())
        return combined


def _delta(part: WeightChange | None, rows: Tensor, start: int) -> Tensor | None:
    if part is None:
        return None
    if isinstance(part, LowRankChange):  # avoids the rounding error of (W + ΔW) − W
        return part.factors.rows(start, start + len(rows)).to(rows.dtype)
    return part.apply(rows.clone(), start) - rows


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim the deltas, elect signs, and return the mean of the values that agree. All deltas have the same shape."""
    trimmed = torch.stack([trim(delta, density) for delta in deltas])
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def trim(delta: Tensor, density: float) -> Tensor:
    """Set all but the largest ``density`` · n elements by magnitude to zero."""
    count = max(1, round(density * delta.numel()))
    if count >= delta.numel():
        return delta
    indices = delta.abs().flatten().topk(count, sorted=False).indices
    trimmed = torch.zeros_like(delta).flatten()
    trimmed[indices] = delta.flatten()[indices]
    return trimmed.view(delta.shape)


def dare(delta: Tensor, density: float, seed: int) -> Tensor:
    """Keep each element with probability ``density``, and divide it by ``density``."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(mask, delta / density, 0.0)


@dataclass(frozen=True)
class Combination:
    """Combined changes of several adapters.

    Attributes:
        changes: Change of each parameter.
        known_errors: Errors that do not depend on the weights, by parameter, as (‖difference‖², ‖sum‖²).
    """

    changes: list[ParameterChange]
    known_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> tuple[dict[str, float], float]:
        """Return ‖combined − Σ wᵢ·ΔWᵢ‖_F / ‖Σ wᵢ·ΔWᵢ‖_F by parameter, and over all parameters together.

        Call this after the weights were written.
        """
        combined = [(p.names[0], p.change) for p in self.changes if isinstance(p.change, CombinedChange)]
        squares = {name: (change.squared_error, change.squared_norm) for name, change in combined}
        return relative_errors({**self.known_errors, **squares})


def combine(adapters: Sequence[AdapterChanges], recipe: Recipe) -> Combination:
    """Combine the changes of several adapters.

    Raises:
        UserError: if the method does not support a change of an adapter.
    """
    names = list(dict.fromkeys(parameter.names for adapter in adapters for parameter in adapter.changes))
    by_adapter = [{parameter.names: parameter for parameter in adapter.changes} for adapter in adapters]
    used_names: set[str] = set()
    combined = []
    errors = {}
    for group in names:
        if used_names & set(group):
            message = f"the adapters change the tied weight '{group[0]}' under different names"
            raise UserError(message, location=group[0], hint="merge the adapters one at a time")
        used_names |= set(group)
        parts = [by_names.get(group) for by_names in by_adapter]
        changes = [None if part is None else part.change for part in parts]
        change: WeightChange
        if recipe.method in FACTORED:
            change, errors[group[0]] = _reduce(group[0], changes, recipe)
        else:
            change = CombinedChange(group[0], changes, recipe)
        combined.append(ParameterChange(group, change, next(part.shape for part in parts if part is not None)))
    return Combination(combined, errors)


def _reduce(name: str, changes: list[WeightChange | None], recipe: Recipe) -> tuple[LowRankChange, tuple[float, float]]:
    factors = []
    for weight, change in zip(recipe.weights, changes, strict=True):
        if isinstance(change, LowRankChange):
            factors.append(change.factors.scaled(weight))
        elif change is not None:
            message = f"the change of '{name}' is not a low-rank update, which method '{recipe.method}' requires"
            raise UserError(message, location=name, hint="use --method linear, ties or dare")
    concatenated = concatenate_factors(factors)
    if recipe.method == "concat":
        return LowRankChange(concatenated), (0.0, sum(max(inner_product(p, p), 0.0) for p in concatenated.matrices()))
    reduced = reduce_rank(concatenated, recipe.rank or max(item.rank for item in factors))
    return LowRankChange(reduced.factors), (reduced.squared_error, reduced.squared_norm)


def concatenate_factors(factors: Sequence[WeightFactors]) -> WeightFactors:
    """Return the sum of several L·R as one pair. Ranks add up."""
    factor_L = torch.cat([item.factor_L for item in factors], dim=-1)
    factor_R = torch.cat([item.factor_R for item in factors], dim=-2)
    return WeightFactors(factor_L, factor_R, factors[0].shape)


def reduce_rank(factors: WeightFactors, rank: int) -> ReducedFactors:
    """Return the best approximation of a given rank."""
    approximations = [truncate(factor_L, factor_R, rank) for factor_L, factor_R in factors.matrices()]
    squared_error = sum(float(c.discarded.square().sum()) for c in approximations)
    retained = sum(float(c.retained.square().sum()) for c in approximations)
    return ReducedFactors(stack_factors(approximations, factors), squared_error, squared_error + retained)


def stack_factors(approximations: Sequence[TruncatedSVD], like: WeightFactors) -> WeightFactors:
    """Return the approximations of a weight's matrices as factors in the layout of ``like``."""
    factor_L = torch.stack([c.factor_L for c in approximations])
    factor_R = torch.stack([c.factor_R for c in approximations])
    if like.factor_L.dim() != 3:
        factor_L = factor_L[0]
        factor_R = factor_R[0]
    return WeightFactors(factor_L, factor_R, like.shape)
