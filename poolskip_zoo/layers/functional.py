"""Window maxima: max pooling followed by max unpooling, in the forms that each use needs.

Three forms compute the same map (the largest value of each window at its place, zero elsewhere):

* *stock*: `max_pool(return_indices)` and `max_unpool`. Eager mode (`stock.py`; with a leaner backward in `lean.py`) and
  `torch.compile`; the oracle of the tests.
* *keys*: a floating-point mask without an index tensor. Tracing, scripting and export, where the stock pair raises,
  freezes sizes or becomes a slow graph.
* *index*: a mask set at the pooled indices. Deterministic mode, where the stock unpooling raises, and windows too
  large for exact keys.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .lean import trains_by_autograd, window_maxima_for_training
from .stock import is_transformed, pool_with_indices, unpool

__all__ = [
    "check_rank",
    "first_maximum_mask",
    "is_traced_or_exported",
    "max_pool_unpool1d",
    "max_pool_unpool2d",
    "max_pool_unpool3d",
    "pool",
    "pool_with_mask",
    "to_window",
    "upsample",
    "window_keys",
    "window_maxima",
]


def max_pool_unpool1d(x: Tensor, pool_size: int | tuple[int]) -> Tensor:
    """Window maxima of a sequence; see `max_pool_unpool2d`.

    Args:
        x: floating-point tensor.
        pool_size: window length and stride e, in elements, at least 1.

    Shape:
        (N, C, L) or (C, L), the output alike.

    Returns:
        The window maxima at their places, zero elsewhere, in the layout of `x`.

    Raises:
        ValueError: if `x` has another number of dimensions, or `pool_size` is no positive integer or 1-tuple of them.
    """
    return window_maxima(x, to_window(pool_size, 1))


def max_pool_unpool2d(x: Tensor, pool_size: int | tuple[int, int]) -> Tensor:
    """Keep the first maximum (row-major) of each e×e window at its place and set the rest to zero.

    The paper's `MaxUnpool(MaxPool(x))` (Sun et al., arXiv 2409.13154, section 3), with `ceil_mode=True`, so that
    partial windows at the right and bottom edge keep their maximum too. Equal to the bit to `F.max_pool2d` and
    `F.max_unpool2d`, except while tracing, scripting or exporting: there non-finite values differ (a window that
    holds NaN gives zeros or NaN, inf gives NaN beside itself), and zeros may have another sign; `torch.compile` may
    keep another of several NaN.

    Args:
        x: floating-point tensor.
        pool_size: window size and stride e, in pixels, at least 1; an int or (height, width).

    Shape:
        (N, C, H, W) or (C, H, W), the output alike. A map smaller than the window is one partial window.

    Returns:
        The window maxima at their places, zero elsewhere, in the memory format of `x`.

    Raises:
        ValueError: if `x` has another number of dimensions, or `pool_size` is no positive integer or pair of them.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 2.0, 0.0], [4.0, 4.0, -1.0], [3.0, 5.0, -2.0]]])
        >>> max_pool_unpool2d(x, 2)
        tensor([[[ 0.,  0.,  0.],
                 [ 4.,  0.,  0.],
                 [ 0.,  5., -2.]]])
    """
    return window_maxima(x, to_window(pool_size, 2))


def max_pool_unpool3d(x: Tensor, pool_size: int | tuple[int, int, int]) -> Tensor:
    """Window maxima of a volume; see `max_pool_unpool2d`.

    Args:
        x: floating-point tensor.
        pool_size: window size and stride e, in voxels, at least 1; an int or (depth, height, width).

    Shape:
        (N, C, D, H, W) or (C, D, H, W), the output alike.

    Returns:
        The window maxima at their places, zero elsewhere, in the memory format of `x`.

    Raises:
        ValueError: if `x` has another number of dimensions, or `pool_size` is no positive integer or triple of them.
    """
    return window_maxima(x, to_window(pool_size, 3))


def to_window(pool_size: int | tuple[int, ...] | list[int], dims: int, minimum: int = 1) -> list[int]:
    """Spread an int over `dims` axes; ValueError if they are another number, or none is at least `minimum`."""
    window = list(pool_size) if isinstance(pool_size, (tuple, list)) else [pool_size] * dims
    whole = all(isinstance(e, int) and not isinstance(e, bool) and e >= min(minimum, 1) for e in window)
    if len(window) != dims or not whole or max(window) < minimum:
        options = f"an int >= {minimum}" + (f" or a tuple of {dims} of them" if dims > 1 else "")
        options += " (1 along axes that are not pooled)" if dims > 1 and minimum > 1 else ""
        raise ValueError(f"pool_size={pool_size!r}: expected {options}")
    return window


def window_maxima(x: Tensor, window: list[int]) -> Tensor:
    """`max_pool_unpool1d/2d/3d` for a window that `to_window` has checked; scripts and traces.

    Args:
        x: floating-point tensor.
        window: window size along each of one to three spatial axes.

    Shape:
        (N, C, *spatial) or (C, *spatial), the output alike.

    Returns:
        The window maxima at their places, zero elsewhere, in the memory format of `x`.

    Raises:
        ValueError: if `x` has another number of dimensions.
    """
    dims = len(window)
    check_rank(x, dims)
    single = x.dim() == dims + 1
    if single:
        x = x.unsqueeze(0)
    # Two branches: a scripted `or` would compile _captures_keys, which has no script form.
    if torch.jit.is_scripting():  # noqa: SIM114
        u = keys_maxima(x, window)
    elif _captures_keys():
        u = keys_maxima(x, window)
    elif torch.are_deterministic_algorithms_enabled():
        # clone and masked_fill_ keep the memory format; masked_fill returns a contiguous tensor.
        u = x.clone().masked_fill_(~pool_with_mask(x.detach(), window, True)[1], 0.0)
    else:
        u = _eager_maxima(x, window)
    return u.squeeze(0) if single else u


def check_rank(x: Tensor, dims: int) -> None:
    """Raise ValueError if a tensor is no batch and no single item of `dims` spatial axes."""
    if x.dim() != dims + 2 and x.dim() != dims + 1:
        raise ValueError(
            f"input of shape {list(x.shape)} has {x.dim()} dimensions: expected {dims + 2} (batch, channels, "
            f"{dims} spatial) or {dims + 1} (channels, {dims} spatial)"
        )


@torch.jit.unused
def is_traced_or_exported() -> bool:
    """Whether torch traces or exports: then the result must be a graph of ordinary operators, valid at every size.

    Scripting compiles: ask `torch.jit.is_scripting` where it counts.
    """
    # torch 2.6 has no is_exporting: there torch.compile gets this form too.
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return torch.jit.is_tracing() or exporting()


class _StockCaptures(threading.local):
    """How many `capture_stock` are open in this thread."""

    count = 0


_stock_captures = _StockCaptures()


@contextmanager
def capture_stock() -> Iterator[None]:
    """While it is open, traces and exports hold window maxima as torch's own pair of pooling and unpooling.

    For whoever rewrites that pair in the captured graph.
    """
    _stock_captures.count += 1
    try:
        yield
    finally:
        _stock_captures.count -= 1


@torch.jit.unused
def _captures_keys() -> bool:
    return is_traced_or_exported() and not _stock_captures.count


def _eager_maxima(x: Tensor, window: list[int]) -> Tensor:
    if trains_by_autograd(x):
        return window_maxima_for_training(x, window)
    if not is_transformed() and kernels.applies(x, window):
        return kernels.load().maxima(x, window)
    # Indexing, not unpacking: torch.fx proxies cannot be unpacked.
    pooled = pool_with_indices(x, window)
    return unpool(pooled[0], pooled[1], window, x.shape[2:])


def keys_maxima(x: Tensor, window: list[int]) -> Tensor:
    """Window maxima by a mask of ordinary operators: traces, scripts and exports at dynamic sizes.

    Args:
        x: floating-point tensor.
        window: window size along each of one to three spatial axes.

    Shape:
        (N, C, *spatial), the output alike.

    Returns:
        `x` times the mask of its window maxima.
    """
    return x * first_maximum_mask(x, window, True).to(x.dtype)


def first_maximum_mask(x: Tensor, window: list[int], ceil_mode: bool) -> Tensor:
    """Mask of the first maximum (row-major) of each window, without gradient.

    `m = up(pool(x))`, `k = (x == m) · key` with keys e²…1 over the window, mask = `k > up(pool(k) - ½)`: half a step
    lower, so that the mask stays what it is where a runtime rounds keys to 8 bits. A window with NaN has no place where
    `x == m`, and none is chosen. Windows whose keys would not be exact in the type of `x` take the index form.

    Args:
        x: floating-point tensor.
        window: window size along each of one to three spatial axes.
        ceil_mode: whether partial windows at the far edges count; else they are False.

    Shape:
        (N, C, *spatial), the output alike.

    Returns:
        A bool tensor.
    """
    cells = 1
    for e in window:
        cells = cells * e
    if cells > largest_exact_key(x.dtype):
        return pool_with_mask(x.detach(), window, ceil_mode)[1]
    x = x.detach()
    size = list(x.shape[2:])
    is_max = x == upsample(pool(x, window, ceil_mode), window, size)
    keys = is_max.to(x.dtype) * window_keys(x, window)
    # Keys start at 1, and 0 marks what is no maximum: neither a NaN window (all 0) nor the rest that floor mode
    # leaves out (filled with more than any key) may exceed it.
    first = pool(keys, window, ceil_mode).clamp(min=1) - 0.5
    return keys > upsample(first, window, size, fill=float(cells))


def largest_exact_key(dtype: torch.dtype) -> int:
    """Cells of the largest window whose keys, and halves between them, are exact in this type: a power of 2."""
    # 2 to the number of significant bits less one (IEEE 754; bfloat16 has 8): up to it halves are exact.
    if dtype == torch.bfloat16:
        return 128
    if dtype == torch.float16:
        return 1024
    return 8388608


def pool(x: Tensor, window: list[int], ceil_mode: bool) -> Tensor:
    """Max pooling of disjoint windows, as an ordinary operator of a graph.

    Args:
        x: floating-point tensor.
        window: window size and stride along each of one to three spatial axes.
        ceil_mode: whether partial windows at the far edges count.

    Shape:
        (N, C, *spatial) to (N, C, *pooled), (C, *spatial) of two or three axes to (C, *pooled).

    Returns:
        The window maxima.
    """
    if ceil_mode and not torch.jit.is_scripting() and _leaves_sizes_open(x):
        x, ceil_mode = _repeat_edges(x, window), False
    if len(window) == 1:
        # torch.export freezes the length in max_pool1d.
        window = [1, window[0]]
        return F.max_pool2d(x.unsqueeze(2), window, window, ceil_mode=ceil_mode).squeeze(2)
    if len(window) == 2:
        return F.max_pool2d(x, window, window, ceil_mode=ceil_mode)
    return F.max_pool3d(x, window, window, ceil_mode=ceil_mode)


@torch.jit.unused
def _leaves_sizes_open(x: Tensor) -> bool:
    """Whether a program of torch.export is to hold at sizes that the window divides and at others.

    For AOTInductor: at open sizes it pools partial windows or not, as the example has them (torch 2.14.1).
    """
    if torch.jit.is_tracing() or not is_traced_or_exported() or torch.onnx.is_in_onnx_export():
        return False
    # Dynamo (strict export) takes symbolic sizes for int.
    return torch.compiler.is_dynamo_compiling() or any(not isinstance(size, int) for size in x.shape[1:])


@torch.jit.unused
def _repeat_edges(x: Tensor, window: list[int]) -> Tensor:
    """Repeat the last row and column e-1 times: partial windows become whole ones of the same maximum.

    Quantised graphs keep the range of `x`, which -inf or zeros beyond the edge would not.
    """
    for axis, e in enumerate(window, x.dim() - len(window)):
        # narrow would compute where the last one is, and coremltools makes that a float.
        x = torch.cat([x] + [torch.ops.aten.slice(x, axis, -1)] * (e - 1), axis)
    return x


def upsample(z: Tensor, window: list[int], size: list[int], fill: float = 0.0) -> Tensor:
    """Repeat each element over its window, and cut or fill up to `size`.

    One more row and column first, so that the slice always cuts: a slice that may be a no-op is frozen by a
    guard under dynamic export, and other sizes then raise.

    Args:
        z: floating-point tensor.
        window: repetition along each of one to three spatial axes.
        size: spatial size of the result, at most one window more than `z` covers.
        fill: value where `z` does not reach.

    Shape:
        (N, C, *pooled) to (N, C, *size).

    Returns:
        The upsampled tensor, differentiable.
    """
    dims = len(window)
    z = F.pad(z, [0, 1] * dims, value=fill)
    # interpolate divides in float32, and takes wrong cells at some larger scales.
    if max(window) <= 40:
        z = F.interpolate(z, scale_factor=[float(e) for e in window])
    else:
        for axis in range(dims):
            z = z.repeat_interleave(window[axis], axis + 2)
    for axis in range(dims):
        z = z.narrow(axis + 2, 0, size[axis])
    return z


def window_keys(x: Tensor, window: list[int]) -> Tensor:
    """Keys e²…1 of the cells of each window of `x` (N, C, *spatial), one to three axes: (*spatial), in its type."""
    # Descending over the window in row-major order: the first of equal maxima has the largest key.
    cells = 1
    for e in window:
        cells = cells * e
    keys = torch.full([1], cells, dtype=torch.int64, device=x.device)
    for axis in range(len(window)):
        cells = cells // window[axis]
        steps = torch.arange(x.shape[axis + 2], device=x.device) % window[axis]
        keys = keys.unsqueeze(-1) - steps * cells
    return keys.squeeze(0).to(x.dtype)


def pool_with_mask(x: Tensor, window: list[int], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Max pooling and the mask of the places it keeps, exact for every window and value (of several NaN the last).

    Args:
        x: floating-point tensor.
        window: window size along each of one to three spatial axes.
        ceil_mode: whether partial windows at the far edges count.

    Shape:
        (N, C, *spatial) to (N, C, *pooled) and (N, C, *spatial).

    Returns:
        The window maxima, differentiable, and a bool tensor.
    """
    if len(window) == 1:
        pooled = F.max_pool1d_with_indices(x, window, window, ceil_mode=ceil_mode)
    elif len(window) == 2:
        pooled = F.max_pool2d_with_indices(x, window, window, ceil_mode=ceil_mode)
    else:
        # In channels_last_3d torch gives a window of -inf alone an index of the first slice.
        pooled = F.max_pool3d_with_indices(x.contiguous(), window, window, ceil_mode=ceil_mode)
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    # A scalar source: deterministic, unlike max_unpool.
    mask = mask.flatten(2).scatter(2, pooled[1].flatten(2), True).view(x.shape)
    return pooled[0], mask
