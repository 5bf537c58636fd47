"""`poolskip diagnose`: what the filters of a model are like, and which do nothing."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .subject import Subject, best_device, load

HELP = "measure a model's filters: sparsity, inert and dead ones, variety, gradients"
# Images of one forward and backward pass.
_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    what = (
        "model of timm or ours (with a tag its weights, else fresh ones), safetensors file, run folder, or a call "
        "of any Python function: 'torchvision.models:vgg16(num_classes=10)'"
    )
    parser.add_argument("name", metavar="MODEL_OR_CHECKPOINT", help=what)
    parser.add_argument("--compare", metavar="OTHER", help="a second one, shown beside the first")
    parser.add_argument("--data-dir", help="data folder (default: the environment variable POOLSKIP_DATA_DIR)")
    parser.add_argument("--dataset", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument(
        "--images", type=int, default=512, metavar="N", help="held-out training images, 0: none (default: 512)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for one picture a measure")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measure one model, or two.

    Returns:
        0.

    Raises:
        ValueError: if a model or data set is unknown, or they do not fit.
        FileNotFoundError: if a file or data are missing.
        OSError: if `--output` cannot be written.
        RuntimeError: if weights cannot be had or do not fit.
        ImportError: if `--output` is given and matplotlib is missing.
    """
    import json

    from ..data.datasets import HOLD_OUT
    from ..diagnostics import diagnose, draw, table
    from ..pictures import new_figure

    if args.images < 0:
        raise ValueError(f"--images {args.images} must be at least 0")
    if args.name == args.compare:
        raise ValueError(f"--compare {args.compare}: the two are the same")
    if args.output:  # what cannot be drawn or written is said before the work
        new_figure(1, 1)
        args.output.mkdir(parents=True, exist_ok=True)
    subjects = [load(name, pretrained=None) for name in (args.name, args.compare) if name]
    # A model whose data are not known is shown those of the model beside it.
    dataset = args.dataset or next((each.dataset for each in subjects if each.dataset), None)
    # Both are shown the same images, held out by both: the fewer are among the more.
    recipes = [each.recipe for each in subjects if each.recipe]
    held_out = min((recipe.hold_out for recipe in recipes if recipe.hold_out > 0), default=HOLD_OUT)
    device = best_device()
    found, facts = [], []
    for subject in subjects:
        subject.dataset = args.dataset or subject.dataset or dataset
        batches = _batches(args, subject, device, held_out)
        found.append(diagnose(subject.model.to(device), batches))
        shown = {"dataset": subject.dataset if batches else None, "seen_in_training": subject.has_seen_all}
        facts.append({"name": subject.name, "weights": subject.weights, **shown})
    if args.json:
        print(json.dumps({"models": [{**fact, **each.to_dict()} for fact, each in zip(facts, found, strict=True)]}))
    else:
        for fact, each in zip(facts, found, strict=True):
            kind = "training images that it has seen" if fact["seen_in_training"] else "held-out training images"
            images = f"{each.images} {kind}, of {fact['dataset']}" if each.images else "weights alone"
            print(f"{fact['name']}: {fact['weights']}; {images}")
            for name, reason in each.left_out.items():
                print(f"  left out: {name}: {reason}")
        print(table(*found))
    if args.output:
        paths = draw(args.output, {subject.name: each for subject, each in zip(subjects, found, strict=True)})
        if not args.json:
            print("\n".join(map(str, paths)))
    return 0


def _batches(args: argparse.Namespace, subject: Subject, device: Any, hold_out: int) -> Any:
    """Batches of held-out images as the model takes them, or None if there is no data folder or none is wanted."""
    from ..data import DATASETS
    from ..data.datasets import SegmentationInfo

    if not args.images or not has_data(args, subject, tuple(DATASETS)):
        return None
    if isinstance(DATASETS[subject.dataset or ""], SegmentationInfo):
        return _scene_batches(args, subject, device)
    return image_batches(subject, args.data_dir, args.images, device, hold_out)


def has_data(args: argparse.Namespace, subject: Subject, known: Sequence[str]) -> bool:
    """Tell whether a verb can show a model images.

    Args:
        args: parsed arguments, `data_dir` and `dataset` among them.
        subject: the model.
        known: the data sets that the verb takes.

    Returns:
        False without a data folder, or where nobody names a data set.

    Raises:
        ValueError: if data are asked for and it is not known which, or the data set is none of these.
    """
    import os

    from ..data.datasets import DATA_DIR_VARIABLE

    asked = args.data_dir or args.dataset
    if not (asked or (os.environ.get(DATA_DIR_VARIABLE) and subject.dataset)):
        return False
    if not subject.dataset:
        raise ValueError(f"it is not known what {subject.name!r} was trained on: give --dataset, of {', '.join(known)}")
    if subject.dataset not in known:
        raise ValueError(f"unknown dataset {subject.dataset!r}: one of {', '.join(known)}")
    return True


def image_batches(
    subject: Subject, data_dir: str | None, images: int, device: Any, hold_out: int, split: str = "val"
) -> Any:
    """Read images of a split as a classifier takes them.

    Args:
        subject: the model, whose data set is known.
        data_dir: data folder; None takes the environment's.
        images: how many, evenly spread.
        device: the model's.
        hold_out: training images that are held out as `val`.
        split: `val` or `test`.

    Returns:
        Batches of images and labels, or of images alone where the classes are not the model's.

    Raises:
        ValueError: if the data set is unknown.
        FileNotFoundError: if data are missing.
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


def _scene_batches(args: argparse.Namespace, subject: Subject, device: Any) -> Any:
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
