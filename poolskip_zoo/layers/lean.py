"""Window maxima for training by autograd: what the backward needs in 1/8 (e=2) or 1/27 (e=4) of the stock pair's bytes.

Pooling keeps each window's maximum and its *offset*, the distance of its flat index from that of the window's first
cell, in one byte where it fits. The sparse map that the 3×3 convolution reads is not kept but made again in the
backward. Every backward is made of differentiable operations, so that second derivatives are right.

`torch.func` transforms, forward-mode AD, dispatch modes, DTensors, `torch.compile` and graph capture do not come here
(`trains_by_autograd`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from . import kernels
from .stock import first_cells, is_batched_gradient, is_channels_last, is_transformed, pool_with_indices, unpool

__all__ = ["add_conv_of_window_maxima", "convolves_plainly", "trains_by_autograd", "window_maxima_for_training"]


@torch.jit.unused
def trains_by_autograd(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a backward through these tensors will be recorded by plain autograd; None is passed over.

    Not for a map of a subclass that records it by itself (DTensor), nor for parameters of any.
    """
    return (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (x, *parameters))
        and type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
        and all(type(tensor) in (Tensor, nn.Parameter, type(None)) for tensor in parameters)
        and not is_transformed()
    )


def convolves_plainly(conv: nn.Module) -> bool:
    """Whether calling this module does nothing but `F.conv*d` of its parameters.

    Not for subclasses, parametrised or wrapped modules, other paddings, and where hooks watch the call.
    """
    if type(conv) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or conv.padding_mode != "zeros":
        return False
    # accelerate fetches offloaded weights in a `forward` of its own, set on the one module.
    if "forward" in conv.__dict__ or "_conv_forward" in conv.__dict__:
        return False
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(conv, kind) or getattr(nn.modules.module, f"_global{kind}") for kind in kinds)


def _as_one_operator(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let subclasses of Tensor (MONAI's MetaTensor) see one operator, as of torch's own, and that a plain tensor."""

    @functools.wraps(function)
    def operator(x: Tensor, *arguments: Any) -> Tensor:
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(operator, (x,), x, *arguments)
        if type(x) is Tensor:
            return function(x, *arguments)
        # A copy: the subclass makes an alias, and autograd lets nobody write to an alias of what a Function returned.
        return function(x.as_subclass(Tensor), *arguments).clone()

    return operator


@_as_one_operator
def window_maxima_for_training(x: Tensor, window: list[int]) -> Tensor:
    """Window maxima whose backward keeps one offset per window.

    Args:
        x: floating-point tensor.
        window: window size along each of one to three spatial axes.

    Shape:
        (N, C, *spatial), the output alike.

    Returns:
        Equal to the bit to torch's pair, in the memory format of `x`.
    """
    shared: list[Tensor | None] = []
    values, offsets, indices, u, _ = _Pool.apply(x, window, shared, True)
    return _Scatter.apply(values, offsets, window, x.shape[2:], indices, u, shared)


@_as_one_operator
def add_conv_of_window_maxima(x: Tensor, window: list[int], conv: nn.Module) -> Tensor:
    """`x + conv(max_unpool(max_pool(x)))` without keeping the sparse map for the backward.

    Args:
        x: floating-point tensor.
        window: window size along each of one to three spatial axes.
        conv: an `nn.Conv1d/2d/3d` of as many axes.

    Shape:
        (N, C, *spatial), the output alike.

    Returns:
        Equal to the bit to `x + conv(window_maxima(x))`, which promotes types where autocast made the convolution's
        another.
    """
    shared: list[Tensor | None] = []
    weight, bias, device, dtype = conv.weight, conv.bias, x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    values, offsets, indices, u, x = _Pool.apply(x, window, shared, dtype == x.dtype)
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    added = _Conv.apply(values.to(dtype), offsets, weight, bias, window, x.shape[2:], settings, indices, u, shared)
    return added.add_(x) if added.dtype == x.dtype and added.stride() == x.stride() else x + added


class _Pool(Function):
    """x → (window maxima, offsets, indices or None, their map or None, x); indices and map are for the forward alone.

    x passes through so that its own gradient is added to in place here, not by autograd into one tensor more.
    `shared` is empty, or holds what the backward of `_Conv` or `_Scatter` has made and no longer needs: the indices,
    and a map that is zero elsewhere or None. `fill` asks for the map where it costs no pass of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: list[int], shared: list[Tensor | None], fill: bool) -> tuple[Any, ...]:
        offset_type = _offset_type(window, x.shape[2:])
        indices, u = None, None
        if kernels.applies(x, window):
            values, offsets, u = kernels.load().pool(x, window, offset_type, fill)
        else:
            values, indices = pool_with_indices(x, window)
            offsets = (indices - first_cells(indices, window, x.shape[2:])).to(offset_type)
        ctx.save_for_backward(offsets)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(each for each in (offsets, indices, u) if each is not None))
        ctx.window, ctx.size, ctx.shared = window, x.shape[2:], shared
        return values, offsets, indices, u, x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        of_values, of_x = grads[0], grads[-1]
        if of_values is None:
            return of_x, None, None, None
        if torch.is_grad_enabled():  # a second derivative will be asked for
            of_u = _Scatter.apply(of_values, offsets, ctx.window, ctx.size)
            return of_u if of_x is None else of_x + of_u, None, None, None
        if is_batched_gradient(of_values) or is_batched_gradient(of_x):
            ctx.shared.clear()  # a map that several gradients cannot be written over
        shared: tuple[Any, Any] = ctx.shared or (None, None)
        indices, u = shared
        ctx.shared.clear()
        last = is_channels_last(offsets)
        if u is not None and u.dtype == of_values.dtype and (is_channels_last(u) if last else u.is_contiguous()):
            _cells(u, last).scatter_(-2 if last else -1, _cells(indices, last), _cells(of_values, last))
            return u if of_x is None else u.add_(of_x), None, None, None
        return _scatter(of_values, offsets, ctx.window, ctx.size, indices, of_x), None, None, None


