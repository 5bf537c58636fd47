"""ResNet, ResNeXt, Wide and SE ResNet with Pool Skip: timm's class plus its placements."""

from typing import Any

from timm.models.resnet import ResNet

from ..layers.placement import Rule, register_placements
from .mixin import PoolSkipModel, checked_settings

__all__ = ["PoolSkipResNet"]

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


class PoolSkipResNet(PoolSkipModel, ResNet):
    """timm's ResNet with Pool Skip; in a ResNeXt its 3×3 convolutions have the cardinality as groups.

    Args:
        pool_skip: see `PoolSkipModel`; placements "default" and "all".
        args: positional arguments of `timm.models.resnet.ResNet`.
        kwargs: keyword arguments of `timm.models.resnet.ResNet`.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: as `PoolSkipModel`.
    """

    def __init__(self, *args: Any, pool_skip: dict[str, Any] | None = None, **kwargs: Any) -> None:
        settings = {"groups": kwargs.get("cardinality", 1), **checked_settings(pool_skip)}
        super().__init__(*args, pool_skip=settings, **kwargs)
