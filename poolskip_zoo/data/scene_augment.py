"""Augmentation of an image together with its labels, a pure function of (seed, epoch, image index)."""

from collections.abc import Sequence

import numpy as np
import torch

from .augment import uniform

_STREAM = 20  # of random_bits: the first draw here; those of `augment` come before


class SceneAugment:
    """Random scale, crop, flip and colour jitter, with one resampling from the full image.

    Args:
        seed: seed of the run, >= 0.
        crop: height and width of the result at most, in pixels.
        image_size: shorter side that an image is resized to before `scale`, in pixels; 0 leaves it as it is.
        scale: least and greatest factor on the size, drawn uniformly.
        flip: flip half of the images left to right.
        jitter: brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter, 0 to 1.
    """

    def __init__(
        self,
        seed: int,
        crop: Sequence[int],
        image_size: int = 0,
        scale: Sequence[float] = (1.0, 1.0),
        flip: bool = False,
        jitter: float = 0.0,
    ) -> None:
        self.seed, self.crop, self.image_size = seed, tuple(crop), image_size
        self.scale, self.flip, self.jitter = tuple(scale), flip, jitter

    def __call__(
        self, image: torch.Tensor, labels: torch.Tensor, index: int, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment one image.

        Args:
            image: (3, H, W) uint8.
            labels: (H, W) uint8.
            index: number of the image.
            epoch: epoch, from 0.

        Returns:
            Image (3, h, w) and labels (h, w), uint8 on the same device; h and w are the crop's, or less where the
            scaled image is smaller.
        """
        place = np.array([index])
        draws = [uniform(self.seed, epoch, place, _STREAM + stream).item() for stream in range(7)]
        zoom = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        if self.image_size:
            zoom *= self.image_size / min(labels.shape)
        # The window of the full image that becomes the crop: what is cut away is never resampled.
        window, size = [], []
        for length, target, draw in zip(labels.shape, self.crop, draws[1:3], strict=True):
            take = min(length, max(1, round(target / zoom)))
            start = int(draw * (length - take + 1))
            window.append(slice(start, start + take))
            size.append(target if take < length else min(target, max(1, round(length * zoom))))
        image, labels = resize(image[(slice(None), *window)], labels[tuple(window)], size)
        if self.flip and draws[3] < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        return self._jitter(image, draws[4:]), labels

    def _jitter(self, image: torch.Tensor, draws: Sequence[float]) -> torch.Tensor:
        """Change brightness, contrast and saturation."""
        if not self.jitter:
            return image
        from torchvision.transforms.v2 import functional

        changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        for change, draw in zip(changes, draws, strict=True):
            image = change(image, 1 + self.jitter * (2 * draw - 1))
        return image


def resize(image: torch.Tensor, labels: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize (3, H, W) uint8 by antialiased bilinear interpolation, and labels (H, W) uint8 to the nearest."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    image = functional.resize(image, list(size), antialias=True)
    return image, functional.resize(labels[None], list(size), InterpolationMode.NEAREST_EXACT)[0]


def scaled_size(size: Sequence[int], image_size: int) -> tuple[int, int]:
    """Compute the size of an image whose shorter side becomes `image_size`.

    Args:
        size: height and width.
        image_size: shorter side, in pixels; 0 leaves the size as it is.

    Returns:
        Height and width.

    Raises:
        ValueError: if one side is over 50 times the other: what they are scaled to would fill the memory.

    Example:
        >>> scaled_size((360, 480), 180)
        (180, 240)
    """
    if image_size and max(size) > 50 * min(size):
        raise ValueError(f"an image of {size[1]}x{size[0]} pixels is too thin: its shorter side becomes {image_size}")
    zoom = image_size / min(size) if image_size else 1.0
    return round(size[0] * zoom), round(size[1] * zoom)
