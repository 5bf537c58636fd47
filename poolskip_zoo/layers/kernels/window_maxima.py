"""The kernels. A program works on a block of windows in the order of memory; imported only where Triton runs.

Choice as torch's own pooling: the first maximum, and of several NaN the last.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather", "maxima", "pool", "scatter"]

_BLOCK = 256  # windows per program


def pool(x: Tensor, window: list[int], offset_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """Max pooling in ceil mode.

    Args:
        x: a map, contiguous or channels_last.
        window: height and width of a window.
        offset_type: integer type of the offsets.

    Shape:
        (N, C, H, W) to twice (N, C, ceil(H / e), ceil(W / e)).

    Returns:
        Window maxima, and the distance of each one's flat index from that of its window's first cell.
    """
    values = _empty_like(x, _pooled(x, window))
    offsets = torch.empty_like(values, dtype=offset_type)
    _launch(_pool_kernel, x, window, values, offsets)
    return values, offsets


def maxima(x: Tensor, window: list[int]) -> Tensor:
    """Window maxima at their places, zero elsewhere, in one pass.

    Args:
        x: a map, contiguous or channels_last.
        window: height and width of a window.

    Shape:
        (N, C, H, W), the output alike.

    Returns:
        The sparse map.
    """
    u = torch.empty_like(x)
    _launch(_maxima_kernel, x, window, u)
    return u


def scatter(values: Tensor, offsets: Tensor, window: list[int], size: torch.Size) -> Tensor:
    """Put values at their offsets, zero elsewhere.

    Args:
        values: one per window, in the layout of the offsets.
        offsets: as `pool` returns them.
        window: height and width of a window.
        size: height and width of the map.

    Shape:
        (N, C, ceil(H / e), ceil(W / e)) to (N, C, H, W).

    Returns:
        The map.
    """
    u = _empty_like(values, list(size))
    _launch(_scatter_kernel, u, window, values, offsets)
    return u


def gather(u: Tensor, offsets: Tensor, window: list[int]) -> Tensor:
    """Read a map at the offsets.

    Args:
        u: a map, in the layout of the offsets.
        offsets: as `pool` returns them.
        window: height and width of a window.

    Shape:
        (N, C, H, W) to (N, C, ceil(H / e), ceil(W / e)).

    Returns:
        One value per window.
    """
    values = torch.empty_like(offsets, dtype=u.dtype)
    _launch(_gather_kernel, u, window, values, offsets)
    return values


def _pooled(x: Tensor, window: list[int]) -> list[int]:
    return [-(-length // e) for length, e in zip(x.shape[2:], window, strict=True)]


def _empty_like(x: Tensor, size: list[int]) -> Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)


def _launch(kernel: Any, full: Tensor, window: list[int], *others: Tensor) -> None:
    count, channels, height, width = full.shape
    rows, columns = _pooled(full, window)
    total = count * channels * rows * columns
    sizes = (total, channels, height, width, rows, columns, *full.stride())
    with torch.cuda.device_of(full):
        kernel[(triton.cdiv(total, _BLOCK),)](
            *(full, *others, *sizes),
            EH=window[0],
            EW=window[1],
            LAST=not full.is_contiguous(),
            BLOCK=_BLOCK,
        )


@triton.jit
def _place(
    total, C, rows, columns, sn, sc, sh, sw, EH: tl.constexpr, EW: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Number of each window in memory, whether there is one, its first row and column, and that cell's address."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if LAST:
        c, rest = i % C, i // C
        column, rest = rest % columns, rest // columns
        row, n = rest % rows, rest // rows
    else:
        column, rest = i % columns, i // columns
        row, rest = rest % rows, rest // rows
        c, n = rest % C, rest // C
    y, x = row * EH, column * EW
    return i, i < total, y, x, n * sn + c * sc + y * sh + x * sw


@triton.jit
def _choose(full, first, live, y, x, H, W, sh, sw, EH: tl.constexpr, EW: tl.constexpr):
    """Maximum of each window and its cell, counted row by row within the window."""
    best = tl.load(full + first, mask=live, other=0).to(tl.float32)  # exact, and bfloat16 cannot be compared everywhere
    cell = tl.zeros(best.shape, tl.int32)
    for k in tl.static_range(1, EH * EW):
        inside = live & (y + k // EW < H) & (x + k % EW < W)
        value = tl.load(full + first + (k // EW) * sh + (k % EW) * sw, mask=inside, other=0).to(tl.float32)
        larger = inside & ((value > best) | (value != value))
        best = tl.where(larger, value, best)
        cell = tl.where(larger, k, cell)
    return best.to(full.dtype.element_ty), cell


@triton.jit
def _pool_kernel(
    full,
    values,
    offsets,
    total,
    C,
    H,
    W,
    rows,
    columns,
    sn,
    sc,
    sh,
    sw,
    EH: tl.constexpr,
    EW: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, live, y, x, first = _place(total, C, rows, columns, sn, sc, sh, sw, EH, EW, LAST, BLOCK)
    best, cell = _choose(full, first, live, y, x, H, W, sh, sw, EH, EW)
    tl.store(values + i, best, mask=live)
    tl.store(offsets + i, ((cell // EW) * W + cell % EW).to(offsets.dtype.element_ty), mask=live)


@triton.jit
def _maxima_kernel(
    full,
    u,
    total,
    C,
    H,
    W,
    rows,
    columns,
    sn,
    sc,
    sh,
    sw,
    EH: tl.constexpr,
    EW: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, live, y, x, first = _place(total, C, rows, columns, sn, sc, sh, sw, EH, EW, LAST, BLOCK)
    best, cell = _choose(full, first, live, y, x, H, W, sh, sw, EH, EW)
    for k in tl.static_range(EH * EW):
        inside = live & (y + k // EW < H) & (x + k % EW < W)
        kept = tl.where(cell == k, best, tl.zeros_like(best))
        tl.store(u + first + (k // EW) * sh + (k % EW) * sw, kept, mask=inside)


@triton.jit
def _scatter_kernel(
    full,
    values,
    offsets,
    total,
    C,
    H,
    W,
    rows,
    columns,
    sn,
    sc,
    sh,
    sw,
    EH: tl.constexpr,
    EW: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, live, y, x, first = _place(total, C, rows, columns, sn, sc, sh, sw, EH, EW, LAST, BLOCK)
    value = tl.load(values + i, mask=live, other=0)
    offset = tl.load(offsets + i, mask=live, other=0).to(tl.int32)
    for k in tl.static_range(EH * EW):
        inside = live & (y + k // EW < H) & (x + k % EW < W)
        kept = tl.where(offset == (k // EW) * W + k % EW, value, tl.zeros_like(value))
        tl.store(full + first + (k // EW) * sh + (k % EW) * sw, kept, mask=inside)


@triton.jit
def _gather_kernel(
    full,
    values,
    offsets,
    total,
    C,
    H,
    W,
    rows,
    columns,
    sn,
    sc,
    sh,
    sw,
    EH: tl.constexpr,
    EW: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, live, _, _, first = _place(total, C, rows, columns, sn, sc, sh, sw, EH, EW, LAST, BLOCK)
    offset = tl.load(offsets + i, mask=live, other=0).to(tl.int32)
    tl.store(values + i, tl.load(full + first + (offset // W) * sh + (offset % W) * sw, mask=live, other=0), mask=live)
