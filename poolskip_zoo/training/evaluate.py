"""Scores of a classifier, and of a segmentation model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..contexts import evaluating
from ..inference import segment

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
# Scores in words, in the order in which they are told.
_WORDS = {
    "miou": "mIoU {:.2f} %",
    "pixel_accuracy": "pixel accuracy {:.2f} %",
    "top1": "top-1 {:.2f} %",
    "top5": "top-5 {:.2f} %",
    "loss": "loss {:.4f}",
}


@dataclass(frozen=True)
class Scores:
    """Result of an evaluation.

    Args:
        top1: share of images whose class scores highest, per cent.
        top5: share of images whose class is among the five highest, per cent.
        loss: mean cross entropy, natural logarithm.
        images: number of images.
    """

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class SegmentationScores:
    """Result of an evaluation of segmentation; void pixels count nowhere.

    Args:
        miou: mean over the classes of intersection over union, per cent.
        pixel_accuracy: share of pixels whose class scores highest, per cent.
        loss: mean cross entropy over pixels, natural logarithm.
        images: number of images.
        class_iou: intersection over union by label, over all images at once, per cent; None of a class that is
            neither in the labels nor in the results, which the mean leaves out.
    """

    miou: float
    pixel_accuracy: float
    loss: float
    images: int
    class_iou: list[float | None]


def describe(scores: Mapping[str, Any]) -> str:
    """Tell scores in words.

    Args:
        scores: scores of either kind, by name.

    Returns:
        For example `top-1 91.25 %, top-5 99.50 %, loss 0.2821`.
    """
    return ", ".join(words.format(scores[key]) for key, words in _WORDS.items() if key in scores)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Scores:
    """Evaluate a classifier; it is put into evaluation mode and back.

    Args:
        model: images (B, 3, H, W) to logits (B, classes).
        loader: batches of images and integer labels, on the model's device.
        autocast: makes the context of a forward pass.
        reduce: sums a tensor over processes, where each has a part of the images.

    Returns:
        The scores over all images.

    Raises:
        ValueError: if there are no images.
    """
    sums = _sum_batches(model, loader, lambda images, labels: model(images), _sums, 4, autocast, reduce)
    top1, top5, loss, count = sums.tolist()
    return Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))


@torch.inference_mode()
def evaluate_segmentation(
    model: nn.Module,
    loader: Batches,
    *,
    classes: int,
    void: int,
    window: Sequence[int] = (),
    overlap: float = 0.5,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> SegmentationScores:
    """Evaluate a segmentation model at the resolution of the labels; it is put into evaluation mode and back.

    Args:
        model: images (B, 3, h, w) to logits (B, classes, h, w).
        loader: batches of images and labels (B, H, W), on the model's device; the sizes may differ.
        classes: number of classes.
        void: label of pixels that do not count.
        window: height and width of a sliding window, in pixels of the images; empty for whole images.
        overlap: share of a window that its neighbours cover too, 0 to 0.9.
        autocast: makes the context of a forward pass.
        reduce: sums a tensor over processes, where each has a part of the images.

    Returns:
        The scores over all images.

    Raises:
        ValueError: if there are no images, or none with a label.
    """
    from segmentation_models_pytorch.metrics import get_stats

    def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return segment(model, images, labels.shape[1:], window, overlap)

    def sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Its histogram has no repeatable kernel on a GPU, where that is asked for.
        place = "cpu" if torch.are_deterministic_algorithms_enabled() else labels.device
        settings: dict[str, Any] = {"mode": "multiclass", "num_classes": classes, "ignore_index": void}
        counts = get_stats(logits.argmax(1).to(place), labels.to(place), **settings)[:3]
        loss = pixel_cross_entropy(logits, labels, void, reduction="none").double().sum()
        rest = torch.stack([loss, torch.tensor(float(len(labels)), dtype=torch.float64, device=loss.device)])
        return torch.cat([*(count.sum(0).double().to(loss.device) for count in counts), rest])

    total = _sum_batches(model, loader, forward, sums, 3 * classes + 2, autocast, reduce).cpu()
    hits, excess, missed = total[:-2].view(3, classes)
    pixels = (hits + missed).sum().item()
    if not pixels:
        raise ValueError("there are no labelled pixels to evaluate on")
    seen = hits + excess + missed
    iou = [100 * hit / all_ if all_ else None for hit, all_ in zip(hits.tolist(), seen.tolist(), strict=True)]
    known = [value for value in iou if value is not None]
    loss, images = total[-2:].tolist()
    accuracy = 100 * hits.sum().item() / pixels
    return SegmentationScores(sum(known) / len(known), accuracy, loss / pixels, int(images), iou)


def pixel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, void: int, **settings: Any) -> torch.Tensor:
    """Compute the cross entropy over a list of pixels, since a GPU has no repeatable kernel for maps.

    `logits` is (B, C, H, W), `labels` (B, H, W) int64; `settings` are more keywords of `cross_entropy`.
    """
    rows = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    return F.cross_entropy(rows, labels.flatten(), ignore_index=void, **settings)


def _sum_batches(
    model: nn.Module,
    loader: Batches,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sums: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    length: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    reduce: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Sum what every batch gives, `length` float64 with the number of images at the end, over the processes too."""
    total: torch.Tensor | None = None
    with evaluating(model):
        for images, labels in loader:
            with autocast():
                logits = forward(images, labels)
            if logits.device.type == "mps":  # it has no float64
                logits, labels = logits.cpu(), labels.cpu()
            part = sums(logits.float(), labels)
            total = part if total is None else total + part
    if reduce is not None:
        device = next(model.parameters()).device
        total = reduce(torch.zeros(length, dtype=torch.float64, device=device) if total is None else total)
    if total is None or not total[-1]:
        raise ValueError("there are no images to evaluate on")
    return total


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return hits at 1 and at 5, summed loss and count as four float64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    count = torch.tensor(float(len(labels)), dtype=torch.float64, device=logits.device)
    return torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss, count])
