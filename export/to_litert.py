"""LiteRT's files (.tflite)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .converted import Lowered, write_converted
from .targets import check_output
from .verify import Run

__all__ = ["to_litert"]


def to_litert(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    lowering: str | None = None,
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model for LiteRT at the sizes of its example, and check it in LiteRT's interpreter.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple.
        path: file to write, `.tflite`.
        lowering: `keys`, `scatter` or `arith` in place of the target's own.
        dynamic: LiteRT's converter takes fixed sizes alone, so that names of axes are refused.
        metadata: JSON-ready entries for the report.

    Returns:
        The report that lies beside the file as `<path>.json`.

    Raises:
        ValueError: if an option is unknown or an unpooling cannot be lowered.
        RuntimeError: if a check fails; then there is no file.
        ImportError: if litert-torch is missing.
    """
    path = check_output(path, ".tflite")
    return write_converted(model, example, path, "litert", _make, lowering, dynamic, metadata)


def _make(lowered: Lowered, path: Path) -> Run:
    """Write and load a file."""
    try:
        import litert_torch
    except ImportError as error:
        raise ImportError("the export needs litert-torch: pip install litert-torch") from error
    litert_torch.convert(lowered.module, lowered.args).export(str(path))
    loaded = litert_torch.load(str(path))

    def run(arrays: Any) -> list[Any]:
        outputs = loaded(*arrays)
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]

    return run
