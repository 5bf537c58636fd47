"""The Pool Skip layer: `y = x + conv(max_unpool(max_pool(x)))`."""

import torch
from torch import Tensor, nn

from .functional import to_window, window_maxima
from .lean import add_conv_of_window_maxima, convolves_plainly, trains_by_autograd

__all__ = ["PoolSkip", "PoolSkip1d", "PoolSkip2d", "PoolSkip3d"]

# torch.fx records one call instead of tracing through size arithmetic.
torch.fx.wrap("window_maxima")


class PoolSkip(nn.Module):
    """What the three layers share; `conv_class` gives the number of spatial axes."""

    conv_class: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    dims: int
    window: list[int]
    zero_init: bool
    after_bias: bool  # whether the module that it follows has a bias

    def __init__(
        self,
        channels: int,
        pool_size: int | tuple[int, ...] = 2,
        groups: int = 1,
        bias: bool = True,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(f"channels={channels} must be a positive multiple of groups={groups}")
        self.window = to_window(pool_size, self.dims, minimum=2)
        self.zero_init = zero_init
        self.after_bias = True
        self.conv = self.conv_class(
            channels, channels, 3, padding=1, groups=groups, bias=bias, device=device, dtype=dtype
        )
        if zero_init:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew: PyTorch's default as in the reference code, or zero if made with `zero_init`."""
        if self.zero_init:
            for parameter in self.conv.parameters():
                nn.init.zeros_(parameter)
        else:
            self.conv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.add_to(x)

    def add_to(self, x: Tensor) -> Tensor:
        """`x` plus the convolution of its window maxima."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what is inside
            if self._is_lean(x):
                return add_conv_of_window_maxima(x, self.window, self.conv)
        return x + self.conv(window_maxima(x, self.window))

    @torch.jit.unused
    def _is_lean(self, x: Tensor) -> bool:
        """Whether the sparse map need not be kept: in plain training, of a batch, by a plain convolution."""
        return (
            isinstance(x, Tensor)  # and no proxy of torch.fx
            and x.dim() == self.dims + 2
            and not torch.are_deterministic_algorithms_enabled()
            and convolves_plainly(self.conv)  # first: a parametrised weight is computed anew at each look
            and trains_by_autograd(x, self.conv.weight, self.conv.bias)
        )

    def extra_repr(self) -> str:
        return f"pool_size={tuple(self.window)}" + (", zero_init=True" if self.zero_init else "")


class PoolSkip1d(PoolSkip):
    """Pool Skip on sequences; see `PoolSkip2d`.

    Shape:
        (N, C, L) or (C, L), the output alike.
    """

    conv_class = nn.Conv1d
    dims = 1


class PoolSkip2d(PoolSkip):
    """Add a 3×3 convolution of the window maxima to a feature map.

    `y = x + conv(max_unpool(max_pool(x)))` (Sun et al., AAAI 2025, arXiv 2409.13154, section 3; reference code
    `pool_skip.py`), placed after a convolution and before its normalisation and activation. Unlike the reference,
    partial windows at the edges count, so that every map size works.

    Args:
        channels: channels C of the map.
        pool_size: window size and stride e in pixels, at least 2; an int or (height, width), of which one may be 1. The
            paper uses 2 and 4.
        groups: groups of the 3×3 convolution; `channels` makes it depthwise.
        bias: whether the 3×3 convolution has a bias.
        zero_init: start the 3×3 convolution at zero, so that y = x for finite x.
        device: device of the parameters.
        dtype: type of the parameters.

    Shape:
        (N, C, H, W) or (C, H, W), the output alike, in the memory format of the input.

    Raises:
        ValueError: if `channels` is no positive multiple of `groups`, or `pool_size` is 1 along every axis or of
            another length; in the forward, if the input has another number of dimensions.

    Example:
        >>> import torch
        >>> PoolSkip2d(8, pool_size=4)(torch.zeros(1, 8, 7, 5)).shape
        torch.Size([1, 8, 7, 5])
    """

    conv_class = nn.Conv2d
    dims = 2


class PoolSkip3d(PoolSkip):
    """Pool Skip on volumes; see `PoolSkip2d`.

    Shape:
        (N, C, D, H, W) or (C, D, H, W), the output alike.
    """

    conv_class = nn.Conv3d
    dims = 3
