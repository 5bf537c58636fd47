"""TorchScript files that load without this package."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..contexts import kept
from .guards import beyond_guards
from .inputs import checked, first_fit, odd_inputs, open_inputs, run_at, runnable, shapes_of
from .lower import blocks_of, capture, lower_unpooling
from .open_sizes import unguarded
from .targets import check_output
from .verify import KEY, check_outputs, described, in_torch, judge, write_report

__all__ = ["to_torchscript"]


def to_torchscript(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    method: str = "trace",
    *,
    dynamic: Sequence[str] = ("batch",),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as TorchScript and check it at several sizes.

    Pool Skip traces and scripts by itself; torch's unpooling does not trace, so a model with it is lowered first
    (`lower_unpooling`).

    Args:
        model: a module in evaluation mode, on the CPU.
        example: its positional arguments, a tensor or a tuple.
        path: file to write, `.pt`, `.pth`, `.ts`, `.jit` or `.torchscript`.
        method: `trace` or `script`.
        dynamic: axes of the inputs that must be open, as for `to_onnx`; a script leaves all open that the model's code
            does, a trace holds one path through it.
        metadata: JSON-ready entries, stored as the extra file `poolskip_zoo`.

    Returns:
        The report that lies beside the file as `<path>.json`.

    Raises:
        ValueError: if an option is unknown, the model trains, or cannot have the open axes.
        RuntimeError: if the model does not script, or the check fails; then there is no file.
    """
    if method not in ("trace", "script"):
        raise ValueError(f"method={method!r}: expected 'trace' or 'script'")
    path = check_output(path, ".pt", ".pth", ".ts", ".jit", ".torchscript")
    args = checked(model, example, dynamic, metadata=metadata)
    with torch.no_grad():
        inputs = first_fit(open_inputs(args, dynamic), dynamic, partial(run_at, model))
        inputs += runnable(model, odd_inputs(args, dynamic))
        module, blocks = (torch.jit.script(model), []) if method == "script" else _trace(model, inputs[0], dynamic)
    facts = described("torchscript", blocks, metadata, method=method, dynamic=list(dynamic))
    report = {"file": path.name, **facts, "checked_in": "PyTorch CPU", "blocks": blocks}
    with kept(path) as temporary:
        buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.jit.save(module, buffer, _extra_files={KEY: json.dumps(facts)})
        temporary.write_bytes(buffer.getbuffer())
        try:
            loaded = torch.jit.load(temporary)
            report["outputs"] = check_outputs(in_torch(loaded), model, inputs, False)
        except RuntimeError as error:
            if not blocks:
                raise
            way_out = "take method='script', dynamic=(), or to_exported_program"
            raise RuntimeError(
                f"{error}; the trace of a lowered model freezes sizes it computes with: {way_out}"
            ) from error
        judge(report["outputs"], path)
        if method == "trace" and dynamic:
            # A trace that does not run at such a size says so itself.
            further = list(runnable(loaded, list(beyond_guards(model, inputs, dynamic))))
            if further:
                report["outputs"] = check_outputs(in_torch(loaded), model, [*inputs, *further], False)
                judge(report["outputs"], path)
        report.pop("class_names", None)
        write_report(path, report)
    return report


def _trace(model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str]) -> tuple[Any, list[dict[str, Any]]]:
    """Trace a model, lowered first if torch's unpooling is in it; also gives the lowered unpoolings."""
    try:
        # Not strict: outputs may be a dict.
        traced = torch.jit.trace(model, args, check_trace=False, strict=False)
        if "aten::max_unpool" not in str(traced.inlined_graph):
            return traced, []
    except TypeError as error:
        # What F.max_unpool raises while it is traced; older releases freeze its sizes.
        if "cond must be a bool" not in str(error):
            raise
    lowered = lower_unpooling(capture(model, args, shapes_of(args, dynamic)))
    blocks = [block.to_dict() for block in blocks_of(lowered)]
    return torch.jit.trace(unguarded(lowered), args, check_trace=False, strict=False), blocks
