"""Pictures by matplotlib, which is an extra: figures, and their files."""

from pathlib import Path
from typing import Any

from .contexts import kept

__all__ = ["new_figure", "save_figure"]


def new_figure(width: float, height: float) -> Any:
    """Make a figure, in inches, that needs no display; ImportError, naming the extra, if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'poolskip-zoo[train]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG; RuntimeError if the disk is full."""
    with kept(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
