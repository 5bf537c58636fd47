"""Classify images with a model's own preprocessing and class names."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classifier", "read_image"]


def read_image(path: str | os.PathLike[str]) -> "Image":
    """Read an image file as RGB.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        The image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {path}") from None
    except (UnidentifiedImageError, IsADirectoryError) as error:
        raise ValueError(f"{path} is no image that can be read") from error


class Classifier:
    """A model with the transform and the class names of its configuration.

    Args:
        model: a timm model with a classifier.

    Raises:
        ValueError: if the model has no classifier.
    """

    def __init__(self, model: Any) -> None:
        from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

        if not model.num_classes:
            raise ValueError(f"{type(model).__name__} has no classifier: num_classes is 0")
        self.model = model.eval()
        self.transform = create_transform(**resolve_model_data_config(model))
        labels = model.pretrained_cfg.get("label_names")
        if labels is None and model.num_classes == 1000:
            info = ImageNetInfo()
            labels = [info.index_to_description(index) for index in range(1000)]
        self.labels = list(labels or map(str, range(model.num_classes)))

    @classmethod
    def from_pretrained(cls, name: str) -> "Classifier":
        """Load a registered model with its weights.

        Args:
            name: name that `timm.create_model` takes.

        Returns:
            The classifier.

        Raises:
            ValueError: if the name is unknown or has no weights.
            RuntimeError: if the weights cannot be had or are not the recorded ones.
        """
        from timm.models import is_model, is_model_pretrained

        from . import create_model

        if ":" not in name:
            arch = name.partition(".")[0]
            if not is_model(arch):
                raise ValueError(f"unknown model {name!r}; `poolskip list` prints the names")
            if not is_model_pretrained(name):
                raise ValueError(f"{name} has no weights; `poolskip list --pretrained` prints those that have")
        return cls(create_model(name, pretrained=True))

    def preprocess(self, images: Sequence["Image"]) -> Tensor:
        """Resize, crop and normalise as at the checkpoint's evaluation.

        Args:
            images: RGB images of any size.

        Returns:
            Tensor (N, 3, H, W).
        """
        return torch.stack([self.transform(image) for image in images])

    @torch.inference_mode()
    def __call__(self, images: Sequence["Image"]) -> list[list[tuple[str, float]]]:
        """Rank the classes of each image.

        Args:
            images: RGB images of any size.

        Returns:
            For each image its (label, probability) pairs, the most likely first.
        """
        probabilities = self.model(self.preprocess(images)).softmax(-1)
        ranked = []
        for row in probabilities:
            values, indices = row.sort(descending=True)
            ranked.append([(self.labels[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)])
        return ranked
