"""The forms of a max-unpooling that the graph pass writes, as functions of ordinary operators.

Each takes the values to place, the map `x` that was pooled, the window, the pooling's `ceil_mode`, and whether the
values are the pooled `x` itself, and returns what `max_unpool(values, indices, size of x)` returns.
"""

import math

import torch
from torch import Tensor

from ..layers.functional import first_maximum_mask, pool, upsample, window_keys

__all__ = ["arith", "keys", "scatter"]


def keys(values: Tensor, x: Tensor, window: list[int], ceil_mode: bool, own: bool) -> Tensor:
    """Place values by the mask of the first maximum of each window; see `layers.functional.first_maximum_mask`.

    Args:
        values: what to place, one per window.
        x: the map that was pooled.
        window: window size along each of two or three spatial axes.
        ceil_mode: whether partial windows at the far edges count.
        own: whether `values` is the pooled `x`.

    Shape:
        values (N, C, *pooled), x (N, C, *spatial), the output as x.

    Returns:
        The values at the places of the maxima, zero elsewhere.
    """
    mask = first_maximum_mask(x, window, ceil_mode).to(values.dtype)
    return (x if own else upsample(values, window, list(x.shape[2:]))) * mask


def arith(values: Tensor, x: Tensor, window: list[int], ceil_mode: bool, own: bool) -> Tensor:
    """`keys` without comparisons: pooling, addition, multiplication, minimum and relu alone.

    Values of `x` that differ by less than the smallest normal number count as equal where a runtime flushes
    subnormal numbers to zero.

    Args:
        values: what to place, one per window.
        x: the map that was pooled.
        window: window size along each of two or three spatial axes.
        ceil_mode: whether partial windows at the far edges count.
        own: whether `values` is the pooled `x`.

    Shape:
        values (N, C, *pooled), x (N, C, *spatial), the output as x.

    Returns:
        The values at the places of the maxima, zero elsewhere.
    """
    size = list(x.shape[2:])
    # What floor mode leaves out lies below any maximum, and its keys below any first one.
    below = upsample(pool(x, window, ceil_mode), window, size, fill=torch.finfo(x.dtype).max) - x
    step = unit_step(x.dtype)
    for _ in range(2):
        below = (below * step).clamp(max=1.0)
    ranks = (1 - below) * window_keys(x, window)
    first = upsample((pool(ranks, window, ceil_mode) - 1).relu(), window, size, fill=float(math.prod(window)))
    mask = (ranks - first).relu().to(values.dtype)
    return (x if own else upsample(values, window, size)) * mask


def unit_step(dtype: torch.dtype) -> float:
    """Factor that lifts any positive number of a type to at least 1 when applied twice, without overflow of 1.

    Args:
        dtype: a floating-point type.

    Returns:
        A power of two.
    """
    info = torch.finfo(dtype)
    return 2.0 ** math.ceil(-math.log2(info.smallest_normal * info.eps) / 2 + 1)


def scatter(values: Tensor, indices: Tensor, size: list[int]) -> Tensor:
    """Unpooling by torch's indices, whatever made them.

    Args:
        values: what to place.
        indices: positions within each flattened plane of the output.
        size: spatial size of the output, two or three ints.

    Shape:
        values and indices (N, C, *pooled) or (C, *pooled), the output (N, C, *size) or (C, *size).

    Returns:
        The values at their indices, zero elsewhere.
    """
    start = values.dim() - len(size)
    outer = list(values.shape[:start])
    zeros = torch.zeros([*outer, math.prod(size)], dtype=values.dtype, device=values.device)
    return zeros.scatter(start, indices.flatten(start), values.flatten(start)).view([*outer, *size])
