"""Batches of images held in memory.

A training batch is a pure function of (seed, epoch, step): there is no iterator whose state a resumed run would have
to restore. `batch_size` counts the images of one optimizer step over all processes and accumulation steps, so that
the same images make up a step on one device and on many.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .augment import Augment, random_bits
from .datasets import Split

_ORDER_STREAM = 99  # of random_bits: the order of an epoch


class Images:
    """Images on a device, turned into normalised float batches.

    Args:
        split: the images.
        mean: three channel means, 0 to 1.
        std: three channel standard deviations, 0 to 1.
        image_size: height and width of a batch; other sizes are resized to it.
        device: where the images are kept.
        channels_last: memory layout of a batch.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank, self.world = rank, world
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.image_size, self.channels_last = image_size, channels_last
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(1, 3, 1, 1))
        self.shift = -torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255 * self.scale

    def to_batch(self, pixels: torch.Tensor, size: int = 0) -> torch.Tensor:
        """Normalise (B, H, W, 3) uint8 to (B, 3, S, S) float32; S is `image_size` where no size is given."""
        size = size or self.image_size
        batch = pixels.permute(0, 3, 1, 2)  # a channels_last view: no copy
        batch = torch.addcmul(self.shift, batch.float(), self.scale)
        if batch.shape[2:] != (size, size):
            batch = F.interpolate(batch, (size, size), mode="bilinear", antialias=True)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return batch.contiguous(memory_format=layout)


class ShuffledBatches:
    """Which images make up a training batch of one process.

    Args:
        count: number of training images.
        batch_size: images per optimizer step over all processes and accumulation steps.
        seed: seed of the run, >= 0.
        rank: number of this process.
        world: number of processes.
        accumulation: forward passes per optimizer step and process.

    Raises:
        ValueError: if the batch is not divisible, or larger than `count`.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world: int, accumulation: int) -> None:
        if batch_size % (world * accumulation):
            raise ValueError(
                f"batch_size={batch_size} is not divisible by {world} process(es) x accumulation={accumulation}"
            )
        if batch_size > count:
            raise ValueError(f"batch_size={batch_size} is larger than the {count} training images")
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.accumulation, self.micro_size = accumulation, batch_size // (world * accumulation)
        self.steps = count // batch_size  # what is left over waits for another epoch's order
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def index(self, epoch: int, step: int, micro: int = 0) -> np.ndarray:
        """Indices (B,) int64 of a batch's images, B = batch_size / (world * accumulation).

        `step` is the optimizer step within the epoch, `micro` the accumulation step; all count from 0.
        """
        start = step * self.batch_size + (micro * self.world + self.rank) * self.micro_size
        return self._epoch_order(epoch)[start : start + self.micro_size]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Shuffle by sorting random bits: the order depends on seed and epoch alone, not on a generator's version."""
        if self._order[0] != epoch:
            bits = random_bits(self.seed, epoch, np.arange(self.count), _ORDER_STREAM)
            self._order = (epoch, np.argsort(bits, kind="stable"))
        return self._order[1]


class TrainLoader(Images, ShuffledBatches):
    """Shuffled, augmented training batches of one process.

    Args:
        split: training images.
        batch_size: images per optimizer step over all processes and accumulation steps.
        augment: the augmentation; its seed also shuffles.
        accumulation: forward passes per optimizer step and process.
        sizes: pairs of an epoch, rising from 0, and the height and width from then on, in place of `image_size`.
        settings: keywords of `Images`.

    Raises:
        ValueError: if the batch is not divisible, or larger than the split.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        augment: Augment,
        *,
        accumulation: int = 1,
        sizes: Sequence[Sequence[int]] = (),
        **settings: Any,
    ) -> None:
        Images.__init__(self, split, **settings)
        ShuffledBatches.__init__(self, len(split), batch_size, augment.seed, self.rank, self.world, accumulation)
        self.augment, self.sizes = augment, sizes

    def batch(self, epoch: int, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one batch.

        Args:
            epoch: epoch, from 0.
            step: optimizer step within the epoch, 0 to `steps - 1`.
            micro: accumulation step, from 0.

        Returns:
            Images (B, 3, S, S) float32 and labels (B,) int64, B = batch_size / (world * accumulation).
        """
        index = self.index(epoch, step, micro)
        chosen = torch.from_numpy(index).to(self.images.device)
        pixels = self.augment.pixels(self.images[chosen], index, epoch)
        size = next((size for start, size in reversed(self.sizes) if start <= epoch), 0)
        return self.augment.erase(self.to_batch(pixels, size), index, epoch), self.labels[chosen]


class EvalLoader(Images):
    """Batches in order, without augmentation; of several processes each takes every `world`-th batch.

    Args:
        split: images.
        batch_size: images per batch.
        settings: keywords of `Images`.
    """

    def __init__(self, split: Split, batch_size: int, **settings: Any) -> None:
        super().__init__(split, **settings)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(self.rank * self.batch_size, len(self.labels), self.world * self.batch_size):
            stop = start + self.batch_size
            yield self.to_batch(self.images[start:stop]), self.labels[start:stop]
