"""What the card of a segmentation model says that others do not."""

from typing import Any

from ..data import DATASETS
from ..registry.checkpoint import SegmentationCheckpoint

__all__ = ["COST_SIZE", "GOLDEN_SIZE", "USE", "class_table", "limit", "what"]

# Segmentation models take any size. Of the golden input: small, for the output has a number for each class and pixel.
GOLDEN_SIZE = (3, 32, 64)
COST_SIZE = (3, 256, 256)

USE = """\
```python
import poolskip_zoo  # registers its encoders and heads with smp
import segmentation_models_pytorch as smp
import torch

# or the path of a copy of this folder
model = smp.from_pretrained("{repo}").eval()
logits = model(torch.rand(1, {shape}))  # (1, {classes}, {spatial}); height and width are multiples of 32
```

Images are RGB, resized to a shorter side of {side}, and normalised with mean {mean} and standard deviation {std}.
`poolskip predict {name} IMAGE` does that and draws the result over the image."""


def use(record: SegmentationCheckpoint) -> str:
    """Write in Markdown how to load a segmentation model."""
    data = DATASETS[record.dataset]
    return USE.format(
        name=record.name,
        repo=record.hub_id.partition("@")[0],
        shape=", ".join(map(str, COST_SIZE)),
        spatial=", ".join(map(str, COST_SIZE[1:])),
        classes=data.num_classes,
        side=f"{record.image_size or data.image_size} pixels" if record.image_size or data.image_size else "any size",
        mean=data.mean,
        std=data.std,
    )


def what(record: SegmentationCheckpoint) -> str:
    """Say in one sentence how a segmentation model is made, and from what its encoder started."""
    arguments: dict[str, Any] = record.model_args
    encoder, weights = arguments.get("encoder_name", "resnet34"), arguments.get("encoder_weights")
    start = f"the weights `{weights}`" if weights else "random weights"
    import segmentation_models_pytorch as smp

    ours = smp.MODEL_ARCHITECTURES_MAPPING[record.model].__module__.startswith(__name__.partition(".")[0])
    whose = "poolskip-zoo's" if ours else "smp's"
    return f"It is {whose} `{record.model}` on the encoder `{encoder}`, which started from {start}."


def class_table(record: SegmentationCheckpoint) -> str:
    """Write the intersection over union of each class as a table in Markdown."""
    lines = ["| class | IoU, % |", "|---|---|"]
    for label, value in zip(DATASETS[record.dataset].labels or (), record.class_iou, strict=True):
        lines.append(f"| {label} | {'–' if value is None else f'{value:.2f}'} |")
    return "\n".join(lines)


def limit(record: SegmentationCheckpoint) -> str:
    """Say in one sentence what a segmentation model knows."""
    data = DATASETS[record.dataset]
    size = f"with a shorter side of {record.image_size} pixels" if record.image_size else "of their own size"
    return (
        f"It was trained and measured on images {size}; the scores are at the labels' full resolution. It knows only "
        f"the {data.num_classes} classes of its data set."
    )
