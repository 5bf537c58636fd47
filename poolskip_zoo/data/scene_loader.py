"""Batches of images with a label for each pixel: of training images pure functions of (seed, epoch, step)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .loader import ShuffledBatches
from .scene_augment import SceneAugment, scaled_size
from .scenes import Item, Scenes

READERS = 8  # threads that read and augment what is not in memory
EVAL_BATCH = 8  # images in memory; larger ones come one by one, for their logits fill the memory


class SceneBatches:
    """Items on a device, turned into normalised float batches.

    Args:
        scenes: the images.
        mean: three channel means, 0 to 1.
        std: three channel standard deviations, 0 to 1.
        device: where batches are made.
        channels_last: memory layout of a batch.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self,
        scenes: Scenes,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank, self.world = rank, world
        self.in_memory = isinstance(scenes.items, list)
        self.items: Sequence[Item] = scenes.items
        if self.in_memory:
            self.items = [(image.to(device), labels.to(device)) for image, labels in scenes.items]
        self.mean, self.std, self.device = list(mean), list(std), device
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Turn (3, H, W) uint8 into float32 on the device, by the data set's statistics."""
        from torchvision.transforms.v2 import functional

        pixels = functional.to_dtype(image.to(self.device), torch.float32, scale=True)
        return functional.normalize(pixels, self.mean, self.std)


class SceneTrainLoader(SceneBatches, ShuffledBatches):
    """Shuffled, augmented training batches of one process.

    What is not in memory is read ahead by threads, one batch.

    Args:
        scenes: training images.
        batch_size: images per optimizer step over all processes and accumulation steps.
        augment: the augmentation; its seed also shuffles, its crop is the size of a batch.
        void: label that fills what a smaller image leaves of the crop; the image is filled with the mean.
        accumulation: forward passes per optimizer step and process.
        settings: keywords of `SceneBatches`.

    Raises:
        ValueError: if the batch is not divisible, or larger than the split.
    """

    def __init__(
        self,
        scenes: Scenes,
        batch_size: int,
        augment: SceneAugment,
        *,
        void: int,
        accumulation: int = 1,
        **settings: Any,
    ) -> None:
        SceneBatches.__init__(self, scenes, **settings)
        ShuffledBatches.__init__(self, len(scenes), batch_size, augment.seed, self.rank, self.world, accumulation)
        self.augment, self.void = augment, void
        self._pool = None if self.in_memory else ThreadPoolExecutor(READERS)
        self._ahead: tuple[tuple[int, int, int], Iterator[Item]] = ((-1, 0, 0), iter(()))

    def batch(self, epoch: int, step: int, micro: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Make one batch.

        Args:
            epoch: epoch, from 0.
            step: optimizer step within the epoch, 0 to `steps - 1`.
            micro: accumulation step, from 0.

        Returns:
            Images (B, 3, h, w) float32 and labels (B, h, w) int64, B = batch_size / (world * accumulation).
        """
        key = (epoch, step, micro)
        augmented = self._ahead[1] if self._ahead[0] == key else self._read(key)
        if self._pool is not None:
            update, next_micro = divmod((epoch * self.steps + step) * self.accumulation + micro + 1, self.accumulation)
            following = (*divmod(update, self.steps), next_micro)
            self._ahead = (following, self._read(following))
        size = (self.micro_size, *self.augment.crop)
        labels = torch.full(size, self.void, dtype=torch.int64, device=self.device)
        images = torch.zeros(self.micro_size, 3, *self.augment.crop, device=self.device)
        images = images.contiguous(memory_format=self.layout)
        for place, (pixels, targets) in enumerate(augmented):
            height, width = targets.shape
            images[place, :, :height, :width] = self.normalise(pixels)
            labels[place, :height, :width] = targets.to(self.device)
        return images, labels

    def _read(self, key: tuple[int, int, int]) -> Iterator[Item]:
        """Read and augment the images of a batch: now if there are threads, else when the iterator is asked."""
        index = self.index(*key)

        def make(place: int) -> Item:
            return self.augment(*self.items[place], place, key[0])

        return map(make, index.tolist()) if self._pool is None else self._pool.map(make, index.tolist())


class SceneEvalLoader(SceneBatches):
    """Images in order, without augmentation; of several processes each takes every `world`-th batch.

    Args:
        scenes: images.
        image_size: shorter side that images are resized to, in pixels; 0 leaves them. Labels stay as they are.
        batch_size: images in memory per batch; others come one by one.
        settings: keywords of `SceneBatches`.
    """

    def __init__(self, scenes: Scenes, *, image_size: int, batch_size: int = EVAL_BATCH, **settings: Any) -> None:
        super().__init__(scenes, **settings)
        self.image_size, self.batch_size = image_size, batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(self.rank * self.batch_size, len(self.items), self.world * self.batch_size):
                places = range(start, min(start + self.batch_size, len(self.items)))
                read = map if self.in_memory else pool.map
                items = list(read(self._item, places))
                if self.in_memory and len({labels.shape for _, labels in items}) == 1:
                    yield self._stack(items)
                else:
                    yield from (self._stack([item]) for item in items)

    def _item(self, place: int) -> Item:
        from torchvision.transforms.v2 import functional

        image, labels = self.items[place]
        return functional.resize(image, list(scaled_size(labels.shape, self.image_size)), antialias=True), labels

    def _stack(self, items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([self.normalise(image) for image, _ in items])
        labels = torch.stack([labels.to(self.device) for _, labels in items])
        return images.contiguous(memory_format=self.layout), labels.long()
