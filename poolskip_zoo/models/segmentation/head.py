"""What the heads of this package share."""

from typing import Any

from segmentation_models_pytorch.base import SegmentationModel
from segmentation_models_pytorch.encoders import TimmUniversalEncoder
from torch import nn

from ...layers.insert import add_pool_skip
from ..mixin import checked_settings
from .encoder import TimmEncoder

__all__ = ["PoolSkipHead", "check_encoder"]


class PoolSkipHead(SegmentationModel):
    """Base of smp models with Pool Skip in their decoder; they call `_add_pool_skip` last in `__init__`."""

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Any:
        # All weights come from the saved file: without this smp would download the encoder's first. Older clients of
        # the Hub leave the model in training mode.
        return super()._from_pretrained(**{**kwargs, "encoder_weights": None}).eval()

    def _add_pool_skip(self, pool_skip: dict[str, Any] | None) -> None:
        # The decoder alone: the encoder has a placement of its own. After smp's initialisation, which gives every
        # convolution of the decoder another one than PyTorch's.
        decoder: Any = self.decoder
        add_pool_skip(decoder, **checked_settings(pool_skip))
        # What the encoder cannot, the whole cannot.
        self._is_torch_scriptable = getattr(self.encoder, "_is_torch_scriptable", True)


def check_encoder(encoder: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for keywords, not None, that smp would drop without a word: only timm's encoders take any."""
    ignored = sorted(key for key, value in kwargs.items() if value is not None)
    if ignored and not isinstance(encoder, (TimmEncoder, TimmUniversalEncoder)):
        raise ValueError(f"unknown keyword {', '.join(ignored)}: the encoder {name!r} takes none")
