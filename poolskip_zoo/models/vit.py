"""ViT and DeiT with Pool Skip on the patch grid: timm's classes plus their placement."""

from typing import Any

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from ..layers.placement import Rule, register_placements
from .mixin import PoolSkipModel

__all__ = ["PoolSkipVisionTransformer", "PoolSkipVisionTransformerDistilled"]

# Depthwise: dense 3×3 convolutions on tokens would add 63.7 M parameters to ViT-B and 226.5 M to ViT-L.
register_placements(VisionTransformer, {"default": (Rule("blocks.*.mlp.fc2", pool_size=2, groups="depthwise"),)})


class _PoolSkipViT(PoolSkipModel):
    """What both share: one more keyword to refuse in words."""

    def __init__(self, *args: Any, use_naflex: bool | None = None, **kwargs: Any) -> None:
        if use_naflex:
            raise ValueError(
                f"use_naflex={use_naflex!r}: NaFlexVit packs patches without a grid, which Pool Skip needs; leave it "
                f"out, and pass dynamic_img_size=True for other image sizes"
            )
        super().__init__(*args, **kwargs)


class PoolSkipVisionTransformer(_PoolSkipViT, VisionTransformer):
    """timm's ViT with Pool Skip on the patch grid of each block's MLP output; prefix tokens pass unchanged.

    Where a head reads prefix tokens alone, the last block's Pool Skip reaches only the feature maps.

    Args:
        pool_skip: see `PoolSkipModel`; placement "default".
        use_naflex: False or None.
        args: positional arguments of `timm.models.vision_transformer.VisionTransformer`.
        kwargs: keyword arguments of `timm.models.vision_transformer.VisionTransformer`.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: as `PoolSkipModel`; for `patch_drop_rate` above 0 or `use_naflex=True`.
    """


class PoolSkipVisionTransformerDistilled(_PoolSkipViT, VisionTransformerDistilled):
    """timm's distilled DeiT with Pool Skip, as `PoolSkipVisionTransformer`; arguments, shapes and errors of both."""