class _Scatter(Function):
    """(values, offsets) → map with the values at their places, zero elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        offsets: Tensor,
        window: list[int],
        size: torch.Size,
        indices: Tensor | None = None,
        u: Tensor | None = None,
        shared: list[Tensor | None] | None = None,
    ) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.window, ctx.shared = window, shared
        return _scatter(values, offsets, window, size, indices) if u is None else u

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        indices = None
        if ctx.shared is not None and not torch.is_grad_enabled() and not kernels.applies(grads[0], ctx.window):
            indices = _to_indices(offsets, ctx.window, grads[0].shape[2:])
            ctx.shared[:] = indices, None
        return _Gather.apply(grads[0], offsets, ctx.window, indices), *[None] * 6


class _Gather(Function):
    """(map, offsets) → the map's values at the offsets."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, offsets: Tensor, window: list[int], indices: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.window, ctx.size = window, u.shape[2:]
        return _gather(u, offsets, window, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return _Scatter.apply(grads[0], offsets, ctx.window, ctx.size), None, None, None


class _Conv(Function):
    """(values, offsets, weight, bias) → convolution of the map that they stand for."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        offsets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        window: list[int],
        size: torch.Size,
        settings: tuple[Any, ...],
        indices: Tensor | None,
        u: Tensor | None,
        shared: list[Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(values, offsets, weight)
        ctx.window, ctx.size, ctx.settings, ctx.shared = window, size, settings, shared
        if u is None:
            u = _scatter(values, offsets, window, size, indices)
        return (F.conv1d, F.conv2d, F.conv3d)[len(window) - 1](u, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, offsets, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        need_values, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        indices, scatter, gather = None, _scatter, _gather
        if torch.is_grad_enabled():
            scatter, gather = _Scatter.apply, _Gather.apply
        elif not kernels.applies(values, ctx.window):
            indices = _to_indices(offsets, ctx.window, ctx.size)
        u = scatter(values, offsets, ctx.window, ctx.size, indices)
        of_u, of_weight, of_bias = torch.ops.aten.convolution_backward(
            *(grads[0], u, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups),
            [need_values, need_weight, need_bias],
        )
        of_values = gather(of_u, offsets, ctx.window, indices) if need_values else None
        if need_values and indices is not None:
            ctx.shared[:] = indices, u
        return of_values, None, of_weight, of_bias, *[None] * 6


def _scatter(
    values: Tensor,
    offsets: Tensor,
    window: list[int],
    size: torch.Size,
    indices: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """The map of the values, plus `base` if there is one."""
    if kernels.applies(values, window) and values.stride() == offsets.stride():
        return kernels.load().scatter(values, offsets, window, size, base)
    if indices is None:
        indices = _to_indices(offsets, window, size)
    u = unpool(values, indices, window, size)
    return u if base is None else u.add_(base)


def _gather(u: Tensor, offsets: Tensor, window: list[int], indices: Tensor | None = None) -> Tensor:
    last = is_channels_last(offsets)
    if kernels.applies(u, window) and last == is_channels_last(u):
        return kernels.load().gather(u, offsets, window)
    if indices is None:
        indices = _to_indices(offsets, window, u.shape[2:])
    read = _cells(u, last).gather(-2 if last else -1, _cells(indices, last))
    batch, channels, *pooled = offsets.shape
    return read.view(batch, *pooled, channels).movedim(-1, 1) if last else read.view(offsets.shape)


def _cells(x: Tensor, last: bool) -> Tensor:
    """(N, C, cells), or where the channels come last in memory (N, cells, C)."""
    batch, channels, cells = *x.shape[:2], math.prod(x.shape[2:])  # no flatten, which batched gradients do not know
    return x.movedim(1, -1).reshape(batch, cells, channels) if last else x.reshape(batch, channels, cells)


def _offset_type(window: list[int], size: torch.Size) -> torch.dtype:
    largest = 0
    for e, length in zip(window, size, strict=True):
        largest = largest * length + e - 1
    return torch.uint8 if largest < 2**8 else torch.int16 if largest < 2**15 else torch.int32


def _to_indices(offsets: Tensor, window: list[int], size: torch.Size) -> Tensor:
    # First the type, then the sum: an addition that does both is several times slower.
    return offsets.long().add_(first_cells(offsets, window, size))
