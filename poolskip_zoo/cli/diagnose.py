"""`poolskip diagnose`: what the filters of a model are like, and which do nothing."""

import argparse
from pathlib import Path
from typing import Any

from .subject import Subject, best_device, load

HELP = "measure a model's filters: sparsity, inert and dead ones, variety, gradients"


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
    """Print the measures of one model, or of two, and draw them with `--output`."""
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
    from .images import has_data, image_batches, scene_batches

    if not args.images or not has_data(args, subject, tuple(DATASETS)):
        return None
    if isinstance(DATASETS[subject.dataset or ""], SegmentationInfo):
        return scene_batches(args, subject, device)
    return image_batches(subject, args.data_dir, args.images, device, hold_out)
