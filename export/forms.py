"""The forms of a max-unpooling that the graph pass writes, as functions of ordinary operators.

Each returns what `max_unpool(values, indices, size of x)` returns. `keys` and `arith` take the values to place
(N, C, *pooled), the map `x` (N, C, *spatial) that was pooled, the window along each of two or three spatial axes, the
pooling's `ceil_mode`, and whether the values are the pooled `x` itself; `scatter` takes torch's indices.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..layers.functional import first_maximum_mask, pool, upsample, window_keys

__all__ = ["arith", "keys", "scatter"]


def keys(values: Tensor, x: Tensor, window: list[int], ceil_mode: bool, own: bool) -> Tensor:
    """Place values by the mask of the first maximum of each window; see `layers.functional.first_maximum_mask`."""
    mask = first_maximum_mask(x, window, ceil_mode).to(values.dtype)
    return (x if own else upsample(values, window, list(x.shape[2:]))) * mask


def arith(values: Tensor, x: Tensor, window: list[int], ceil_mode: bool, own: bool) -> Tensor:
    """`keys` without comparisons: pooling, addition, multiplication, minimum and relu alone.

    Values of `x` that differ by less than the smallest normal number count as equal where a runtime flushes
    subnormal numbers to zero.
    """
    size = list(x.shape[2:])
    # What floor mode leaves out lies below any maximum, and its keys below any first one.
    below = upsample(pool(x, window, ceil_mode), window, size, fill=torch.finfo(x.dtype).max) - x
    step = unit_step(torch.finfo(x.dtype))
    for _ in range(2):
        below = (below * step).clamp(max=1.0)
    ranks = (1 - below) * window_keys(x, window)
    first = upsample((pool(ranks, window, ceil_mode) - 1).relu(), window, size, fill=float(math.prod(window)))
    mask = (ranks - first).relu().to(values.dtype)
    return (x if own else upsample(values, window, size)) * mask


def unit_step(info: Any) -> float:
    """Power of two that, applied twice, lifts any positive number of a type to at least 1, without overflow of 1."""
    return 2.0 ** math.ceil(-(math.log2(info.smallest_normal) + math.log2(info.eps)) / 2 + 1)


def scatter(values: Tensor, indices: Tensor, size: list[int]) -> Tensor:
    """Unpooling by torch's indices, positions within each flattened plane of `size`, whatever made them.

    Values and indices are (N, C, *pooled) or (C, *pooled), the map (N, C, *size) or (C, *size), of two or three axes.
    """
    start = values.dim() - len(size)
    outer = list(values.shape[:start])
    zeros = torch.zeros([*outer, math.prod(size)], dtype=values.dtype, device=values.device)
    return zeros.scatter(start, indices.flatten(start), values.flatten(start)).view([*outer, *size])
