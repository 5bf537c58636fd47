"""`poolskip predict`: classes of image files, or of their pixels."""

import argparse
import sys
from typing import Any

from ..contexts import kept

HELP = "classify or segment image files with trained weights"

_BATCH = 32  # images of a forward pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "name", help="model with weights, such as resnet20_cifar_poolskip.c10, or folder of a run or timm"
    )
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes to print per image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per image")
    parser.add_argument("--output", default=".", help="folder for overlays of segmentation (default: this folder)")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights of NAME: `poolskip train`'s, or a file of timm's train.py"
    )
    parser.add_argument("--dataset", help="what --checkpoint was trained on (default: what its recipe.yaml says)")


def run(args: argparse.Namespace) -> int:
    """Print the most likely classes of each image; of segmentation those with most pixels, and draw an overlay."""
    import json

    from ..inference import Classifier, read_image
    from .subject import load

    subject = load(args.name, args.checkpoint, args.dataset)
    if args.dataset not in (None, subject.dataset):
        raise ValueError(
            f"--dataset {args.dataset} says what a --checkpoint without recipe.yaml was trained on; of {args.name} it "
            f"is known: {subject.dataset or 'what its configuration says'}"
        )
    print(f"{args.name}: {subject.weights}, of {subject.dataset or 'data that it does not name'}", file=sys.stderr)
    if subject.segments:
        return _segment(args, subject)
    classifier = Classifier(subject.model)
    _check_top(args.top, classifier.labels)
    for start in range(0, len(args.images), _BATCH):
        paths = args.images[start : start + _BATCH]
        for path, ranked in zip(paths, classifier(map(read_image, paths)), strict=True):
            best = ranked[: args.top]
            if args.json:
                print(json.dumps({"image": path, "classes": [{"label": k, "probability": v} for k, v in best]}))
            else:
                print(f"{path}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in best))
    return 0


def _check_top(top: int, labels: list[str]) -> None:
    if not 1 <= top <= len(labels):
        raise ValueError(f"--top {top}: expected 1 to {len(labels)}")


def _segment(args: argparse.Namespace, subject: Any) -> int:
    """Write an overlay for each image, and print the classes with most pixels."""
    import json
    import os
    from pathlib import Path

    from ..inference import Segmenter, draw_segments, read_image

    stems = [Path(path).stem for path in args.images]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise ValueError(f"two images named {twice} would share an overlay: give them in two calls, with --output")
    recipe = subject.recipe
    segmenter = Segmenter(subject.model, recipe.dataset, recipe.image_size, recipe.window, recipe.overlap)
    _check_top(args.top, segmenter.labels)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output {folder} cannot be written")
    for path, stem in zip(args.images, stems, strict=True):
        image = read_image(path)
        labels = segmenter([image])[0]
        shares = labels.flatten().bincount(minlength=len(segmenter.labels)) / labels.numel()
        best = [
            (segmenter.labels[place], shares[place].item()) for place in shares.argsort(descending=True)[: args.top]
        ]
        overlay = folder / f"{stem}_segmented.png"
        with kept(overlay) as temporary:
            draw_segments(image, [labels], segmenter.labels, segmenter.info.palette).save(temporary, "PNG")
        if args.json:
            classes = [{"label": label, "share": share} for label, share in best]
            print(json.dumps({"image": path, "classes": classes, "overlay": str(overlay)}))
        else:
            print(f"{path}: " + ", ".join(f"{label} {share:.1%}" for label, share in best) + f"; {overlay}")
    return 0
