"""Small-image bases (CIFAR stems, small patches), which timm does not have, with and without Pool Skip."""

from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vgg import cfgs as vgg_cfgs
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from ..models.cifar import (
    CifarResNet,
    CifarVGG,
    PoolSkipCifarResNet,
    PoolSkipCifarVGG,
    PoolSkipSmallStemResNet,
    SmallStemResNet,
)
from ..models.vit import PoolSkipVisionTransformer
from .build import VIT_POOLING, create
from .checkpoint import SUFFIX, Checkpoint, cfg_for_data, trained_cfgs

CHECKPOINTS: tuple[Checkpoint, ...] = (
    Checkpoint(
        name="resnet20_cifar_poolskip.c10_e60",
        dataset="cifar10_jpeg",
        sha256="520c9f0317fb18a944b02ef90732ed99feeed4b995518193648c78c1f325fefb",
        metrics={"top1": 87.98, "top5": 99.53},
        recipe="resnet20_cifar_poolskip.c10_e60",
        seed=0,
        hardware="AMD EPYC (CPU, 1 thread)",
        hours=4.824,
        images_per_second=222.8,
        torch="2.15.0",
    ),
    Checkpoint(
        name="resnet20_cifar.c10_e60",
        dataset="cifar10_jpeg",
        sha256="b9e6c88791cc5057a58e1cf6178b97b30379aa0fbe8bd66193964266a220c034",
        metrics={"top1": 87.9, "top5": 99.49},
        recipe="resnet20_cifar.c10_e60",
        seed=0,
        hardware="AMD EPYC (CPU, 1 thread)",
        hours=1.929,
        images_per_second=450.8,
        torch="2.15.0",
    ),
    Checkpoint(
        name="resnet20_cifar_poolskip.c10",
        dataset="cifar10_jpeg",
        sha256="5a1c48fa6b4d5e686b2670e645cdaffc19e53b61e9b395d515368bad34d61747",
        metrics={"top1": 87.43, "top5": 99.52},
        recipe="resnet20_cifar_poolskip.c10",
        seed=0,
        hardware="AMD EPYC (CPU, 1 thread)",
        hours=1.959,
        images_per_second=198.7,
        torch="2.15.0",
    ),
    Checkpoint(
        name="resnet20_cifar.c10",
        dataset="cifar10_jpeg",
        sha256="eb856ef1489aba34a6221f04edad6a7a72ad864d2d35430743bd79a7f9453451",
        metrics={"top1": 87.24, "top5": 99.5},
        recipe="resnet20_cifar.c10",
        seed=0,
        hardware="AMD EPYC (CPU, 1 thread)",
        hours=1.566,
        images_per_second=304.3,
        torch="2.15.0",
    ),
    Checkpoint(
        name="resnet56_cifar_poolskip.c10_e12",
        dataset="cifar10_jpeg",
        sha256="d780f56758380b4ccd18ecbd5196680c416f519607c7b23df45e846a4d84c2c6",
        metrics={"top1": 84.83, "top5": 99.41},
        recipe="resnet56_cifar_poolskip.c10_e12",
        seed=0,
        hardware="Intel(R) Xeon(R) Processor (CPU, 1 thread)",
        hours=2.256,
        images_per_second=66.4,
        torch="2.15.0",
    ),
    Checkpoint(
        name="resnet56_cifar.c10_e12",
        dataset="cifar10_jpeg",
        sha256="8c51816fa197bfe12b5ed7e5a874107af99f83c3433fc7dc709fc466c0732360",
        metrics={"top1": 85.43, "top5": 99.34},
        recipe="resnet56_cifar.c10_e12",
        seed=0,
        hardware="Intel(R) Xeon(R) Processor (CPU, 1 thread)",
        hours=1.428,
        images_per_second=146.2,
        torch="2.15.0",
    ),
    Checkpoint(
        name="vit_tiny_patch4_32_poolskip.c10_e11",
        dataset="cifar10_jpeg",
        sha256="e7665022f4b716f2ad4d194893093de3ba07a103b0ee55cbc9490d992398b9d8",
        metrics={"top1": 82.82, "top5": 99.25},
        recipe="vit_tiny_patch4_32_poolskip.c10_e11",
        seed=0,
        hardware="AMD EPYC (CPU, 1 thread)",
        hours=1.155,
        images_per_second=146.0,
        torch="2.14.1",
        base_scores={"top1": 79.35, "top5": 98.79, "hours": 1.109, "images_per_second": 146.6},
    ),
    Checkpoint(
        name="vgg11_bn_cifar_poolskip.c10_e5",
        dataset="cifar10_jpeg",
        sha256="",
        metrics={"top1": 81.04, "top5": 99.08},
        recipe="vgg11_bn_cifar_poolskip.c10_e5",
        seed=0,
        hardware="Intel(R) Xeon(R) Processor (CPU, 1 thread)",
        hours=1.474,
        images_per_second=47.5,
        torch="2.15.0",
        base_scores={"top1": 81.77, "top5": 99.09, "hours": 0.721, "images_per_second": 98.2},
    ),
)


