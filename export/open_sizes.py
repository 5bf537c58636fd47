"""Capture of a model with open sizes, and proof that it is one function at all of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from .guards import beyond_guards
from .inputs import (
    axes_of,
    bounded,
    first_fit,
    odd_inputs,
    open_inputs,
    random_args,
    run_at,
    runnable,
    shapes_of,
    smaller_inputs,
    with_random,
)
from .lower import capture
from .verify import relative_error

__all__ = ["capture_bounded", "capture_open", "unguarded"]


def capture_open(
    model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str], guarded: bool = False
) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
    """Capture a model with the asked axes open: arguments of several sizes, and the program captured with the first.

    `guarded` leaves sizes of another path to torch's checks in the program. Raises ValueError if axes cannot be open.
    """
    return _first_captured(
        model,
        open_inputs(args, dynamic),
        dynamic,
        shapes_of,
        reach=0 if guarded else 4,
        odd=odd_inputs(args, dynamic),
    )


def capture_bounded(
    model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str]
) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
    """Capture a model with the asked axes open up to its arguments' sizes.

    Returns these and smaller arguments, and the program captured with the first; ValueError if axes cannot be open.
    """
    sizes = [(name, value.shape[axis]) for value in args for axis, name in axes_of(value).items() if name in dynamic]
    for name, size in sizes:
        if size < 2:
            raise ValueError(
                f"dynamic={tuple(dynamic)!r}: the example's sizes are the largest that the file takes, and its {name} "
                f"is 1; give an example of a larger {name}"
            )
    # Multiples of 32 where there are smaller ones.
    steps = (1, 32) if all(size > 32 for name, size in sizes if name != "batch") else (1,)
    choices = [[args, *(smaller_inputs(args, dynamic, part, step) for part in (2, 4))] for step in steps]
    choices = choices if dynamic else [with_random(args)]
    # What shrinks to one cell at the largest size is fixed.
    way_out = ", or a larger one"
    return _first_captured(model, choices, dynamic, bounded, reach=1, way_out=way_out)


def _first_captured(
    model: nn.Module,
    choices: Iterable[list[tuple[Any, ...]]],
    dynamic: Sequence[str],
    shapes: Callable[[tuple[Any, ...], Sequence[str]], Any],
    *,
    reach: int,
    odd: Sequence[tuple[Any, ...]] = (),
    way_out: str = "",
) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
    """The first list of arguments at all of which the model is one function, and its capture."""

    def fit(inputs: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
        run_at(model, inputs)
        program = capture(model, inputs[0], shapes(inputs[0], dynamic))
        inputs = [*inputs, *_apart(program, inputs, dynamic)]
        tried = [*inputs, *runnable(model, odd)]
        _check_branches(program, model, tried[1:])
        _check_branches(program, model, beyond_guards(model, tried, dynamic, program, reach))
        return inputs, program

    return first_fit(choices, dynamic, fit, way_out)


def _apart(
    program: ExportedProgram, inputs: list[tuple[Any, ...]], dynamic: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """Arguments that differ where the program lets axes of one name differ; a program that fixed one is refused."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    symbols, sizes = {name: list[str]() for name in dynamic}, [list(each.shape) for each in inputs[0]]
    for i, name in enumerate(program.graph_signature.user_inputs):
        for axis, axis_name in axes_of(inputs[0][i]).items():
            if axis_name in dynamic:
                size = nodes[str(name)].meta["val"].shape[axis]
                if isinstance(size, int) or size.node.expr.is_number:
                    raise RuntimeError(f"it fixes {axis_name} at {size}")
                known = symbols[axis_name]
                known += [str(size)] if str(size) not in known else []
                sizes[i][axis] = inputs[known.index(str(size)) % 3][i].shape[axis]
    if any(len(known) > 1 for known in symbols.values()):
        yield random_args(inputs[0], sizes)


def unguarded(module: nn.Module) -> GraphModule:
    """Take torch.export's checks of sizes out of a program's module, in place.

    They refuse maps of one cell, and do not trace.
    """
    assert isinstance(module, GraphModule)
    for node in module.graph.nodes:
        if node.target == "_guards_fn":
            module.graph.erase_node(node)
    module.recompile()
    module._forward_pre_hooks.clear()
    return module


def _check_branches(program: ExportedProgram, model: nn.Module, inputs: Iterable[tuple[Any, ...]]) -> None:
    """Refuse a program that is another function than the model at other sizes: a branch of its code on the size."""
    module = unguarded(program.module())
    for args in inputs:
        shapes = [list(each.shape) for each in args]
        try:
            with torch.no_grad():
                pairs = zip(tree_leaves(module(*args)), tree_leaves(model(*args)), strict=True)
                same = all(_close(a, b) for a, b in pairs)
        except Exception:  # whatever a model raises
            same = False
        if not same:
            raise RuntimeError(f"it takes another path at inputs {shapes}")


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    # The same operators on the same machine: far closer than two paths through a model are.
    return a.shape == b.shape and relative_error(a, b) <= 1e-3
