"""`poolskip study`: tables, pictures and verdict of the study, from its run folders."""

import argparse
from pathlib import Path
from typing import Any

HELP = "tables, pictures and verdict of the study, from the folder that `train-many study` wrote"
# Around the part of a page that the verb writes anew.
MARKS = ("<!-- results: written by poolskip study -->", "<!-- end of results -->")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of run folders")
    parser.add_argument("--list", default="study", help="the list that they are of (default: %(default)s)")
    parser.add_argument("--data-dir", help="data folder (default: the environment variable POOLSKIP_DATA_DIR)")
    parser.add_argument(
        "--images", type=int, default=512, metavar="N", help="held-out images for dead filters (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for CSV and pictures (default: RUNS)")
    parser.add_argument("--page", type=Path, help="Markdown page whose results to renew, such as docs/study.md")


def run(args: argparse.Namespace) -> int:
    """Measure what is finished, write the results, and print verdict and tables.

    The test set is read once for each run that counts, and only after all runs of its net are finished.
    """
    import dataclasses

    from ..contexts import write_atomic
    from ..study.picture import draw_cost, draw_depth
    from ..study.results import LayerRow, Run, decays, reported, summary, to_csv
    from ..training import load_list

    if args.images < 1:
        raise ValueError(f"--images {args.images} must be at least 1")
    recipes = load_list(args.list, args.runs)
    _check_settings(recipes)
    unfinished, finished, diverged = _progress(recipes, args.runs)
    if not finished:
        raise ValueError(f"no run of the list {args.list} is finished in {args.runs}: poolskip train-many {args.list}")
    found = [_measure(recipe, args) for recipe in finished]
    runs, layers = [each for each, _ in found], [layer for _, each in found for layer in each]
    counted = {(each.recipe, each.seed) for each in reported(runs) if each.net not in unfinished}
    for place, recipe in enumerate(finished):
        if (recipe.name, recipe.seed) in counted:
            runs[place] = dataclasses.replace(runs[place], test_top1=_test(recipe, args))
    output = args.output or args.runs
    text = summary(runs, unfinished, [(recipe.name, recipe.seed) for recipe in diverged])
    for name, content in (("runs.csv", to_csv(runs, Run)), ("layers.csv", to_csv(layers, LayerRow))):
        write_atomic(output / name, content.encode())
    pictures = [output / "cost.png"]
    draw_cost(pictures[0], runs)
    if any(decays(runs, each.net) for each in runs):
        pictures.append(output / "depth.png")
        draw_depth(pictures[1], runs, layers)
    if args.page:
        _renew(args.page, text, output, pictures)
    print(text)
    return 0


def _check_settings(recipes: list[Any]) -> None:
    """Refuse segmentation, and recipes of an arm of equal learning rate and weight decay: their runs would be mixed."""
    from ..study.results import arm_of

    named: dict[tuple[Any, ...], str] = {}
    for recipe in recipes:
        if recipe.segments:
            raise ValueError(f"{recipe.name} segments {recipe.dataset}: a study is of classifiers")
        net, arm = arm_of(recipe.name)
        other = named.setdefault((net, arm, recipe.lr, recipe.weight_decay), recipe.name)
        if other != recipe.name:
            raise ValueError(
                f"{other} and {recipe.name} are arm {arm} of {net} at lr={recipe.lr:g}, "
                f"weight_decay={recipe.weight_decay:g}: the settings of an arm must differ in one of the two"
            )


def _progress(recipes: list[Any], folder: Path) -> tuple[dict[str, str], list[Any], list[Any]]:
    """How far each net is that is not finished, and the recipes of runs that are finished, and that have diverged."""
    from ..study.results import arm_of
    from ..training.state import DIVERGED, finished_metrics, run_folder

    finished = [recipe for recipe in recipes if finished_metrics(run_folder(folder, recipe), recipe) is not None]
    left = [recipe for recipe in recipes if recipe not in finished]
    diverged = [recipe for recipe in left if (run_folder(folder, recipe) / DIVERGED).exists()]
    unfinished = {}
    for net in dict.fromkeys(arm_of(recipe.name)[0] for recipe in left if recipe not in diverged):
        of_net = [recipe for recipe in recipes if arm_of(recipe.name)[0] == net]
        done = sum(recipe in finished for recipe in of_net)
        unfinished[net] = f"{done} runs finished of {len(of_net)} or more"
    return unfinished, finished, diverged


