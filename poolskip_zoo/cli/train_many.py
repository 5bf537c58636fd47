"""`poolskip train-many`: train a list of recipes and seeds, one after another."""

import argparse
from pathlib import Path

from .train import minutes

HELP = "train a list of recipes and seeds within a time limit"
_LISTS = sorted(path.stem for path in (Path(__file__).parent.parent / "recipes" / "lists").glob("*.yaml"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "list",
        help="YAML file of recipes, or of mappings of recipe, seeds, set, grid; or a shipped list: "
        + ", ".join(_LISTS),
    )
    parser.add_argument("--data-dir", help="data folder (default: the environment variable POOLSKIP_DATA_DIR)")
    parser.add_argument("--output", default="runs", help="folder of run folders (default: %(default)s)")
    parser.add_argument("--limit-minutes", type=minutes, default=0, metavar="M", help="save and stop after M minutes")
    parser.add_argument(
        "--share",
        default="1/1",
        metavar="I/N",
        help="take every N-th entry, starting with the I-th: N commands can train the list in parallel",
    )
    parser.add_argument("--part-size", default="", metavar="SIZE", help="also leave weights in parts, such as 16MB")
    parser.add_argument("--test", action="store_true", help="measure each finished run on its test set, once")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


def run(args: argparse.Namespace) -> int:
    """Train the list, and print how each run ended; exit status 1 if one failed."""
    import os
    from functools import partial

    from ..training import train_list
    from ..training.many import summary_name
    from .validate import measure_run

    share = _share(args.share)
    outcomes = train_list(
        args.list,
        args.data_dir,
        args.output,
        share=share,
        limit_seconds=60 * args.limit_minutes,
        part_size=args.part_size,
        measure=partial(measure_run, data_dir=args.data_dir) if args.test else None,
        cpu=args.cpu,
    )
    if os.environ.get("RANK", "0") == "0":
        for outcome in outcomes:
            recipe = outcome.recipe
            print(f"{recipe.name}, seed {recipe.seed}: {outcome.state}{outcome.error and ': ' + outcome.error}")
        print(f"see {os.path.join(args.output, summary_name(share))}")
    return int(any(outcome.state == "failed" for outcome in outcomes))


def _share(text: str) -> tuple[int, int]:
    """Read "I/N"."""
    part, _, parts = text.partition("/")
    if not part.isdecimal() or not parts.isdecimal():
        raise ValueError(f"--share {text!r} is not of the form I/N, such as 1/2")
    return int(part), int(parts)
