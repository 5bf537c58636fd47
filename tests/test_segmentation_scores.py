"""Losses, weights of classes, scores and sliding windows of segmentation."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from poolskip_zoo.data.scenes import Scenes
from poolskip_zoo.inference import segment
from poolskip_zoo.training import evaluate_segmentation
from poolskip_zoo.training.task import SegmentationLoss, balanced_weights


def example(classes: int = 5, void: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, classes, (3, 8, 10))
    labels[:, :2] = void
    return torch.randn(3, classes, 8, 10), labels


def test_losses_are_the_libraries_and_ignore_void() -> None:
    logits, labels = example()
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    ce = F.cross_entropy(logits, labels, weights, ignore_index=9, label_smoothing=0.1)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=9)(logits, labels)
    for kind, expected in (("ce", ce), ("dice", dice), ("ce+dice", ce + dice)):
        loss = SegmentationLoss(kind, 9, weights, 0.1)
        torch.testing.assert_close(loss(logits, labels), expected)
        changed = logits.clone()
        changed[:, :, :2] += 5 * torch.randn(3, 5, 2, 10)
        torch.testing.assert_close(loss(changed, labels), expected)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])])
def test_a_batch_without_a_labelled_pixel_has_no_loss(weights: torch.Tensor | None) -> None:
    logits = example()[0].requires_grad_()
    for label in (9,) if weights is None else (9, 0):  # void, or of a class without weight
        loss = SegmentationLoss("ce", 9, weights)(logits, torch.full((3, 8, 10), label))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0
        assert not gradient.any()


def test_balanced_weights_are_median_frequency_over_frequency() -> None:
    maps = [[[0, 0, 0, 1], [0, 0, 0, 9]], [[0, 0, 2, 2], [0, 0, 0, 9]]]
    items = [(torch.zeros(3, 2, 4).byte(), torch.tensor(each).byte()) for each in maps]
    # Frequencies: 11/14 of both images, 1/7 of the first, 2/7 of the second; void pixels count nowhere.
    expected = torch.tensor([(2 / 7) / (11 / 14), (2 / 7) / (1 / 7), 1.0, 0.0])
    torch.testing.assert_close(balanced_weights(Scenes(items, []), 4), expected)


# --- scores


class Repeat(nn.Module):
    """Returns its input as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_scores_are_those_of_the_confusion_matrix() -> None:
    logits, labels = example()
    labels[labels == 4] = 1
    logits[:, 4] = -9  # neither in the labels nor in the results
    batches = [(logits[:2], labels[:2]), (logits[2:], labels[2:])]
    scores = evaluate_segmentation(Repeat(), batches, classes=5, void=9)
    seen = (labels != 9).numpy()
    matrix = np.zeros((5, 5))
    np.add.at(matrix, (labels.numpy()[seen], logits.argmax(1).numpy()[seen]), 1)
    hits = matrix.diagonal()
    with np.errstate(invalid="ignore"):
        iou = 100 * hits / (matrix.sum(0) + matrix.sum(1) - hits)
    assert scores.class_iou[4] is None
    assert scores.class_iou[:4] == pytest.approx(iou[:4])
    assert scores.miou == pytest.approx(iou[:4].mean())
    assert scores.pixel_accuracy == pytest.approx(100 * hits.sum() / seen.sum())
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels, ignore_index=9).item(), rel=1e-6)
    assert scores.images == 3
    # Of two processes each has one batch; summed, they have the scores of all.
    parts: list[torch.Tensor] = []

    def keep(sums: torch.Tensor) -> torch.Tensor:
        parts.append(sums)
        return sum(parts[1:], parts[0])

    for batch in batches:
        together = evaluate_segmentation(Repeat(), [batch], classes=5, void=9, reduce=keep)
    assert together == scores
    with pytest.raises(ValueError, match="no images"):
        evaluate_segmentation(Repeat(), [], classes=5, void=9)
    with pytest.raises(ValueError, match="no labelled pixels"):
        evaluate_segmentation(Repeat(), [(logits, torch.full_like(labels, 9))], classes=5, void=9)


def test_scores_are_at_the_resolution_of_the_labels() -> None:
    labels = torch.zeros(1, 16, 24, dtype=torch.int64)
    labels[:, :, 10:] = 1
    logits = F.one_hot(labels, 2).permute(0, 3, 1, 2).float()
    half = F.interpolate(logits, (8, 12), mode="bilinear", antialias=True)
    scores = evaluate_segmentation(Repeat(), [(half, labels)], classes=2, void=9)
    assert scores.pixel_accuracy == 100


class Shape(nn.Module):
    """Refuses sizes that are no multiple of 32, and is pointwise, so that windows change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] % 32 == x.shape[3] % 32 == 0
        self.calls.append(tuple(x.shape[2:]))
        return torch.cat([x, -x], 1)


@pytest.mark.parametrize(
    ("window", "overlap", "calls"),
    [((), 0.5, 1), ((64, 64), 0.5, 8), ((64, 64), 0.0, 6), ((96, 200), 0.25, 1), ((32, 224), 0.0, 3)],
)
def test_sliding_windows_cover_everything_once_averaged(window: tuple, overlap: float, calls: int) -> None:
    x, model = torch.randn(2, 3, 90, 130), Shape()
    logits = segment(model, x, (90, 130), window, overlap)
    torch.testing.assert_close(logits, torch.cat([x, -x], 1))
    assert len(model.calls) == calls
