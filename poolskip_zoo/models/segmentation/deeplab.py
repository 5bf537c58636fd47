"""DeepLabV3 and DeepLabV3+ with Pool Skip: smp's classes plus their placements."""

from collections.abc import Callable, Iterable
from typing import Any

from segmentation_models_pytorch import DeepLabV3, DeepLabV3Plus
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder, DeepLabV3PlusDecoder

from ...layers.placement import Rule, register_placements
from .head import PoolSkipHead, check_encoder

__all__ = ["DeepLabV3PlusPoolSkip", "DeepLabV3PoolSkip"]

# The image branch of ASPP is left out: its convolution works on a map of 1×1. Of a separable convolution it is the
# pointwise one, which norm and activation follow.
_POINTWISE = Rule("*.1", parent="SeparableConv2d")
register_placements(
    DeepLabV3Decoder,
    {"default": (Rule("aspp.convs.[0-9].0"), Rule("aspp.project.0"), Rule("conv"), _POINTWISE)},
)
register_placements(
    DeepLabV3PlusDecoder,
    {"default": (Rule("aspp.0.convs.[0-9].0"), Rule("aspp.0.project.0"), Rule("block1.0"), _POINTWISE)},
)


class DeepLabV3PoolSkip(PoolSkipHead, DeepLabV3):
    """smp's DeepLabV3 with Pool Skip after the convolutions of ASPP and the one behind it.

    Args:
        encoder_name: any encoder of smp with an output stride, ours included (not VGG).
        encoder_depth: number of stages, 3 to 5.
        encoder_weights: of the encoder; "imagenet", a tag, or None.
        encoder_output_stride: 8 or 16.
        decoder_channels: channels of ASPP.
        decoder_atrous_rates: three dilations, in pixels of the encoder's last map.
        decoder_aspp_separable: whether ASPP's convolutions are separable.
        decoder_aspp_dropout: dropout probability behind ASPP.
        in_channels: image channels.
        classes: channels of the mask.
        activation: as in smp.
        upsampling: factor behind the head; None brings the mask to the size of the image.
        aux_params: of a classification head, as in smp.
        pool_skip: as in `UnetPoolSkip`.
        kwargs: keywords of a timm encoder.

    Shape:
        (N, in_channels, H, W), both sizes multiples of the output stride, to (N, classes, H, W).

    Raises:
        ValueError: as `UnetPoolSkip`; for an output stride that is none of these, or that the encoder does not have.
    """

    @supports_config_loading
    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        encoder_output_stride: int = 8,
        decoder_channels: int = 256,
        decoder_atrous_rates: Iterable[int] = (12, 24, 36),
        decoder_aspp_separable: bool = False,
        decoder_aspp_dropout: float = 0.5,
        in_channels: int = 3,
        classes: int = 1,
        activation: str | Callable[..., Any] | None = None,
        upsampling: int | None = None,
        aux_params: dict[str, Any] | None = None,
        pool_skip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            encoder_name=encoder_name,
            encoder_depth=encoder_depth,
            encoder_weights=encoder_weights,
            encoder_output_stride=encoder_output_stride,
            decoder_channels=decoder_channels,
            decoder_atrous_rates=decoder_atrous_rates,
            decoder_aspp_separable=decoder_aspp_separable,
            decoder_aspp_dropout=decoder_aspp_dropout,
            in_channels=in_channels,
            classes=classes,
            activation=activation,
            upsampling=upsampling,
            aux_params=aux_params,
            **kwargs,
        )
        check_encoder(self.encoder, encoder_name, kwargs)
        self._add_pool_skip(pool_skip)


class DeepLabV3PlusPoolSkip(PoolSkipHead, DeepLabV3Plus):
    """smp's DeepLabV3+ with Pool Skip after the convolutions of ASPP and the decoder.

    Args:
        encoder_name: any encoder of smp with an output stride, ours included (not VGG).
        encoder_depth: number of stages, 3 to 5.
        encoder_weights: of the encoder; "imagenet", a tag, or None.
        encoder_output_stride: 8 or 16.
        decoder_channels: channels of ASPP and the decoder.
        decoder_atrous_rates: three dilations, in pixels of the encoder's last map.
        decoder_aspp_separable: whether ASPP's convolutions are separable.
        decoder_aspp_dropout: dropout probability behind ASPP.
        in_channels: image channels.
        classes: channels of the mask.
        activation: as in smp.
        upsampling: factor behind the head; 4 brings the mask to the size of the image.
        aux_params: of a classification head, as in smp.
        pool_skip: as in `UnetPoolSkip`.
        kwargs: keywords of a timm encoder.

    Shape:
        (N, in_channels, H, W), both sizes multiples of the output stride, to (N, classes, H, W).

    Raises:
        ValueError: as `DeepLabV3PoolSkip`.
    """

    @supports_config_loading
    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        encoder_output_stride: int = 16,
        decoder_channels: int = 256,
        decoder_atrous_rates: Iterable[int] = (12, 24, 36),
        decoder_aspp_separable: bool = True,
        decoder_aspp_dropout: float = 0.5,
        in_channels: int = 3,
        classes: int = 1,
        activation: str | Callable[..., Any] | None = None,
        upsampling: int = 4,
        aux_params: dict[str, Any] | None = None,
        pool_skip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            encoder_name=encoder_name,
            encoder_depth=encoder_depth,
            encoder_weights=encoder_weights,
            encoder_output_stride=encoder_output_stride,
            decoder_channels=decoder_channels,
            decoder_atrous_rates=decoder_atrous_rates,
            decoder_aspp_separable=decoder_aspp_separable,
            decoder_aspp_dropout=decoder_aspp_dropout,
            in_channels=in_channels,
            classes=classes,
            activation=activation,
            upsampling=upsampling,
            aux_params=aux_params,
            **kwargs,
        )
        check_encoder(self.encoder, encoder_name, kwargs)
        self._add_pool_skip(pool_skip)
