"""The weights that a run starts from, where its recipe names some."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..layers import pool_skip_modules
from ..registry.checkpoint import WEIGHTS, find
from ..registry.resolve import local_weights
from .recipe import Recipe
from .state import run_folder


def init_file(recipe: Recipe, output: Path) -> Path:
    """Find the weights that `init` names: a path, the finished run of that name and the same seed, or a checkpoint.

    Raises FileNotFoundError if there are none, RuntimeError if a checkpoint's cannot be had.
    """
    path = Path(recipe.init)
    if path.is_file():
        return path
    if path.name != recipe.init:
        raise FileNotFoundError(f"{recipe.name} starts from init={recipe.init!r}, and there is no such file")
    run = run_folder(output, dataclasses.replace(recipe, name=recipe.init, init=""))
    if (run / WEIGHTS).is_file():
        return run / WEIGHTS
    checkpoint = find(recipe.init) if "." in recipe.init else None
    if checkpoint is None:
        raise FileNotFoundError(
            f"{recipe.name} starts from init={recipe.init!r}, and there is no such file, no checkpoint of that name, "
            f"and no finished run in {run}: `poolskip train {recipe.init} --output {output}` comes first. For timm's "
            "own weights set model_args.pretrained=true"
        )
    return local_weights(checkpoint)


def init_weights(path: Path, model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read weights for a model that may have Pool Skip and another number of classes beyond them.

    Args:
        path: a safetensors file.
        model: the model, with fresh weights.

    Returns:
        The model's whole state, Pool Skip at zero where the file has none, so that the output is the base model's; and
        the names of tensors that stay fresh, those of a last layer for other classes.

    Raises:
        ValueError: if the file is damaged or of another model.
    """
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"init: {path} is not a readable safetensors file: {error}") from error
    own = model.state_dict()
    skips = tuple(f"{name}." for name in pool_skip_modules(model))
    if skips and not any(key.startswith(skips) for key in given):
        given.update({key: torch.zeros_like(value) for key, value in own.items() if key.startswith(skips)})
    other = [key for key in own if key in given and given[key].shape != own[key].shape]
    lacking, excess = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    classes_alone = all(given[key].shape[1:] == own[key].shape[1:] for key in other)
    if lacking or excess or not classes_alone or len({key.rpartition(".")[0] for key in other}) > 1:
        named = [*lacking, *excess, *other]
        raise ValueError(
            f"init: {path} is of another model: of {len(own)} tensors it lacks {len(lacking)}, has {len(excess)} in "
            f"excess and {len(other)} of another shape ({', '.join(named[:3])}{', …' if len(named) > 3 else ''})"
        )
    return given | {key: own[key] for key in other}, other


def init_seconds(recipe: Recipe, path: Path) -> float:
    """Seconds of training of the first weights, by the `metrics.json` beside them or their record; 0 without either."""
    metrics = path.with_name("metrics.json")
    if metrics.is_file():
        return float(json.loads(metrics.read_text(encoding="utf-8")).get("seconds", 0))
    checkpoint = find(recipe.init) if "." in recipe.init and not Path(recipe.init).is_file() else None
    return 3600 * checkpoint.hours if checkpoint else 0.0
