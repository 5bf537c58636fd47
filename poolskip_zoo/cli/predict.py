"""`poolskip predict`: classes of image files."""

import argparse

HELP = "classify image files with trained weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments.

    Args:
        parser: parser of this verb.
    """
    parser.add_argument("name", help="model with weights, for example resnet20_cifar_poolskip.c10_e20")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes to print per image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per image")


def run(args: argparse.Namespace) -> int:
    """Print the most likely classes of each image.

    Args:
        args: parsed arguments.

    Returns:
        0.

    Raises:
        ValueError: if `--top` is not between 1 and the number of classes, or the model has no weights.
        OSError: if a file is missing or no image.
    """
    import json

    from ..inference import Classifier, read_image

    classifier = Classifier.from_pretrained(args.name)
    if not 1 <= args.top <= len(classifier.labels):
        raise ValueError(f"--top {args.top}: expected 1 to {len(classifier.labels)}")
    images = [read_image(path) for path in args.images]
    for path, ranked in zip(args.images, classifier(images), strict=True):
        best = ranked[: args.top]
        if args.json:
            print(json.dumps({"image": path, "classes": [{"label": k, "probability": v} for k, v in best]}))
        else:
            print(f"{path}: " + ", ".join(f"{label} {probability:.1%}" for label, probability in best))
    return 0
