"""``poolskip validate``: accuracy on a test set."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "measure a model on the test set that its checkpoint belongs to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument("name", help="model name with or without tag, such as resnet20_cifar_poolskip.c10_e20")
    parser.add_argument("--data-dir", help="data folder (default: the environment variable POOLSKIP_DATA_DIR)")
    parser.add_argument("--dataset", help="data set (default: the one that the checkpoint was trained on)")
    parser.add_argument("--checkpoint", metavar="FILE", help="model.safetensors that `poolskip train` wrote")
    parser.add_argument("--batch-size", type=int, default=250, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10 or CIFAR-100")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Validate.

    Args:
        args: The verb's arguments.

    Returns:
        Exit code.

    Raises:
        ValueError: If the data set is not known, or model and data set do not fit.
        FileNotFoundError: If data or checkpoint are missing.
        RuntimeError: If the checkpoint does not fit the model.
    """
    import dataclasses
    import json

    import torch

    from ..data import DATASETS, EvalLoader, load_split
    from ..training.evaluate import evaluate

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    recipe = _recipe(args)
    dataset = args.dataset or (recipe.dataset if recipe else _dataset(args.name))
    if dataset not in DATASETS:
        raise ValueError(f"unknown dataset {dataset!r}: one of {', '.join(DATASETS)}")
    info = DATASETS[dataset]
    model = _model(args, recipe, info.num_classes)
    config: dict[str, Any] = {"mean": info.mean, "std": info.std, "input_size": (3, info.image_size, info.image_size)}
    if args.checkpoint and recipe and recipe.image_size:
        config["input_size"] = (3, recipe.image_size, recipe.image_size)
    elif not args.checkpoint:
        config = model.pretrained_cfg  # what the weights were made with
    split = load_split(dataset, "test", args.data_dir, download=args.download)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = EvalLoader(
        split,
        args.batch_size,
        mean=config["mean"],
        std=config["std"],
        image_size=config["input_size"][1],
        device=device,
        channels_last=True,
    )
    scores = evaluate(model.to(device, memory_format=torch.channels_last), loader)
    if args.json:
        print(json.dumps({"name": args.name, "dataset": dataset, **dataclasses.asdict(scores)}))
    else:
        print(
            f"{args.name} on {info.title}, {scores.images:,} test images: "
            f"top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} %, loss {scores.loss:.4f}"
        )
    return 0


def _recipe(args: argparse.Namespace) -> Any:
    """Return the recipe in the folder of ``--checkpoint``, or None."""
    from pathlib import Path

    from ..training import load_recipe

    if not args.checkpoint:
        return None
    path = Path(args.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    beside = path.with_name("recipe.yaml")
    recipe = load_recipe(beside) if beside.is_file() else None
    arch = args.name.partition(".")[0]
    if recipe is not None and recipe.model.partition(".")[0] != arch:
        raise ValueError(f"{path} was trained as {recipe.model!r}, not {arch!r} (see {beside})")
    return recipe


def _dataset(name: str) -> str:
    """Return the name of the data set that a checkpoint was trained on."""
    from ..registry.checkpoint import find

    record = find(name)
    if record is None:
        raise ValueError(f"it is not known what {name!r} was trained on: give --dataset")
    return record.dataset


def _model(args: argparse.Namespace, recipe: Any, num_classes: int) -> Any:
    """Make the model with its weights."""
    import timm

    import poolskip_zoo  # noqa: F401  registers the models

    if not timm.is_model(args.name):
        raise ValueError(f"unknown model {args.name!r}: `poolskip list` shows the names")
    if not args.checkpoint:
        model = timm.create_model(args.name, pretrained=True)
        if model.num_classes != num_classes:
            raise ValueError(f"{args.name} tells {model.num_classes} classes apart, the data set has {num_classes}")
        return model
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model_args = recipe.model_args if recipe else {}
    model = timm.create_model(args.name.partition(".")[0], num_classes=num_classes, **model_args)
    try:
        model.load_state_dict(load_file(args.checkpoint))
    except SafetensorError as error:
        raise RuntimeError(f"{args.checkpoint} is no readable safetensors file: {error}") from error
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise RuntimeError(f"{args.checkpoint} does not fit {args.name}: {message[:300]}") from error
    return model
