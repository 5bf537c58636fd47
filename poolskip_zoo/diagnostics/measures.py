"""Measures of one convolution's weights. docs/diagnostics.md defines them and gives the reasons for the thresholds."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["filters_of", "l2_l1", "orthogonality", "small_scale", "small_weights", "sparsity", "variance_entropy"]

# Of the root mean square of a layer's filter norms: at or below it a filter is inert.
SMALL_WEIGHTS = 0.01
# Of a norm's scale, which starts at 1: at or below it a filter is inert.
SMALL_SCALE = 0.01
# Of a layer's largest weight: a kernel all of whose weights are below is sparse (CNN Filter DB, arXiv 2203.15331).
SPARSE = 0.01


def filters_of(weight: Tensor, convolution: Any) -> Tensor:
    """Weights of a convolution, or their gradient, as float32 (out_channels, in_channels / groups, *kernel_size)."""
    weight = weight.detach().float()
    if not convolution.transposed:
        return weight
    # Transposed ones keep (in_channels, out_channels / groups, …), group by group.
    return weight.unflatten(0, (convolution.groups, -1)).transpose(1, 2).flatten(0, 1)


def l2_l1(filters: Tensor) -> float | None:
    """Euclidean norm over sum of absolute values: sparsity of all weights (arXiv 2409.13154, its figure of l2/l1).

    Args:
        filters: weights of any shape.

    Returns:
        1/√n for n weights of one size up to 1 for a single one that is not zero; None if all are zero.

    Example:
        >>> l2_l1(torch.tensor([3.0, 0.0, -4.0])) == 5 / 7
        True
    """
    total = filters.abs().sum().item()
    return filters.norm().item() / total if total else None


def small_weights(filters: Tensor) -> list[int]:
    """Indices of filters whose norm is at most 0.01 of the root mean square of all norms: all if all weights are 0."""
    norms = filters.flatten(1).norm(dim=1)
    return _where(norms <= SMALL_WEIGHTS * norms.square().mean().sqrt())


def small_scale(scale: Tensor) -> list[int]:
    """Indices of channels that a norm scales by at most 0.01."""
    return _where(scale.detach().float().abs() <= SMALL_SCALE)


def sparsity(filters: Tensor) -> float:
    """Share of 3×3 kernels whose weights are all below 1 % of the layer's largest (arXiv 2203.15331, sparsity).

    `filters` is (filters, channels, 3, 3); 1 if all weights are zero.
    """
    largest = filters.abs().flatten(2).amax(2)
    return (largest < SPARSE * largest.max()).float().mean().item() if largest.any() else 1.0


def variance_entropy(filters: Tensor) -> float | None:
    """Entropy of the shares of variance along the principal axes of the 3×3 kernels (arXiv 2203.15331).

    H = −Σ v̂ᵢ log₁₀ v̂ᵢ, v̂ the eigenvalues of the covariance of the kernels over their sum.

    Args:
        filters: (filters, channels, 3, 3).

    Returns:
        0 to log₁₀ 9; None for a single kernel.

    Example:
        >>> variance_entropy(torch.arange(4.0).view(4, 1, 1, 1) * torch.ones(1, 1, 3, 3))
        0.0
    """
    kernels = filters.cpu().flatten(0, 1).flatten(1).double()  # Apple's MPS has no float64
    if len(kernels) < 2:
        return None
    centred = kernels - kernels.mean(0)
    variances = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    shares = variances / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    # Rounding leaves eigenvalues that should be zero at about 1e-16 of the largest.
    return abs(round(torch.special.entr(shares).sum().item() / math.log(10), 9))


def orthogonality(filters: Tensor, groups: int = 1) -> float | None:
    """1 − mean of the absolute cosines between filters of one group (arXiv 2203.15331, orthogonality).

    Args:
        filters: (filters, …).
        groups: groups of the convolution.

    Returns:
        0 (all parallel) to 1 (all orthogonal); None if a group has a single filter.

    Example:
        >>> orthogonality(torch.eye(3)), orthogonality(torch.ones(3, 4))
        (1.0, 0.0)
    """
    rows = F.normalize(filters.flatten(1), dim=1).unflatten(0, (groups, -1))
    count = rows.shape[1]
    if count < 2:
        return None
    cosines = (rows @ rows.mT).abs()
    others = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
    return 1 - others.item() / (groups * count * (count - 1))


def _where(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
