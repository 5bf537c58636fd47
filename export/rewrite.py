"""Existing ONNX files with max-unpooling, from any exporter, in the form that a target runs, checked there."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..contexts import kept
from . import verify
from .targets import check_output, check_target

__all__ = ["rewrite_onnx"]


def rewrite_onnx(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    target: str = "onnxruntime",
    *,
    lowering: str | None = None,
    size: Sequence[int] | None = None,
    example: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Replace the index tensors of an ONNX file's max-unpoolings, whoever wrote the file, by a form that a target runs.

    Finds MaxPool with indices followed by MaxUnpool, ScatterND, ScatterElements or Scatter, through any arithmetic on
    the indices (torch's per plane, TensorFlow's with channels last). What becomes of each is decided as in
    `lower_unpooling`. The file is kept only if every unpooling equals the original's to the bit on random values, ties
    and rectified values, and the outputs equal the original's within a tolerance. The original runs in ONNX Runtime,
    or in onnx's own reference where that cannot run it. A report, `<path>.json`, lies beside the file.

    Args:
        source: the file, of operator set 11 or newer, or an older one that onnx can convert.
        path: file to write, `.onnx`.
        target: one of `TARGETS`.
        lowering: one of `LOWERINGS` in place of the target's own. `scatter` also leaves index tensors alone that are
            used for other things than unpooling.
        size: sizes to run the file at, one for each axis that an input leaves open after its first, the batch: height
            and width of most files. By default several of up to 289 cells, odd ones where the file runs at them.
        example: arrays to run the file on, one per input, in place of random numbers.

    Returns:
        The report.

    Raises:
        ValueError: if an option is unknown, the file holds no unpooling, does not run, or cannot be rewritten; the
            message names the node and the way out.
        RuntimeError: if a check fails; then there is no file.
        ImportError: if onnx, onnxscript or the runtime is missing; it names the extra to install.
    """
    source, path, choice = Path(source), check_output(path, ".onnx"), check_target(target, lowering, onnx=True)
    try:
        from .rewrite_file import File

        file = File(source, size, example)
        blocks = file.rewrite(choice, lowering)
    except ModuleNotFoundError as error:
        raise ImportError(f"rewriting needs {error.name}: pip install 'poolskip-zoo[export]'") from error
    report = {
        "file": path.name,
        "source": source.name,
        **file.describe(target, blocks),
        "checked_in": verify.checked_in(choice.runtime),
        "original_in": file.engine,
        "nodes": {"before": len(file.original.graph.node), "after": len(file.proto.graph.node)},
        "blocks": blocks,
    }
    with kept(path) as temporary:
        temporary.write_bytes(file.proto.SerializeToString())
        report["bit_comparisons"] = file.check_blocks(blocks, choice.runtime)
        report["outputs"] = file.check_outputs(verify.runner(temporary, choice.runtime))
        report["outputs"].update(file.flips(blocks, choice.runtime))
        verify.judge(report["outputs"], path, "the original file")
        verify.write_report(path, report)
    return report
