"""Augmentation of a whole batch at once, a pure function of (seed, epoch, image index).

Nothing here reads or advances a global random generator: an image looks the same in an epoch whichever process,
batch or restart it is met in. That is what makes a resumed run equal to the bit.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

# Zhong et al., "Random Erasing Data Augmentation" (2017), table of CIFAR settings: area and aspect ratio of the hole.
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = 0.3


def random_bits(seed: int, epoch: int, index: np.ndarray, stream: int) -> np.ndarray:
    """Hash to 64 random bits per image, (B,) uint64 (the finaliser of splitmix64, Steele et al. 2014, applied in turn).

    `index` are (B,) image indices, `stream` is the number of the draw: different draws of one image are independent.
    """
    bits = np.zeros(len(index), np.uint64)
    for part in (seed, epoch, np.asarray(index), stream):
        bits = bits + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits


def uniform(seed: int, epoch: int, index: np.ndarray, stream: int) -> np.ndarray:
    """Draw one number in [0, 1) per image, (B,) float64; arguments as for `random_bits`."""
    return (random_bits(seed, epoch, index, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Augment:
    """Random crop, flip, RandAugment on uint8 images, and random erasing on normalised ones.

    Args:
        seed: seed of the run, >= 0.
        crop_padding: zero pixels added on each side before a random crop, >= 0.
        crop_size: side of the square that is cut out; 0 for the original size.
        flip: flip half of the images left to right.
        rand_augment: timm's RandAugment string such as `rand-m9-n2-mstd0.5`; empty for none. It runs image by
            image in PIL, and so bounds the speed.
        erasing: probability of erasing one rectangle, 0 to 1.
        fill: RGB fill colour of RandAugment, 0 to 255.

    Raises:
        ValueError: if timm does not understand `rand_augment`.
    """

    def __init__(
        self,
        seed: int,
        crop_padding: int = 0,
        crop_size: int = 0,
        flip: bool = False,
        rand_augment: str = "",
        erasing: float = 0.0,
        fill: tuple[int, int, int] = (128, 128, 128),
    ) -> None:
        self.seed, self.crop_padding, self.crop_size = seed, crop_padding, crop_size
        self.flip, self.erasing = flip, erasing
        self._make_policy = _policy_maker(rand_augment, fill) if rand_augment else None

    def pixels(self, images: torch.Tensor, index: np.ndarray, epoch: int) -> torch.Tensor:
        """Crop, flip and RandAugment (B, H, W, 3) uint8, then of the crop's size; `index` are (B,) image indices."""
        if self.crop_padding or self.crop_size or self.flip:
            images = self._crop_flip(images, index, epoch)
        if self._make_policy is not None:
            images = self._rand_augment(images, index, epoch)
        return images

    def erase(self, batch: torch.Tensor, index: np.ndarray, epoch: int) -> torch.Tensor:
        """Set a random rectangle of some images (B, 3, H, W) to zero, the mean of normalised ones, in place."""
        if not self.erasing:
            return batch
        hit, area, aspect, top, left = (uniform(self.seed, epoch, index, 10 + draw) for draw in range(5))
        area = ERASE_AREA[0] + area * (ERASE_AREA[1] - ERASE_AREA[0])
        aspect = np.exp((2 * aspect - 1) * np.log(ERASE_ASPECT))
        inside = []
        for size, extent, start in zip(batch.shape[2:], (area * aspect, area / aspect), (top, left), strict=True):
            length = np.minimum(np.rint(np.sqrt(extent) * size), size - 1)
            begin = np.floor(start * (size - length + 1))
            place = np.arange(size)
            inside.append((place >= begin[:, None]) & (place < (begin + length)[:, None]))
        hole = inside[0][:, :, None] & inside[1][:, None, :] & (hit < self.erasing)[:, None, None]
        return batch.masked_fill_(torch.from_numpy(hole)[:, None].to(batch.device), 0.0)

    def _crop_flip(self, images: torch.Tensor, index: np.ndarray, epoch: int) -> torch.Tensor:
        """Gather the cropped, flipped pixels in one indexing step."""
        pad, count = self.crop_padding, len(images)
        height, width = (self.crop_size, self.crop_size) if self.crop_size else images.shape[1:3]
        rows, cols = np.arange(height)[None], np.arange(width)[None]
        if self.flip:
            flipped = uniform(self.seed, epoch, index, 0) < 0.5
            cols = np.where(flipped[:, None], cols[:, ::-1], cols)
        if pad:
            images = F.pad(images, (0, 0, pad, pad, pad, pad))
        whole_height, whole_width = images.shape[1:3]
        rows = rows + (uniform(self.seed, epoch, index, 1) * (whole_height - height + 1)).astype(np.int64)[:, None]
        cols = cols + (uniform(self.seed, epoch, index, 2) * (whole_width - width + 1)).astype(np.int64)[:, None]
        rows = rows + np.arange(count)[:, None] * whole_height
        place = torch.from_numpy(rows[:, :, None] * whole_width + cols[:, None, :]).to(images.device)
        return images.view(-1, 3).index_select(0, place.view(-1)).view(count, height, width, 3)

    def _rand_augment(self, images: torch.Tensor, index: np.ndarray, epoch: int) -> torch.Tensor:
        """Run timm's RandAugment, which knows only the global generators: seed them per image, then put them back."""
        from PIL import Image

        assert self._make_policy is not None
        policy = self._make_policy(images.shape[1])
        seeds = random_bits(self.seed, epoch, index, 3) & np.uint64(0xFFFFFFFF)
        state, numpy_state = random.getstate(), np.random.get_state()
        result = np.empty(images.shape, np.uint8)
        try:
            for place, (image, image_seed) in enumerate(zip(images.cpu().numpy(), seeds.tolist(), strict=True)):
                random.seed(image_seed)
                np.random.seed(image_seed)
                result[place] = np.asarray(policy(Image.fromarray(image)))
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
        return torch.from_numpy(result).to(images.device)


def _policy_maker(config: str, fill: tuple[int, int, int]) -> Callable[[int], Any]:
    """Check a RandAugment string and return a function from image size to policy."""
    from timm.data.auto_augment import rand_augment_transform

    def make(size: int) -> Any:
        # 0.45: timm's own bound on translation (timm/data/transforms_factory.py)
        return rand_augment_transform(config, {"translate_const": int(size * 0.45), "img_mean": fill})

    try:
        make(32)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"rand_augment={config!r} is not a RandAugment string such as 'rand-m9-n2-mstd0.5'") from error
    return make
