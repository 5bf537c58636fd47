"""What a run does for its task, classification or segmentation; the loop around it is the same.

Both classes have the same methods.
"""

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data import DATASETS, EvalLoader, TrainLoader, load_splits
from ..data.augment import Augment
from ..data.scene_augment import SceneAugment
from ..data.scene_loader import SceneEvalLoader, SceneTrainLoader
from ..data.scenes import Scenes, load_scenes
from ..registry.checkpoint import timm_config
from ..registry.segmentation import create_segmentation, smp_config
from . import build
from .evaluate import Batches, Scores, SegmentationScores, evaluate, evaluate_segmentation, pixel_cross_entropy
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

EVAL_BATCH = 250
DataDir = str | os.PathLike[str] | None


class _Task:
    """What both tasks share."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.info: Any = DATASETS[recipe.dataset]

    def _of_loaders(self, accelerator: "Accelerator") -> dict[str, Any]:
        """What all loaders of a run are given: the data set's statistics, not those of the weights it starts from."""
        return {
            "mean": self.info.mean,
            "std": self.info.std,
            "device": accelerator.device,
            "channels_last": self.recipe.channels_last,
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
        }


class Classification(_Task):
    """One class for an image; a timm model."""

    scores: tuple[str, ...] = ("loss", "top1", "top5")

    def make_model(self, trained: bool = False) -> nn.Module:
        """Make the model; for trained weights without those that it started from, which may have to be fetched."""
        first = ("pretrained", "checkpoint_path") if trained else ()
        model_args = {key: value for key, value in self.recipe.model_args.items() if key not in first}
        return build.make_model(dataclasses.replace(self.recipe, model_args=model_args))

    def check_output(self, model: nn.Module) -> None:
        """Refuse a model that does not take the recipe's images."""
        own = self.recipe.image_size or DATASETS[self.recipe.dataset].image_size
        sizes = {own, *(size for _, size in self.recipe.sizes)}
        build.check_output(self.recipe, model, [(size, size) for size in sorted(sizes)])

    def make_loaders(
        self, data_dir: DataDir, download: bool, accelerator: "Accelerator"
    ) -> tuple[TrainLoader, EvalLoader | None]:
        """Make the loaders of training and of held-out images, if any."""
        recipe, info = self.recipe, self.info
        names = ("train", "val") if recipe.hold_out else ("train",)
        splits = load_splits(recipe.dataset, names, data_dir, hold_out=recipe.hold_out, download=download)
        if recipe.train_images:
            splits[0] = splits[0].part(recipe.train_images)
        crop, largest = (recipe.crop_size or [0])[0], min(splits[0].images.shape[1:3]) + 2 * recipe.crop_padding
        if crop > largest:
            raise ValueError(
                f"crop_size={recipe.crop_size} is larger than the images with their padding, {largest} pixels"
            )
        red, green, blue = (round(255 * value) for value in info.mean)
        augment = Augment(
            *(recipe.seed, recipe.crop_padding, crop, recipe.flip, recipe.rand_augment, recipe.random_erasing),
            (red, green, blue),
        )
        shared = {**self._of_loaders(accelerator), "image_size": recipe.image_size or info.image_size}
        settings: dict[str, Any] = {"accumulation": recipe.accumulation, "sizes": recipe.sizes, **shared}
        train = TrainLoader(splits[0], recipe.batch_size, augment, **settings)
        if recipe.mixes and train.micro_size % 2:
            raise ValueError(f"mixup and cutmix need an even batch per forward pass, not {train.micro_size}")
        return train, EvalLoader(splits[1], EVAL_BATCH, **shared) if len(splits) > 1 else None

    def make_criterion(self) -> nn.Module:
        """Make the loss."""
        # mixed labels are smoothed already
        return nn.CrossEntropyLoss(label_smoothing=0.0 if self.recipe.mixes else self.recipe.label_smoothing)

    def evaluate(self, model: nn.Module, loader: Batches, **settings: Any) -> Scores:
        """Measure a model."""
        return evaluate(model, loader, **settings)

    def files(self, model: nn.Module) -> dict[str, Any]:
        """Give timm's config.json, so that `timm.create_model("local-dir:FOLDER")` loads the folder."""
        made: Any = model
        # A base with arguments of our classes is one of them without its Pool Skip: no name of timm's makes it.
        if made.pretrained_cfg["architecture"] != self.recipe.model.partition(".")[0]:
            return {}
        return {"config.json": timm_config(made, self.recipe.dataset)}


