"""Write the tables of models in README.md and docs/models.md from the registry: `make tables`."""

from pathlib import Path

from poolskip_zoo.hub.facts import describe
from poolskip_zoo.registry.catalogue import base_name, registered_models
from poolskip_zoo.registry.checkpoint import SUFFIX, checkpoints

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/models.md")
BEGIN, END = "<!-- table: made by docs/make_tables.py -->", "<!-- end of table -->"
# One of each kind for the README; docs/models.md has all.
EXAMPLES = (
    "resnet18_poolskip",
    "resnet34_poolskip",
    "resnet50_poolskip",
    "resnet101_poolskip",
    "resnext50_32x4d_poolskip",
    "seresnet50_poolskip",
    "vgg16_bn_poolskip",
    "vit_base_patch16_224_poolskip",
    "deit_small_patch16_224_poolskip",
    "resnet20_cifar_poolskip",
    "resnet56_cifar_poolskip",
    "vgg11_bn_cifar_poolskip",
    "vit_tiny_patch4_32_poolskip",
)
_HEAD = (
    "| model | input | parameters, M (base) | GMACs (base) | trained weights | warm starts |\n|---|---|---|---|---|---|"
)


def row(name: str) -> str:
    """One line of the table.

    Args:
        name: name of a Pool Skip variant.

    Returns:
        A Markdown table row.
    """
    facts = describe(name)
    base = facts["base"]
    trained = "; ".join(f"`{c['name'].partition('.')[2]}`: {c['metrics']['top1']:.2f} %" for c in facts["checkpoints"])
    cells = (
        f"`{name}`",
        f"{facts['input_size'][1]}",
        f"{facts['parameters'] / 1e6:.2f} ({base['parameters'] / 1e6:.2f})",
        f"{facts['macs'] / 1e9:.3g} ({base['macs'] / 1e9:.3g})",
        trained or "–",
        str(len(facts["warm_starts"]) or "–"),
    )
    return "| " + " | ".join(cells) + " |"


def table(names: list[str] | tuple[str, ...]) -> str:
    """The whole table.

    Args:
        names: names of Pool Skip variants.

    Returns:
        Markdown.
    """
    return "\n".join([_HEAD, *(row(name) for name in names)])


def checkpoint_table() -> str:
    """What has been trained, base and variant beside each other.

    Returns:
        Markdown.
    """
    kinds = {("top1", "top5"): "top-1, % | top-5, %", ("miou", "pixel_accuracy"): "mIoU, % | pixel accuracy, %"}
    tables = []
    for keys, heading in kinds.items():
        rows = []
        for c in (each for each in checkpoints() if each.metrics.keys() == set(keys)):
            runs = {f"`{c.name}`": {**c.metrics, "hours": c.hours}}
            if c.base_scores:
                runs[f"`{base_name(c.arch)}.{c.tag}`, scores alone"] = c.base_scores
            for name, scores in runs.items():
                told = " | ".join(f"{scores[key]:.2f}" for key in keys)
                rows.append(
                    f"| {name} | {c.dataset_title} | {told} | {c.seed} | {scores['hours']:.1f} | {c.hardware} |"
                )
        head = [f"| checkpoint | data | {heading} | seed | hours | hardware |", "|---|---|---|---|---|---|---|"]
        tables += ["\n".join([*head, *rows])] if rows else []
    return "\n\n".join(tables)


def replaced(text: str, tables: list[str]) -> str:
    """A page with its marked tables renewed.

    Args:
        text: the page.
        tables: Markdown of each marked place, in order.

    Returns:
        The new page.

    Raises:
        ValueError: if the page has another number of marked places.
    """
    parts = text.split(BEGIN)
    if len(parts) != len(tables) + 1:
        raise ValueError(f"{len(parts) - 1} marked tables in the page, {len(tables)} made")
    for i, made in enumerate(tables, 1):
        parts[i] = f"\n{made}\n{END}" + parts[i].partition(END)[2]
    return BEGIN.join(parts)


def renewed(name: str) -> str:
    """A page with its tables renewed.

    Args:
        name: "README.md" or "docs/models.md".

    Returns:
        Its new text.
    """
    if name == "README.md":
        tables = [table(EXAMPLES)]
    else:
        tables = [table([name for name in registered_models() if name.endswith(SUFFIX)]), checkpoint_table()]
    return replaced((ROOT / name).read_text(encoding="utf-8"), tables)


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(renewed(page), encoding="utf-8")
