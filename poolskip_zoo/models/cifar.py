"""Base networks for images of about 32×32 pixels (CIFAR), which timm does not have.

* `CifarResNet`: three stages and parameter-free shortcuts, He et al. section 4.2 (resnet20 … resnet110).
* `SmallStemResNet`: timm's four-stage ResNet behind a 3×3 stem, the form of the Pool Skip reference code.
* `CifarVGG`: timm's VGG features under a pooled linear head.

All of them are timm's own classes with parts replaced after construction, so features, classifier, checkpointing
and initialisation are timm's. `feature_info` and `output_stride` count from the input, as everywhere in timm.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import ClassifierHead, get_act_layer, get_norm_layer
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn

from .resnet import TIMM_STEM_STRIDE, PoolSkipGroupedModel
from .vgg import PoolSkipVGG

__all__ = [
    "CifarResNet",
    "CifarVGG",
    "PadShortcut",
    "PoolSkipCifarResNet",
    "PoolSkipCifarVGG",
    "PoolSkipSmallStemResNet",
    "SmallStemResNet",
]

# timm's VGG builds a head of 4096 · mlp_ratio hidden channels, replaced at once here: one channel wastes no memory.
_ONE_HIDDEN_CHANNEL = 1 / 4096


class PadShortcut(nn.Module):
    """He's option A: subsample, then append channels of zeros. It has no parameters.

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output, at least `in_chs`.
        stride: subsampling factor, in pixels.

    Shape:
        (N, in_chs, H, W) → (N, out_chs, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: if `out_chs` is smaller than `in_chs`.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        if out_chs < in_chs:
            raise ValueError(f"PadShortcut only adds channels: in_chs={in_chs}, out_chs={out_chs}")
        self.extra_chs = out_chs - in_chs
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]  # ceil(H / stride) rows, as the block's 3×3 convolution gives
        return F.pad(x, (0, 0, 0, 0, 0, self.extra_chs))

    def extra_repr(self) -> str:
        return f"extra_chs={self.extra_chs}, stride={self.stride}"