class Segmentation(_Task):
    """One class for every pixel; a model of smp."""

    scores: tuple[str, ...] = ("loss", "miou", "pixel_accuracy")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._train: Scenes | None = None

    def make_model(self, trained: bool = False) -> nn.Module:
        """Make the model; for trained weights without the encoder's first ones, which may have to be fetched."""
        model_args = {**self.recipe.model_args, **({"encoder_weights": None} if trained else {})}
        return create_segmentation(self.recipe.model, model_args, self.info.num_classes)

    def check_output(self, model: nn.Module) -> None:
        """Refuse a model that does not take the recipe's images."""
        build.check_output(self.recipe, model, [self.recipe.crop_size])

    def make_loaders(
        self, data_dir: DataDir, download: bool, accelerator: "Accelerator"
    ) -> tuple[SceneTrainLoader, SceneEvalLoader | None]:
        """Make the loaders of training and of held-out images, if any."""
        recipe = self.recipe
        names = ("train", "val") if recipe.hold_out else ("train",)
        splits = load_scenes(recipe.dataset, names, data_dir, hold_out=recipe.hold_out, download=download)
        self._train = splits[0]
        shared = self._of_loaders(accelerator)
        augment = SceneAugment(
            recipe.seed, recipe.crop_size, recipe.image_size, recipe.scale, recipe.flip, recipe.color_jitter
        )
        settings: dict[str, Any] = {"void": self.info.void, "accumulation": recipe.accumulation, **shared}
        train = SceneTrainLoader(splits[0], recipe.batch_size, augment, **settings)
        held_out = SceneEvalLoader(splits[1], image_size=recipe.image_size, **shared) if len(splits) > 1 else None
        return train, held_out

    def make_criterion(self) -> nn.Module:
        """Make the loss of logits and labels, after the loaders: classes may be weighed by the training images."""
        recipe, weights = self.recipe, None
        if recipe.class_weights == "balanced":
            assert self._train is not None
            weights = balanced_weights(self._train, self.info.num_classes)
        return SegmentationLoss(recipe.loss, self.info.void, weights, recipe.label_smoothing)

    def evaluate(self, model: nn.Module, loader: Batches, **settings: Any) -> SegmentationScores:
        """Measure a model."""
        sizes: dict[str, Any] = {"classes": self.info.num_classes, "void": self.info.void}
        windows: dict[str, Any] = {"window": self.recipe.window, "overlap": self.recipe.overlap}
        return evaluate_segmentation(model, loader, **sizes, **windows, **settings)

    def files(self, model: nn.Module) -> dict[str, Any]:
        """Give smp's config.json, so that `smp.from_pretrained` loads the folder."""
        return {"config.json": smp_config(model)}


def make_task(recipe: Recipe) -> Classification | Segmentation:
    """Make the task of a recipe's data set."""
    return Segmentation(recipe) if recipe.segments else Classification(recipe)


class SegmentationLoss(nn.Module):
    """Cross entropy, Dice loss, or their sum.

    Args:
        kind: `ce`, `dice` or `ce+dice`.
        void: label of pixels that do not count.
        weights: (C,) weights of the classes in the cross entropy.
        label_smoothing: of the cross entropy, 0 to 1.

    Shape:
        Logits (B, C, H, W) and labels (B, H, W) int64 to a scalar.
    """

    weights: torch.Tensor | None

    def __init__(self, kind: str, void: int, weights: torch.Tensor | None = None, label_smoothing: float = 0.0) -> None:
        from segmentation_models_pytorch.losses import DiceLoss

        super().__init__()
        self.kind, self.void, self.label_smoothing = kind, void, label_smoothing
        self.register_buffer("weights", weights)
        self.dice = DiceLoss("multiclass", ignore_index=void)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the loss."""
        loss = logits.new_zeros(())
        if "ce" in self.kind.split("+"):
            settings: dict[str, Any] = {"weight": self.weights, "label_smoothing": self.label_smoothing}
            total = pixel_cross_entropy(logits, labels, self.void, reduction="sum", **settings)
            seen = (labels != self.void).float()
            weights = seen if self.weights is None else seen * self.weights[(labels * seen).long()]
            # The mean, and 0 where all is void.
            loss = loss + total / weights.sum().clamp(min=1e-12)
        if "dice" in self.kind.split("+"):
            loss = loss + self.dice(logits, labels)
        return loss


def balanced_weights(scenes: Scenes, classes: int) -> torch.Tensor:
    """Weigh classes by the median frequency over their own (Eigen and Fergus 2015, as SegNet's training): (C,) float32.

    A class's frequency is its share of the pixels of the images that it occurs in; one that never occurs weighs 0.
    """
    counts = torch.tensor([count[:classes].tolist() for count in scenes.count_labels()], dtype=torch.float64)
    own = counts.sum(0)
    frequency = own / (counts.sum(1, keepdim=True) * (counts > 0)).sum(0)
    present = own > 0
    return torch.where(present, frequency[present].median() / frequency, 0).float()
