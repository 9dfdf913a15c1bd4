"""What a low-rank update is, measured from its factors: norm, singular values, ranks.

ΔW = scaling · B·A is as large as the weight that it changes, its factors are r columns wide. Everything here
is computed from the factors, in float64, in O((n + m)·r²) for a weight of n inputs and m outputs.

It knows tensors only, not adapters or files.
"""

from __future__ import annotations

import math

import torch


def factor_pairs(a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors as float64 matrices A (r, n) and B (m, r), one pair a group.

    Linear layers and embeddings have one pair. A convolution's A is (r, inputs, kernel…) and its B is
    (outputs, r / groups, 1…); the groups' updates act on different channels, so that the singular values of
    the whole are those of the groups together.
    """
    a = a.to(torch.float64).flatten(1)
    b = b.to(torch.float64).flatten(1)
    if a.shape[0] == b.shape[1]:
        return [(a, b)]
    groups = a.shape[0] // b.shape[1]
    return list(zip(a.chunk(groups), b.chunk(groups), strict=True))


def frobenius_norm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> float:
    """‖ΔW‖_F of ΔW = scaling · B·A, by ‖B·A‖_F² = tr((Bᵀ·B)·(A·Aᵀ)).

    Args:
        a: A (r, n), or as :func:`factor_pairs` takes it.
        b: B (m, r).
        scaling: the factor of B·A.
    """
    square = 0.0
    for left, right in factor_pairs(a, b):
        # The trace of a product of two symmetric matrices is the sum of their elementwise product.
        square += float(((right.T @ right) * (left @ left.T)).sum())
    return abs(scaling) * math.sqrt(max(square, 0.0))


def singular_values(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The singular values of ΔW = scaling · B·A that can be other than zero, descending, float64.

    With B = Q_B·R_B and Aᵀ = Q_A·R_A, B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ: those of the r × r matrix in the middle.
    """
    values = []
    for left, right in factor_pairs(a, b):
        r_b = torch.linalg.qr(right, mode="r").R
        r_a = torch.linalg.qr(left.T, mode="r").R
        values.append(torch.linalg.svdvals(r_b @ r_a.T))
    return torch.cat(values).sort(descending=True).values * abs(scaling)


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of σ / Σσ: from 1 (one direction) to the rank (all alike); 0 for ΔW = 0.

    O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 4.
    """
    total = float(values.sum())
    if total == 0.0:
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def stable_rank(values: torch.Tensor) -> float:
    """‖ΔW‖_F² / σ_max²: how many directions as strong as the strongest would carry it; 0 for ΔW = 0.

    M. Rudelson and R. Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007, section 1.
    """
    if values.numel() == 0 or float(values.max()) == 0.0:
        return 0.0
    return float((values / values.max()).square().sum())
