"""VGG family with Pool Skip, registered with timm."""

from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models.vgg import _filter_fn, cfgs
from torch import nn

from ..models.vgg import PoolSkipVGG
from .build import create
from .checkpoint import pool_skip_cfgs

_BASES = ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")

# timm has no tiny VGG to take the arguments of.
_CFGS: dict[str, list[int | str]] = {**cfgs, "test": [8, "M", 16, "M", 16, "M", 24, "M", 24, "M"]}

default_cfgs = generate_default_cfgs(
    {
        **pool_skip_cfgs(_BASES),
        "test_vgg_poolskip": PretrainedCfg(
            num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2), first_conv="features.0", classifier="head.fc"
        ),
    }
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], model_cfg: str, **model_args: Any) -> PoolSkipVGG:
    kwargs = {**model_args, **kwargs}
    # VGG has six feature maps, the first at stride 1.
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4, 5))
    return create(
        PoolSkipVGG,
        variant,
        pretrained,
        filter_fn=lambda state_dict, model: _filter_fn(state_dict),
        model_cfg=_CFGS[model_cfg],
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **kwargs,
    )


@register_model
def vgg11_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-11 with Pool Skip."""
    return _create("vgg11_poolskip", pretrained, kwargs, "vgg11")


@register_model
def vgg11_bn_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-11 with BatchNorm and Pool Skip."""
    return _create("vgg11_bn_poolskip", pretrained, kwargs, "vgg11", norm_layer=nn.BatchNorm2d)


@register_model
def vgg13_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-13 with Pool Skip."""
    return _create("vgg13_poolskip", pretrained, kwargs, "vgg13")


@register_model
def vgg13_bn_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-13 with BatchNorm and Pool Skip."""
    return _create("vgg13_bn_poolskip", pretrained, kwargs, "vgg13", norm_layer=nn.BatchNorm2d)


@register_model
def vgg16_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-16 with Pool Skip."""
    return _create("vgg16_poolskip", pretrained, kwargs, "vgg16")


@register_model
def vgg16_bn_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-16 with BatchNorm and Pool Skip."""
    return _create("vgg16_bn_poolskip", pretrained, kwargs, "vgg16", norm_layer=nn.BatchNorm2d)


@register_model
def vgg19_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-19 with Pool Skip."""
    return _create("vgg19_poolskip", pretrained, kwargs, "vgg19")


@register_model
def vgg19_bn_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """VGG-19 with BatchNorm and Pool Skip."""
    return _create("vgg19_bn_poolskip", pretrained, kwargs, "vgg19", norm_layer=nn.BatchNorm2d)


@register_model
def test_vgg_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVGG:
    """Tiny VGG for tests."""
    return _create("test_vgg_poolskip", pretrained, kwargs, "test", norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 128)
