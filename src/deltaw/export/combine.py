"""Several adapters as one: ways to combine their updates ΔW, each weighted, and lower ranks of one.

    concat   Σ wᵢ·ΔWᵢ, exactly: factors side by side, ranks add
    svd      the best approximation of that of a given rank
    linear   Σ wᵢ·ΔWᵢ, formed whole; takes any change of a weight, not low-rank ones alone
    ties     of each wᵢ·ΔWᵢ the largest share ``density`` by magnitude; per element the sign with the larger
             sum; the mean of what agrees with it (arXiv 2306.01708, section 3)
    dare     of each ΔWᵢ a random share ``density``, divided by it; the weighted sum (arXiv 2311.03099, eq. 1)

All act on ΔW, never on A and B apart, whose product would have cross terms. Each is measured against the
weighted sum Σ wᵢ·ΔWᵢ. It knows changes of weights, not files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.export.adapters import AdapterChanges, Blocks, Change, Factors, LowRank, Trained

# ΔW is never formed to find its norm, products, angles and best lower rank: for a weight of n rows and m columns
# everything costs O((n + m)·r²), in float64. Formulas: with L = Q_L·R_L and Rᵀ = Q_R·R_R (QR decompositions) the
# singular values of L·R are those of the r × r matrix R_L·R_Rᵀ, and the truncated SVD is the best approximation of its
# rank (Eckart and Young, 1936).


@dataclass(frozen=True)
class Truncated:
    """The best approximation of a lower rank.

    Attributes:
        left, right: factors (n, k) and (k, m), fp32, each with the square root of the singular values.
        kept, discarded: singular values, descending.
    """

    left: Tensor
    right: Tensor
    kept: Tensor
    discarded: Tensor


@dataclass(frozen=True)
class Reduced:
    """Factors, their squared error to what was asked for, and the squared norm of that."""

    factors: Factors
    lost: float
    total: float


def truncated(left: Tensor, right: Tensor, rank: int) -> Truncated:
    """The best approximation of L·R of at most ``rank``.

    Args:
        left: L (n, r). right: R (r, m).
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    inner_left, inner_right, kept, discarded = _cut(r_left @ r_right.T, rank)
    return Truncated((q_left @ inner_left).float(), (inner_right @ q_right.T).float(), kept, discarded)


def truncated_dense(delta: Tensor, rank: int) -> Truncated:
    """The same of a ΔW (n, m) that is no product of narrow factors, by its whole SVD."""
    left, right, kept, discarded = _cut(delta.double(), rank)
    return Truncated(left.float(), right.float(), kept, discarded)


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of the truncated SVD, and the singular values in it and left out."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = values[:rank]
    half = kept.sqrt()
    return u[:, : len(kept)] * half, half[:, None] * v[: len(kept)], kept, values[rank:]


