"""The kernels. A program works on a block of windows in the order of memory; imported only where Triton runs.

Choice as torch's own pooling: the first maximum, and of several NaN the last. Divisions are done once for a run of
windows and in 32 bits where the map allows; maps of the default layout are written a window's row at a time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gather", "maxima", "pool", "scatter"]

_BLOCK = 512  # windows per program


def pool(x: Tensor, window: list[int], offset_type: torch.dtype, fill: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Max pooling in ceil mode of (N, C, H, W), contiguous or channels_last, to (N, C, ceil(H / e), ceil(W / e)).

    Values, offsets (flat indices less those of the windows' first cells), and with `fill` the sparse map, else None.
    """
    values = _empty_like(x, _pooled(x, window))
    offsets = torch.empty_like(values, dtype=offset_type)
    u = torch.empty_like(x) if fill else None
    _launch(_pool_kernel, x, window, values, offsets, u)
    return values, offsets, u


def maxima(x: Tensor, window: list[int]) -> Tensor:
    """Window maxima of (N, C, H, W), contiguous or channels_last, at their places, zero elsewhere, in one pass."""
    u = torch.empty_like(x)
    _launch(_pool_kernel, x, window, None, None, u)
    return u


def scatter(values: Tensor, offsets: Tensor, window: list[int], size: torch.Size, base: Tensor | None = None) -> Tensor:
    """Put values at their offsets, zero elsewhere, and add a map: in the same pass if it has the result's layout.

    Values, one per window in the layout of `pool`'s offsets, and `base` have one type; `base` is (N, C, *size).
    """
    u = _empty_like(values, list(size))
    fused = base is not None and base.dtype == u.dtype and base.stride() == u.stride()
    _launch(_scatter_kernel, u, window, values, offsets, base if fused else None)
    return u if base is None or fused else u.add_(base)


def gather(u: Tensor, offsets: Tensor, window: list[int]) -> Tensor:
    """Read a map (N, C, H, W) at the offsets that `pool` returns, in their layout: one value per window."""
    values = torch.empty_like(offsets, dtype=u.dtype)
    _launch(_gather_kernel, u, window, values, offsets)
    return values


