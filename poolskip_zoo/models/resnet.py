"""ResNet, ResNeXt, Wide and SE ResNet with Pool Skip: timm's class plus its placements, and a stem for small images."""

from typing import Any

from timm.models.resnet import ResNet
from torch import nn

from ..layers.placement import Rule, register_placements
from .mixin import PoolSkipModel, checked_settings

__all__ = ["TIMM_STEM_STRIDE", "PoolSkipGroupedModel", "PoolSkipResNet", "StemResNet"]

# Window sizes of the reference code (models/resnet_poolskip.py): 2 in basic blocks, 4 in bottlenecks. After all three
# convolutions of a bottleneck ("all", its form) ResNet-50 grows from 25.6 to 229.3 M parameters; after the reducing
# 1×1 alone to 36.9 M. Its README finds 1×1 convolutions the best place.
_BASIC = Rule("layer*.conv[12]", parent="BasicBlock", pool_size=2)
register_placements(
    ResNet,
    {
        "default": (_BASIC, Rule("layer*.conv1", parent="Bottleneck", pool_size=4)),
        "all": (_BASIC, Rule("layer*.conv[123]", parent="Bottleneck", pool_size=4)),
    },
)


# timm's ResNet reduces by 4 before its first stage: by 2 in the first convolution, by 2 in max pooling.
TIMM_STEM_STRIDE = 4


class StemResNet(ResNet):
    """timm's ResNet with a choice of the stem's stride, for small images.

    The stem keeps its convolutions and their names, so timm's weights load at every `stem_stride`.

    Args:
        stem_stride: reduction before the first stage, in pixels: 4 (timm's own), 2 (without max pooling) or 1 (nor a
            stride in the first convolution).
        output_stride: reduction of the last map: 2, 4 or 8 times `stem_stride`, where smaller ones dilate the last
            stages; None takes the largest.
        args: positional arguments of `timm.models.resnet.ResNet`.
        kwargs: keyword arguments of `timm.models.resnet.ResNet`; `replace_stem_pool` at `stem_stride=4` alone.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: if `stem_stride` is none of these, or does not go with `output_stride` or `replace_stem_pool`.
        AssertionError: timm's, for an impossible `output_stride` at `stem_stride=4`.

    Example:
        >>> from timm.models.resnet import BasicBlock
        >>> model = StemResNet(BasicBlock, (1, 1, 1, 1), stem_stride=2)
        >>> [info["reduction"] for info in model.feature_info]
        [2, 2, 4, 8, 16]
    """

    def __init__(
        self, *args: Any, stem_stride: int = TIMM_STEM_STRIDE, output_stride: int | None = None, **kwargs: Any
    ) -> None:
        if stem_stride not in (1, 2, TIMM_STEM_STRIDE):
            raise ValueError(f"stem_stride={stem_stride!r} is not possible, choose one of 4 (timm's own), 2, 1")
        finer = TIMM_STEM_STRIDE // stem_stride
        if finer > 1 and output_stride not in (None, *(stem_stride * i for i in (2, 4, 8))):
            options = ", ".join(str(stem_stride * i) for i in (2, 4, 8))
            raise ValueError(f"output_stride={output_stride!r} is not possible at stem_stride={stem_stride}: {options}")
        if finer > 1 and kwargs.get("replace_stem_pool"):
            raise ValueError(f"replace_stem_pool=True has no meaning at stem_stride={stem_stride}, which has no pool")
        if output_stride is not None:
            kwargs["output_stride"] = output_stride * finer
        super().__init__(*args, **kwargs)
        if finer == 1:
            return
        self.add_module("maxpool", nn.Identity())
        if stem_stride == 1:
            first = next(module for module in self.conv1.modules() if isinstance(module, nn.Conv2d))
            first.stride = (1, 1)
        features: list[Any] = self.feature_info
        for info in features:
            # The stem's own map comes before the pooling.
            info["reduction"] = min(2, stem_stride) if info["module"] == "act1" else info["reduction"] // finer


class PoolSkipGroupedModel(PoolSkipModel):
    """What ResNets share: in a ResNeXt, Pool Skip's convolutions have the cardinality as groups.

    Args:
        pool_skip: see `PoolSkipModel`.
        args: positional arguments of the base class.
        kwargs: keyword arguments of the base class.

    Raises:
        ValueError: as `PoolSkipModel`.
    """

    def __init__(self, *args: Any, pool_skip: dict[str, Any] | None = None, **kwargs: Any) -> None:
        settings = {"groups": kwargs.get("cardinality", 1), **checked_settings(pool_skip)}
        super().__init__(*args, pool_skip=settings, **kwargs)


class PoolSkipResNet(PoolSkipGroupedModel, StemResNet):
    """timm's ResNet with Pool Skip, placements "default" and "all"; arguments, shapes and errors of both bases."""
