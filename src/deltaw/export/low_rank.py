"""What can be said of ΔW = L·R from its factors alone: norms, products, angles, and the best lower rank.

ΔW is never formed: for a weight of n rows and m columns everything costs O((n + m)·r²), in float64. Formulas:
with L = Q_L·R_L and Rᵀ = Q_R·R_R (QR decompositions) the singular values of L·R are those of the r × r matrix
R_L·R_Rᵀ, and the truncated SVD is the best approximation of its rank (Eckart and Young, 1936).

It knows matrices only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def error(self) -> float:
        """‖ΔW − approximation‖_F / ‖ΔW‖_F; 0 for ΔW = 0."""
        lost, all_of_it = self.discarded.square().sum(), self.kept.square().sum()
        total = float(lost + all_of_it)
        return (float(lost) / total) ** 0.5 if total else 0.0


def truncated(left: Tensor, right: Tensor, rank: int) -> Truncated:
    """The best approximation of L·R of at most ``rank``.

    Args:
        left: L (n, r). right: R (r, m).
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = values[:rank]
    half = kept.sqrt()
    return Truncated(
        (q_left @ (u[:, : len(kept)] * half)).float(),
        ((half[:, None] * v[: len(kept)]) @ q_right.T).float(),
        kept,
        values[rank:],
    )


def truncated_dense(delta: Tensor, rank: int) -> Truncated:
    """The same of a ΔW (n, m) that is no product of narrow factors, by its whole SVD."""
    u, values, v = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = values[:rank]
    half = kept.sqrt()
    return Truncated(
        (u[:, : len(kept)] * half).float(), (half[:, None] * v[: len(kept)]).float(), kept, values[rank:]
    )


def inner(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """⟨ΔW₁, ΔW₂⟩_F = tr((L₁ᵀ·L₂)·(R₂·R₁ᵀ)) of two pairs (L, R)."""
    (l1, r1), (l2, r2) = left, right
    across = l1.double().T @ l2.double()
    # The trace of X·Yᵀ is the sum of the elementwise product.
    return float((across * (r1.double() @ r2.double().T)).sum())


def norm(left: Tensor, right: Tensor) -> float:
    """‖L·R‖_F."""
    pair = (left, right)
    return max(inner(pair, pair), 0.0) ** 0.5


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
