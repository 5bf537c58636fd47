"""torch's own pooling with indices and unpooling, each in the memory format in which it is fastest."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "first_cells",
    "is_batched_gradient",
    "is_channels_last",
    "is_traced_or_compiled",
    "is_transformed",
    "pool_with_indices",
    "unpool",
]


def is_traced_or_compiled() -> bool:
    """Whether torch traces, compiles or exports: then the graph is to hold the plain pair."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether something else than plain eager execution looks on: then torch's own operators must be what it sees.

    That is `torch.func`, forward-mode AD, dispatch modes such as selective checkpointing's, and the capture of a graph.
    """
    if is_traced_or_compiled() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0


def is_batched_gradient(x: Tensor | None) -> bool:
    """Whether a backward gets several gradients at once (`is_grads_batched`), whose tensors know few operators."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)


def pool_with_indices(x: Tensor, window: list[int]) -> tuple[Tensor, Tensor]:
    """Max pooling (N, C, *spatial) in ceil mode: window maxima and flat int64 indices, in the memory format of `x`.

    On a CPU torch pools channels_last up to four times faster than the default layout, a copy included; the choice is
    the same to the bit.
    """
    dims = len(window)
    if dims == 1:
        return F.max_pool1d_with_indices(x, window, window, ceil_mode=True)
    pool = F.max_pool2d_with_indices if dims == 2 else F.max_pool3d_with_indices
    if is_traced_or_compiled() or x.device.type != "cpu":
        return pool(x, window, window, ceil_mode=True)
    moved = x.is_contiguous() and x.shape[1] > 1
    values, indices = pool(x.movedim(1, -1).contiguous().movedim(-1, 1) if moved else x, window, window, ceil_mode=True)
    if dims == 3 and is_channels_last(values):
        # torch gives a window of -inf alone an index of the first slice in this layout.
        indices = torch.where(values == -math.inf, first_cells(indices, window, x.shape[2:]), indices)
    return (values.contiguous(), indices.contiguous()) if moved else (values, indices)


def unpool(values: Tensor, indices: Tensor, window: list[int], size: torch.Size) -> Tensor:
    """Max unpooling, as `F.max_unpool1d/2d/3d`.

    Args:
        values: floating-point tensor.
        indices: flat index of each value.
        window: window size and stride along each of one to three spatial axes.
        size: spatial size of the result.

    Shape:
        (N, C, *pooled) to (N, C, *size).

    Returns:
        The map, in the type and memory format of `values`.
    """
    device = values.device.type
    if not is_traced_or_compiled() and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # On a CPU autocast would return float32, only for the convolution that follows to cast it back.
        with torch.autocast(device, enabled=False):
            return unpool(values, indices, window, size)
    plain = not (torch.is_grad_enabled() or is_transformed() or is_batched_gradient(values))
    if plain and device == "cpu" and values.is_contiguous():
        # 1.5 to 2.5 times as fast in this layout (docs/performance.md).
        flat = values.new_zeros((*values.shape[:2], math.prod(size))).scatter_(2, indices.flatten(2), values.flatten(2))
        return flat.view(*values.shape[:2], *size)
    if len(window) == 1:
        return F.max_unpool1d(values, indices, window, window, output_size=size)
    if len(window) == 2:
        return F.max_unpool2d(values, indices, window, window, output_size=size)
    u = F.max_unpool3d(values, indices, window, window, output_size=size)
    # It returns a contiguous tensor whatever it gets. By strides and axes: vmap knows no channels_last_3d.
    if is_channels_last(values):
        u = u.movedim(1, -1).contiguous().movedim(-1, 1)
    return u


def first_cells(like: Tensor, window: list[int], size: torch.Size) -> Tensor:
    """Flat index of the first cell of each window of `like` (N, C, *pooled), on a map of this size: (*pooled) int64.

    Division of int64 indices would cost more than all the rest.
    """
    cells = torch.zeros((), dtype=torch.int64, device=like.device)
    for axis, (e, length) in enumerate(zip(window, size, strict=True)):
        steps = torch.arange(like.shape[axis + 2], device=like.device) * e
        cells = cells.unsqueeze(-1) * length + steps
    return cells


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map (N, C, *spatial) come last in memory; not where both layouts are the same."""
    return x.dim() > 3 and x.stride(1) == 1 and not x.is_contiguous()
