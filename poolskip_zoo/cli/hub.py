"""`poolskip hub`: make, check, copy and publish checkpoints."""

import argparse
from pathlib import Path
from typing import Any

HELP = "model cards, verification, copies and publication of checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    add = _action(actions, "add", "make a checkpoint's folder of a finished run; print its record")
    add.add_argument("run", type=Path, help="run folder of `poolskip train`")
    add.add_argument("--scores", required=True, help="output of `poolskip validate … --json`; - reads standard input")
    add.add_argument(
        "--base",
        type=Path,
        metavar="RUN",
        help="measured run of the base whose weights are not published, for the card",
    )
    add.add_argument(
        "--without-weights", action="store_true", help="make only the card, for weights that are too large"
    )
    add.add_argument("--cards", type=Path, help="folder of checkpoints (default: hub_cards/ of the checkout)")

    _named(actions, "card", "write README.md, config.json and SHA256SUMS again from the record")
    _named(actions, "verify", "compare files with their hashes, and a golden output")
    pull = _named(actions, "pull", "copy verified checkpoints into a folder, for POOLSKIP_HUB_DIR")
    pull.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder; made if missing")
    publish = _named(actions, "publish", "upload checkpoints to the Hugging Face Hub")
    publish.add_argument("--org", help="organisation or user on the Hub (default: the records')")
    publish.add_argument("--private", action="store_true", help="make new repositories private")
    publish.add_argument("--dry-run", action="store_true", help="only say what would be done")


def run(args: argparse.Namespace) -> int:
    """Run one action; exit status 1 if a checkpoint failed verification."""
    return {"add": _add, "card": _card, "verify": _verify, "pull": _pull, "publish": _publish}[args.action](args)


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    return actions.add_parser(name, help=text, description=text)


