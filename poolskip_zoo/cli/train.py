"""`poolskip train`: train by a recipe."""

import argparse

HELP = "train a model by a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("recipe", help="YAML file, or the name of a shipped recipe such as resnet20_cifar.c10")
    parser.add_argument("--data-dir", help="data folder (default: the environment variable POOLSKIP_DATA_DIR)")
    parser.add_argument("--output", default="runs", help="folder of run folders (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the last checkpoint (default); --no-resume removes what the run wrote and starts over",
    )
    parser.add_argument("--checkpoint-steps", type=int, default=0, metavar="N", help="also save after every N steps")
    parser.add_argument("--limit-steps", type=int, default=0, metavar="N", help="save and stop after N steps")
    parser.add_argument("--limit-minutes", type=minutes, default=0, metavar="M", help="save and stop after M minutes")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR or Pascal VOC")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


def minutes(text: str) -> float:
    """Read a time limit in minutes; 0 is none, and argparse.ArgumentTypeError is raised for less and for no number."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes of at least 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Train, and print the held-out scores; exit status 130 if interrupted."""
    import os

    from ..training import describe, load_recipe, train
    from ..training.state import run_folder

    recipe = load_recipe(args.recipe, args.set)
    again = "the same command goes on" if args.resume else "without --no-resume the command goes on"
    try:
        metrics = train(
            recipe,
            args.data_dir,
            args.output,
            resume=args.resume,
            checkpoint_steps=args.checkpoint_steps,
            limit_steps=args.limit_steps,
            limit_seconds=60 * args.limit_minutes,
            download=args.download,
            cpu=args.cpu,
        )
    except KeyboardInterrupt:
        print(f"stopped; {again} from the last checkpoint")
        return 130
    if os.environ.get("RANK", "0") != "0":
        return 0
    if metrics is None:
        print(f"stopped at the limit; {again}")
        return 0
    scores = metrics["val"]
    measured = f"held-out {describe(scores)}" if scores else "nothing held out"
    folder = run_folder(args.output, recipe)
    print(f"{recipe.name}: {measured}, {metrics['seconds'] / 60:.1f} min on {metrics['hardware']}; see {folder}")
    return 0