class SmallStemResNet(ResNet):
    """timm's ResNet with one 3×3 stride-1 stem convolution and no stem pooling.

    Parameter names are timm's (`conv1`, `bn1`, `layer1.0.conv1`, …, `fc`).

    Args:
        block: `BasicBlock` or `Bottleneck` of `timm.models.resnet`.
        layers: blocks of each of the four stages.
        num_classes: classes, 0 for no classifier.
        in_chans: image channels.
        output_stride: reduction of the last map; smaller values dilate the last stages. 2, 4, … up to one
            doubling per stage after the first; None takes the largest.
        channels: channels of each stage before the block's expansion; the first, an even number, is also the stem's.
        **kwargs: timm's `ResNet` keywords (`global_pool`, `act_layer`, `norm_layer`, `aa_layer`, `drop_rate`,
            `drop_path_rate`, `drop_block_rate`, `zero_init_last`, `block_args`, `device`, `dtype`, …), except those
            of the stem (`stem_type`, `stem_width`, `replace_stem_pool`).

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: if `layers` or `channels` has not one entry per stage, the first of `channels` is odd, or
            `output_stride` is none of the possible ones.
        TypeError: for an unknown keyword, or one of the stem's.

    Example:
        >>> import torch
        >>> model = SmallStemResNet(BasicBlock, (1, 1, 1, 1), num_classes=10)
        >>> model(torch.zeros(1, 3, 32, 32)).shape, model.forward_features(torch.zeros(1, 3, 32, 32)).shape
        (torch.Size([1, 10]), torch.Size([1, 512, 4, 4]))
    """

    num_stages = 4

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        output_stride: int | None = None,
        channels: Sequence[int] = (64, 128, 256, 512),
        **kwargs: Any,
    ) -> None:
        if not len(layers) == len(channels) == self.num_stages:
            given = f"layers={tuple(layers)}, channels={tuple(channels)}"
            raise ValueError(f"{type(self).__name__} has {self.num_stages} stages, got {given}")
        if channels[0] % 2:
            raise ValueError(f"the first of channels={tuple(channels)} must be even")
        strides = [2**i for i in range(1, len(channels))]
        if output_stride not in (None, *strides):
            raise ValueError(f"output_stride={output_stride!r} is not possible, choose one of {strides}")
        super().__init__(
            block,  # type: ignore[arg-type]  # timm's annotation names instances
            tuple(layers),
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=(output_stride or strides[-1]) * TIMM_STEM_STRIDE,  # the 3×3 stem here has 1
            channels=tuple(channels),
            # Only timm's deep stem has a width to choose; its convolutions are replaced below.
            stem_type="deep",
            stem_width=channels[0] // 2,
            replace_stem_pool=False,
            **kwargs,
        )
        dd: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        conv = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as ResNet.init_weights
        self.add_module("conv1", conv)
        self.add_module("maxpool", nn.Identity())
        features: list[Any] = self.feature_info
        for info in features:
            info["reduction"] = max(1, info["reduction"] // TIMM_STEM_STRIDE)  # the stem itself: 2 in timm, 1 here


class CifarResNet(SmallStemResNet):
    """The three-stage ResNet for 32×32 images, He et al. (arXiv 1512.03385) section 4.2, 6n+2 layers.

    Shortcuts that change the shape are `PadShortcut`s (option A): y = F(x) + pad(subsample(x)), so the network has
    exactly the parameters of its plain counterpart. `feature_info` has four entries, of reductions 1, 1, 2 and 4.

    Args:
        layers: blocks of the three stages.
        block: `BasicBlock` (the paper's) or `Bottleneck` of `timm.models.resnet`.
        channels: channels of the stages before the block's expansion; the first, an even number, is also the stem's.
        zero_init_last: start each block's last norm at zero, as timm does for its own ResNets. Not here: channels that
            `PadShortcut` adds would be zero on both ways, and the ReLU behind them would never pass a gradient.
        **kwargs: keywords of `SmallStemResNet`, except those of a projection shortcut (`avg_down`,
            `down_kernel_size`). `output_stride` may be 4 (default) or 2.

    Shape:
        (N, in_chans, H, W) → (N, num_classes).

    Raises:
        ValueError: as `SmallStemResNet`.
        TypeError: for an unknown keyword, or one of the stem's or the projection's.

    Example:
        >>> sum(p.numel() for p in CifarResNet((3, 3, 3)).parameters())  # resnet20: 0.27 M
        269722
    """

    num_stages = 3

    def __init__(
        self,
        layers: Sequence[int],
        block: type[nn.Module] = BasicBlock,
        channels: Sequence[int] = (16, 32, 64),
        zero_init_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            block,
            layers,
            channels=channels,
            zero_init_last=zero_init_last,
            avg_down=False,
            down_kernel_size=1,
            **kwargs,
        )
        # ResNet's methods name four stages; an empty one passes its input on, as where timm prunes a stage.
        self.layer4 = nn.Sequential()
        for module in list(self.modules()):
            projection: Any = getattr(module, "downsample", None)
            if projection is not None:
                conv = projection[0]
                module.downsample = PadShortcut(conv.in_channels, conv.out_channels, conv.stride[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's, of four features: the stem's and those of the three stages."""
        take, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, take, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's, of four features; the empty last stage is none."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        if last < len(self.feature_info) - 1:
            return super().prune_intermediate_layers(take, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, "")
        return take


class CifarVGG(VGG):
    """timm's VGG features under global pooling and one linear layer.

    timm's VGG head alone has 119.5 M parameters, made for 7×7 maps; on 32×32 images the last map is 1×1.

    Args:
        cfg: channels of the convolutions, 'M' for a max pooling (`timm.models.vgg.cfgs`).
        num_classes: classes, 0 for no classifier.
        in_chans: image channels.
        output_stride: 32, as in timm's VGG; there are no dilated forms.
        act_layer: activation class or timm's name of one.
        conv_layer: convolution class.
        norm_layer: normalisation class, timm's name of one, or None for none.
        global_pool: timm's pooling type, '' for none.
        drop_rate: dropout probability before the classifier.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        (N, in_chans, H, W), H and W at least 32 → (N, num_classes).

    Raises:
        ValueError: if `output_stride` is not 32.

    Example:
        >>> from timm.models.vgg import cfgs
        >>> sum(p.numel() for p in CifarVGG(cfgs["vgg11"], norm_layer=nn.BatchNorm2d).parameters())
        9231114
    """

    def __init__(
        self,
        cfg: Sequence[int | str],
        num_classes: int = 10,
        in_chans: int = 3,
        output_stride: int = 32,
        act_layer: str | type[nn.Module] = nn.ReLU,
        conv_layer: type[nn.Module] = nn.Conv2d,
        norm_layer: str | type[nn.Module] | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if output_stride != 32:
            raise ValueError(f"output_stride={output_stride!r} is not possible, VGG supports only 32")
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            list(cfg),
            num_classes=num_classes,
            in_chans=in_chans,
            mlp_ratio=_ONE_HIDDEN_CHANNEL,
            act_layer=get_act_layer(act_layer),
            conv_layer=conv_layer,
            norm_layer=get_norm_layer(norm_layer),
            **dd,
        )
        self.add_module("pre_logits", nn.Identity())
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        if num_classes > 0:  # as VGG._initialize_weights
            nn.init.normal_(self.head.fc.weight, 0, 0.01)
            nn.init.zeros_(self.head.fc.bias)


class PoolSkipSmallStemResNet(PoolSkipGroupedModel, SmallStemResNet):
    """`SmallStemResNet` with Pool Skip; arguments, shapes and errors of both."""


class PoolSkipCifarResNet(PoolSkipGroupedModel, CifarResNet):
    """`CifarResNet` with Pool Skip; arguments, shapes and errors of both."""


class PoolSkipCifarVGG(PoolSkipVGG, CifarVGG):
    """`CifarVGG` with Pool Skip; arguments, shapes and errors of both."""
