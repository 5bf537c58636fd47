"""Core ML packages (.mlpackage)."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .converted import Lowered, check_forms, lower_fixed, with_random
from .verify import KEY, Run, check_outputs, judge, write_report

__all__ = ["to_coreml"]


def to_coreml(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | Path,
    *,
    lowering: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model for Core ML (ML Program, float32, iOS 16, macOS 13) at the sizes of its example.

    Core ML runs on Apple's systems alone, so what is checked is the program given to the converter, in PyTorch, and
    that the package has the model's inputs and outputs and operators of Core ML alone; the package itself is not run.

    Args:
        model: a module in evaluation mode, on the CPU, in float32.
        example: its positional arguments, a tensor or a tuple.
        path: folder to write, `.mlpackage`.
        lowering: `keys`, `scatter` or `arith` in place of the target's own.
        metadata: JSON-ready entries for the package's own metadata.

    Returns:
        The report that lies beside the package as `<path>.json`.

    Raises:
        ValueError: if an option is unknown or an unpooling cannot be lowered.
        RuntimeError: if a check fails; then there is no package.
        ImportError: if coremltools is missing.
    """
    from poolskip_zoo import __version__

    path = Path(path)
    if path.suffix != ".mlpackage":
        raise ValueError(f"path={str(path)!r}: expected a name that ends in .mlpackage")
    lowered = lower_fixed(model, example, "coreml", lowering)
    try:
        import coremltools
    except ImportError as error:
        raise ImportError("the export needs coremltools: pip install coremltools") from error
    used = sorted({block["lowering"] for block in lowered.blocks})
    facts = {"package_version": __version__, "target": "coreml", "lowering": used, **(metadata or {})}
    report: dict[str, Any] = {"file": path.name, **facts, "checked_in": "PyTorch before the conversion; not run"}
    report.update(blocks=lowered.blocks, bit_comparisons=check_forms(lowered.blocks, lowered.shapes, _side))
    program = _decomposed(lowered)
    report["outputs"] = check_outputs(_runner(program.module()), model, with_random(lowered.args), False)
    judge(report["outputs"], path)
    package = coremltools.convert(
        program,
        convert_to="mlprogram",
        # float16, the default, would make ties of unequal values.
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS16,
        skip_model_load=True,
    )
    with torch.no_grad():
        _check_package(package.get_spec(), lowered.args, model(*lowered.args), path)
    package.user_defined_metadata[KEY] = json.dumps(facts)
    report.pop("class_names", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        made = Path(folder, path.name)
        package.save(str(made))
        write_report(path, report)
        # A folder does not replace another.
        if path.exists():
            path.replace(Path(folder, "before"))
        made.replace(path)
    return report


def _decomposed(lowered: Lowered) -> Any:
    with torch.no_grad():
        return torch.export.export(lowered.module, lowered.args, strict=False).run_decompositions({})


def _side(side: nn.Module, inputs: tuple[Tensor, ...], form: str) -> Run:
    return _runner(_decomposed(lower_fixed(side, inputs, "coreml", form)).module())


def _runner(module: nn.Module) -> Run:
    def run(arrays: Any) -> list[Any]:
        with torch.no_grad():
            return [each.numpy() for each in tree_leaves(module(*map(torch.from_numpy, arrays)))]

    return run


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
