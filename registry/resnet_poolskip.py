"""ResNet family with Pool Skip, registered with timm."""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck

from ..models.resnet import PoolSkipResNet
from .build import create
from .checkpoint import Checkpoint, pool_skip_cfgs

CHECKPOINTS: tuple[Checkpoint, ...] = (
    Checkpoint(
        name="resnet50_poolskip.tin200_r64_cpu",
        dataset="tiny_imagenet_jpeg",
        sha256="5ae7564736133345ee6a87997f4c5ef58f38a33730c94ffe18d4c31b1a22a024",
        metrics={"top1": 51.93, "top5": 77.31},
        recipe="resnet50_poolskip.tin200_r64_cpu",
        seed=0,
        hardware="AMD EPYC (CPU, 2 threads)",
        hours=2.683,
        images_per_second=130.4,
        torch="2.14.1",
        base_scores={"top1": 48.17, "top5": 74.35, "hours": 2.84, "images_per_second": 110.6},
        base_note=(
            "the base's run skipped the first 6 of 17 epochs, those on shrunk crops (its own "
            "`resnet50.tin200_r64_trunk64` began with `init: ''`), and began the last 5 with 37.2 % of 2,000 "
            "held-out images right, the variant's with 42.6 %"
        ),
    ),
)

_BASES = (
    *("resnet18", "resnet18d", "resnet26", "resnet26d", "resnet34", "resnet34d", "resnet50", "resnet50d"),
    *("resnet101", "resnet101d", "resnet152", "resnet152d", "resnet200", "resnet200d"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "seresnet50", "test_resnet"),
)

default_cfgs = generate_default_cfgs({**pool_skip_cfgs(_BASES, CHECKPOINTS)})

_DEEP_STEM: dict[str, Any] = {"stem_width": 32, "stem_type": "deep", "avg_down": True}


def _create(
    variant: str, pretrained: bool, kwargs: dict[str, Any], block: Any, layers: tuple[int, ...], **model_args: Any
) -> PoolSkipResNet:
    """Build by the variant's own arguments; the caller's `kwargs` win over them."""
    return create(PoolSkipResNet, variant, pretrained, **{"block": block, "layers": layers, **model_args, **kwargs})


@register_model
def resnet18_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-18 with Pool Skip."""
    return _create("resnet18_poolskip", pretrained, kwargs, BasicBlock, (2, 2, 2, 2))


@register_model
def resnet18d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-18-D with Pool Skip."""
    return _create("resnet18d_poolskip", pretrained, kwargs, BasicBlock, (2, 2, 2, 2), **_DEEP_STEM)


@register_model
def resnet26_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-26 with Pool Skip."""
    return _create("resnet26_poolskip", pretrained, kwargs, Bottleneck, (2, 2, 2, 2))


@register_model
def resnet26d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-26-D with Pool Skip."""
    return _create("resnet26d_poolskip", pretrained, kwargs, Bottleneck, (2, 2, 2, 2), **_DEEP_STEM)


@register_model
def resnet34_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-34 with Pool Skip."""
    return _create("resnet34_poolskip", pretrained, kwargs, BasicBlock, (3, 4, 6, 3))


@register_model
def resnet34d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-34-D with Pool Skip."""
    return _create("resnet34d_poolskip", pretrained, kwargs, BasicBlock, (3, 4, 6, 3), **_DEEP_STEM)


@register_model
def resnet50_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-50 with Pool Skip."""
    return _create("resnet50_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 6, 3))


@register_model
def resnet50d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-50-D with Pool Skip."""
    return _create("resnet50d_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 6, 3), **_DEEP_STEM)


@register_model
def resnet101_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-101 with Pool Skip."""
    return _create("resnet101_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 23, 3))


@register_model
def resnet101d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-101-D with Pool Skip."""
    return _create("resnet101d_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 23, 3), **_DEEP_STEM)


@register_model
def resnet152_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-152 with Pool Skip."""
    return _create("resnet152_poolskip", pretrained, kwargs, Bottleneck, (3, 8, 36, 3))


@register_model
def resnet152d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-152-D with Pool Skip."""
    return _create("resnet152d_poolskip", pretrained, kwargs, Bottleneck, (3, 8, 36, 3), **_DEEP_STEM)


@register_model
def resnet200_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-200 with Pool Skip."""
    return _create("resnet200_poolskip", pretrained, kwargs, Bottleneck, (3, 24, 36, 3))


@register_model
def resnet200d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNet-200-D with Pool Skip."""
    return _create("resnet200d_poolskip", pretrained, kwargs, Bottleneck, (3, 24, 36, 3), **_DEEP_STEM)


@register_model
def resnext50_32x4d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNeXt-50 32x4d with Pool Skip of 32 groups."""
    return _create(
        "resnext50_32x4d_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 6, 3), cardinality=32, base_width=4
    )


@register_model
def resnext101_32x8d_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """ResNeXt-101 32x8d with Pool Skip of 32 groups."""
    return _create(
        "resnext101_32x8d_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 23, 3), cardinality=32, base_width=8
    )


@register_model
def wide_resnet50_2_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """Wide ResNet-50-2 with Pool Skip."""
    return _create("wide_resnet50_2_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 6, 3), base_width=128)


@register_model
def seresnet50_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """SE-ResNet-50 with Pool Skip."""
    return _create("seresnet50_poolskip", pretrained, kwargs, Bottleneck, (3, 4, 6, 3), block_args={"attn_layer": "se"})


@register_model
def test_resnet_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipResNet:
    """Tiny ResNet for tests, basic and bottleneck blocks mixed."""
    blocks = [BasicBlock, BasicBlock, Bottleneck, BasicBlock]
    model_args: dict[str, Any] = {**_DEEP_STEM, "stem_width": 16, "channels": (32, 48, 48, 96)}
    return _create("test_resnet_poolskip", pretrained, kwargs, blocks, (1, 1, 1, 1), **model_args)
