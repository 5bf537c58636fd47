"""What a run keeps on disk, and the random state that it does not need to keep.

Exact resume rests on three things: a batch is a pure function of (seed, epoch, step) (`poolskip_zoo.data.loader`);
every random number drawn while a step runs comes from generators seeded by (seed, step, rank) (`seed_step`); and a
checkpoint holds everything else at full precision. So no generator's state is saved.
"""

import dataclasses
import errno
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..contexts import explain_full_disk, write_atomic
from ..data.augment import random_bits
from ..registry.checkpoint import WEIGHTS
from .recipe import Recipe, make_recipe, read_yaml

CHECKPOINT = "last.pt"
DIVERGED = "diverged.txt"  # says why, of a run whose loss was no longer finite
# All that is written into a run's folder
FILES = (
    *("recipe.yaml", CHECKPOINT, "metrics.jsonl", WEIGHTS, "config.json", "metrics.json", "curves.png"),
    DIVERGED,
    "tensorboard",
    *("scores.json", "parts"),  # of train-many
    "diagnosis.json",  # of study
)
_STEP_STREAM = 98  # of random_bits: generators within a step


def run_folder(output: str | os.PathLike[str], recipe: Recipe) -> Path:
    """Folder of a run: `<output>/<name>-s<seed>`."""
    return Path(output) / f"{recipe.name}-s{recipe.seed}"


def finished_metrics(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Read the metrics of a finished run, after a check that the folder's run is the same one.

    Args:
        folder: the run folder.
        recipe: the run that is meant.

    Returns:
        What `metrics.json` holds, or None if the run is not finished, or has lost its weights and can write them
        again.

    Raises:
        ValueError: if the folder holds a run of another recipe, or a file in it is damaged.
    """
    path, checkpoint, weights = (folder / name for name in ("metrics.json", CHECKPOINT, WEIGHTS))
    if not (path.exists() or checkpoint.exists() or weights.exists()):
        return None  # a run that ended before its first checkpoint, by its recipe perhaps, is none
    try:
        written = make_recipe(read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder} holds a damaged recipe.yaml: start over with --no-resume ({error})") from error
    theirs, ours = dataclasses.asdict(written), dataclasses.asdict(recipe)
    changed = [f"{key} {theirs[key]!r} -> {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if changed:
        raise ValueError(
            f"{folder} holds a run of another recipe ({'; '.join(changed)}): "
            "give another name or --output, or start over with --no-resume"
        )
    if checkpoint.exists() and not weights.exists():
        return None
    try:  # metrics.json is written last
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: start over with --no-resume ({error})") from error


def open_folder(folder: Path, resume: bool) -> int | None:
    """Make or clear a run folder, and lock it until the returned descriptor is closed; None where there are no locks.

    `resume` clears half-written files alone. RuntimeError if another process trains in it, or the disk is full.
    """
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    for path in (*folder.glob(".tmp*"), *(folder / name for name in FILES if not resume)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return lock


def _lock(folder: Path) -> int | None:
    """Lock the folder itself: no file is left behind, and the system takes the lock of a killed process back."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise RuntimeError(f"another process trains in {folder}: wait for it, or give another --output") from error
        return None  # some network file systems have no locks
    return lock


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every global generator for one forward and backward pass (dropout, stochastic depth, mixup).

    `step` is the number of the pass, counted over the whole run, from 0.
    """
    bits = int(random_bits(seed, step, np.array([rank]), _STEP_STREAM)[0])
    random.seed(bits)
    np.random.seed(bits & 0xFFFFFFFF)
    torch.manual_seed(bits >> 1)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a run's state: tensors, numbers, strings, lists and dicts alone, so that it loads without pickled code.

    Raises RuntimeError if the disk is full; the last checkpoint is intact.
    """
    buffer = io.BytesIO()  # torch.save straight to a full disk fails with an internal error instead of ENOSPC
    torch.save(state, buffer)
    path = folder / CHECKPOINT
    kept = f"the last checkpoint {path} is intact: " if path.exists() else ""
    write_atomic(path, buffer.getbuffer(), kept)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read the state of a run, None where there is none; RuntimeError if the file is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["recipe"]  # what another program wrote has none
        return state
    except Exception as error:
        kind = type(error).__name__
        raise RuntimeError(f"checkpoint {path} cannot be read ({kind}): start over with --no-resume") from error


def save_weights(path: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Write a model's state as safetensors, floating-point tensors as `dtype` unless one would overflow in it.

    Raises RuntimeError if the disk is full.
    """
    from safetensors.torch import save

    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point() and (not tensor.numel() or tensor.abs().max() <= torch.finfo(dtype).max):
            tensor = tensor.to(dtype)
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format)  # safetensors refuses shared tensors
    write_atomic(path, save(tensors, {"format": "pt"}))
