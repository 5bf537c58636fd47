"""OpenVINO's own files (.xml with .bin)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..contexts import kept
from .inputs import as_args, random_args
from .targets import check_output
from .to_onnx import Half, compared, to_onnx
from .verify import judge, runner, write_report

__all__ = ["to_openvino"]


def to_openvino(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic: Sequence[str] | None = None,
    half: bool = False,
    lowering: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model in OpenVINO's format and check it there.

    OpenVINO reads ONNX files too: `to_onnx(..., target="openvino")` is enough for most uses.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple.
        path: file to write, `.xml`; the weights go to `.bin` beside it.
        dynamic: as for `to_onnx`.
        half: as for `to_onnx`.
        lowering: as for `to_onnx`.
        metadata: as for `to_onnx`; kept in the file's runtime information.

    Returns:
        The report that lies beside the file as `<path>.json`.

    Raises:
        ValueError: as `to_onnx`.
        RuntimeError: if a check fails; then there is no file.
        ImportError: if openvino is missing; it names the extra to install.
    """
    path = check_output(path, ".xml")
    try:
        import openvino
    except ImportError as error:
        raise ImportError("the export needs openvino: pip install 'poolskip-zoo[export]'") from error
    with kept(path) as converted:
        onnx_file = converted.with_suffix(".onnx")
        report = to_onnx(
            model, example, onnx_file, "openvino", dynamic=dynamic, half=half, lowering=lowering, metadata=metadata
        )
        program = openvino.Core().read_model(str(onnx_file))
        openvino.save_model(program, str(converted), compress_to_fp16=half)
        args = as_args(example)
        inputs = [random_args(args, shapes, seed=1) for shapes in report["outputs"]["inputs"]]
        judged = Half(model).eval() if half else model
        found = compared(runner(converted, "openvino"), judged, model, [*inputs, args], path)
        # Windows that flipped are those of the ONNX file.
        report.update(found, outputs={**report["outputs"], **found["outputs"]})
        judge(report["outputs"], path)
        report["file"] = path.name
        write_report(path, report)
        path.unlink(missing_ok=True)  # never an old one beside new weights
        for file in (path.with_suffix(".bin"), path.with_name("poolskip_predictor.py")):
            converted.with_name(file.name).replace(file)
    return report
