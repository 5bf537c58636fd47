"""VGG with Pool Skip: timm's class plus its placement."""

import torch
from timm.models.vgg import VGG

from ..layers.insert import reset_pool_skip
from ..layers.placement import Rule, register_placements
from .mixin import PoolSkipModel

__all__ = ["PoolSkipVGG"]

register_placements(VGG, {"default": (Rule("features.*", exclude="features.0", pool_size=2),)})


class PoolSkipVGG(PoolSkipModel, VGG):
    """timm's VGG with Pool Skip after every convolution of the features but the first; arguments and errors of both."""

    @torch.jit.ignore
    def init_weights(self) -> None:
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        super()._initialize_weights()
        reset_pool_skip(self)