def _pooled(x: Tensor, window: list[int]) -> list[int]:
    return [-(-length // e) for length, e in zip(x.shape[2:], window, strict=True)]


def _empty_like(x: Tensor, size: list[int]) -> Tensor:
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.empty((*x.shape[:2], *size), dtype=x.dtype, device=x.device, memory_format=layout)


def _launch(kernel: Any, full: Tensor, window: list[int], *others: Tensor | None) -> None:
    count, channels, height, width = full.shape
    rows, columns = _pooled(full, window)
    lacks = rows * window[0] - height, columns * window[1] - width  # cells that the last windows have too few
    last = not full.is_contiguous()
    # A run is what lies side by side in memory: the channels of a window, or the windows of a row.
    outer, run = (count * rows * columns, channels) if last else (count * channels * rows, columns)
    block = min(triton.next_power_of_2(run), _BLOCK)
    with torch.cuda.device_of(full):
        kernel[(triton.cdiv(outer, _BLOCK // block), triton.cdiv(run, block))](
            *(full, *others, outer, rows, columns, *lacks, channels if last else 1),
            EH=window[0],
            EW=window[1],
            LAST=last,
            WIDE=full.numel() > 2**30,
            EVEN=lacks == (0, 0),
            OUTER=_BLOCK // block,
            RUN=block,
            TILE=1 if last else triton.next_power_of_2(window[1]),
        )


@triton.jit
def _windows(
    outer, rows, columns, H, W, step,
    EH: tl.constexpr, EW: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, OUTER: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Number of each window in memory, whether there is one, its first row and column, and that cell's place."""
    o = tl.program_id(0)
    if WIDE:
        o = o.to(tl.int64)
    o = (o * OUTER + tl.arange(0, OUTER))[:, None]
    j = (tl.program_id(1) * RUN + tl.arange(0, RUN))[None, :]
    if LAST:
        y, x = o // columns % rows * EH, o % columns * EW
        first = ((o // columns // rows * H + y) * W + x) * step + j
        i, live = o * step + j, (o < outer) & (j < step)
    else:
        y, x = o % rows * EH, j * EW
        first = (o // rows * H + y) * W + x
        i, live = o * columns + j, (o < outer) & (j < columns)
    return i, live, y, x, first


@triton.jit
def _choose(full, first, live, y, x, H, W, step, EH: tl.constexpr, EW: tl.constexpr, EVEN: tl.constexpr):
    """Maximum of each window and its cell, counted row by row within the window."""
    best = tl.load(full + first, mask=live, other=0).to(tl.float32)  # exact, and bfloat16 cannot be compared everywhere
    cell = tl.zeros(best.shape, tl.int32)
    for k in tl.static_range(1, EH * EW):
        inside = live if EVEN else live & (y + k // EW < H) & (x + k % EW < W)
        place = full + first + (k // EW * W + k % EW) * step
        value = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
        larger = (value > best) | (value != value)
        best = tl.where(larger, value, best)
        cell = tl.where(larger, k, cell)
    return best.to(full.dtype.element_ty), cell


@triton.jit
def _fill(
    u, base, first, live, y, x, H, W, step, value, chosen, pitch,
    EH: tl.constexpr, EW: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write windows: the value at the cell whose row times `pitch` plus column is the chosen number, else zero."""
    first, live, y, x = first[:, :, None], live[:, :, None], y[:, :, None], x[:, :, None]
    value, chosen = value[:, :, None], chosen[:, :, None]
    for row in tl.static_range(EH):
        for left in tl.static_range(0, EW, TILE):
            column = left + tl.arange(0, TILE)[None, None, :]
            inside = live if EVEN else live & (y + row < H) & (x + column < W)
            if EW % TILE > 0:
                inside &= column < EW
            place = first + (row * W + column) * step
            kept = tl.where(chosen == row * pitch + column, value, tl.zeros_like(value))
            if base is not None:
                added = kept.to(tl.float32) + tl.load(base + place, mask=inside, other=0).to(tl.float32)
                kept = added.to(kept.dtype)
            tl.store(u + place, kept, mask=inside)


@triton.jit
def _pool_kernel(
    full, values, offsets, u, outer, rows, columns, lack_h, lack_w, step,
    EH: tl.constexpr, EW: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    EVEN: tl.constexpr, OUTER: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    H, W = rows * EH - lack_h, columns * EW - lack_w  # so that the compiler sees which rows are aligned
    i, live, y, x, first = _windows(outer, rows, columns, H, W, step, EH, EW, LAST, WIDE, OUTER, RUN)
    best, cell = _choose(full, first, live, y, x, H, W, step, EH, EW, EVEN)
    if values is not None:
        tl.store(values + i, best, mask=live)
        tl.store(offsets + i, (cell // EW * W + cell % EW).to(offsets.dtype.element_ty), mask=live)
    if u is not None:
        _fill(u, None, first, live, y, x, H, W, step, best, cell, EW, EH, EW, EVEN, TILE)


@triton.jit
def _scatter_kernel(
    u, values, offsets, base, outer, rows, columns, lack_h, lack_w, step,
    EH: tl.constexpr, EW: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    EVEN: tl.constexpr, OUTER: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    H, W = rows * EH - lack_h, columns * EW - lack_w  # so that the compiler sees which rows are aligned
    i, live, y, x, first = _windows(outer, rows, columns, H, W, step, EH, EW, LAST, WIDE, OUTER, RUN)
    value = tl.load(values + i, mask=live, other=0)
    offset = tl.load(offsets + i, mask=live, other=0).to(tl.int32)
    _fill(u, base, first, live, y, x, H, W, step, value, offset, W, EH, EW, EVEN, TILE)


@triton.jit
def _gather_kernel(
    full, values, offsets, outer, rows, columns, lack_h, lack_w, step,
    EH: tl.constexpr, EW: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr,
    EVEN: tl.constexpr, OUTER: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    H, W = rows * EH - lack_h, columns * EW - lack_w  # so that the compiler sees which rows are aligned
    i, live, _, _, first = _windows(outer, rows, columns, H, W, step, EH, EW, LAST, WIDE, OUTER, RUN)
    offset = tl.load(offsets + i, mask=live, other=0).to(tl.int32)
    tl.store(values + i, tl.load(full + first + offset * step, mask=live, other=0), mask=live)
