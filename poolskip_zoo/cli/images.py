"""Images that the verbs show a model."""

import argparse
from collections.abc import Sequence
from typing import Any

from .subject import Subject

# Images of one forward and backward pass.
_BATCH = 64


def has_data(args: argparse.Namespace, subject: Subject, known: Sequence[str]) -> bool:
    """Whether a verb can show a model images: not without a data folder, or where nobody names a data set.

    Raises ValueError if data are asked for and it is not known which, or the data set is none that the verb takes.
    """
    import os

    from ..data.datasets import DATA_DIR_VARIABLE

    asked = args.data_dir or args.dataset
    if not (asked or (os.environ.get(DATA_DIR_VARIABLE) and subject.dataset)):
        return False
    if not subject.dataset:
        raise ValueError(f"what {subject.name!r} was trained on is unknown: give --dataset, one of {', '.join(known)}")
    if subject.dataset not in known:
        raise ValueError(f"unknown dataset {subject.dataset!r}: one of {', '.join(known)}")
    return True


def image_batches(
    subject: Subject, data_dir: str | None, images: int, device: Any, hold_out: int, split: str = "val"
) -> Any:
    """Batches of images and labels of a split as a classifier takes them: `images` of its images, evenly spread.

    They have no labels where the classes are not the model's; `hold_out` training images are held out as `val`.
    """
    from ..data import DATASETS, EvalLoader, Split, load_split

    info = DATASETS[subject.dataset or ""]
    whole = load_split(subject.dataset or "", split, data_dir, hold_out=hold_out)
    chosen = _spread(len(whole), images)
    part = Split(whole.images[chosen], whole.labels[chosen], whole.classes)
    mean, std, size = info.mean, info.std, info.image_size
    if config := getattr(subject.model, "pretrained_cfg", None):
        mean, std, size = config["mean"], config["std"], config["input_size"][1]
    loader = EvalLoader(part, _BATCH, mean=mean, std=std, image_size=size, device=device)
    # Labels of other classes than the model's say nothing of its loss.
    labelled = getattr(subject.model, "num_classes", None) == info.num_classes
    return loader if labelled else (images for images, _ in loader)


def scene_batches(args: argparse.Namespace, subject: Subject, device: Any) -> Any:
    """Whole images, padded as segmentation models of smp need it, without labels."""
    from torch.nn import functional as F

    from ..data import DATASETS
    from ..data.scene_loader import SceneEvalLoader
    from ..data.scenes import Scenes, load_scenes

    if not subject.segments:
        raise ValueError(
            f"{subject.name} does not segment, or no recipe.yaml says how: give --images 0, or a --dataset with one "
            "label for an image"
        )
    if subject.dataset != subject.recipe.dataset:
        raise ValueError(f"{subject.name} segments {subject.recipe.dataset}, not {subject.dataset!r}")
    info = DATASETS[subject.recipe.dataset]
    scenes = load_scenes(subject.recipe.dataset, ("val",), args.data_dir, hold_out=subject.recipe.hold_out)[0]
    items = [scenes.items[place] for place in _spread(len(scenes), args.images).tolist()]
    settings: dict[str, Any] = {"image_size": subject.recipe.image_size, "device": device, "batch_size": 1}
    loader = SceneEvalLoader(Scenes(items, scenes.classes), mean=info.mean, std=info.std, **settings)
    return (F.pad(x, (0, -x.shape[3] % 32, 0, -x.shape[2] % 32)) for x, _ in loader)


def _spread(count: int, wanted: int) -> Any:
    """Indices evenly spread over a split."""
    import torch

    return torch.linspace(0, count - 1, min(wanted, count)).round().long()