def _cfg(
    first_conv: str = "conv1", classifier: str = "fc", dataset: str = "cifar10_jpeg", **kwargs: Any
) -> PretrainedCfg:
    return cfg_for_data(PretrainedCfg(first_conv=first_conv, classifier=classifier, **kwargs), dataset)


_THREE_STAGES = _cfg(pool_size=(8, 8))
_FOUR_STAGES = _cfg(pool_size=(4, 4))
_VGG = _cfg("features.0", "head.fc", pool_size=(1, 1))
_VIT = _cfg("patch_embed.proj", "head", fixed_input_size=True)
_VIT_64 = _cfg("patch_embed.proj", "head", "tiny_imagenet_jpeg", fixed_input_size=True)

_BASES = {
    **dict.fromkeys(("resnet20_cifar", "resnet32_cifar", "resnet38_cifar", "resnet56_cifar"), _THREE_STAGES),
    **dict.fromkeys(("resnet110_cifar", "test_resnet_cifar"), _THREE_STAGES),
    **dict.fromkeys(("resnet18_cifar", "resnet34_cifar", "resnet350_cifar", "resnet420_cifar"), _FOUR_STAGES),
    **dict.fromkeys(("vgg11_bn_cifar", "vgg16_bn_cifar"), _VGG),
    "vit_tiny_patch4_32": _VIT,
    "vit_tiny_patch8_64": _VIT_64,
}

_ARCHS = {name: cfg for base, cfg in _BASES.items() for name in (base, base + SUFFIX)}
_TRAINED = trained_cfgs(CHECKPOINTS, _ARCHS)
_UNTRAINED = {
    name: cfg for name, cfg in _ARCHS.items() if not any(trained.startswith(f"{name}.") for trained in _TRAINED)
}

default_cfgs = generate_default_cfgs({**_TRAINED, **_UNTRAINED})


def _three_stages(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> CifarResNet:
    """Build by the variant's own arguments, as do the next three; the caller's `kwargs` win over them."""
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    model_class = PoolSkipCifarResNet if variant.endswith(SUFFIX) else CifarResNet
    feature_cfg = {"out_indices": out_indices}
    return create(model_class, variant, pretrained, feature_cfg=feature_cfg, **{**model_args, **kwargs})


def _four_stages(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> SmallStemResNet:
    model_class = PoolSkipSmallStemResNet if variant.endswith(SUFFIX) else SmallStemResNet
    return create(model_class, variant, pretrained, **{**model_args, **kwargs})


def _vgg(variant: str, pretrained: bool, kwargs: dict[str, Any], model_cfg: str) -> CifarVGG:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3, 4, 5))
    model_class = PoolSkipCifarVGG if variant.endswith(SUFFIX) else CifarVGG
    feature_cfg = {"flatten_sequential": True, "out_indices": out_indices}
    own: dict[str, Any] = {"model_cfg": vgg_cfgs[model_cfg], "feature_cfg": feature_cfg}
    return create(model_class, variant, pretrained, **own, **{"norm_layer": nn.BatchNorm2d, **kwargs})


