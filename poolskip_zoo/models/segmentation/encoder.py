"""timm models as encoders of segmentation-models-pytorch: feature maps of any family as a pyramid at 1, 1/2, … 1/32."""

import math
from collections.abc import Sequence
from typing import Any

import timm
from segmentation_models_pytorch.encoders._base import EncoderMixin
from timm.layers import Format, LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.functional import pool

__all__ = ["ConvEncoder", "TimmEncoder", "TokenEncoder", "build_encoder"]


class TimmEncoder(nn.Module, EncoderMixin):
    """What both kinds share: the protocol of smp's encoders.

    The features lie in `model`, as in smp's own `tu-` encoders, so that their state dicts load here.

    Args:
        model: timm's feature extractor.
        out_channels: channels of the maps, that of the image first.
        in_channels: image channels.
        output_stride: stride at which the maps stop to shrink.
    """

    def __init__(self, model: nn.Module, out_channels: Sequence[int], in_channels: int, output_stride: int) -> None:
        super().__init__()
        self.model = model
        self._out_channels = list(out_channels)
        self._depth = len(self._out_channels) - 1
        self._in_channels = in_channels
        self._output_stride = output_stride

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the model was built with its output stride.

        smp's own version gives every convolution that it finds the dilation of its stage, Pool Skip's 3×3 included,
        which changes the function.
        """


class ConvEncoder(TimmEncoder):
    """A model whose maps shrink by themselves.

    Args:
        model: timm's feature extractor.
        strides: strides of its maps, before any output stride.
        in_channels: image channels.
        output_stride: stride at which the maps stop to shrink.

    Shape:
        (N, in_channels, H, W) to a list of maps, one per stride. Where the model has no map at stride 1 the image
        stands for it, where it has none at stride 2 a map of no channels, as in smp's `tu-` encoders.
    """

    def __init__(self, model: Any, strides: Sequence[int], in_channels: int, output_stride: int) -> None:
        channels = model.feature_info.channels()
        # Plain booleans: scripting leaves the other branches out.
        image_first, no_half = strides[0] != 1, 2 not in strides
        first = ([in_channels] if image_first else []) + ([0] if no_half else [])
        super().__init__(model, first + channels, in_channels, output_stride)
        self.image_first, self.no_half = image_first, no_half

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.model(x)
        if self.no_half:
            features.insert(0, x.new_zeros([x.shape[0], 0, x.shape[2] // 2, x.shape[3] // 2]))
        if self.image_first:
            features.insert(0, x)
        return features


class TokenEncoder(TimmEncoder):
    """A plain ViT as a pyramid: maps of evenly spaced blocks, resampled to strides 2, 4, … .

    Maps finer than the patches come from transposed 2×2 convolutions that halve the channels, coarser ones from max
    pooling (Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, arXiv
    2203.16527, section 3; there from the last block, here from one block each). The transposed convolutions are new:
    pretrained weights have none.

    Args:
        model: timm's feature extractor of a ViT, one block per map.
        patch: size of its patches in pixels, a power of two.
        in_channels: image channels.
        output_stride: stride at which the maps stop to shrink.

    Shape:
        (N, in_channels, H, W) to the image and maps (N, C, ⌈H/s⌉, ⌈W/s⌉) for strides s of 2, 4, … `output_stride`.
    """

    # timm's forward_intermediates does not script.
    _is_torch_scriptable = False

    def __init__(self, model: Any, patch: int, in_channels: int, output_stride: int) -> None:
        channels = model.feature_info.channels()
        strides = [min(2 ** (i + 1), output_stride) for i in range(len(channels))]
        finer = [max(patch // stride, 1) for stride in strides]
        out_channels = [c // f for c, f in zip(channels, finer, strict=True)]
        super().__init__(model, [in_channels, *out_channels], in_channels, output_stride)
        # As timm makes maps of tokens, a trace would hold their size for ever.
        model.output_fmt = Format.NLC
        self.strides, self.patch = strides, patch
        self.levels = nn.ModuleList(_resample(c, patch, stride) for c, stride in zip(channels, strides, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        # timm pads the image to whole patches on the right and at the bottom.
        grid = [(length + self.patch - 1) // self.patch for length in (height, width)]
        features = [x]
        for level, stride, tokens in zip(self.levels, self.strides, self.model(x), strict=True):
            z = level(tokens.transpose(1, 2).reshape(x.shape[0], tokens.shape[2], *grid))
            # Exported graphs keep this form alone: a slice that cuts nothing at the example's size becomes a guard, a
            # negative dividend rounds up in ONNX.
            bottom, right = (height + stride - 1) // stride, (width + stride - 1) // stride
            features.append(F.pad(z, (0, right - z.shape[3], 0, bottom - z.shape[2])))
        return features


def _resample(channels: int, patch: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while patch > stride:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels, patch = channels // 2, patch // 2
    while patch < stride:
        layers.append(_Halved())
        patch *= 2
    return nn.Sequential(*layers)


class _Halved(nn.Module):
    """Max pooling of 2×2 windows, partial ones too, in the form that AOTInductor compiles rightly."""

    def forward(self, x: Tensor) -> Tensor:
        return pool(x, [2, 2], True)


def build_encoder(
    name: str,
    in_channels: int = 3,
    depth: int = 5,
    output_stride: int = 32,
    pretrained: bool = False,
    **kwargs: Any,
) -> TimmEncoder:
    """Build an encoder from a timm model.

    Args:
        name: timm's name of it, with a tag if `pretrained`.
        in_channels: image channels.
        depth: number of maps below the image, 1 to 5; smp's decoders take 3 to 5.
        output_stride: 8, 16 or 32; passed on to timm, which dilates what it no longer strides.
        pretrained: whether to load the weights of the tag.
        kwargs: what else the timm model takes, such as `pool_skip` or `drop_path_rate`.

    Returns:
        The encoder.

    Raises:
        ValueError: if `depth` or `output_stride` is none of these, the model has no such output stride, or its maps
            are no pyramid.
        TypeError: timm's, for an unknown keyword.
        RuntimeError: if weights cannot be had or do not fit.

    Example:
        >>> import poolskip_zoo
        >>> build_encoder("resnet18_poolskip", depth=3).out_channels
        [3, 64, 64, 128]
    """
    if depth not in range(1, 6):
        raise ValueError(f"encoder_depth={depth!r}: expected 1 to 5")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride={output_stride!r}: expected 8, 16 or 32")
    # On the meta device it costs nothing to ask where the maps are.
    info: Any = timm.create_model(name, **{**kwargs, "features_only": True, "device": "meta"}).feature_info
    strides = info.reduction()
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_channels, "features_only": True}
    if len(set(strides)) == 1 and math.log2(strides[0]).is_integer():
        blocks = len(info.info)
        options["out_indices"] = [blocks * (i + 1) // depth - 1 for i in range(depth)]
        model = timm.create_model(name, **{"dynamic_img_size": True, "dynamic_img_pad": True, **options, **kwargs})
        return TokenEncoder(model, strides[0], in_channels, output_stride)
    if strides not in ([2**i for i in range(first, 6)] for first in range(3)):
        raise ValueError(
            f"{name} cannot be an encoder: its maps have the strides {', '.join(map(str, strides))}, "
            f"segmentation needs 2, 4, 8, 16, 32"
        )
    options["out_indices"] = [i for i, stride in enumerate(strides) if stride <= 2**depth]
    if output_stride != 32:
        options["output_stride"] = output_stride
    try:
        model = timm.create_model(name, **options, **kwargs)
    except AssertionError as error:
        # How timm refuses an output stride, VGG's for one.
        if output_stride == 32:
            raise
        raise ValueError(f"output_stride={output_stride} is not possible: {name} supports only 32") from error
    return ConvEncoder(model, strides, in_channels, output_stride)
