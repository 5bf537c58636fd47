"""SegNet: a VGG whose decoder unpools with the places of the encoder's own maxima."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from segmentation_models_pytorch import encoders
from segmentation_models_pytorch.base import ClassificationHead, SegmentationHead
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from segmentation_models_pytorch.base.modules import Conv2dReLU
from torch import Tensor, nn

from ...layers.placement import Rule, register_placements
from ...layers.pool_skip import PoolSkip
from ...layers.unpool import MaxPool2d, MaxUnpool2d
from .head import PoolSkipHead, check_encoder

__all__ = ["SegNet", "SegNetDecoder"]


class SegNetDecoder(nn.Module):
    """The encoder mirrored: at each resolution as many 3×3 convolutions, unpooling in between.

    Args:
        encoder_channels: channels of the encoder's maps at strides 1, 2, 4, ….
        layers: numbers of convolutions at these strides; the last map may have none.
        use_norm: as in smp's `Conv2dReLU`.

    Shape:
        The encoder's maps to (N, `encoder_channels[0]`, H, W).
    """

    def __init__(
        self, encoder_channels: Sequence[int], layers: Sequence[int], use_norm: bool | str | dict[str, Any]
    ) -> None:
        super().__init__()
        self.pool = MaxPool2d(2)
        self.unpool = MaxUnpool2d(2)
        self.stages = nn.ModuleList()
        for level in reversed(range(len(layers))):
            channels = [encoder_channels[level]] * layers[level] + [encoder_channels[max(level - 1, 0)]]
            pairs = pairwise(channels)
            self.stages.append(
                nn.Sequential(*(Conv2dReLU(c, d, kernel_size=3, padding=1, use_norm=use_norm) for c, d in pairs))
            )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        level = len(self.stages)
        for stage in self.stages:
            level -= 1
            if level < len(features) - 1:
                # The encoder pools this very map, so its places are the encoder's own, of whatever library.
                mask = self.pool(features[level])[1]
                x = self.unpool(x, mask, mask.shape[2:])
            x = stage(x)
        return x


register_placements(SegNetDecoder, {"default": (Rule("stages.*.0"),)})


class SegNet(PoolSkipHead):
    """SegNet (Badrinarayanan et al., TPAMI 2017, arXiv 1511.00561), with or without Pool Skip in its decoder.

    Args:
        encoder_name: any VGG of smp, ours included.
        encoder_depth: number of poolings, 3 to 5.
        encoder_weights: of the encoder; "imagenet", a tag, or None.
        decoder_use_norm: as in smp's U-Net.
        in_channels: image channels.
        classes: channels of the mask.
        activation: as in smp.
        aux_params: of a classification head, as in smp.
        pool_skip: as in `UnetPoolSkip`, but None means no Pool Skip; {} takes the default, after every convolution of
            the decoder.
        kwargs: keywords of a timm encoder.

    Shape:
        (N, in_channels, H, W), both sizes at least 2^`encoder_depth`, to (N, classes, H, W).

    Raises:
        ValueError: if the encoder is no VGG; as `UnetPoolSkip`.

    Example:
        >>> import torch
        >>> SegNet("test_vgg_poolskip", encoder_weights=None, classes=11)(torch.zeros(2, 3, 50, 70)).shape
        torch.Size([2, 11, 50, 70])
    """

    requires_divisible_input_shape = False

    @supports_config_loading
    def __init__(
        self,
        encoder_name: str = "vgg16_bn",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
        in_channels: int = 3,
        classes: int = 1,
        activation: str | Callable[..., Any] | None = None,
        aux_params: dict[str, Any] | None = None,
        pool_skip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        # By its module: registration puts ours in its place there.
        encoder: Any = encoders.get_encoder(encoder_name, in_channels, encoder_depth, encoder_weights, **kwargs)
        check_encoder(encoder, encoder_name, kwargs)
        self.encoder = encoder
        channels = encoder.out_channels
        self.decoder = SegNetDecoder(channels, _layers(encoder, encoder_name, encoder_depth), decoder_use_norm)
        self.segmentation_head = SegmentationHead(channels[0], classes, activation=activation, kernel_size=3)
        self.classification_head = None if aux_params is None else ClassificationHead(channels[-1], **aux_params)
        self.name = f"segnet-{encoder_name}"
        self.initialize()
        if pool_skip is not None:
            self._add_pool_skip(pool_skip)


def _layers(encoder: nn.Module, name: str, depth: int) -> list[int]:
    """Convolutions of the encoder before its first pooling, between each two, and behind the last."""
    layers, poolings = [0], 0
    inside = {conv for module in encoder.modules() if isinstance(module, PoolSkip) for conv in module.modules()}
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module not in inside:
            layers[-1] += 1
        elif isinstance(module, nn.MaxPool2d) and (module.kernel_size, module.stride, module.padding) == (2, 2, 0):
            poolings += 1
            layers.append(0)
    if poolings < depth:
        raise ValueError(
            f"the encoder {name!r} has {poolings} max poolings of 2×2, SegNet needs {depth}: choose a VGG, such as "
            f"'vgg16_bn' or 'vgg16_bn_poolskip'"
        )
    # The last map of a whole VGG lies behind its last pooling and has no convolution.
    return [n for n in layers[: depth + 1] if n]
