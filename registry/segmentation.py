"""Segmentation models: built by smp from plain data, and described as smp's own folders describe them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from timm.models import load_state_dict
from torch import nn

from ..data import DATASETS
from .build import shown
from .checkpoint import SegmentationCheckpoint
from .smp import encoder_names

__all__ = ["build_recorded", "create_segmentation", "load_weights", "smp_config"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def create_segmentation(model: str, model_args: Mapping[str, Any], classes: int) -> Any:
    """Make a segmentation model.

    Args:
        model: name of smp's architecture, ours included, such as `unet` or `segnet`.
        model_args: keywords of `smp.create_model`; `encoder_weights` is None where left out, other than smp's own.
        classes: number of classes.

    Returns:
        The model, an `smp.base.SegmentationModel`.

    Raises:
        ValueError: if smp does not know the architecture or the encoder, or does not take the keywords.
    """
    import segmentation_models_pytorch as smp

    known = smp.MODEL_ARCHITECTURES_MAPPING
    if model not in known:
        raise ValueError(f"unknown segmentation model {model!r}: one of {', '.join(known)}")
    encoder = model_args.get("encoder_name", "resnet34")
    if not isinstance(encoder, str):
        raise ValueError(f"encoder_name={encoder!r}: expected a name such as 'resnet18_poolskip'")
    excess = set(model_args) - set(inspect.signature(known[model]).parameters)
    if excess and encoder not in encoder_names() and not encoder.startswith("tu-"):
        # smp passes them on to the encoder, and its own encoders swallow what they do not know.
        raise ValueError(f"{model} on {encoder} does not take model_args {', '.join(sorted(excess))}")
    try:
        return smp.create_model(model, classes=classes, **{"encoder_weights": None, **model_args})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{model} does not take model_args={dict(model_args)}: {str(error)[:300]}") from error


def build_recorded(checkpoint: SegmentationCheckpoint, device: str = "cpu") -> Any:
    """Make a checkpoint's model without its weights, in evaluation mode; on `meta` for sizes and names alone.

    Raises ValueError as `create_segmentation`.
    """
    model_args = {**checkpoint.model_args, "encoder_weights": None}
    with torch.device(device):
        return create_segmentation(checkpoint.model, model_args, DATASETS[checkpoint.dataset].num_classes).eval()


def load_weights(model: ModelT, path: Path) -> ModelT:
    """Load weights from a file.

    Args:
        model: the model.
        path: safetensors file, or a checkpoint of timm's scripts, of which the moving average counts if it has one.

    Returns:
        The model.

    Raises:
        RuntimeError: if the file cannot be read or does not fit; it is named.
    """
    own = path.suffix == ".safetensors"
    try:
        # Of timm's scripts tensors and plain values alone: a pickle of anything else is refused.
        state = load_file(path) if own else load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        reason = next(iter(str(error).splitlines()), "")
        wanted = "safetensors file" if own else "checkpoint"
        raise RuntimeError(f"{path} is not a readable {wanted}: {reason or type(error).__name__}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        fits = model.state_dict()
        lacking, excess = ([key for key in a if key not in b] for a, b in ((fits, state), (state, fits)))
        shapes = {key: [list(each[key].shape) for each in (state, fits)] for key in fits if key in state}
        other = [f"{key} is {there}, not {here}" for key, (there, here) in shapes.items() if there != here]
        raise RuntimeError(
            f"{path} does not fit {type(model).__name__}: it lacks {shown(lacking)}, has {shown(excess)} in excess and "
            f"{shown(other)} of another shape"
        ) from error
    return model


def smp_config(model: nn.Module) -> dict[str, Any]:
    """The config.json of smp's `save_pretrained`, but for the encoder's first weights, which it would fetch again."""
    config: Any = model.config
    return {**config, "encoder_weights": None, "_model_class": type(model).__name__}
