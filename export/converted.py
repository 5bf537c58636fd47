"""What the formats share that have a converter of their own: the lowered module, the checks, and the files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule

from ..contexts import kept
from . import forms, verify
from .inputs import bounded, checked
from .lower import blocks_of, lower_unpooling, returning_maps
from .lower_pair import unpoolings
from .open_sizes import capture_bounded, unguarded
from .verify_blocks import compare

__all__ = ["Lowered", "check_forms", "lower_for", "of_maps", "unpooled_shapes", "write_converted"]


@dataclass(frozen=True)
class Lowered:
    """A model without index tensors, of fixed sizes or of open ones up to those of its arguments.

    Args:
        module: the lowered module.
        inputs: its arguments, then others to check at: smaller ones where sizes are open.
        dynamic: names of the open axes.
        blocks: JSON-ready record of each unpooling.
        shapes: shape of each unpooled map, with None for open sizes, and the largest sizes.
    """

    module: GraphModule
    inputs: list[tuple[Any, ...]]
    dynamic: tuple[str, ...]
    blocks: list[dict[str, Any]]
    shapes: list[tuple[list[int | None], list[int]]]

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments, of the largest sizes."""
        return self.inputs[0]

    def export(self) -> ExportedProgram:
        """`torch.export` of the lowered module."""
        with torch.no_grad():
            return torch.export.export(
                self.module, self.args, dynamic_shapes=bounded(self.args, self.dynamic), strict=False
            )


# Writes a lowered model to a path, and loads that file: arrays in, arrays out.
Make = Callable[[Lowered, Path], verify.Run]


