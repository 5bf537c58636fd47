"""Programs of torch.export (.pt2) that load without this package."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from ..contexts import kept
from .inputs import checked, shapes_of
from .lower import blocks_of, lower_unpooling
from .open_sizes import capture_open
from .targets import check_output
from .verify import KEY, check_outputs, described, first_line, in_torch, judge, write_report

__all__ = ["to_exported_program"]

# Options of torch to capture by, in the order to try: with the first the file's own checks of sizes take maps of a
# single cell. torch 2.6 does not have it, and some models then cannot take a batch of 1.
_CAPTURES: list[dict[str, bool]] = [{}]
if hasattr(fx_config, "backed_size_oblivious"):
    _CAPTURES.insert(0, {"backed_size_oblivious": True})
_WAY_OUT = "leave fewer axes open (dynamic=('batch',), or () for none), or take to_onnx"


def to_exported_program(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic: Sequence[str] = ("batch",),
    lowering: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as a program of torch.export with its unpoolings lowered, and check it at several sizes.

    torch's own checks in the file refuse open sizes at which the model may take another path (not with torch 2.6) and,
    with torch 2.6 and of some models with newer ones, those at which some map shrinks to a single cell.

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
    path, args = check_output(path, ".pt2"), checked(model, example, dynamic, lowering=lowering, metadata=metadata)
    write = partial(_write, model, args, path, dynamic, lowering, metadata)
    *others, last = _CAPTURES if dynamic else _CAPTURES[-1:]
    for options in others:
        try:
            return write(options)
        except (RuntimeError, ValueError) as error:
            if isinstance(error.__cause__, OSError):  # a full disk is full the next time, too
                raise
    return write(last)


def _write(
    model: nn.Module,
    args: tuple[Any, ...],
    path: Path,
    dynamic: Sequence[str],
    lowering: str | None,
    metadata: Mapping[str, Any] | None,
    options: dict[str, bool],
) -> dict[str, Any]:
    """Capture with torch's options, lower, write and check."""
    with torch.no_grad(), fx_config.patch(options):  # type: ignore[attr-defined]  # installed at run time
        inputs, captured = capture_open(model, args, dynamic, guarded=True)
        lowered = lower_unpooling(captured, lowering=lowering)
        program = torch.export.export(lowered, inputs[0], dynamic_shapes=shapes_of(inputs[0], dynamic), strict=False)
    blocks = [block.to_dict() for block in blocks_of(lowered)]
    facts = described("pt2", blocks, metadata, dynamic=list(dynamic))
    report = {"file": path.name, **facts, "checked_in": "PyTorch CPU", "blocks": blocks}
    with kept(path) as temporary:
        buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
        try:
            torch.export.save(program, buffer, extra_files={KEY: json.dumps(facts)})
        except RuntimeError as error:  # SerializeError
            raise RuntimeError(f"torch.export cannot save this program ({first_line(error)}); {_WAY_OUT}") from error
        temporary.write_bytes(buffer.getbuffer())
        if not options and any(name != "batch" for name in dynamic):
            del inputs[2:5]  # the small ones
        try:
            report["outputs"] = check_outputs(in_torch(torch.export.load(temporary).module()), model, inputs, False)
        except RuntimeError as error:
            if "Guard failed" not in str(error):
                raise
            raise RuntimeError(f"{error}; torch.export found the model to depend on that: {_WAY_OUT}") from error
        judge(report["outputs"], path)
        report.pop("class_names", None)
        write_report(path, report)
    return report
