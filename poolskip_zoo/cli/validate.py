"""``poolskip validate``: accuracy on a test set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "measure a model on the test set that its checkpoint belongs to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments.

    Args:
        parser: The verb's parser.
    """
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
    import json

    from ..data import DATASETS
    from ..training import describe

    scores = _measure(args)
    if args.json:
        print(json.dumps(scores))
    else:
        print(
            f"{args.name} on {DATASETS[scores['dataset']].title}, {scores['images']:,} test images: {describe(scores)}"
        )
    return 0


def measure_run(folder: Path, data_dir: str | None) -> dict[str, Any]:
    """Measure a finished run on its test set, as the verb does with ``--checkpoint``.

    Args:
        folder: The run folder.
        data_dir: Data folder; None takes ``POOLSKIP_DATA_DIR``.

    Returns:
        What ``--json`` prints.

    Raises:
        FileNotFoundError: If data or checkpoint are missing.
        RuntimeError: If the checkpoint does not fit the model.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _measure(parser.parse_args([str(folder), *(("--data-dir", data_dir) if data_dir else ())]))


def name_run(args: argparse.Namespace) -> None:
    """Let a run folder stand for its model and weights.

    Args:
        args: The verb's arguments, which are changed.
    """
    from ..training import load_recipe

    file = Path(args.name, "recipe.yaml")
    if file.is_file() and not args.checkpoint:
        recipe = load_recipe(file)
        args.name = recipe.name if recipe.segments else recipe.model
        args.checkpoint = str(file.with_name("model.safetensors"))


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate by the verb's arguments."""
    import dataclasses

    import torch
    from timm.models import is_model_pretrained

    from ..data import DATASETS, EvalLoader, load_split
    from ..registry.checkpoint import find
    from ..training.build import is_known
    from ..training.evaluate import evaluate

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} must be at least 1")
    name_run(args)
    recipe = recipe_beside(args.name, args.checkpoint)
    if segments(args.name, recipe):
        return _measure_segmentation(args, recipe)
    if args.window or args.overlap is not None:
        raise ValueError(f"{args.name} is no segmentation model: --window and --overlap have no meaning for it")
    if Path(args.name, "config.json").is_file():
        args.name = f"local-dir:{args.name}"
    elsewhere = ":" in args.name  # local-dir: and hf-hub:
    if not elsewhere and not is_known(args.name):
        raise ValueError(f"unknown model {args.name!r}: `poolskip list` shows the names")
    if not elsewhere and not args.checkpoint and not is_model_pretrained(args.name):
        raise ValueError(f"{args.name} has no weights: give --checkpoint, or a name of `poolskip list --pretrained`")
    known: Any = recipe or find(args.name)
    if not (args.dataset or known):
        raise ValueError(f"it is not known what {args.name!r} was trained on: give --dataset")
    dataset = args.dataset or known.dataset
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
    return {"name": args.name, "dataset": dataset, "sha256": _sha256(args), **dataclasses.asdict(scores)}


