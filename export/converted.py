"""What the formats share that have a converter of their own: the lowered module, the checks, and the files."""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_leaves

from . import forms, verify
from .inputs import unguarded
from .lower import as_args, blocks_of, capture, lower_unpooling
from .targets import check_drop_in, check_target
from .to_onnx import _block

__all__ = ["Lowered", "check_forms", "lower_fixed", "write_converted"]

# Writes a module with example arguments to a path, and loads that file: arrays in, arrays out.
Make = Callable[[nn.Module, tuple[Any, ...], Path], verify.Run]


@dataclass(frozen=True)
class Lowered:
    """A model of fixed sizes without index tensors.

    Args:
        module: the lowered module.
        args: its arguments.
        blocks: JSON-ready record of each unpooling.
        shapes: shape of each unpooled map.
    """

    module: GraphModule
    args: tuple[Any, ...]
    blocks: list[dict[str, Any]]
    shapes: list[list[int]]


def lower_fixed(model: nn.Module, example: Tensor | Sequence[Any], target: str, lowering: str | None = None) -> Lowered:
    """Lower a model at the sizes of its example.

    Args:
        model: a module in evaluation mode.
        example: its positional arguments, a tensor or a tuple.
        target: one of `TARGETS`.
        lowering: as for `lower_unpooling`.

    Returns:
        The module and what was done.

    Raises:
        ValueError: if an option is unknown or an unpooling cannot be lowered.
    """
    check_target(target, lowering, onnx=False)
    check_drop_in(model, target, lowering)
    args = as_args(example)
    program = capture(model, args, None)
    module = unguarded(lower_unpooling(program, target=target, lowering=lowering))
    for each in module.modules():
        # A captured module refuses eval(), and converters warn of training.
        each.training = False
    assert isinstance(module, GraphModule)
    return Lowered(module, args, [_block(each, False) for each in blocks_of(module)], unpooled_shapes(program))


def unpooled_shapes(program: ExportedProgram) -> list[list[int]]:
    """Shapes of the maps that unpoolings of fixed size return.

    Args:
        program: a captured program, not lowered.

    Returns:
        One shape per unpooling, in the graph's order.
    """
    unpools = torch.ops.aten.max_unpool2d.default, torch.ops.aten.max_unpool3d.default
    return [list(node.meta["val"].shape) for node in program.graph.nodes if node.target in unpools]