def _named(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = _action(actions, name, text)
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints, such as resnet20_cifar_poolskip.c10")
    parser.add_argument("--all", action="store_true", help="all checkpoints")
    return parser


def _records(args: argparse.Namespace) -> list[Any]:
    from ..registry.checkpoint import checkpoints

    cards = args.action == "card"
    known = {record.name: record for record in checkpoints(not_kept=cards)}
    if args.all == bool(args.names):
        raise ValueError("give names of checkpoints, or --all")
    unknown = [name for name in args.names if name not in known]
    if unknown and unknown[0] in {record.name for record in checkpoints(not_kept=True)}:
        raise ValueError(
            f"{unknown[0]} has only a card, because its weights are not kept: `poolskip train` makes them again"
        )
    if unknown:
        raise ValueError(f"no trained checkpoint {unknown[0]!r}; there are: {', '.join(known) or 'none yet'}")
    return list(known.values()) if args.all else [known[name] for name in args.names]


def _cards_folder() -> Path:
    from ..registry.resolve import hub_cards_dir

    folder = hub_cards_dir()
    if folder is None:
        raise ValueError("there is no hub_cards/ here: this is an installation, not a checkout")
    return folder


def _add(args: argparse.Namespace) -> int:
    import json
    import sys

    from ..hub.add import add_run, record_source
    from ..training import join_weights

    _check_arguments(args.run, _check_recipe(args.run))
    if args.base:
        _check_recipe(args.base)
    if (args.run / "parts").is_dir():
        join_weights(args.run)
    cards = args.cards or _cards_folder()
    data = sys.stdin.buffer.read() if args.scores == "-" else Path(args.scores).read_bytes()
    try:
        scores = json.loads(data)  # bytes, since Windows' PowerShell writes UTF-16
    except ValueError as error:
        raise ValueError(f"--scores {args.scores} is not valid JSON: {error}") from error
    if not isinstance(scores, dict):
        raise ValueError(f"--scores {args.scores} is not what `poolskip validate … --json` prints")
    record = add_run(args.run, scores, cards, args.base, weights=not args.without_weights)
    size = sum(file.stat().st_size for file in (cards / record.name).iterdir())
    print(f"# {cards / record.name}, {size / 1e6:.2f} MB. Put this into CHECKPOINTS of its family in registry/,")
    print("# then run `poolskip hub card --all` and `make tables`:")
    print(record_source(record))
    return 0


def _check_recipe(run: Path) -> Any:
    """A card shows the shipped recipe, so the run must have used it; the seed is the record's own."""
    import dataclasses

    from ..training import load_recipe

    path = run / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is not a run of `poolskip train`: it has no recipe.yaml")
    used = load_recipe(path)
    shipped = load_recipe(used.name)
    differing = [
        field.name
        for field in dataclasses.fields(used)
        if field.name != "seed" and getattr(used, field.name) != getattr(shipped, field.name)
    ]
    if differing:
        raise ValueError(
            f"{run} was not made by the recipe {used.name}: {', '.join(differing)} differ. Ship its recipe "
            "under another name, so that the card tells how the weights were made"
        )
    return used


def _check_arguments(run: Path, used: Any) -> None:
    """A checkpoint loads by its name, so its record must carry what its model was made with."""
    from ..data import DATASETS
    from ..registry.catalogue import registered_models
    from ..registry.checkpoint import CARRIED

    if used.segments:  # smp's folders keep the keywords
        return
    arch, _, tag = used.model.partition(".")
    if arch not in registered_models(test=True):
        raise ValueError(
            f"{run} is of {arch}, a model of timm's, which has no tags but timm's own: its weights make no "
            f"checkpoint of ours; its numbers get into the card of {arch}_poolskip with --base"
        )
    if tag or used.model_args.get("pretrained"):
        raise ValueError(
            f"{run} started from weights of {used.model} that no recipe here made: the zoo's checkpoints are trained "
            "by its recipes alone. timm.models.push_to_hf_hub and save_for_hf publish a model of your own"
        )
    size = DATASETS[used.dataset].image_size
    if used.image_size not in (0, size):
        raise ValueError(
            f"{run} was measured on images of {used.image_size} pixels, but a checkpoint of {used.dataset} loads for "
            f"{size}, where its scores are others"
        )
    # Drop rates are of training alone; timm's configurations leave them out as well. A ViT that takes other sizes too
    # computes the same of its own.
    free = ("drop_", "dynamic_img_size")
    needed = [key for key in used.model_args if not key.startswith(free) and not key.endswith("_drop_rate")]
    excess = [key for key in needed if key not in CARRIED]
    if excess:
        raise ValueError(
            f"{run}: a checkpoint's record carries {', '.join(CARRIED)}, but its recipe has model_args "
            f"{', '.join(excess)} too, without which the weights would load into another model"
        )


def _card(args: argparse.Namespace) -> int:
    from ..hub.card import write_card

    for record in _records(args):
        write_card(record, _cards_folder() / record.name)
        print(_cards_folder() / record.name)
    return 0


def _verify(args: argparse.Namespace) -> int:
    import sys

    from ..hub.verify import fetch_folder, verify_folder

    failed = 0
    for record in _records(args):
        try:
            folder = fetch_folder(record)
            difference = verify_folder(record, folder)
        except RuntimeError as error:
            print(f"{record.name}: FAILED: {error}", file=sys.stderr)
            failed += 1
        else:
            print(f"{record.name}: all files as recorded, golden output within {difference:.0e}; {folder}")
    return int(failed > 0)


def _pull(args: argparse.Namespace) -> int:
    from ..hub.verify import pull

    for record in _records(args):
        print(pull(record, args.to))
    return 0


def _publish(args: argparse.Namespace) -> int:
    from ..hub.publish import publish
    from ..registry.checkpoint import HUB_ORG

    for record in _records(args):
        publish(record, _cards_folder() / record.name, args.org or HUB_ORG, private=args.private, dry_run=args.dry_run)
    return 0
