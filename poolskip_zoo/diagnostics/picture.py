"""Diagnoses of one model, or of two beside each other, as a table and as pictures."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..pictures import new_figure, save_figure
from .filters import KINDS, Diagnosis, LayerDiagnosis

__all__ = ["draw", "table"]


def _share(indices: list[int] | None, layer: LayerDiagnosis) -> float | None:
    return None if indices is None else len(indices) / layer.filters


def _summed(how: Callable[[list[float]], float], values: list[float] | None) -> float | None:
    return None if values is None else how(values)


# Measure to the label of its picture and the number that stands for a layer there.
_MEASURES: dict[str, tuple[str, Callable[[LayerDiagnosis], float | None]]] = {
    "l2_l1": ("l2/l1 of the weights", lambda layer: layer.l2_l1),
    "inert": ("inert filters, share", lambda layer: _share(layer.inert, layer)),
    "sparsity": ("sparse 3×3 kernels, share", lambda layer: layer.sparsity),
    "variance_entropy": ("variance entropy of 3×3 kernels", lambda layer: layer.variance_entropy),
    "orthogonality": ("orthogonality of filters", lambda layer: layer.orthogonality),
    "zero_share": ("zeros behind the ReLU, mean share", lambda layer: _summed(mean, layer.zero_share)),
    "dead": ("dead channels, share", lambda layer: _share(layer.dead, layer)),
    "gradient": ("gradient norm, median over filters", lambda layer: _summed(median, layer.gradient)),
}
# Shares of filters are told as numbers of filters in the table.
_COLUMNS: dict[str, tuple[str, Callable[[LayerDiagnosis], str]]] = {
    "filters": ("filters", lambda layer: str(layer.filters)),
    "l2_l1": ("l2/l1", lambda layer: _number(layer, "l2_l1", ".4f")),
    "inert": ("inert", lambda layer: str(len(layer.inert))),
    "sparsity": ("sparse", lambda layer: _number(layer, "sparsity", ".3f")),
    "variance_entropy": ("entropy", lambda layer: _number(layer, "variance_entropy", ".3f")),
    "orthogonality": ("orthog.", lambda layer: _number(layer, "orthogonality", ".3f")),
    "zero_share": ("zeros", lambda layer: _number(layer, "zero_share", ".3f")),
    "dead": ("dead", lambda layer: _NONE if layer.dead is None else str(len(layer.dead))),
    "gradient": ("gradient", lambda layer: _number(layer, "gradient", ".1e")),
}
_NONE = "-"


def _number(layer: LayerDiagnosis, measure: str, form: str) -> str:
    value = _MEASURES[measure][1](layer)
    return _NONE if value is None else format(value, form)


def table(found: Diagnosis, other: Diagnosis | None = None) -> str:
    """Lay out a diagnosis as text, one line for each convolution and one for each kind's sum.

    Args:
        found: the diagnosis.
        other: a second one, whose numbers stand behind a slash; lines are matched by name.

    Returns:
        Lines without a last line break. Measures that no convolution has are left out.
    """
    models = [found] if other is None else [found, other]
    by_name = [{layer.name: layer for layer in model.layers} for model in models]
    names = {layer.name: layer for model in reversed(models) for layer in model.layers}
    order = sorted(names.values(), key=lambda layer: (layer.depth, KINDS.index(layer.kind), layer.name))
    columns = []
    for heading, cell in _COLUMNS.values():
        cells = [[cell(each[layer.name]) if layer.name in each else _NONE for each in by_name] for layer in order]
        if any(value != _NONE for line in cells for value in line):
            # Two models that agree to the last digit shown still stand both.
            columns.append([heading, *(" / ".join(line) for line in cells)])
    rows = list(zip(["convolution", *(layer.name for layer in order)], *columns, strict=True))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, *_sums(models)])


def _sums(models: list[Diagnosis]) -> list[str]:
    lines = []
    for kind in KINDS:
        sums = [model.summary().get(kind) for model in models]
        if any(sums):
            told = {
                key: " / ".join(_NONE if each is None or each[key] is None else f"{each[key]:,}" for each in sums)
                for key in ("convolutions", "filters", "inert", "dead", "watched")
            }
            line = "{convolutions} convolutions, {filters} filters, {inert} inert".format(**told)
            if any(model.images for model in models):
                line += "; {dead} dead of {watched} channels before a ReLU".format(**told)
            lines.append(f"{kind}: {line}")
    return lines


def draw(folder: str | os.PathLike[str], diagnoses: Mapping[str, Diagnosis]) -> list[Path]:
    """Draw each measure over the model's depth, of all models in one PNG for each measure.

    Args:
        folder: where to; it is made if missing.
        diagnoses: diagnosis by the model's name in the legend.

    Returns:
        The pictures. Measures that no convolution has are left out.

    Raises:
        ImportError: if matplotlib is missing; it names the extra to install.
    """
    paths = []
    for measure, (label, value) in _MEASURES.items():
        figure = new_figure(8, 4.6)
        axes = figure.subplots()
        for place, (name, found) in enumerate(diagnoses.items()):
            for kind in KINDS:
                # The first is wider, so that it is seen below an equal second.
                style = {"color": f"C{place}", "linewidth": 1 if place else 2.5, "alpha": 0.8}
                _plot(axes, found, kind, value, label=name if kind == "base" else f"{name}: Pool Skip", **style)
        if not axes.lines:
            continue
        axes.set(xlabel="depth: convolutions in the model's order", ylabel=label)
        positive = [number for found in diagnoses.values() for layer in found.layers if (number := value(layer))]
        if measure == "gradient" and positive:
            # Logarithmic down to the smallest, with zero at the bottom: a layer without gradient is what one looks for.
            axes.set_yscale("symlog", linthresh=min(positive))
            axes.set_ylim(bottom=0)
        if "share" in label:
            axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        for text in figure.legend(loc="outside upper center").get_texts():
            text.set_parse_math(False)  # a path may have $ in it
        path = Path(folder, f"{measure}.png")
        save_figure(figure, path)
        paths.append(path)
    return paths


def _plot(axes: Any, found: Diagnosis, kind: str, value: Callable[..., Any], **style: Any) -> None:
    """Plot one kind of convolutions: the base's as a line, Pool Skip's as crosses."""
    import numpy as np

    points = [(layer.depth, value(layer)) for layer in found.layers if layer.kind == kind]
    known = np.array([point for point in points if point[1] is not None], float)
    if len(known):
        axes.plot(known[:, 0], known[:, 1], ".-" if kind == "base" else "x:", **style)
