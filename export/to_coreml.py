"""Core ML packages (.mlpackage)."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..contexts import kept
from .converted import Lowered, check_forms, lower_for, of_maps
from .inputs import axes_of
from .open_sizes import unguarded
from .targets import check_output
from .verify import KEY, Run, check_outputs, described, first_line, in_torch, judge, write_report

__all__ = ["to_coreml"]

_SIZE = torch.ops.aten.sym_size.int


def to_coreml(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    lowering: str | None = None,
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model for Core ML (ML Program, float32, iOS 16, macOS 13).

    Sizes are those of the example; on open axes ranges up to them, from one image and about a quarter of each size.
    Core ML runs on Apple's systems alone, so what is checked is the program given to the converter, in PyTorch, and
    that the package has the model's inputs and outputs and operators of Core ML alone; the package itself is not run.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple.
        path: folder to write, `.mlpackage`.
        lowering: `keys`, `scatter` or `arith` in place of the target's own.
        dynamic: axes of the inputs to leave open: `batch`, and `length`, `height`, `width` or `depth` by rank; needs
            torch 2.7.
        metadata: JSON-ready entries for the package's own metadata.

    Returns:
        The report that lies beside the package as `<path>.json`.

    Raises:
        ValueError: if an option is unknown, an unpooling cannot be lowered, or the model cannot have the open axes.
        RuntimeError: if a check fails; then there is no package.
        ImportError: if coremltools is missing.
    """
    path = check_output(path, ".mlpackage")
    lowered = lower_for(model, example, "coreml", lowering, dynamic, metadata)
    try:
        import coremltools
    except ImportError as error:
        raise ImportError("the export needs coremltools: pip install coremltools") from error
    facts = described("coreml", lowered.blocks, metadata, dynamic=list(dynamic))
    report: dict[str, Any] = {"file": path.name, **facts, "checked_in": "PyTorch before the conversion; not run"}

    def build(side: nn.Module, inputs: tuple[Tensor, ...], form: str) -> Run:
        program = _decomposed(lower_for(side, inputs, "coreml", form, of_maps(dynamic)))
        return in_torch(unguarded(program.module()))

    report.update(blocks=lowered.blocks, bit_comparisons=check_forms(lowered.blocks, lowered.shapes, build))
    program = _decomposed(lowered)
    # torch.export's own checks refuse maps of one cell.
    report["outputs"] = check_outputs(in_torch(unguarded(program.module())), model, lowered.inputs, False)
    judge(report["outputs"], path)
    try:
        package = coremltools.convert(
            program,
            inputs=_ranges(coremltools, lowered),
            convert_to="mlprogram",
            # float16, the default, would make ties of unequal values.
            compute_precision=coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
    except Exception as error:
        if not dynamic:
            raise
        raise RuntimeError(
            f"dynamic={tuple(dynamic)!r}: coremltools fails ({first_line(error)}); pass dynamic=()"
        ) from error
    with torch.no_grad():
        _check_package(package.get_spec(), lowered.args, model(*lowered.args), path)
    package.user_defined_metadata[KEY] = json.dumps(facts)
    report.pop("class_names", None)
    with kept(path) as made:
        package.save(str(made))
        write_report(path, report)
        # A folder does not replace another.
        if path.exists():
            path.replace(made.with_name("before"))
    return report


def _decomposed(lowered: Lowered) -> Any:
    with torch.no_grad():
        program = lowered.export().run_decompositions({})
    _read_sizes(program)
    return program


def _read_sizes(program: Any) -> None:
    """Read open sizes off the maps in place of computing them: the converter divides sizes in floating point."""
    known: dict[str, tuple[Any, int]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            for axis, size in enumerate(value.shape):
                known.setdefault(str(size), (node, axis))
        elif isinstance(value, torch.SymInt) and node.target is not _SIZE and str(value) in known:
            with program.graph.inserting_before(node):
                size = program.graph.call_function(_SIZE, known[str(value)])
            size.meta["val"] = value
            node.replace_all_uses_with(size)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _ranges(coremltools: Any, lowered: Lowered) -> list[Any] | None:
    """Inputs whose open axes reach from the smallest size that was checked to the largest; None where all is fixed."""
    if not lowered.dynamic:
        return None
    ranges = []
    for values in zip(*lowered.inputs, strict=True):
        shape: list[Any] = list(values[0].shape)
        for axis, name in axes_of(values[0]).items():
            if name in lowered.dynamic:
                smallest = min(each.shape[axis] for each in values)
                shape[axis] = coremltools.RangeDim(smallest, shape[axis], shape[axis])
        ranges.append(coremltools.TensorType(shape=shape))
    return ranges


def _check_package(spec: Any, args: tuple[Any, ...], expected: Any, path: Path) -> None:
    """Refuse a package with other inputs or outputs than the model's, or with operators of another maker."""
    wanted = [[list(each.shape) for each in tree_leaves(side) if isinstance(each, Tensor)] for side in (args, expected)]
    ends = spec.description.input, spec.description.output
    declared = [[list(each.type.multiArrayType.shape) for each in side] for side in ends]
    # Packages may leave the shapes of outputs to the run time.
    if declared[0] != wanted[0] or len(declared[1]) != len(wanted[1]):
        raise RuntimeError(f"{path.name} is not kept: it has inputs {declared[0]} and outputs {declared[1]}")
    blocks = [
        block for function in spec.mlProgram.functions.values() for block in function.block_specializations.values()
    ]
    custom = sorted({each.type for block in blocks for each in block.operations if each.type.startswith("custom")})
    if custom:
        raise RuntimeError(f"{path.name} is not kept: it needs operators that Core ML lacks: {', '.join(custom)}")
