"""Write the tables of README.md, docs/models.md and docs/results.md from the registry: `make tables`."""

from pathlib import Path

from poolskip_zoo.hub.card import result_rows
from poolskip_zoo.hub.facts import describe
from poolskip_zoo.registry.catalogue import registered_models
from poolskip_zoo.registry.checkpoint import SUFFIX, checkpoints

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/models.md", "docs/results.md")
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


def results_table(metric: str) -> str:
    """What has been trained: a base, its variant by the same recipe, and what lies between them.

    Args:
        metric: one that the checkpoints of a task have, "top1" or "miou".

    Returns:
        Markdown.
    """
    lines = []
    for record in checkpoints(not_kept=True):
        if not record.arch.endswith(SUFFIX) or metric not in record.metrics:
            continue
        columns, (base, variant) = result_rows(record)
        if not lines:
            lines = [f"| data | {' | '.join(columns)} | seed, hardware |", "|---" * (len(columns) + 2) + "|"]
        for cells in (base, variant):
            told = "–" if cells[1] == "–" else f"{record.seed}, {record.hardware}"  # no score: not trained
            lines.append(f"| {record.dataset_title} | {' | '.join(cells)} | {told} |")
        scores = len(record.metrics)
        cells = [
            "–" if place < scores and record.base_note else _between(x, y, place < scores)
            for place, (x, y) in enumerate(zip(base[1:-2], variant[1:-2], strict=True))
        ]
        lines.append(f"| | **Pool Skip to base** | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


def _between(base: str, variant: str, score: bool) -> str:
    """Points between two scores, or the ratio of two sizes; speeds of two runs are no ratio."""
    try:
        x, y = float(base), float(variant)
    except ValueError:
        return "–"
    return f"**{y - x:+.2f}**" if score else f"**×{y / x:.1f}**"  # the cells are rounded


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
        name: one of `PAGES`.

    Returns:
        Its new text.
    """
    if name == "README.md":
        tables = [table(EXAMPLES)]
    elif name == "docs/results.md":
        tables = [results_table("top1"), results_table("miou")]
    else:
        tables = [table([name for name in registered_models() if name.endswith(SUFFIX)])]
    return replaced((ROOT / name).read_text(encoding="utf-8"), tables)


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(renewed(page), encoding="utf-8")