def _measure_segmentation(args: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    """Evaluate a segmentation model by the verb's arguments."""
    import dataclasses

    import torch

    from ..data import DATASETS
    from ..data.scene_loader import EVAL_BATCH, SceneEvalLoader
    from ..data.scenes import load_scenes
    from ..training.task import make_task

    recipe, model = segmentation_model(args.name, recipe, args.checkpoint)
    if args.dataset not in (None, recipe.dataset):
        raise ValueError(f"{args.name} segments {recipe.dataset}, not {args.dataset!r}")
    window = {"window": args.window, "overlap": args.overlap}
    recipe = dataclasses.replace(recipe, **{key: value for key, value in window.items() if value is not None})
    info = DATASETS[recipe.dataset]
    scenes = load_scenes(recipe.dataset, ("test",), args.data_dir, hold_out=0, download=args.download)[0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = min(args.batch_size, EVAL_BATCH)
    settings: dict[str, Any] = {"mean": info.mean, "std": info.std, "device": device, "batch_size": size}
    loader = SceneEvalLoader(scenes, image_size=recipe.image_size, channels_last=True, **settings)
    scores = make_task(recipe).evaluate(model.to(device, memory_format=torch.channels_last), loader)
    result = {"name": args.name, "dataset": recipe.dataset, "sha256": _sha256(args), **dataclasses.asdict(scores)}
    result |= {"window": recipe.window, "overlap": recipe.overlap}
    return {**result, "class_iou": dict(zip(info.labels or (), scores.class_iou, strict=True))}


def segments(name: str, recipe: Any) -> bool:
    """Tell whether a model gives every pixel a class.

    Args:
        name: Model name with or without tag.
        recipe: The recipe that it was trained by, or None.

    Returns:
        True for a segmentation recipe or recorded checkpoint.

    Raises:
        ValueError: If it is a shipped recipe of segmentation whose weights are not recorded.
    """
    from ..registry.checkpoint import SegmentationCheckpoint, find
    from ..training import load_recipe, recipe_names

    if recipe:
        return recipe.segments
    record = find(name)
    if record is None and name in recipe_names() and load_recipe(name).segments:
        raise ValueError(
            f"no weights of {name} are recorded: train it, then give its run (predict and validate: "
            "--checkpoint FOLDER/model.safetensors, diagnose: the folder)"
        )
    return isinstance(record, SegmentationCheckpoint)


def segmentation_model(name: str, recipe: Any, checkpoint: str | None) -> tuple[Any, Any]:
    """Load a segmentation model: a recorded one, or the weights of a run.

    Args:
        name: Name of the recorded checkpoint.
        recipe: The recipe beside ``checkpoint``, or None for a recorded one.
        checkpoint: Weights of a run.

    Returns:
        The recipe, and the model in evaluation mode on the CPU.

    Raises:
        RuntimeError: If the weights cannot be had or do not fit.
    """
    from ..registry.checkpoint import find
    from ..registry.resolve import local_weights
    from ..registry.segmentation import build_recorded, load_weights
    from ..training import load_recipe
    from ..training.task import make_task

    record: Any = find(name)
    recipe = recipe or load_recipe(record.recipe)
    if checkpoint:
        return recipe, load_weights(make_task(recipe).make_model(trained=True), Path(checkpoint)).eval()
    return recipe, load_weights(build_recorded(record), local_weights(record))


def recipe_beside(name: str, checkpoint: str | None) -> Any:
    """Read the recipe in the folder of a run's weights.

    Args:
        name: Model name with or without tag, which the recipe must be of.
        checkpoint: The weights, or None.

    Returns:
        The recipe, or None without a checkpoint or where there is no recipe beside it.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is of another model.
    """
    if not checkpoint:
        return None
    from ..training import load_recipe

    path = Path(checkpoint)
    if path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} is a folder: give the file, such as {path / 'model.safetensors'}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    beside = path.with_name("recipe.yaml")
    recipe = load_recipe(beside) if beside.is_file() else None
    arch = name.partition(".")[0]
    trained = recipe and (recipe.name if recipe.segments else recipe.model)
    if trained and trained.partition(".")[0] != arch:
        raise ValueError(f"{path} was trained as {trained!r}, not {arch!r} (see {beside})")
    return recipe


def _sha256(args: argparse.Namespace) -> str | None:
    """Hash of the weights, by which `poolskip hub add` knows whose scores these are; None if they are not ours."""
    from ..registry.checkpoint import find
    from ..registry.resolve import sha256_of

    if args.checkpoint:
        return sha256_of(Path(args.checkpoint))
    record = find(args.name)
    return record.sha256 if record else None


def _model(args: argparse.Namespace, recipe: Any, num_classes: int) -> Any:
    """Make the model with its weights."""
    from ..inference import load_model

    if not args.checkpoint:
        model = load_model(args.name)
        if model.num_classes != num_classes:
            raise ValueError(f"{args.name} tells {model.num_classes} classes apart, the data set has {num_classes}")
        return model
    from ..registry.checkpoint import find
    from ..registry.segmentation import load_weights
    from ..training.build import create_classifier

    # A tag names the record, whose arguments the weights may need; a bare name is of the model as it comes.
    arch, dot, _ = args.name.partition(".")
    known: Any = recipe or (find(args.name) if dot else None)
    model_args = {**known.model_args, "pretrained": False} if known else {}
    return load_weights(create_classifier(arch, num_classes, model_args), Path(args.checkpoint))