def _measure(recipe: Any, args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Make the lines of one run: of what it wrote, and of its diagnosis, which is made once for a number of images."""
    import json

    from ..diagnostics.cost import count_macs
    from ..registry.checkpoint import WEIGHTS
    from ..study.results import LayerRow, Run, arm_of
    from ..training.many import held_out_accuracy
    from ..training.metrics import write_json
    from ..training.state import run_folder
    from .subject import of_run

    folder = run_folder(args.runs, recipe)
    path = folder / "diagnosis.json"
    diagnosis = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if diagnosis.get("images") != min(args.images, recipe.hold_out):
        subject = of_run(recipe.name, folder / WEIGHTS)
        diagnosis = {"macs": count_macs(subject.model, subject.input_size), **_diagnose(subject, args)}
        write_json(path, diagnosis)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    net, arm = arm_of(recipe.name)
    base, skip = (diagnosis["summary"].get(kind) or {} for kind in ("base", "pool_skip"))
    known = [layer["l2_l1"] for layer in diagnosis["layers"] if layer["kind"] == "base" and layer["l2_l1"] is not None]
    setting: dict[str, Any] = {key: getattr(recipe, key) for key in ("lr", "weight_decay", "seed")}
    setting |= {"net": net, "arm": arm}
    layers = [
        LayerRow(
            **setting,
            layer=layer["name"],
            inert=len(layer["inert"]),
            dead=None if layer["dead"] is None else len(layer["dead"]),
            **{key: layer[key] for key in ("kind", "depth", "filters", "l2_l1")},
        )
        for layer in diagnosis["layers"]
    ]
    line = Run(
        **setting,
        recipe=recipe.name,
        epochs=recipe.epochs,
        parameters=metrics["parameters"],
        macs=diagnosis["macs"],
        val_top1=held_out_accuracy(metrics),
        test_top1=None,
        **{key: base[key] for key in ("filters", "inert", "watched", "dead")},
        l2_l1=sum(known) / len(known),
        **{f"skip_{key}": skip.get(key, 0) for key in ("filters", "inert", "dead")},
        hours=round(metrics["seconds"] / 3600, 4),
        hardware=metrics["hardware"],
    )
    return line, layers


def _diagnose(subject: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Diagnose a run's model on held-out images."""
    from ..diagnostics import diagnose
    from .images import image_batches
    from .subject import best_device

    device = best_device()
    batches = image_batches(subject, args.data_dir, args.images, device, subject.recipe.hold_out)
    return diagnose(subject.model.to(device), (images for images, _ in batches)).to_dict()


def _test(recipe: Any, args: argparse.Namespace) -> float:
    """Accuracy on the test set, measured at the first call."""
    from functools import partial

    from ..training.many import scores_on_test
    from ..training.state import run_folder
    from .validate import measure_run

    scores = scores_on_test(run_folder(args.runs, recipe), partial(measure_run, data_dir=args.data_dir))
    assert scores is not None
    return scores["top1"]


def _renew(page: Path, text: str, output: Path, pictures: list[Path]) -> None:
    """Put the results between a page's marks, with links to the files beside it."""
    import os

    from ..contexts import write_atomic

    old = page.read_text(encoding="utf-8")
    before, start, rest = old.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"{page} has no place for results: the lines {' and '.join(MARKS)}")
    files = [output / "runs.csv", *pictures]
    links = {file.name: Path(os.path.relpath(file, page.parent)).as_posix() for file in files}
    shown = [f"![{name.removesuffix('.png')}]({link})" for name, link in links.items() if name.endswith(".png")]
    source = f"All numbers come from [{links['runs.csv']}]({links['runs.csv']}), one line for each run."
    body = "\n\n".join([start, source, text, *shown, end])
    write_atomic(page, (before + body + after).encode())
