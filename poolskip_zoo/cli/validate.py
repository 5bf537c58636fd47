"""`poolskip validate`: accuracy on a test set."""

import argparse
from pathlib import Path
from typing import Any

HELP = "measure a model on the test set that its checkpoint belongs to"
_WAY_OUT = "give --checkpoint, or a name of `poolskip list --pretrained`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "name",
        help="model name with or without tag, such as resnet20_cifar_poolskip.c10, or a folder of a run or timm's",
    )
    parser.add_argument("--data-dir", help="data folder (default: the environment variable POOLSKIP_DATA_DIR)")
    parser.add_argument("--dataset", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights: model.safetensors of `poolskip train`, or a file of timm's train.py",
    )
    parser.add_argument("--batch-size", type=int, default=250, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, nargs=2, metavar=("H", "W"), help="segment by a sliding window (default: the recipe's)"
    )
    parser.add_argument("--overlap", type=float, help="share of a window that the next covers too (default: the same)")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR or Pascal VOC")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the scores on the test set."""
    import json

    from ..data import DATASETS
    from ..training import describe

    scores = _measure(args)
    if args.json:
        print(json.dumps(scores))
    else:
        info = DATASETS[scores["dataset"]]
        print(f"{args.name} on {info.title}, {scores['images']:,} {info.tested_on} images: {describe(scores)}")
    return 0


def measure_run(folder: Path, data_dir: str | None) -> dict[str, Any]:
    """What `poolskip validate FOLDER --json` prints of a finished run; `data_dir` None takes `POOLSKIP_DATA_DIR`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--", str(folder)])
    args.data_dir = data_dir
    return _measure(args)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate by the verb's arguments."""
    import dataclasses

    from timm.models import is_model_pretrained

    from ..registry.catalogue import is_name
    from ..registry.checkpoint import find
    from .subject import load

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    unknown = ValueError(f"what {args.name!r} was trained on is unknown: give --dataset")
    if is_model_pretrained(args.name) and not (args.dataset or args.checkpoint or find(args.name)):
        raise unknown  # before weights of timm's are fetched
    subject = load(args.name, args.checkpoint, args.dataset, way_out=_WAY_OUT)
    if subject.segments and args.dataset not in (None, subject.dataset):
        raise ValueError(f"{args.name} segments {subject.dataset}, not {args.dataset!r}")
    subject.dataset = args.dataset or subject.dataset
    if not subject.dataset:
        raise unknown
    scores = (_segmentation if subject.segments else _classification)(args, subject)
    # A run's folder goes by the name that its record will have.
    of_run = subject.recipe and not (is_name(args.name) or args.checkpoint)
    told = {"name": subject.recipe.name if of_run else args.name, "dataset": subject.dataset, "sha256": subject.sha256}
    return {**told, **dataclasses.asdict(scores.pop("scores")), **scores}


def _classification(args: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """Evaluate a classifier."""
    import torch

    from ..data import DATASETS, EvalLoader, load_split
    from ..training.evaluate import evaluate
    from .subject import best_device

    if args.window or args.overlap is not None:
        raise ValueError(f"{args.name} is not a segmentation model: --window and --overlap have no meaning for it")
    size, classes = subject.input_size[1], DATASETS[subject.dataset].num_classes
    if subject.model.num_classes != classes:
        raise ValueError(f"{args.name} has {subject.model.num_classes} classes, the data set has {classes}")
    config = subject.model.pretrained_cfg
    split = load_split(subject.dataset, "test", args.data_dir, download=args.download)
    device = best_device()
    loader = EvalLoader(
        split,
        args.batch_size,
        mean=config["mean"],
        std=config["std"],
        image_size=size,
        device=device,
        channels_last=True,
    )
    return {"scores": evaluate(subject.model.to(device, memory_format=torch.channels_last), loader)}


def _segmentation(args: argparse.Namespace, subject: Any) -> dict[str, Any]:
    """Evaluate a segmentation model."""
    import dataclasses

    import torch

    from ..data import DATASETS
    from ..data.scene_loader import EVAL_BATCH, SceneEvalLoader
    from ..data.scenes import load_scenes
    from ..training.task import Segmentation
    from .subject import best_device

    window = {"window": args.window, "overlap": args.overlap}
    recipe = dataclasses.replace(subject.recipe, **{key: value for key, value in window.items() if value is not None})
    info = DATASETS[recipe.dataset]
    scenes = load_scenes(recipe.dataset, ("test",), args.data_dir, hold_out=0, download=args.download)[0]
    device = best_device()
    size = min(args.batch_size, EVAL_BATCH)
    settings: dict[str, Any] = {"mean": info.mean, "std": info.std, "device": device, "batch_size": size}
    loader = SceneEvalLoader(scenes, image_size=recipe.image_size, channels_last=True, **settings)
    scores = Segmentation(recipe).evaluate(subject.model.to(device, memory_format=torch.channels_last), loader)
    by_label = dict(zip(info.labels or (), scores.class_iou, strict=True))
    return {"scores": scores, "window": recipe.window, "overlap": recipe.overlap, "class_iou": by_label}