def _vit(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> VisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    model_class = PoolSkipVisionTransformer if variant.endswith(SUFFIX) else VisionTransformer
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    sizes = {"embed_dim": 192, "num_heads": 3, **model_args, **kwargs}
    optional = VIT_POOLING if "global_pool" in kwargs else ()
    shared: dict[str, Any] = {"filter_fn": checkpoint_filter_fn, "optional": optional, "feature_cfg": feature_cfg}
    return create(model_class, variant, pretrained, **shared, **sizes)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-20 for 32×32 images."""
    return _three_stages("resnet20_cifar", pretrained, kwargs, layers=(3, 3, 3))


@register_model
def resnet20_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-20 for 32×32 images with Pool Skip."""
    return _three_stages("resnet20_cifar_poolskip", pretrained, kwargs, layers=(3, 3, 3))


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-32 for 32×32 images."""
    return _three_stages("resnet32_cifar", pretrained, kwargs, layers=(5, 5, 5))


@register_model
def resnet32_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-32 for 32×32 images with Pool Skip."""
    return _three_stages("resnet32_cifar_poolskip", pretrained, kwargs, layers=(5, 5, 5))


@register_model
def resnet38_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-38 for 32×32 images."""
    return _three_stages("resnet38_cifar", pretrained, kwargs, layers=(6, 6, 6))


@register_model
def resnet38_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-38 for 32×32 images with Pool Skip."""
    return _three_stages("resnet38_cifar_poolskip", pretrained, kwargs, layers=(6, 6, 6))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-56 for 32×32 images."""
    return _three_stages("resnet56_cifar", pretrained, kwargs, layers=(9, 9, 9))


@register_model
def resnet56_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-56 for 32×32 images with Pool Skip."""
    return _three_stages("resnet56_cifar_poolskip", pretrained, kwargs, layers=(9, 9, 9))


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-110 for 32×32 images."""
    return _three_stages("resnet110_cifar", pretrained, kwargs, layers=(18, 18, 18))


@register_model
def resnet110_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """He's ResNet-110 for 32×32 images with Pool Skip."""
    return _three_stages("resnet110_cifar_poolskip", pretrained, kwargs, layers=(18, 18, 18))


@register_model
def test_resnet_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny three-stage ResNet for tests."""
    return _three_stages("test_resnet_cifar", pretrained, kwargs, layers=(1, 1, 1), channels=(8, 16, 32))


@register_model
def test_resnet_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny three-stage ResNet for tests with Pool Skip."""
    return _three_stages("test_resnet_cifar_poolskip", pretrained, kwargs, layers=(1, 1, 1), channels=(8, 16, 32))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-18 with a 3×3 stem, in the form of the reference code."""
    return _four_stages("resnet18_cifar", pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def resnet18_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-18 with a 3×3 stem, in the form of the reference code with Pool Skip."""
    return _four_stages("resnet18_cifar_poolskip", pretrained, kwargs, block=BasicBlock, layers=(2, 2, 2, 2))


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-34 with a 3×3 stem, in the form of the reference code."""
    return _four_stages("resnet34_cifar", pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3))


@register_model
def resnet34_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-34 with a 3×3 stem, in the form of the reference code with Pool Skip."""
    return _four_stages("resnet34_cifar_poolskip", pretrained, kwargs, block=BasicBlock, layers=(3, 4, 6, 3))


@register_model
def resnet350_cifar(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-350 with a 3×3 stem, as in the paper."""
    return _four_stages("resnet350_cifar", pretrained, kwargs, block=Bottleneck, layers=(4, 36, 72, 4))


@register_model
def resnet350_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-350 with a 3×3 stem, as in the paper with Pool Skip."""
    return _four_stages("resnet350_cifar_poolskip", pretrained, kwargs, block=Bottleneck, layers=(4, 36, 72, 4))


@register_model
def resnet420_cifar(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-420 with a 3×3 stem, as in the paper (its 419 layers)."""
    return _four_stages("resnet420_cifar", pretrained, kwargs, block=Bottleneck, layers=(4, 44, 87, 4))


@register_model
def resnet420_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> SmallStemResNet:
    """ResNet-420 with a 3×3 stem, as in the paper (its 419 layers) with Pool Skip."""
    return _four_stages("resnet420_cifar_poolskip", pretrained, kwargs, block=Bottleneck, layers=(4, 44, 87, 4))


@register_model
def vgg11_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11 with BatchNorm and a linear head for 32×32 images."""
    return _vgg("vgg11_bn_cifar", pretrained, kwargs, "vgg11")


@register_model
def vgg11_bn_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-11 with BatchNorm and a linear head for 32×32 images with Pool Skip."""
    return _vgg("vgg11_bn_cifar_poolskip", pretrained, kwargs, "vgg11")


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16 with BatchNorm and a linear head for 32×32 images."""
    return _vgg("vgg16_bn_cifar", pretrained, kwargs, "vgg16")


@register_model
def vgg16_bn_cifar_poolskip(pretrained: bool = False, **kwargs: Any) -> CifarVGG:
    """VGG-16 with BatchNorm and a linear head for 32×32 images with Pool Skip."""
    return _vgg("vgg16_bn_cifar_poolskip", pretrained, kwargs, "vgg16")


@register_model
def vit_tiny_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Tiny with 4×4 patches for 32×32 images."""
    return _vit("vit_tiny_patch4_32", pretrained, kwargs, img_size=32, patch_size=4)


@register_model
def vit_tiny_patch4_32_poolskip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Tiny with 4×4 patches for 32×32 images with Pool Skip."""
    return _vit("vit_tiny_patch4_32_poolskip", pretrained, kwargs, img_size=32, patch_size=4)


@register_model
def vit_tiny_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Tiny with 8×8 patches for 64×64 images."""
    return _vit("vit_tiny_patch8_64", pretrained, kwargs, img_size=64, patch_size=8)


@register_model
def vit_tiny_patch8_64_poolskip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT-Tiny with 8×8 patches for 64×64 images with Pool Skip."""
    return _vit("vit_tiny_patch8_64_poolskip", pretrained, kwargs, img_size=64, patch_size=8)
