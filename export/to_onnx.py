"""ONNX files for several runtimes, checked in the runtime before they are kept."""

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from ..contexts import kept
from . import verify, verify_blocks
from .inputs import axes_of, checked, shapes_of
from .lower import blocks_of, lower_program, returning_maps
from .lower_pair import unpoolings
from .open_sizes import capture_open, unguarded
from .targets import check_output, check_target
from .verify import KEY, write_report

__all__ = ["Half", "compared", "to_onnx"]


def to_onnx(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    target: str = "onnxruntime",
    *,
    dynamic: Sequence[str] | None = None,
    opset: int = 18,
    half: bool = False,
    lowering: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as an ONNX file that its target runs fast and exactly, and check it there.

    Every max-unpooling takes the target's form (see `lower_unpooling`). The file is kept only if every unpooling
    equals torch's to the bit on ties, odd sizes and random values, and the whole model equals eager mode within a
    tolerance at several sizes. A report, `<path>.json`, and the stand-alone `poolskip_predictor.py` lie beside it.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple.
        path: file to write, `.onnx`.
        target: one of `TARGETS`; ncnn takes only fixed sizes. Targets whose runtime is not here are checked in ONNX
            Runtime's CPU provider.
        dynamic: axes of the inputs to leave open: `batch`, and `length`, `height`, `width` or `depth` by rank; None
            leaves the batch open where the target can.
        opset: version of ONNX's operator set, at least 18.
        half: whether weights and computation are float16; inputs and outputs stay float32.
        lowering: one of `LOWERINGS` in place of the target's own.
        metadata: JSON-ready entries for the file, which `Predictor` reads: `class_names`, `mean`, `std`, `input_size`,
            `interpolation`, `crop_pct`, `crop_mode`, `checkpoint`, …; of masks, whose `task` is `segmentation`, the
            `threshold` of each class where classes may overlap, 0.5 by default if the model ends in a sigmoid.

    Returns:
        The report.

    Raises:
        ValueError: if an option is unknown, an unpooling cannot be lowered, or the model cannot have the open axes.
        RuntimeError: if a check fails; then there is no file.
        ImportError: if onnx, onnxscript or the runtime is missing; it names the extra to install.
    """
    path, choice = check_output(path, ".onnx"), check_target(target, lowering, onnx=True)
    _check_opset(opset)
    if dynamic is None:
        dynamic = ("batch",) if choice.dynamic else ()
    args = checked(model, example, dynamic, target, lowering, metadata)
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype}: call model.float() first; half=True writes float16")
    size = sum(value.nbytes for value in (*model.parameters(), *model.buffers())) / (2 if half else 1)
    if size >= 2**31:
        raise ValueError(f"the model has {size / 1e9:.1f} GB of weights, and an ONNX file holds less than 2.1 GB")
    reference = model
    if half:
        if len(args) != 1:
            raise ValueError(f"half=True: the model has {len(args)} inputs, and one is supported")
        model = Half(model).eval()
    inputs, program = capture_open(model, args, dynamic)
    _check_types(program, half)
    args = inputs[0]
    with _explained():
        from .onnx_forms import OPERATORS

        checked_in = verify.checked_in(choice.runtime)
        lowered = unguarded(lower_program(program, target, lowering, OPERATORS))
        proto, made = _export(lowered, args, dynamic, opset)
    unoptimized = partial(_export, lowered, args, dynamic, opset, optimize=False)
    blocks = [block.to_dict(half) for block in blocks_of(lowered)]
    facts = verify.described(target, blocks, metadata, opset=opset, half=half, dynamic=list(dynamic))
    if facts.get("task") == "segmentation" and _ends_in_sigmoid(proto):
        facts.setdefault("threshold", 0.5)
    _finish(proto, args, dynamic, facts)
    report = {"file": path.name, **facts, "checked_in": checked_in, "blocks": blocks}
    report.pop("class_names", None)

    with kept(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        report["bit_comparisons"] = verify_blocks.check_blocks((proto, made), unoptimized, blocks, choice.runtime)
        run = verify.runner(temporary, choice.runtime)
        report.update(compared(run, model, reference, inputs, path))
        report["outputs"].update(_flips(proto, made, lowered, inputs, blocks, choice.runtime))
        verify.judge(report["outputs"], path)
        write_report(path, report)
        with kept(path.with_name("poolskip_predictor.py")) as predictor:
            shutil.copyfile(Path(__file__).with_name("predictor.py"), predictor)
    return report


def _check_types(program: Any, half: bool) -> None:
    """Refuse maps that the runtimes do not resize; the checks feed float32 or, of a half model, float16."""
    wanted = torch.float16 if half else torch.float32
    for unpooling in unpoolings(program.graph):
        dtype = unpooling.meta["val"].dtype
        if dtype != wanted:
            halves = "half=True makes a float16 file of a float32 model"
            way_out = "" if half else f"; {halves if dtype == torch.float16 else 'call .float() before pooling'}"
            raise ValueError(f"node {unpooling.name!r} unpools {dtype}: expected {wanted}{way_out}")


def compared(
    run: verify.Run, model: nn.Module, reference: nn.Module, inputs: list[tuple[Any, ...]], path: Path
) -> dict[str, Any]:
    """Compare a file's outputs with those of `model`: the reference, or its float16 copy, which the file was made of.

    Of float16 `beside_float32` is for the user to judge: rounding flips near-ties. RuntimeError also if it overflows.
    """
    half = model is not reference
    result = {"outputs": verify.check_outputs(run, model, inputs, half)}
    if half:
        result["beside_float32"] = verify.check_outputs(run, reference, inputs, half)
        if math.isinf(result["beside_float32"]["max_relative_error"]):
            raise RuntimeError(
                f"{path.name} is not kept: in float16 NaN or infinities lie elsewhere in its outputs than in float32; "
                "leave half out"
            )
    return result


class Half(nn.Module):
    """A float16 copy of a model of one input, with float32 input and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, x: Tensor) -> Any:
        outputs = self.model(x.half() if x.is_floating_point() else x)
        return tree_map(lambda each: each.float() if getattr(each, "dtype", None) == torch.float16 else each, outputs)


