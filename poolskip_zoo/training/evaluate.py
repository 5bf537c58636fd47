"""Accuracy and loss of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Scores:
    """Result of an evaluation.

    Args:
        top1: Share of images whose class scores highest, per cent.
        top5: Share of images whose class is among the five highest, per cent.
        loss: Mean cross entropy, natural logarithm.
        images: Number of images.
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Scores:
    """Evaluate a classifier; it is put into evaluation mode and back.

    Args:
        model: Images (B, 3, H, W) to logits (B, classes).
        loader: Batches of images and integer labels, on the model's device.
        autocast: Makes the context of a forward pass.
        reduce: Sums a tensor over processes, where each has a part of the images.

    Returns:
        The scores over all images.

    Raises:
        ValueError: If there are no images.
    """
    was_training = model.training
    model.eval()
    sums: torch.Tensor | None = None
    try:
        for images, labels in loader:
            with autocast():
                logits = model(images)
            part = _sums(logits.float(), labels)
            sums = part if sums is None else sums + part
    finally:
        model.train(was_training)
    if reduce is not None:
        device = next(model.parameters()).device
        sums = reduce(torch.zeros(4, dtype=torch.float64, device=device) if sums is None else sums)
    if sums is None or not sums[3]:
        raise ValueError("there are no images to evaluate on")
    top1, top5, loss, count = sums.tolist()
    return Scores(100 * top1 / count, 100 * top5 / count, loss / count, int(count))


def _sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return hits at 1 and at 5, summed loss and count as four float64."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    count = torch.tensor(float(len(labels)), dtype=torch.float64, device=logits.device)
    return torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss, count])
