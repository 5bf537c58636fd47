"""U-Net with Pool Skip: smp's class plus its placement."""

from collections.abc import Callable, Sequence
from typing import Any

from segmentation_models_pytorch import Unet
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

from ...layers.placement import Rule, register_placements
from .head import PoolSkipHead, check_encoder

__all__ = ["UnetPoolSkip"]

# smp's default for five stages.
_CHANNELS = (256, 128, 64, 32, 16)

register_placements(UnetDecoder, {"default": (Rule("center.[01].0"), Rule("blocks.*.conv[12].0"))})


class UnetPoolSkip(PoolSkipHead, Unet):
    """smp's U-Net with Pool Skip after the 3×3 convolutions of its decoder.

    Args:
        encoder_name: any encoder of smp, ours included.
        encoder_depth: number of stages, 3 to 5.
        encoder_weights: of the encoder; "imagenet", a tag, or None.
        decoder_use_norm: as in smp.
        decoder_channels: channels of the decoder's stages; None takes the first of 256, 128, 64, 32, 16.
        decoder_attention_type: as in smp.
        decoder_interpolation: as in smp.
        in_channels: image channels.
        classes: channels of the mask.
        activation: as in smp.
        aux_params: of a classification head, as in smp.
        pool_skip: dict with any of `placement`, `pool_size`, `groups` and `zero_init`, as in `add_pool_skip` on the
            decoder; plain data, so that it travels in `config.json`. None takes the default.
        kwargs: keywords of a timm encoder.

    Shape:
        (N, in_channels, H, W) to (N, classes, H, W).

    Raises:
        ValueError: for an unknown keyword, an unknown or unsaveable `pool_skip`, or a depth that is none of these.
    """

    @supports_config_loading
    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        decoder_use_norm: bool | str | dict[str, Any] = "batchnorm",
        decoder_channels: Sequence[int] | None = None,
        decoder_attention_type: str | None = None,
        decoder_interpolation: str = "nearest",
        in_channels: int = 3,
        classes: int = 1,
        activation: str | Callable[..., Any] | None = None,
        aux_params: dict[str, Any] | None = None,
        pool_skip: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            encoder_name=encoder_name,
            encoder_depth=encoder_depth,
            encoder_weights=encoder_weights,
            decoder_use_norm=decoder_use_norm,
            decoder_channels=_CHANNELS[:encoder_depth] if decoder_channels is None else decoder_channels,
            decoder_attention_type=decoder_attention_type,
            decoder_interpolation=decoder_interpolation,
            in_channels=in_channels,
            classes=classes,
            activation=activation,
            aux_params=aux_params,
            **kwargs,
        )
        kwargs.pop("decoder_use_batchnorm", None)  # smp's old name of decoder_use_norm
        check_encoder(self.encoder, encoder_name, kwargs)
        self._add_pool_skip(pool_skip)
