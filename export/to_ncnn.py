"""ncnn's files (.param with .bin), made of ONNX by pnnx."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..contexts import kept
from .converted import check_forms, unpooled_shapes
from .inputs import checked, with_random
from .lower import capture
from .targets import check_output
from .to_onnx import to_onnx
from .verify import Run, check_outputs, judge, write_report

__all__ = ["to_ncnn"]


def to_ncnn(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model for ncnn at the sizes of its example, and check it there.

    Both the file and the check are in float32: where ncnn computes in float16 or bfloat16 (its default on ARM), the
    `arith` form overflows. Set `use_fp16_packed`, `use_fp16_storage`, `use_fp16_arithmetic` and `use_bf16_storage` of
    `net.opt` to false before loading.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple, of batch 1: ncnn has no batches.
        path: file to write, `.param`; the weights go to `.bin` beside it.
        dynamic: pnnx writes fixed sizes alone, so that names of axes are refused.
        metadata: JSON-ready entries for the report.

    Returns:
        The report that lies beside the file as `<path>.json`.

    Raises:
        ValueError: if an option is unknown or an unpooling cannot be lowered.
        RuntimeError: if the conversion or a check fails; then there is no file.
        ImportError: if ncnn, pnnx or a library of the ONNX export is missing.
    """
    path, args = check_output(path, ".param"), checked(model, example, dynamic, "ncnn", metadata=metadata)
    batches = {each.shape[0] for each in args}
    if batches != {1}:
        raise ValueError(f"example: batches {sorted(batches)}: ncnn takes one image at a time")
    shapes = unpooled_shapes(capture(model, args, None))
    with kept(path) as made:
        report = to_onnx(model, args, made.with_suffix(".onnx"), "ncnn", dynamic=(), metadata=metadata)
        run = _convert(made)

        def build(side: nn.Module, inputs: tuple[Tensor, ...], form: str) -> Run:
            file = made.with_name("forms.onnx")
            to_onnx(side, inputs, file, "ncnn", dynamic=(), lowering=form)
            return _convert(file.with_suffix(".param"))

        report["bit_comparisons"] = check_forms(report["blocks"], shapes, build)
        # Windows that flipped are those of the ONNX file.
        report["outputs"].update(check_outputs(run, model, with_random(args), False))
        judge(report["outputs"], path)
        report.update({"file": path.name, "checked_in": "ncnn CPU, float32", **(metadata or {})})
        write_report(path, report)
        path.unlink(missing_ok=True)  # never an old one beside new weights
        made.with_suffix(".bin").replace(path.with_suffix(".bin"))
    return report


def _convert(path: Path) -> Run:
    """Make `.param` and `.bin` of the ONNX file beside it, and load them."""
    try:
        import ncnn
        import pnnx
    except ImportError as error:
        raise ImportError("the export needs ncnn and pnnx: pip install ncnn pnnx") from error
    files = [f"ncnnparam={path.name}", f"ncnnbin={path.with_suffix('.bin').name}"]
    # Arguments to the program itself: the package's own function takes TorchScript alone.
    command = [pnnx.EXEC_PATH, path.with_suffix(".onnx").name, "fp16=0", *files]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    net = ncnn.Net()
    net.opt.num_threads = 1
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
    if not path.is_file() or net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"ncnn does not take the model; pnnx says: {last}")

    def run(arrays: Any) -> list[Any]:
        import numpy as np

        extractor = net.create_extractor()
        for name, array in zip(net.input_names(), arrays, strict=True):
            extractor.input(name, ncnn.Mat(np.ascontiguousarray(array[0])).clone())
        return [np.array(extractor.extract(name)[1])[None] for name in net.output_names()]

    return run
