"""Context managers that several parts share: files that are whole or not there, full disks, evaluation mode."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

__all__ = ["evaluating", "explain_full_disk", "kept"]


@contextmanager
def kept(path: Path) -> Iterator[Path]:
    """Give a file its name once all is well.

    Args:
        path: its name.

    Yields:
        The name to write it under. After an error that file is removed, and what was at `path` stays.

    Raises:
        RuntimeError: if the disk is full.
    """
    temporary = path.with_name(f".{path.name}")
    with explain_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(path: Path, intact: str = "") -> Iterator[None]:
    """Turn "no space left" into one line that names the file.

    Args:
        path: the file being written.
        intact: what is, as a sentence.

    Raises:
        RuntimeError: on ENOSPC or EDQUOT; other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(f"no space left on the disk to write {path}; {intact}free some and run again") from error


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
