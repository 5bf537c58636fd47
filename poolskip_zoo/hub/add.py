"""From a finished training run to a checkpoint's folder and record."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..contexts import kept
from ..registry.catalogue import base_name
from ..registry.checkpoint import CARRIED, WEIGHTS, Checkpoint, SegmentationCheckpoint
from ..registry.resolve import sha256_of
from .card import write_card
from .verify import verify_folder

__all__ = ["add_run", "record_source"]

# Of a run's metrics.json, what a record is made of.
_NEEDED = {"name", "model", "dataset", "seed", "hardware", "seconds", "images_per_second", "versions"}


def add_run(
    run: Path, scores: dict[str, Any], cards: Path, base: Path | None = None, *, weights: bool = True
) -> Checkpoint:
    """Make a checkpoint's folder from a finished run.

    Args:
        run: folder of `poolskip train`, with `model.safetensors` and `metrics.json`.
        scores: what `poolskip validate --json` printed for these weights.
        cards: folder of checkpoints, `hub_cards/` of a checkout.
        base: finished run of the base by the same recipe, with its `scores.json`, where its weights are not published.
        weights: keep the weights; else the folder has the card alone.

    Returns:
        The record, to be put into the family's file in `registry/`.

    Raises:
        ValueError: if the run is not finished, the scores are not its own, or other weights of this name are there.
        RuntimeError: if the weights do not fit the model.
    """
    source, metrics_file = run / WEIGHTS, run / "metrics.json"
    for path in (source, metrics_file):
        if not path.is_file():
            raise ValueError(f"{run} is not a finished run: it has no {path.name}")
    metrics = _read(metrics_file)
    name = metrics["name"]
    if name != Path(name).name:  # the folder of its card
        raise ValueError(f"{metrics_file}: name {name!r} is not a plain file name such as resnet20_cifar.c10")
    if (
        scores.get("name") not in (name, name.partition(".")[0], metrics["model"])
        or scores.get("dataset") != metrics["dataset"]
    ):
        raise ValueError(
            f"{run} is {name} on {metrics['dataset']}, "
            f"the scores are of {scores.get('name')} on {scores.get('dataset')}"
        )
    _check_weights(source)
    sha256 = sha256_of(source)
    if scores.get("sha256") not in (None, sha256):
        raise ValueError(f"the scores are of other weights than {source}: sha256 {scores['sha256']}, not {sha256}")
    for key in ("window", "overlap"):
        if key in scores and scores[key] != metrics[key]:
            raise ValueError(f"the scores were measured with {key}={scores[key]}, the recipe has {metrics[key]}")
    folder = cards / name
    new = not folder.exists()
    if (folder / WEIGHTS).is_file() and sha256_of(folder / WEIGHTS) != sha256:
        raise ValueError(f"{folder} has other weights; weights are never replaced: give the new ones another tag")
    record = _record(metrics, scores, sha256 if weights else "", _base_scores(name, base))
    try:
        if weights:
            with kept(folder / WEIGHTS) as temporary:
                shutil.copyfile(source, temporary)
        write_card(record, folder)
        if weights:
            verify_folder(record, folder)
    except BaseException:
        if new:  # or the next weights of this name would be refused
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return record


def _read(path: Path) -> dict[str, Any]:
    """Read what a run or a measurement wrote."""
    try:
        values = json.loads(path.read_bytes())
        if path.name == "metrics.json" and (lacking := _NEEDED - set(values)):
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return values


def _base_scores(name: str, base: Path | None) -> dict[str, float]:
    """What a run of the base tells."""
    if base is None:
        return {}
    metrics, scores = (
        _read(base / file) if (base / file).is_file() else {} for file in ("metrics.json", "scores.json")
    )
    arch, _, tag = name.partition(".")
    expected = f"{base_name(arch)}.{tag}"
    if metrics.get("name") != expected or expected == name or not scores:
        raise ValueError(f"{base} is not a finished run of {expected}, measured by `poolskip train-many --test`")
    hours = round(metrics["seconds"] / 3600, 3)
    return {**_rounded(scores), "hours": hours, "images_per_second": metrics["images_per_second"]}


def _rounded(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that a record keeps."""
    # Of accuracies this takes away 92.34000000000001 alone: a share of up to 50,000 images has 4 places or fewer.
    names = ("miou", "pixel_accuracy") if "miou" in scores else ("top1", "top5")
    try:
        return {key: round(scores[key], 4) for key in names}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the scores lack a number for {' or '.join(names)}: {scores}") from error


def _record(metrics: dict[str, Any], scores: dict[str, Any], sha256: str, base_scores: dict[str, float]) -> Checkpoint:
    """Make the record of a run."""
    values: dict[str, Any] = {
        "name": metrics["name"],
        "dataset": metrics["dataset"],
        "sha256": sha256,
        "metrics": _rounded(scores),
        "base_scores": base_scores,
        "recipe": metrics["name"],
        "seed": metrics["seed"],
        "hardware": metrics["hardware"],
        "hours": round(metrics["seconds"] / 3600, 3),
        "images_per_second": metrics["images_per_second"],
        "torch": metrics["versions"]["torch"],
    }
    if "miou" not in scores:
        carried = {key: value for key, value in metrics.get("model_args", {}).items() if key in CARRIED}
        return Checkpoint(**values, model_args=carried)
    iou = tuple(value if value is None else round(value, 2) for value in scores["class_iou"].values())
    own = {key: metrics[key] for key in ("model", "model_args", "image_size", "overlap")}
    return SegmentationCheckpoint(**values, **own, window=tuple(metrics["window"]), class_iou=iou)


def record_source(record: Checkpoint) -> str:
    """Write a record as Python, as the formatter leaves it, for the `CHECKPOINTS` of a family's file."""
    lines = ""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if value != default:
            # The formatter wants double quotes.
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value).replace("'", '"')
            lines += f"        {field.name}={text},\n"
    return f"    {type(record).__name__}(\n{lines}    ),"


def _check_weights(path: Path) -> None:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{path}: {key} is not finite")
