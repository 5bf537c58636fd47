"""`poolskip pack`: a data set's folders as the packs that training reads."""

import argparse
from pathlib import Path

HELP = "pack the images of CIFAR-10 (JPEG copy) or Tiny ImageNet for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("dataset", help="cifar10_jpeg or tiny_imagenet_jpeg")
    parser.add_argument("source", type=Path, help="its folder as it comes: CIFAR-10-images, tiny-imagenet-200")
    parser.add_argument("data_dir", type=Path, metavar="DATA", help="data folder to write to")


def run(args: argparse.Namespace) -> int:
    """Write the packs, and print their paths."""
    from ..data.make_packs import make_packs

    print("\n".join(map(str, make_packs(args.dataset, args.source, args.data_dir))))
    return 0