def _export(
    lowered: GraphModule, args: tuple[Any, ...], dynamic: Sequence[str], opset: int, optimize: bool = True
) -> verify_blocks.Exported:
    """The ONNX model, and what became of each unpooling in it."""
    from .onnx_forms import Translation, translations

    made: list[Translation] = []
    with torch.no_grad(), _explained():
        program = torch.export.export(lowered, args, dynamic_shapes=shapes_of(args, dynamic), strict=False)
        exported = torch.onnx.export(
            program,
            args,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations(made),
            optimize=optimize,
            verbose=False,
        )
    assert exported is not None
    proto = exported.model_proto
    written = next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
    if written != opset:
        raise ValueError(f"opset={opset}: with these releases of torch and onnxscript the file gets {written}")
    return proto, made


def _check_opset(opset: int) -> None:
    with _explained():
        from onnx.defs import onnx_opset_version
    if not 18 <= opset <= onnx_opset_version():
        raise ValueError(f"opset={opset}: expected 18 to {onnx_opset_version()}, the highest of this release of onnx")


@contextmanager
def _explained() -> Iterator[None]:
    """Name the extra to install or what stops the exporter, and keep it from announcing every step."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f"the export needs {error.name}: pip install 'poolskip-zoo[export]'") from error
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RuntimeError(f"torch.onnx cannot write this model: {verify.first_line(cause)}") from error
    finally:
        logger.setLevel(level)


def _ends_in_sigmoid(proto: Any) -> bool:
    """Whether the first output is of probabilities, one by one, as smp's `activation="sigmoid"` gives them."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    node = makers.get(proto.graph.output[0].name)
    while node is not None and node.op_type == "Cast":  # of half
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "Sigmoid"


def _finish(proto: Any, args: tuple[Any, ...], dynamic: Sequence[str], facts: dict[str, Any]) -> None:
    """Readable names of open axes, and the metadata."""
    renamed = dict[str, str]()
    for value, spec in zip(args, proto.graph.input, strict=False):
        for axis, name in axes_of(value).items():
            param = spec.type.tensor_type.shape.dim[axis].dim_param
            if name in dynamic and param and param not in renamed:
                # Sizes of another input may be others.
                renamed[param] = f"{name}_{spec.name}" if name in renamed.values() else name
    for spec in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in spec.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]
    for value in proto.graph.node:
        # The exporter's notes on every node hold paths of the machine.
        del value.metadata_props[:]
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(facts)


def _flips(
    proto: Any,
    made: list[Any],
    lowered: GraphModule,
    inputs: list[tuple[Any, ...]],
    blocks: list[dict[str, Any]],
    runtime: str,
) -> dict[str, float]:
    """What `verify.flipped_windows` finds beside eager mode."""
    from .onnx_forms import OPERATORS

    masked = [operator for lowering, operator in OPERATORS.items() if lowering != "scatter"]
    module, places = returning_maps(lowered, masked, blocks)
    run = verify.values_of(proto, [made[place].input_names()[-1] for place in places], runtime)
    arrays = ([each.numpy() for each in args] for args in inputs)
    return verify.flipped_windows(verify.in_torch(module), run, [blocks[place] for place in places], arrays)
