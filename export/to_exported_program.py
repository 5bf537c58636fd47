"""Programs of torch.export (.pt2) that load without this package."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..contexts import kept
from .inputs import capture_open, check_arguments, shapes_of
from .lower import as_args, blocks_of, lower_unpooling
from .targets import check_output
from .verify import KEY, check_outputs, described, in_torch, judge, write_report

__all__ = ["to_exported_program"]


def to_exported_program(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | Path,
    *,
    dynamic: Sequence[str] = ("batch",),
    lowering: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as a program of torch.export with its unpoolings lowered, and check it at several sizes.

    torch.export's own checks in the file refuse open sizes at which some map shrinks to a single cell.

    Args:
        model: a module in evaluation mode, on the CPU.
        example: its positional arguments, a tensor or a tuple.
        path: file to write, `.pt2`.
        dynamic: axes of the inputs to leave open: `batch`, and `length`, `height`, `width` or `depth` by rank.
        lowering: as for `lower_unpooling`.
        metadata: JSON-ready entries, stored as the extra file `poolskip_zoo`.

    Returns:
        The report that lies beside the file as `<path>.json`.

    Raises:
        ValueError: if an option is unknown, an unpooling cannot be lowered, or the model cannot have the open axes.
        RuntimeError: if the check fails; then there is no file.
    """
    path, args = check_output(path, ".pt2"), as_args(example)
    check_arguments(model, args, dynamic)
    inputs, captured = capture_open(model, args, dynamic)
    lowered = lower_unpooling(captured, lowering=lowering)
    with torch.no_grad():
        program = torch.export.export(lowered, inputs[0], dynamic_shapes=shapes_of(inputs[0], dynamic), strict=False)
    blocks = [block.to_dict() for block in blocks_of(lowered)]
    facts = described("pt2", blocks, dynamic=list(dynamic)) | dict(metadata or {})
    report = {"file": path.name, **facts, "checked_in": "PyTorch CPU", "blocks": blocks}
    with kept(path) as temporary:
        buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.export.save(program, buffer, extra_files={KEY: json.dumps(facts)})
        temporary.write_bytes(buffer.getbuffer())
        if any(name != "batch" for name in dynamic):
            # The checks of sizes in the file refuse maps of a single cell, as small inputs may lead to.
            del inputs[2:4]
        report["outputs"] = check_outputs(in_torch(torch.export.load(temporary).module()), model, inputs, False)
        judge(report["outputs"], path)
        report.pop("class_names", None)
        write_report(path, report)
    return report
