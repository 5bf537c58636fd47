"""Networks of the study that the zoo does not have: plain ones, and those with a control in Pool Skip's place."""

from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor

from ..layers import PoolSkip2d
from ..models.cifar import CifarResNet, PoolSkipCifarResNet
from ..models.resnet import PoolSkipGroupedModel
from ..registry.build import create
from ..registry.checkpoint import cfg_for_data
from .layers import ControlSkip2d, RandomSkip2d, replace_layers

__all__ = ["PlainBlock", "PlainCifarNet"]

_NAMES = (
    *("plain20_cifar", "plain20_cifar_maxima", "plain20_cifar_control"),
    *("resnet20_cifar_control", "resnet20_cifar_random"),
    *("test_plain_cifar", "test_plain_cifar_maxima", "test_plain_cifar_control"),
    *("test_resnet_cifar_control", "test_resnet_cifar_random"),
)
_CFG = cfg_for_data(PretrainedCfg(first_conv="conv1", classifier="fc", pool_size=(8, 8)), "cifar10_jpeg")
default_cfgs = generate_default_cfgs(dict.fromkeys(_NAMES, _CFG))


class PlainBlock(BasicBlock):
    """timm's basic block without its shortcut: two convolutions, each with a norm and a ReLU behind it.

    Args:
        args: positional arguments of `BasicBlock`.
        kwargs: keyword arguments of `BasicBlock`; without effect are those of what the residual branch may add
            (`drop_path`, `attn_layer`).

    Shape:
        (N, inplanes, H, W) to (N, planes, ceil(H / stride), ceil(W / stride)).
    """

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self  # timm's types of some parts allow None
        x = block.aa(block.act1(block.drop_block(block.bn1(block.conv1(x)))))
        return block.act2(block.bn2(block.conv2(x)))


class PlainCifarNet(CifarResNet):
    """`CifarResNet` without shortcuts: the plain net that He et al. (arXiv 1512.03385, section 4.2) compare it with.

    Equal parameters, since the shortcuts have none.

    Args:
        layers: blocks of the three stages.
        kwargs: keyword arguments of `CifarResNet` but `block`.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: as `CifarResNet`.

    Example:
        >>> sum(p.numel() for p in PlainCifarNet((3, 3, 3)).parameters())  # as resnet20
        269722
    """

    def __init__(self, layers: tuple[int, ...], **kwargs: Any) -> None:
        super().__init__(layers, block=PlainBlock, **kwargs)
        for module in self.modules():
            if isinstance(module, PlainBlock):
                module.downsample = None


class _PlainMaxima(PoolSkipGroupedModel, PlainCifarNet):
    """`PlainCifarNet` with Pool Skip."""


class _Replaced:
    """Mixin before a model with Pool Skip: its layers become those of `layer_class`."""

    layer_class: type[PoolSkip2d] = ControlSkip2d

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_layers(self, self.layer_class)  # type: ignore[arg-type]


class _PlainControl(_Replaced, _PlainMaxima):
    """`PlainCifarNet` with `ControlSkip2d` in Pool Skip's places."""


class _ResidualControl(_Replaced, PoolSkipCifarResNet):
    """`CifarResNet` with `ControlSkip2d` in Pool Skip's places."""


class _ResidualRandom(_Replaced, PoolSkipCifarResNet):
    """`CifarResNet` with `RandomSkip2d` in Pool Skip's places."""

    layer_class = RandomSkip2d


_TEST = {"layers": (1, 1, 1), "channels": (8, 16, 32)}


def _make(model_class: type[CifarResNet], variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    sizes: dict[str, Any] = _TEST if variant.startswith("test_") else {"layers": (3, 3, 3)}
    return create(model_class, variant, pretrained, **{**sizes, **kwargs})


@register_model
def plain20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32×32 images without shortcuts."""
    return _make(PlainCifarNet, "plain20_cifar", pretrained, **kwargs)


@register_model
def plain20_cifar_maxima(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`plain20_cifar` with Pool Skip."""
    return _make(_PlainMaxima, "plain20_cifar_maxima", pretrained, **kwargs)


@register_model
def plain20_cifar_control(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`plain20_cifar` with the control of equal parameters."""
    return _make(_PlainControl, "plain20_cifar_control", pretrained, **kwargs)


@register_model
def resnet20_cifar_control(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet20_cifar` with the control of equal parameters."""
    return _make(_ResidualControl, "resnet20_cifar_control", pretrained, **kwargs)


@register_model
def resnet20_cifar_random(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet20_cifar` with random positions in place of the maxima."""
    return _make(_ResidualRandom, "resnet20_cifar_random", pretrained, **kwargs)


@register_model
def test_plain_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny `plain20_cifar` for tests."""
    return _make(PlainCifarNet, "test_plain_cifar", pretrained, **kwargs)


@register_model
def test_plain_cifar_maxima(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny `plain20_cifar_maxima` for tests."""
    return _make(_PlainMaxima, "test_plain_cifar_maxima", pretrained, **kwargs)


@register_model
def test_plain_cifar_control(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny `plain20_cifar_control` for tests."""
    return _make(_PlainControl, "test_plain_cifar_control", pretrained, **kwargs)


@register_model
def test_resnet_cifar_control(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny `resnet20_cifar_control` for tests."""
    return _make(_ResidualControl, "test_resnet_cifar_control", pretrained, **kwargs)


@register_model
def test_resnet_cifar_random(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Tiny `resnet20_cifar_random` for tests."""
    return _make(_ResidualRandom, "test_resnet_cifar_random", pretrained, **kwargs)