def inner(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """⟨ΔW₁, ΔW₂⟩_F = tr((L₁ᵀ·L₂)·(R₂·R₁ᵀ)) of two pairs (L, R)."""
    (l1, r1), (l2, r2) = left, right
    # The trace of X·Yᵀ is the sum of the elementwise product.
    return float(((l1.double().T @ l2.double()) * (r1.double() @ r2.double().T)).sum())


def norm(left: Tensor, right: Tensor) -> float:
    """‖L·R‖_F."""
    return max(inner((left, right), (left, right)), 0.0) ** 0.5


def angles(left: Tensor, right: Tensor) -> Tensor:
    """The cosines of the principal angles between the column spaces of two matrices (n, r₁) and (n, r₂),
    descending (Björck and Golub, 1973). Directions that a matrix does not use are left out."""
    bases = [_basis(matrix) for matrix in (left, right)]
    if not all(basis.shape[1] for basis in bases):
        return torch.zeros(0, dtype=torch.float64)
    return torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(0.0, 1.0)


def _basis(matrix: Tensor) -> Tensor:
    """(n, k) orthonormal columns that span those of ``matrix``."""
    u, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not values.numel():
        return u
    # The bound of numpy's matrix_rank, for numbers that were trained in fp32.
    least = values.max() * max(matrix.shape) * torch.finfo(torch.float32).eps
    return u[:, values > least]


METHODS = ("concat", "svd", "linear", "ties", "dare")
FACTORED = ("concat", "svd")


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    Attributes:
        method: one of :data:`METHODS`.
        weights: of each adapter.
        rank: of ``svd``; None takes the largest of the adapters'.
        density: the share that ``ties`` and ``dare`` keep.
        seed: of ``dare``.

    Raises:
        UserError: a value is out of range.
    """

    method: str
    weights: tuple[float, ...]
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"there is no method '{self.method}'", where="--method", hint=f"use {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise UserError(f"the density is {self.density:g}, and a share is above 0 and at most 1", where="--density")
        require_rank(self.rank)
        bad = [weight for weight in self.weights if not abs(weight) < float("inf")]
        if bad:
            raise UserError(f"a weight is {bad[0]}", where="--with", hint="give a number")


def require_rank(rank: int | None) -> None:
    """Raise a UserError for a rank below 1."""
    if rank is not None and rank < 1:
        raise UserError(f"the rank is {rank}, and must be at least 1", where="--rank")


@dataclass
class Combined(Change):
    """W + what a method makes of several changes of W; it measures itself while it works.

    Attributes:
        name: of the parameter, which the random numbers of ``dare`` depend on.
        parts: changes of W by each adapter; None where one leaves this weight alone.
        lost, total: sums of squares, of the difference to the weighted sum and of the weighted sum.
    """

    name: str
    parts: Sequence[Change | None]
    recipe: Recipe
    lost: float = 0.0
    total: float = 0.0

    def __post_init__(self) -> None:
        self.whole = self.recipe.method == "ties"  # its threshold needs all of ΔW

    def prepare(self, blocks: Blocks) -> None:
        self.lost = self.total = 0.0
        for part in self.parts:
            if part is not None:
                part.prepare(blocks)

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.delta(rows, start).to(rows.dtype))

    def delta(self, rows: Tensor, start: int) -> Tensor:
        """These rows of the combined ΔW."""
        deltas = [_delta(part, rows, start) for part in self.parts]
        weighted = [w * d for w, d in zip(self.recipe.weights, deltas, strict=True) if d is not None]
        exact = torch.stack(weighted).sum(0) if len(weighted) > 1 else weighted[0]
        if self.recipe.method == "ties":
            made = ties(weighted, self.recipe.density)
        elif self.recipe.method == "dare":
            made = torch.zeros_like(exact)
            for number, (weight, one) in enumerate(zip(self.recipe.weights, deltas, strict=True)):
                if one is not None:
                    # Depends on all of these and on nothing else, such as the order of tensors.
                    text = f"{self.recipe.seed}:{number}:{self.name}:{start}"
                    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
                    made += weight * dare(one, self.recipe.density, seed)
        else:
            made = exact
        self.lost += float((made - exact).double().square().sum())
        self.total += float(exact.double().square().sum())
        return made


def _delta(part: Change | None, rows: Tensor, start: int) -> Tensor | None:
    if part is None:
        return None
    if isinstance(part, LowRank):  # without the rounding of (W + ΔW) − W
        return part.factors.rows(start, start + len(rows)).to(rows.dtype)
    return part.apply(rows.clone(), start) - rows


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect signs, mean of what agrees; ``deltas`` of one shape."""
    trimmed = torch.stack([trim(delta, density) for delta in deltas])
    sign = trimmed.sum(0).sign()
    agrees = (trimmed.sign() == sign) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def trim(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but its largest ``density`` · n elements by magnitude set to zero."""
    count = max(1, round(density * delta.numel()))
    if count >= delta.numel():
        return delta
    kept = delta.abs().flatten().topk(count, sorted=False).indices
    made = torch.zeros_like(delta).flatten()
    made[kept] = delta.flatten()[kept]
    return made.view(delta.shape)


def dare(delta: Tensor, density: float, seed: int) -> Tensor:
    """``delta`` with each element kept with probability ``density``, and divided by it."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float32) < density
    return torch.where(kept, delta / density, 0.0)


@dataclass(frozen=True)
class Combination:
    """Changes made of several adapters'.

    Attributes:
        trained: each changed parameter, once.
        known: errors that are known before a weight is read, by parameter: (‖difference‖², ‖sum‖²).
    """

    trained: list[Trained]
    known: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def errors(self) -> dict[str, float]:
        """By parameter, ‖combined − Σ wᵢ·ΔWᵢ‖_F / ‖Σ wᵢ·ΔWᵢ‖_F; after the weights were written."""
        return {name: ratio(*squares) for name, squares in self._squares().items()}

    def total_error(self) -> float:
        """The same over all parameters together."""
        squares = list(self._squares().values())
        return ratio(sum(lost for lost, _ in squares), sum(total for _, total in squares))

    def _squares(self) -> dict[str, tuple[float, float]]:
        made = [(one.names[0], one.change) for one in self.trained if isinstance(one.change, Combined)]
        return {**self.known, **{name: (change.lost, change.total) for name, change in made}}


def ratio(lost: float, total: float) -> float:
    """The relative error of squares."""
    return (lost / total) ** 0.5 if total > 0 else 0.0


def combine(adapters: Sequence[AdapterChanges], recipe: Recipe) -> Combination:
    """What several adapters make of a model together.

    Raises:
        UserError: the method cannot combine what one of them changes.
    """
    names = list(dict.fromkeys(one.names for adapter in adapters for one in adapter.trained))
    by_adapter = [{one.names: one for one in adapter.trained} for adapter in adapters]
    taken: set[str] = set()
    trained, known = [], {}
    for group in names:
        if taken & set(group):
            what = f"the adapters change '{group[0]}' under different names that it is tied by"
            raise UserError(what, where=group[0], hint="merge them one after the other")
        taken |= set(group)
        parts = [own.get(group) for own in by_adapter]
        changes = [None if part is None else part.change for part in parts]
        change: Change
        if recipe.method in FACTORED:
            change, known[group[0]] = _factored(group[0], changes, recipe)
        else:
            change = Combined(group[0], changes, recipe)
        trained.append(Trained(group, change, next(part.shape for part in parts if part is not None)))
    return Combination(trained, known)


def _factored(name: str, changes: Sequence[Change | None], recipe: Recipe) -> tuple[LowRank, tuple[float, float]]:
    factors = []
    for weight, change in zip(recipe.weights, changes, strict=True):
        if isinstance(change, LowRank):
            factors.append(change.factors.scaled(weight))
        elif change is not None:
            what = f"'{name}' is not changed by a low-rank update alone, as method '{recipe.method}' needs"
            raise UserError(what, where=name, hint="use --method linear, ties or dare")
    joined = side_by_side(factors)
    if recipe.method == "concat":
        return LowRank(joined), (0.0, sum(max(inner(pair, pair), 0.0) for pair in joined.matrices()))
    made = reduced(joined, recipe.rank or max(one.rank for one in factors))
    return LowRank(made.factors), (made.lost, made.total)


def side_by_side(factors: Sequence[Factors]) -> Factors:
    """The sum of several L·R as one pair, whose rank is the sum of theirs."""
    left = torch.cat([one.left for one in factors], dim=-1)
    right = torch.cat([one.right for one in factors], dim=-2)
    return Factors(left, right, factors[0].shape)


def reduced(factors: Factors, rank: int) -> Reduced:
    """The best approximation of a rank."""
    cut = [truncated(left, right, rank) for left, right in factors.matrices()]
    lost = sum(float(c.discarded.square().sum()) for c in cut)
    return Reduced(stacked(cut, factors), lost, lost + sum(float(c.kept.square().sum()) for c in cut))


def stacked(cut: Sequence[Truncated], like: Factors) -> Factors:
    """Approximations of the matrices of one weight as its factors, in the form of ``like``."""
    left, right = torch.stack([c.left for c in cut]), torch.stack([c.right for c in cut])
    return Factors(left, right, like.shape) if like.left.dim() == 3 else Factors(left[0], right[0], like.shape)