def lower_for(
    model: nn.Module,
    example: Tensor | Sequence[Any],
    target: str,
    lowering: str | None = None,
    dynamic: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> Lowered:
    """Lower a model at the sizes of its example or, on the axes of `dynamic`, at open ones of at most these.

    Raises ValueError if an option is unknown, an unpooling cannot be lowered, or the model cannot have the open axes.
    """
    args = checked(model, example, dynamic, target, lowering, metadata)
    inputs, program = capture_bounded(model, args, dynamic)
    module = unguarded(lower_unpooling(program, target=target, lowering=lowering))
    for each in module.modules():
        # A captured module refuses eval(), and converters warn of training.
        each.training = False
    assert isinstance(module, GraphModule)
    blocks = [each.to_dict() for each in blocks_of(module)]
    return Lowered(module, inputs, tuple(dynamic), blocks, unpooled_shapes(program))


def unpooled_shapes(program: ExportedProgram) -> list[tuple[list[int | None], list[int]]]:
    """Shapes of the maps that the different unpoolings of a program, not yet lowered, return, in the graph's order.

    Each is a shape with None for open sizes, and the sizes as captured.
    """
    found = [node.meta["val"].shape for node in unpoolings(program.graph)]
    return [
        (
            [size if isinstance(size, int) else None for size in shape],
            [size if isinstance(size, int) else size.node.hint for size in shape],
        )
        for shape in found
    ]


def write_converted(
    model: nn.Module,
    example: Tensor | Sequence[Any],
    path: Path,
    target: str,
    make: Make,
    lowering: str | None,
    dynamic: Sequence[str],
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write a file by a converter, and keep it if the checks in the target's runtime hold.

    `make` has the converter and the runtime. Returns the report, as it lies beside the file. Raises as `lower_for`, and
    RuntimeError if a check fails; then there is no file.
    """
    lowered = lower_for(model, example, target, lowering, dynamic, metadata)
    facts = verify.described(target, lowered.blocks, metadata, dynamic=list(dynamic))
    report = {"file": path.name, **facts, "checked_in": f"{target} CPU", "blocks": lowered.blocks}
    with kept(path) as made:
        run = make(lowered, made)

        def build(side: nn.Module, inputs: tuple[Tensor, ...], form: str) -> verify.Run:
            return make(lower_for(side, inputs, target, form, of_maps(dynamic)), made.with_name(f"forms{path.suffix}"))

        report["bit_comparisons"] = check_forms(lowered.blocks, lowered.shapes, build)
        outputs = verify.check_outputs(run, model, lowered.inputs, False)
        if outputs["max_relative_error"] > outputs["tolerance"]:
            outputs.update(_flips(lowered, make, made.with_name(f"watched{path.suffix}")))
        report["outputs"] = outputs
        verify.judge(outputs, path)
        verify.write_report(path, report)
    return report


def of_maps(dynamic: Sequence[str]) -> tuple[str, ...]:
    """Open axes of the maps that are unpooled, for those of a model: a sequence is a map one cell wide."""
    return tuple("height" if name == "length" else name for name in dynamic)


def check_forms(
    blocks: list[dict[str, Any]],
    shapes: list[tuple[list[int | None], list[int]]],
    build: Callable[[nn.Module, tuple[Tensor, ...], str], verify.Run],
) -> int:
    """Compare the unpoolings of a model with torch's to the bit, on random values, ties and rectified values.

    A file of such a format cannot be cut, so the same unpoolings are written side by side into one of their own. It
    holds them at the model's sizes and an odd one; where sizes are open, at the largest, and runs at smaller ones too.
    Those of indices that no pooling of the model made are left to the whole model.

    `shapes` is what `unpooled_shapes` returns; `build` writes and loads a module with torch's unpoolings by the named
    lowering. Returns how many comparisons were made; RuntimeError names the first unpooling that is not equal.
    """
    wanted: dict[str, dict[str, tuple[dict[str, Any], list[list[int]]]]] = {}
    for block, (declared, largest) in zip(blocks, shapes, strict=True):
        for sizes in _sizes(block["window"], declared, largest) if block["window"] else ():
            key = str((block["window"], block["ceil_mode"], block["own"], declared, sizes))
            wanted.setdefault(block["lowering"], {}).setdefault(key, (block, sizes))
    compared = 0
    for lowering, pairs in wanted.items():
        chosen = [block for block, _ in pairs.values()]
        # All maps take their first size, then their second, where a single size is repeated.
        rounds = [
            [_cases(block, sizes[min(number, len(sizes) - 1)]) for block, sizes in pairs.values()]
            for number in range(max(len(sizes) for _, sizes in pairs.values()))
        ]
        run = build(_side_by_side(chosen), tuple(cases[0][1] for cases in rounds[0]), lowering)
        for cases_of in rounds:
            for cases in zip(*cases_of, strict=True):
                outputs = run([x.numpy() for _, x, _ in cases])
                for block, (case, _, expected), output in zip(chosen, cases, outputs, strict=True):
                    compared += 1
                    compare(torch.from_numpy(output), expected, block, case)
    return compared


def _sizes(window: list[int], declared: list[int | None], largest: list[int]) -> list[list[list[int]]]:
    """Shapes to compare one unpooling at: lists of those that one map takes."""
    # A sequence is a map one cell wide.
    ones = [1] * (len(window) + 2 - len(largest))
    if None not in declared:
        odd = [1, 3, *(max(size, e + 1) if e > 1 else 1 for size, e in zip((17, 13, 9), window, strict=False))]
        return [[ones + largest], [odd]]
    parts = [
        [size if fixed else min(size, size // part | (part > 1)) for fixed, size in zip(declared, largest, strict=True)]
        for part in (1, 2, 4)
    ]
    return [[ones + part for part in parts]]


def _cases(block: dict[str, Any], shape: list[int]) -> list[tuple[str, Tensor, Tensor]]:
    """Name, map and expected output of each comparison."""
    return [
        (f"{kind} of size {shape[2:]}", x, _unpooled(x, block["window"], block["ceil_mode"], block["own"]))
        for kind, x in verify.probes(shape, torch.Generator().manual_seed(0)).items()
    ]


def _side_by_side(blocks: list[dict[str, Any]]) -> nn.Module:
    """Torch's unpoolings, each of a map of its own."""
    graph = Graph()
    inputs = [graph.placeholder(f"map_{i}") for i in range(len(blocks))]
    graph.output(
        tuple(
            graph.call_function(_unpooled, (x, list(block["window"]), block["ceil_mode"], block["own"]))
            for x, block in zip(inputs, blocks, strict=True)
        )
    )
    return GraphModule(nn.Module(), graph).eval()


def _unpooled(x: Tensor, window: list[int], ceil_mode: bool, own: bool) -> Tensor:
    pooled, indices = verify.torch_pool(x, window, ceil_mode)
    # Other values, of sizes that follow from the map's.
    return verify.torch_unpool(pooled if own else -pooled, indices, list(x.shape[2:]))


def _flips(lowered: Lowered, make: Make, path: Path) -> dict[str, float]:
    """What `verify.flipped_windows` finds beside eager mode, of a file that returns the pooled maps."""
    module, places = returning_maps(lowered.module, (forms.keys, forms.arith), lowered.blocks)
    run = make(replace(lowered, module=module), path) if places else verify.in_torch(module)
    arrays = ([each.numpy() for each in args] for args in lowered.inputs)
    return verify.flipped_windows(verify.in_torch(module), run, [lowered.blocks[place] for place in places], arrays)
