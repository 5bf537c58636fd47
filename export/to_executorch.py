"""ExecuTorch's programs (.pte) for XNNPACK."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .converted import Lowered, write_converted
from .targets import check_output
from .verify import Run

__all__ = ["to_executorch"]


def to_executorch(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    lowering: str | None = None,
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model for ExecuTorch with XNNPACK, and check it in ExecuTorch's runtime.

    What XNNPACK lacks runs in ExecuTorch's portable kernels. Memory is planned for the sizes of the example: they are
    fixed, or the largest of the open axes.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple.
        path: file to write, `.pte`.
        lowering: `keys`, `scatter` or `arith` in place of the target's own.
        dynamic: axes of the inputs to leave open: `batch`, and `length`, `height`, `width` or `depth` by rank; needs
            torch 2.7.
        metadata: JSON-ready entries for the report.

    Returns:
        The report that lies beside the file as `<path>.json`.

    Raises:
        ValueError: if an option is unknown, an unpooling cannot be lowered, or the model cannot have the open axes.
        RuntimeError: if a check fails; then there is no file.
        ImportError: if executorch is missing.
    """
    path = check_output(path, ".pte")
    return write_converted(model, example, path, "executorch", _make, lowering, dynamic, metadata)


def _make(lowered: Lowered, path: Path) -> Run:
    """Write and load a program."""
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime
    except ImportError as error:
        raise ImportError("the export needs executorch: pip install executorch") from error
    edge = to_edge_transform_and_lower(lowered.export(), partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    assert method is not None

    # The default keeps the program: a method does not, and reads freed memory without it.
    def run(arrays: Any, program: Any = program) -> list[Any]:
        outputs = method.execute([torch.from_numpy(each) for each in arrays])
        return [each.clone().numpy() for each in outputs if isinstance(each, Tensor)]

    return run
