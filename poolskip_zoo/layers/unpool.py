"""Drop-in `MaxPool*d(return_indices=True)` and `MaxUnpool*d` whose "indices" are a mask that any runtime takes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import check_rank, first_maximum_mask, is_traced_or_exported, pool, pool_with_mask, to_window, upsample

__all__ = ["MaxPool1d", "MaxPool2d", "MaxPool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"]

_Size = int | tuple[int, ...]


def _only(name: str, value: object, allowed: object, instead: str) -> None:
    if value != allowed:
        raise ValueError(f"{name}={value!r}: only {name}={allowed!r} is supported; {instead}")


class MaxPoolNd(nn.Module):
    dims: int
    window: list[int]
    ceil_mode: bool

    def __init__(
        self,
        kernel_size: _Size,
        stride: _Size | None = None,
        padding: _Size = 0,
        dilation: _Size = 1,
        return_indices: bool = True,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.window = to_window(kernel_size, self.dims)
        nn_pool = f"torch.nn.MaxPool{self.dims}d has the rest"
        _only("stride", self.window if stride is None else to_window(stride, self.dims), self.window, nn_pool)
        _only("padding", to_window(padding, self.dims, minimum=0), [0] * self.dims, nn_pool)
        _only("dilation", to_window(dilation, self.dims), [1] * self.dims, nn_pool)
        _only("return_indices", return_indices, True, nn_pool)
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = len(self.window)
        check_rank(x, dims)
        single = x.dim() == dims + 1
        if single:
            x = x.unsqueeze(0)
        if torch.jit.is_scripting() or is_traced_or_exported():
            pooled, mask = pool(x, self.window, self.ceil_mode), first_maximum_mask(x, self.window, self.ceil_mode)
        else:
            pooled, mask = pool_with_mask(x, self.window, self.ceil_mode)
        if single:
            return pooled.squeeze(0), mask.squeeze(0)
        return pooled, mask

    def extra_repr(self) -> str:
        return f"kernel_size={tuple(self.window)}, ceil_mode={self.ceil_mode}"


class _MaxUnpoolNd(nn.Module):
    dims: int
    window: list[int]

    def __init__(self, kernel_size: _Size, stride: _Size | None = None, padding: _Size = 0) -> None:
        super().__init__()
        self.window = to_window(kernel_size, self.dims)
        nn_unpool = f"torch.nn.MaxUnpool{self.dims}d has the rest"
        _only("stride", self.window if stride is None else to_window(stride, self.dims), self.window, nn_unpool)
        _only("padding", to_window(padding, self.dims, minimum=0), [0] * self.dims, nn_unpool)

    def forward(self, x: Tensor, mask: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.window)
        check_rank(x, dims)
        single = x.dim() == dims + 1
        if single:
            x, mask = x.unsqueeze(0), mask.unsqueeze(0)
        default = [x.shape[axis + 2] * self.window[axis] for axis in range(dims)]
        if output_size is not None and len(output_size) < dims:
            raise ValueError(f"output_size={list(output_size)}: expected at least {dims} sizes")
        size = default if output_size is None else list(output_size[len(output_size) - dims :])
        places = mask
        # Without output_size no comparison of sizes: export would freeze its outcome.
        if output_size is None or size != list(mask.shape[2:]):
            if not torch.jit.is_scripting():
                self._check_size(size, default, mask)
            pads = [0] * (2 * dims)
            for axis in range(dims):
                pads[2 * (dims - 1 - axis) + 1] = 2 * self.window[axis]
            places = F.pad(places, pads)
            for axis in range(dims):
                places = places.narrow(axis + 2, 0, size[axis])
        u = upsample(x, self.window, size)
        # Runtimes multiply faster than they select.
        captured = torch.jit.is_scripting() or is_traced_or_exported()
        u = u * places.to(x.dtype) if captured else torch.where(places, u, 0.0)
        return u.squeeze(0) if single else u

    @torch.jit.unused
    def _check_size(self, size: list[int], default: list[int], mask: Tensor) -> None:
        if is_traced_or_exported():
            return
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}: expected the bool mask of poolskip_zoo's MaxPool{self.dims}d")
        for got, usual, e, full in zip(size, default, self.window, mask.shape[2:], strict=True):
            if abs(got - usual) >= e or abs(full - usual) >= e:
                raise ValueError(
                    f"output_size={size} from a mask of {list(mask.shape[2:])}: each must lie within "
                    f"{[e - 1 for e in self.window]} of the pooled size times the window, {default}"
                )

    def extra_repr(self) -> str:
        return f"kernel_size={tuple(self.window)}"


class MaxPool1d(MaxPoolNd):
    """Max pooling of sequences that also returns the mask of what it keeps; see `MaxPool2d`.

    Shape:
        (N, C, L) or (C, L) to (N, C, L // e) and (N, C, L).
    """

    dims = 1


class MaxPool2d(MaxPoolNd):
    """`torch.nn.MaxPool2d(return_indices=True)` for disjoint windows, with a mask in place of the indices.

    The mask holds True at the place of each window's maximum (the first in row-major order; of several NaN the last,
    as in torch). Unlike int64 indices it needs no scatter, so that `MaxUnpool2d` runs in any runtime.

    Args:
        kernel_size: window size e in pixels, at least 1; an int or (height, width).
        stride: equal to `kernel_size` or None.
        padding: 0.
        dilation: 1.
        return_indices: True.
        ceil_mode: whether partial windows at the right and bottom edge count.

    Shape:
        (N, C, H, W) or (C, H, W) to (N, C, H // e, W // e) (rounded up with `ceil_mode`) and the mask's (N, C, H, W).

    Returns:
        The window maxima and a bool mask.

    Raises:
        ValueError: for any other stride, padding, dilation or return_indices, or an input of other dimensions.

    Example:
        >>> import torch
        >>> pooled, mask = MaxPool2d(2)(torch.tensor([[[1.0, 2.0], [4.0, 3.0]]]))
        >>> MaxUnpool2d(2)(pooled, mask)
        tensor([[[0., 0.],
                 [4., 0.]]])
    """

    dims = 2


class MaxPool3d(MaxPoolNd):
    """Max pooling of volumes that also returns the mask of what it keeps; see `MaxPool2d`.

    Shape:
        (N, C, D, H, W) or (C, D, H, W) to the pooled map and the mask in the input's shape.
    """

    dims = 3


class MaxUnpool1d(_MaxUnpoolNd):
    """Partial inverse of `MaxPool1d`; see `MaxUnpool2d`."""

    dims = 1


class MaxUnpool2d(_MaxUnpoolNd):
    """`torch.nn.MaxUnpool2d` that takes the mask of `MaxPool2d` in place of indices.

    Values, gradients and sizes equal torch's pair wherever torch's is right: with `output_size` omitted for a width
    that the window does not divide, torch misreads its flat indices; the mask keeps rows and columns. While tracing,
    scripting or exporting NaN and inf give NaN in their whole window, and zeros may have another sign.

    Args:
        kernel_size: window size e in pixels, at least 1; an int or (height, width).
        stride: equal to `kernel_size` or None.
        padding: 0.

    Shape:
        values (N, C, h, w) and mask (N, C, H, W), or both without N, to (N, C, e·h, e·w) or `output_size`.

    Returns:
        The values at the places of the mask, zero elsewhere.

    Raises:
        ValueError: if `output_size` or the mask is not within one window of e·h, e·w, for indices in place of the mask,
            or for any other stride or padding.
    """

    dims = 2


class MaxUnpool3d(_MaxUnpoolNd):
    """Partial inverse of `MaxPool3d`; see `MaxUnpool2d`."""

    dims = 3
