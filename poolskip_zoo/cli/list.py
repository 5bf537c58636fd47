"""`poolskip list`: names of the registered models, with their weights."""

import argparse

HELP = "list registered models, or their weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help="glob over model names, for example 'resnet*'")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--pretrained", action="store_true", help="only models with a trained checkpoint, with its tag")
    group.add_argument("--recipes", action="store_true", help="recipes of `poolskip train`")
    group.add_argument("--warm-starts", action="store_true", help="timm's tags that start a variant, Pool Skip at 0")


def run(args: argparse.Namespace) -> int:
    """Print one name a line."""
    from fnmatch import fnmatchcase

    from ..registry.catalogue import registered_models, warm_starts
    from ..registry.checkpoint import checkpoints

    def matching(names: list[str]) -> list[str]:
        return [name for name in names if any(fnmatchcase(each, args.pattern) for each in (name, name.split(".")[0]))]

    trained = [checkpoint.name for checkpoint in checkpoints()]
    if args.warm_starts:
        names, option = warm_starts(), " --warm-starts"
    elif args.recipes:
        from ..training import recipe_names

        names, option = recipe_names(), " --recipes"
    elif args.pretrained:
        names, option = trained, " --pretrained"
    else:
        names, option = registered_models(), ""
    shown = matching(names)
    if not shown:
        # Models of smp are built by it and not registered.
        told = f"no model matches {args.pattern!r}; `poolskip list{option}` prints all {len(names)}"
        raise ValueError(told + (f"; with --pretrained: {', '.join(matching(trained))}" if matching(trained) else ""))
    print("\n".join(shown))
    return 0
