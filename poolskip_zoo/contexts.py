"""Context managers that several parts share: files that are whole or not there, evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

__all__ = ["evaluating", "kept"]


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Give a file its name once all is well.

    Args:
        path: its name.

    Yields:
        The name to write it under. After an error that file is removed, and what was at `path` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in.

    Args:
        model: any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