def write_converted(
    model: nn.Module,
    example: Tensor | Sequence[Any],
    path: Path,
    target: str,
    make: Make,
    lowering: str | None,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write a file by a converter and keep it if the checks in the target's runtime hold.

    Args:
        model: a module in evaluation mode, on the CPU.
        example: its positional arguments, a tensor or a tuple; their sizes are fixed.
        path: file to write.
        target: one of `TARGETS`.
        make: the converter and the runtime.
        lowering: as for `lower_unpooling`.
        metadata: JSON-ready entries of the report.

    Returns:
        The report, as it lies beside the file.

    Raises:
        ValueError: if an option is unknown or an unpooling cannot be lowered.
        RuntimeError: if a check fails; then there is no file.
    """
    from poolskip_zoo import __version__

    lowered = lower_fixed(model, example, target, lowering)
    used = sorted({block["lowering"] for block in lowered.blocks})
    report: dict[str, Any] = {"file": path.name, "package_version": __version__, "target": target, "lowering": used}
    report.update({**(metadata or {}), "checked_in": f"{target} CPU", "blocks": lowered.blocks})
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the finished file can be renamed into place.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        made = Path(folder, path.name)
        run = make(lowered.module, lowered.args, made)

        def build(side: nn.Module, inputs: tuple[Tensor, ...], form: str) -> verify.Run:
            probe = lower_fixed(side, inputs, target, form)
            return make(probe.module, probe.args, made.with_name(f"forms{path.suffix}"))

        report["bit_comparisons"] = check_forms(lowered.blocks, lowered.shapes, build)
        outputs = verify.check_outputs(run, model, with_random(lowered.args), False)
        if outputs["max_relative_error"] > outputs["tolerance"]:
            outputs["flipped_windows"] = _flips(lowered, make, made.with_name(f"watched{path.suffix}"))
        report["outputs"] = outputs
        verify.judge(outputs, path)
        verify.write_report(path, report)
        made.replace(path)
    return report


def with_random(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The example, and other values of the same shapes.

    Args:
        args: a model's arguments.

    Returns:
        Two tuples of arguments.
    """
    generator = torch.Generator().manual_seed(1)
    other = [
        torch.randn(each.shape, generator=generator) if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in args
    ]
    return [args, tuple(other)]


def check_forms(
    blocks: list[dict[str, Any]],
    shapes: list[list[int]],
    build: Callable[[nn.Module, tuple[Tensor, ...], str], verify.Run],
) -> int:
    """Compare the unpoolings of a model with torch's to the bit, on random values, ties and rectified values.

    A file of such a format cannot be cut, so the same unpoolings are written side by side into one of their own, at the
    model's sizes and an odd one. Those of indices that no pooling of the model made are left to the whole model.

    Args:
        blocks: record of each unpooling.
        shapes: shape of each unpooled map.
        build: writes and loads a module with torch's unpoolings by the named lowering.

    Returns:
        How many comparisons were made.

    Raises:
        RuntimeError: naming the first unpooling that is not equal.
    """
    wanted: dict[str, dict[str, tuple[dict[str, Any], list[int | None]]]] = {}
    for block, shape in zip(blocks, shapes, strict=True):
        window = block["window"]
        if not window:
            continue
        # A sequence is a map one cell wide.
        odd = [1, 3, *(max(size, e + 1) if e > 1 else 1 for size, e in zip((17, 13, 9), window, strict=False))]
        for each in ([1] * (len(window) + 2 - len(shape)) + shape, odd):
            key = str((window, block["ceil_mode"], block["own"], each))
            wanted.setdefault(block["lowering"], {}).setdefault(key, (block, list(each)))
    compared = 0
    for lowering, pairs in wanted.items():
        cases_of = [verify._mask_cases(block, size, size, size) for block, size in pairs.values()]
        rounds = list(zip(*cases_of, strict=True))
        run = build(_side_by_side([block for block, _ in pairs.values()]), _joined(rounds[0]), lowering)
        for cases in rounds:
            outputs = run([each.numpy() for each in _joined(cases)])
            for (block, _), (case, _, expected), output in zip(pairs.values(), cases, outputs, strict=True):
                compared += 1
                got = torch.from_numpy(output)
                if not torch.equal(got, expected):
                    wrong = int((got != expected).sum()) if got.shape == expected.shape else expected.numel()
                    raise RuntimeError(
                        f"{block['name']} ({block['source']}): the exported form {lowering!r} differs from torch in "
                        f"{wrong} of {expected.numel()} values on {case}"
                    )
    return compared


def _joined(cases: Sequence[tuple[str, list[Tensor], Tensor]]) -> tuple[Tensor, ...]:
    return tuple(tensor for _, tensors, _ in cases for tensor in tensors)


def _side_by_side(blocks: list[dict[str, Any]]) -> nn.Module:
    """Torch's unpoolings, each on inputs of its own: the values, where they are others, and the map to pool."""
    graph = Graph()
    inputs = [
        [graph.placeholder(f"{kind}_{i}") for kind in ("values", "map") if kind == "map" or not block["own"]]
        for i, block in enumerate(blocks)
    ]
    graph.output(
        tuple(
            graph.call_function(_unpooled, (*each, list(block["window"]), block["ceil_mode"]))
            for each, block in zip(inputs, blocks, strict=True)
        )
    )
    return GraphModule(nn.Module(), graph).eval()


def _unpooled(*given: Any) -> Tensor:
    *values, x, window, ceil_mode = given
    pooled, indices = verify._pool(x, window, ceil_mode)
    return verify._unpool(values[0] if values else pooled, indices, list(x.shape[2:]))


def _flips(lowered: Lowered, make: Make, path: Path) -> float:
    """Share of windows whose maximum lies elsewhere than in eager mode; of a file that returns the pooled maps."""
    module = copy.deepcopy(lowered.module)
    nodes = [node for node in module.graph.nodes if node.target in (forms.keys, forms.arith)]
    blocks = [block for block in lowered.blocks if block["lowering"] != "scatter"]
    # A map that is an input of the model is the same in both.
    pairs = [
        (node.args[1], block) for node, block in zip(nodes, blocks, strict=True) if node.args[1].op != "placeholder"
    ]
    if not pairs:
        return 0.0
    for node in module.graph.nodes:
        if node.op == "output":
            node.args = (tuple(node for node, _ in pairs),)
    module.graph.eliminate_dead_code()
    # A captured module rebuilds its outputs by the original's structure.
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module.recompile()
    inputs = tuple(each for each in tree_leaves(lowered.args) if isinstance(each, Tensor))
    watched, run = [], make(module, inputs, path)
    for args in with_random(inputs):
        with torch.no_grad():
            ours = list(module(*args))
        theirs = [torch.from_numpy(each) for each in run([each.numpy() for each in args])]
        windows = [(block["window"], block["ceil_mode"]) for _, block in pairs]
        watched.append(verify.flipped_windows(ours, theirs, windows))
    return sum(watched) / len(watched)
