"""Context managers that several parts share: files that are whole or not there, full disks, evaluation mode."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

__all__ = ["evaluating", "explain_full_disk", "kept", "write_atomic"]


@contextmanager
def kept(path: Path, intact: str = "") -> Iterator[Path]:
    """Yield a name to write a file under, in a folder that goes afterwards; it is moved to `path` once all is well.

    After an error what was at `path` stays. RuntimeError if the disk is full; `intact` says in it what is.
    """
    with explain_full_disk(path, intact):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: two writers may share a path, and a name beside it may be somebody's.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp") as folder:
            temporary = Path(folder, path.name)
            yield temporary
            temporary.replace(path)


def write_atomic(path: Path, data: bytes | memoryview, intact: str = "") -> None:
    """Write a file whole or not at all, and let it reach the disk first; `intact` and errors as for `kept`."""
    with kept(path, intact) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def explain_full_disk(path: Path, intact: str = "") -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into a RuntimeError of one line with the file's name and `intact`, as for `kept`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(f"no space left on the disk to write {path}; {intact}free some and run again") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
