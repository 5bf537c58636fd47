"""What every registered Pool Skip model shares."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..layers.insert import add_pool_skip, reset_pool_skip

__all__ = ["PoolSkipModel", "checked_settings"]

_SETTINGS = ("placement", "pool_size", "groups", "zero_init")


class PoolSkipModel:
    """Mixin: a timm model class that takes the keyword `pool_skip` and inserts Pool Skip after its own initialisation.

    Put it before the base class: `class PoolSkipResNet(PoolSkipModel, ResNet)`.

    Args:
        pool_skip: dict with any of `placement`, `pool_size`, `groups` and `zero_init`, as in `add_pool_skip`; plain
            data, so that it travels in `config.json`. None takes the family's default.
        args: positional arguments of the base class.
        kwargs: keyword arguments of the base class.

    Raises:
        ValueError: if `pool_skip` is no dict, has an unknown key, or names what the model does not have.
    """

    def __init__(self, *args: Any, pool_skip: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_pool_skip(self, **checked_settings(pool_skip))  # type: ignore[arg-type]

    @torch.jit.ignore
    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        super().init_weights(*args, **kwargs)  # type: ignore[misc]
        # The base initialises every convolution its own way; Pool Skip's keeps PyTorch's, as in the reference code.
        reset_pool_skip(self)  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if any(".pool_skip." in key for key in state_dict):
                raise
            raise RuntimeError(
                f"{error}\n\tThey have no Pool Skip. A base model's weights, with Pool Skip at zero: "
                "timm.create_model(..., pretrained=True, pretrained_cfg_overlay={'file': PATH}), in timm's train.py "
                "--pretrained --pretrained-path PATH"
            ) from error


def checked_settings(pool_skip: dict[str, Any] | None) -> dict[str, Any]:
    """Check a `pool_skip` keyword, and copy it; None gives an empty dict.

    Raises ValueError if it is no dict, has an unknown key, or is not plain data.
    """
    if pool_skip is None:
        return {}
    if not isinstance(pool_skip, dict):
        raise ValueError(f"pool_skip={pool_skip!r}: expected a dict with any of {', '.join(_SETTINGS)}")
    unknown = sorted(set(pool_skip) - set(_SETTINGS))
    if unknown:
        raise ValueError(f"unknown pool_skip setting {', '.join(unknown)}: choose from {', '.join(_SETTINGS)}")
    try:
        json.dumps(pool_skip)
    except TypeError as error:
        raise ValueError(
            f"pool_skip={pool_skip!r} cannot be saved in config.json: name a placement or patterns, or call "
            f"add_pool_skip on the model or its decoder yourself"
        ) from error
    return dict(pool_skip)
