"""A list of runs, one after another within a time limit."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..contexts import write_atomic
from ..registry.checkpoint import WEIGHTS
from .loop import train
from .metrics import write_json
from .recipe import RECIPE_DIR, Recipe, load_recipe, read_file
from .state import DIVERGED, finished_metrics, run_folder

SUMMARY = "results.csv"
COLUMNS = ("name", "seed", "state", "parameters", "epochs", "hours", "hardware")  # then the scores, as val_ and test_
_ENTRY_KEYS = ("recipe", "seeds", "set", "grid")


@dataclass(frozen=True)
class Outcome:
    """How one run of a list ended.

    Args:
        recipe: the run.
        state: `finished`, `stopped` (by the time limit; the next call goes on), `waiting` or `failed`.
        metrics: what `metrics.json` holds, of a finished run.
        scores: what the measurement on the test set returned, of a finished run.
        error: one line, of a failed run.
    """

    recipe: Recipe
    state: Literal["finished", "stopped", "waiting", "failed"]
    metrics: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None
    error: str = ""


def load_list(
    source: str | os.PathLike[str], output: str | os.PathLike[str] = "runs", share: tuple[int, int] = (1, 1)
) -> list[Recipe]:
    """Read a list of runs.

    A YAML list; an entry is the name or path of a recipe, or a mapping of `recipe`, `seeds` (default: the
    recipe's own), `set` (keys that override the recipe's) and `grid`. A grid is a list of mappings like `set`:
    each of its points is trained with the first seed, and the one of best held-out accuracy with the other seeds too.

    Args:
        source: the file, or the name of a shipped list such as `c10`.
        output: folder of run folders, where the results on a grid are found.
        share: (i, n) takes every n-th entry from the i-th on, counted from 1, for n calls beside each other.

    Returns:
        One recipe for each entry and seed, in order; of a grid the first seed's alone until all of these are finished.

    Raises:
        FileNotFoundError: if the file or a recipe is missing.
        ValueError: if the list is malformed, two runs would share a folder, a grid's results are of other recipes, or
            there is no such share.
    """
    shipped = RECIPE_DIR / "lists" / f"{source}.yaml"
    path = Path(source) if Path(source).is_file() or not shipped.is_file() else shipped
    if not path.is_file():
        names = ", ".join(sorted(each.stem for each in shipped.parent.glob("*.yaml")))
        raise FileNotFoundError(f"no file {str(source)!r} and no shipped list of that name; shipped: {names}")
    entries = read_file(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a YAML list of recipes")
    part, parts = share
    if not 1 <= part <= parts <= len(entries):
        raise ValueError(f"share {part}/{parts}: expected I/N, I of 1 to N, N at most {len(entries)}, the entries")
    expanded = [list(_expand(path, entry, Path(output))) for entry in entries]
    folders = [(recipe.name, recipe.seed) for recipes in expanded for recipe in recipes]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise ValueError(f"{path} has {twice[0]} with seed {twice[1]} twice: give one another name in `set`")
    return [recipe for recipes in expanded[part - 1 :: parts] for recipe in recipes]


def _expand(path: Path, entry: Any, output: Path) -> Iterator[Recipe]:
    """Yield the recipes of one entry."""
    entry = {"recipe": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("recipe"), str) or set(entry) - set(_ENTRY_KEYS):
        raise ValueError(f"{path}: {entry!r} must be the name of a recipe, or a mapping of {', '.join(_ENTRY_KEYS)}")
    changes, seeds, grid = entry.get("set") or {}, entry.get("seeds"), entry.get("grid", [{}])
    if not isinstance(changes, dict) or not isinstance(seeds, list | None) or seeds == []:
        raise ValueError(f"{path}: in {entry!r}, seeds must be a list of one or more, and set a mapping")
    if not isinstance(grid, list) or not grid or not all(isinstance(point, dict) for point in grid):
        raise ValueError(f"{path}: in {entry!r}, grid must be a list of mappings")
    if any({"name", "seed"} & set(point) for point in grid):
        raise ValueError(f"{path}: in {entry!r}, the grid has name or seed: `set` names a run, `seeds` lists its seeds")
    points = []
    for point in grid:
        recipe = load_recipe(
            entry["recipe"],
            [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in (changes | point).items()],
        )
        points.append(dataclasses.replace(recipe, name="_".join([recipe.name, *(f"{k}{v}" for k, v in point.items())])))
    seeds = [points[0].seed] if seeds is None else seeds
    first = [dataclasses.replace(point, seed=seed) for seed in seeds[:1] for point in points]
    yield from first
    if not seeds[1:]:
        return
    unjudged = next((recipe.name for recipe in first if len(first) > 1 and recipe.hold_out == 0), None)
    if unjudged:
        raise ValueError(f"{path}: {unjudged} holds out no images (hold_out=0), by which a grid chooses for more seeds")
    best = first[0] if len(first) == 1 else _best(first, output)
    if best is not None:
        yield from (dataclasses.replace(best, seed=seed) for seed in seeds[1:])


def _best(recipes: list[Recipe], output: Path) -> Recipe | None:
    """Return the run of best held-out accuracy, the earlier of equal ones, or None if not all are finished.

    One that has diverged is the worst; if all have, there is none.
    """
    scores = []
    for recipe in recipes:
        metrics = finished_metrics(run_folder(output, recipe), recipe)
        if metrics is None and not (run_folder(output, recipe) / DIVERGED).exists():
            return None
        scores.append(held_out_accuracy(metrics) if metrics else -math.inf)
    return recipes[scores.index(max(scores))] if max(scores) > -math.inf else None


def held_out_accuracy(metrics: dict[str, Any]) -> float:
    """Held-out top-1 or mIoU, per cent, in a `metrics.json`, to choose by; ValueError if no images were held out."""
    scores = metrics["val"]
    if not scores:
        raise ValueError(f"{metrics['name']} held out no images: there is nothing to choose by")
    return scores["top1"] if "top1" in scores else scores["miou"]


def summary_name(share: tuple[int, int] = (1, 1)) -> str:
    """File name of the table of runs, one for each share."""
    return SUMMARY if share[1] == 1 else SUMMARY.replace(".", f"-{share[0]}of{share[1]}.")


def train_list(
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] = "runs",
    *,
    share: tuple[int, int] = (1, 1),
    limit_seconds: float = 0,
    **settings: Any,
) -> list[Outcome]:
    """Train a list, and the runs that join it as its grids are decided; arguments and errors as for `load_list` too.

    Args:
        source: the list.
        data_dir: data folder; None takes `POOLSKIP_DATA_DIR`.
        output: folder of run folders.
        share: which entries.
        limit_seconds: time for all of them together, 0 for no limit.
        settings: more keywords of `train_many`.

    Returns:
        The outcomes, in order.
    """
    begun = time.monotonic()
    recipes, left = load_list(source, output, share), limit_seconds
    settings["summary"], outcomes = summary_name(share), list[Outcome]()
    while True:
        failed = [outcome for outcome in outcomes if outcome.state == "failed"]
        outcomes = train_many(recipes, data_dir, output, limit_seconds=left, failed=failed, **settings)
        known = load_list(source, output, share)
        left = _agreed(limit_seconds - (time.monotonic() - begun) if limit_seconds else 0)
        if known == recipes or (limit_seconds and left <= 0):
            return outcomes
        recipes = known


def train_many(
    recipes: Iterable[Recipe],
    data_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str] = "runs",
    *,
    limit_seconds: float = 0,
    part_size: str = "",
    measure: Callable[[Path], dict[str, Any]] | None = None,
    summary: str = SUMMARY,
    failed: Iterable[Outcome] = (),
    **settings: Any,
) -> list[Outcome]:
    """Train runs in order, each from where it was stopped; a failed one does not keep the others.

    In several processes it does: one that failed alone cannot tell the others, which torchrun ends.

    Beside the runs' folders, a table has a line for each run of the list.

    Args:
        recipes: the runs, as `load_list` returns them.
        data_dir: data folder; None takes `POOLSKIP_DATA_DIR`.
        output: folder of run folders.
        limit_seconds: time for all of them together, 0 for no limit; what is not finished goes on in the next call.
        part_size: also leave the weights in files of at most this size, such as `"16MB"`; empty for none.
        measure: makes test scores of a finished run's folder; kept in its `scores.json`.
        summary: file name of the table.
        failed: outcomes of runs that are not tried once more.
        settings: more keywords of `train`.

    Returns:
        The outcomes, in order.

    Raises:
        ValueError: if `limit_seconds` is negative or `part_size` no size.
        Exception: in several processes, whatever ended a run.
    """
    if limit_seconds < 0:
        raise ValueError(f"limit_seconds={limit_seconds} must be at least 0")
    if part_size and not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", part_size, re.IGNORECASE):
        raise ValueError(f"part_size {part_size!r} is not a number with KB, MB, GB or TB, such as 16MB")
    recipes, end = list(recipes), time.monotonic() + limit_seconds
    known = {run_folder(output, outcome.recipe): outcome for outcome in failed}
    outcomes = [known.get(run_folder(output, recipe), Outcome(recipe, "waiting")) for recipe in recipes]
    main = os.environ.get("RANK", "0") == "0"  # of torchrun's processes the one that writes
    for place, recipe in enumerate(recipes):
        left = _agreed(end - time.monotonic()) if limit_seconds else 0
        late = limit_seconds > 0 and left <= 0
        folder = run_folder(output, recipe)
        if folder in known:
            continue
        try:
            if late:  # what was finished before has its line all the same
                metrics = finished_metrics(folder, recipe)
            else:
                metrics = train(recipe, data_dir, output, limit_seconds=left, **settings)
            if metrics is None:
                outcomes[place] = Outcome(recipe, "waiting" if late else "stopped")
            else:
                scores = scores_on_test(folder, measure if main and not late else None)
                if part_size and main:
                    split_weights(folder, part_size)
                outcomes[place] = Outcome(recipe, "finished", metrics, scores)
        except Exception as error:  # one line each, whatever a library raises
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise  # the other processes may wait for this one; torchrun ends them
            kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
            outcomes[place] = Outcome(recipe, "failed", error=kind + " ".join(str(error).split()))
        if main:
            _write_summary(Path(output) / summary, outcomes)
    return outcomes


def _agreed(value: Any) -> Any:
    """Process 0's value in all processes of torchrun, whose clocks differ: all train a run, or none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def scores_on_test(folder: Path, measure: Callable[[Path], dict[str, Any]] | None) -> dict[str, Any] | None:
    """Measure a run on the test set once: later calls read what was written, or None where there is nothing.

    `measure` makes the scores; None only reads.
    """
    path = folder / "scores.json"
    if not path.exists() and measure is not None:
        write_json(path, measure(folder))
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def split_weights(folder: Path, part_size: str) -> None:
    """Leave a run's weights also as parts, the Hub's sharded form: `parts/` with an index.

    Parts are of at most `part_size`, such as `"16MB"`, or one larger tensor; ValueError if it is not understood.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import load_file

    parts = folder / "parts"
    if not parts.exists():
        with tempfile.TemporaryDirectory(prefix=".tmp", dir=folder) as temporary:
            new = Path(temporary) / "parts"
            new.mkdir()
            save_torch_state_dict(load_file(folder / WEIGHTS), new, max_shard_size=part_size)
            new.replace(parts)


def join_weights(folder: str | os.PathLike[str]) -> None:
    """Make a run's `model.safetensors` again from its parts, equal to the byte.

    Args:
        folder: the run folder.

    Raises:
        FileNotFoundError: if there is neither, or a part is missing.
    """
    from safetensors.torch import load_file, save

    path, parts = Path(folder, WEIGHTS), Path(folder, "parts")
    if path.exists():
        return
    files = sorted(parts.glob("*.safetensors"))
    index = parts / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    missing = sorted(wanted - {file.name for file in files})
    if missing or not files:
        raise FileNotFoundError(
            f"{folder} has no model.safetensors, and of its parts lacks {', '.join(missing) or 'all'}"
        )
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    write_atomic(path, save(tensors, {"format": "pt"}))


def _write_summary(path: Path, outcomes: list[Outcome]) -> None:
    """Write one line per run."""
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"name": outcome.recipe.name, "seed": outcome.recipe.seed, "state": outcome.state}
        metrics = outcome.metrics or {}
        if metrics:
            row.update({key: metrics[key] for key in ("parameters", "epochs", "hardware")})
            row["hours"] = round(metrics["seconds"] / 3600, 4)
        for kind, scores in (("val", metrics.get("val")), ("test", outcome.scores)):
            numbers = {key: value for key, value in (scores or {}).items() if isinstance(value, int | float)}
            row.update({f"{kind}_{key}": value for key, value in numbers.items()})
        rows.append(row)
    columns = dict.fromkeys((*COLUMNS, *(key for row in rows for key in row)))
    text = io.StringIO()
    table = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(path, text.getvalue().encode())
