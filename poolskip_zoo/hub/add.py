"""From a finished training run to a checkpoint's folder and record."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..registry.checkpoint import Checkpoint
from ..registry.resolve import sha256_of
from .card import write_card
from .verify import WEIGHTS, verify_folder

__all__ = ["add_run", "record_source"]


def add_run(run: Path, scores: dict[str, Any], cards: Path) -> Checkpoint:
    """Make a checkpoint's folder from a finished run.

    Args:
        run: folder of `poolskip train`, with `model.safetensors` and `metrics.json`.
        scores: what `poolskip validate --json` printed for these weights.
        cards: folder of checkpoints, `hub_cards/` of a checkout.

    Returns:
        The record, to be put into the family's file in `registry/`.

    Raises:
        ValueError: if the run is not finished, the scores are not its own, or other weights of this name are there.
        RuntimeError: if the weights do not fit the model.
    """
    weights, metrics_file = run / WEIGHTS, run / "metrics.json"
    for path in (weights, metrics_file):
        if not path.is_file():
            raise ValueError(f"{run} is no finished run: it has no {path.name}")
    metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
    name = metrics["name"]
    if scores.get("name") not in (name, metrics["model"]) or scores.get("dataset") != metrics["dataset"]:
        raise ValueError(
            f"{run} is {name} on {metrics['dataset']}, "
            f"the scores are of {scores.get('name')} on {scores.get('dataset')}"
        )
    _check_weights(weights)
    sha256 = sha256_of(weights)
    folder = cards / name
    if (folder / WEIGHTS).is_file() and sha256_of(folder / WEIGHTS) != sha256:
        raise ValueError(f"{folder} has other weights; weights are never replaced: give the new ones another tag")
    record = Checkpoint(
        name=name,
        dataset=metrics["dataset"],
        sha256=sha256,
        # Rounding takes away 92.34000000000001, and nothing else: a share of up to 50,000 images has 4 places or fewer.
        metrics={key: round(scores[key], 4) for key in ("top1", "top5")},
        recipe=name,
        seed=metrics["seed"],
        hardware=metrics["hardware"],
        hours=round(metrics["seconds"] / 3600, 3),
        images_per_second=metrics["images_per_second"],
        torch=metrics["versions"]["torch"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, folder / f".{WEIGHTS}")
    (folder / f".{WEIGHTS}").replace(folder / WEIGHTS)
    write_card(record, folder)
    verify_folder(record, folder)
    return record


def record_source(record: Checkpoint) -> str:
    """Write a record as source text.

    Args:
        record: the checkpoint.

    Returns:
        Python, as the formatter leaves it, for the `CHECKPOINTS` of a family's file.
    """
    metrics = ", ".join(f'"{key}": {value!r}' for key, value in record.metrics.items())
    values = {
        "name": _quoted(record.name),
        "dataset": _quoted(record.dataset),
        "sha256": _quoted(record.sha256),
        "metrics": f"{{{metrics}}}",
        "recipe": _quoted(record.recipe),
        "seed": str(record.seed),
        "hardware": _quoted(record.hardware),
        "hours": repr(record.hours),
        "images_per_second": repr(record.images_per_second),
        "torch": _quoted(record.torch) if record.torch else None,
    }
    lines = "".join(f"        {key}={value},\n" for key, value in values.items() if value is not None)
    return f"    Checkpoint(\n{lines}    ),"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _check_weights(path: Path) -> None:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.float().abs().max() if tensor.numel() else 0)):
            raise ValueError(f"{path}: {key} is not finite")
