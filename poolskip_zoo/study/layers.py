"""Layers that take one thing out of Pool Skip each, with its parameters and their first values."""

import torch
from torch import Tensor, nn

from ..layers import PoolSkip2d, pool_skip_modules
from ..layers.functional import window_maxima

__all__ = ["ControlSkip2d", "RandomSkip2d", "replace_layers"]


class ControlSkip2d(PoolSkip2d):
    """`y = x + conv(x)`: Pool Skip without pooling, of the same parameters and convolutions.

    What it gains over a net without it comes from more parameters and a deeper stack, not from window maxima.

    Args:
        channels: channels C of the map.
        options: keyword arguments of `PoolSkip2d`; `pool_size` has no effect.

    Shape:
        (N, C, H, W), the output alike.

    Raises:
        ValueError: as `PoolSkip2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class RandomSkip2d(PoolSkip2d):
    """`y = x + conv(u)`, u being x at one random position of each window and zero elsewhere.

    As sparse as Pool Skip, without its choice of the maximum. In training positions are drawn anew in each pass, from
    torch's global generator, which training seeds for every step. In evaluation they are drawn once and for all from
    the layer's number, equal for all images: a draw like those of training, by which the result for an image depends
    neither on its batch nor on what ran before. (The mean over draws, x / e², is not sparse: the following norm has
    not seen such maps in training.)

    Args:
        channels: channels C of the map.
        options: keyword arguments of `PoolSkip2d`.

    Shape:
        (N, C, H, W), the output alike.

    Raises:
        ValueError: as `PoolSkip2d`; in the forward, if the input is no batch.

    Example:
        >>> layer = RandomSkip2d(1, bias=False).eval()
        >>> _ = nn.init.dirac_(layer.conv.weight)  # y = x + u
        >>> layer(torch.ones(1, 1, 4, 6)).sum().item()  # 24 and one of each of the 6 windows
        30.0
    """

    number = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"input of shape {list(x.shape)}: expected 4 dimensions (batch, channels, height, width)")
        return x + self.conv(x * self._positions(x))

    @torch.no_grad()
    def _positions(self, x: Tensor) -> Tensor:
        """One cell of each window, a mask; where noise is largest, since that also fits partial windows."""
        # float32 also for bfloat16 maps: few distinct values would have ties, which the first cell wins.
        if self.training:
            noise = torch.rand_like(x, dtype=torch.float32)
        else:
            generator = torch.Generator().manual_seed(self.number)
            noise = torch.rand((1, *x.shape[1:]), generator=generator).to(x.device)
        return window_maxima(noise.add_(1), self.window) > 0


def replace_layers(model: nn.Module, layer_class: type[PoolSkip2d]) -> None:
    """Give every Pool Skip layer another class without parameters of its own, in place; parameters stay as they are."""
    for number, layer in enumerate(pool_skip_modules(model).values()):
        layer.__class__ = layer_class
        if isinstance(layer, RandomSkip2d):
            layer.number = number
