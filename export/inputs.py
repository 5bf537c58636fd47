"""Arguments of a model at other sizes, and which of its axes stay open."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from .lower import capture

__all__ = ["axes_of", "capture_open", "check_dynamic", "open_inputs", "shapes_of", "unguarded"]

# Names of the axes after batch and channels, by their number.
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
# Sizes to capture open axes with, then a larger and a smaller one to check at: a map of 1 is frozen, so what is
# captured must leave more after five halvings and a 4×4 window. Odd sizes first; models that need multiples of 32 take
# the second. Volumes take a quarter.
_OPEN_SIZES = (((193, 161), (257, 289), (47, 33)), ((192, 160), (256, 288), (64, 96)))


def axes_of(value: Tensor) -> dict[int, str]:
    """Names of the axes that may be open.

    Args:
        value: an argument of a model.

    Returns:
        Axis to name: `batch`, and `length`, `height`, `width` or `depth` by rank.
    """
    if not 3 <= value.dim() <= 5:
        return {0: "batch"}
    return {0: "batch", **{i + 2: name for i, name in enumerate(_AXES[value.dim() - 2])}}


def check_dynamic(args: tuple[Any, ...], dynamic: Sequence[str]) -> None:
    """Refuse names of axes that the arguments do not have.

    Args:
        args: a model's arguments.
        dynamic: names of axes.

    Raises:
        ValueError: naming the first such and the options.
    """
    if isinstance(dynamic, str):
        raise ValueError(f"dynamic={dynamic!r}: expected a tuple of names")
    known = {name for value in args if isinstance(value, Tensor) for name in axes_of(value).values()}
    unknown = [name for name in dynamic if name not in known]
    if unknown:
        raise ValueError(f"dynamic={unknown[0]!r}: the inputs have {', '.join(sorted(known))}")


def shapes_of(args: tuple[Any, ...], dynamic: Sequence[str]) -> tuple[Any, ...]:
    """`dynamic_shapes` of `torch.export.export`.

    Args:
        args: a model's arguments.
        dynamic: names of the open axes.

    Returns:
        One entry per argument.
    """
    return tuple(
        dict.fromkeys((axis for axis, name in axes_of(value).items() if name in dynamic), Dim.AUTO)
        if isinstance(value, Tensor)
        else None
        for value in args
    )


def open_inputs(args: tuple[Any, ...], dynamic: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    """Lists of arguments, those to capture with first and then some of other sizes of the open axes.

    Args:
        args: a model's arguments.
        dynamic: names of the open axes.

    Yields:
        One list where no spatial axis is open; else one of odd sizes, then one of multiples of 32.
    """
    batches = (2, 1, 3) if "batch" in dynamic else (0, 0, 0)
    if any(name != "batch" for name in dynamic):
        for sizes in _OPEN_SIZES:
            yield [_resized(args, dynamic, *each) for each in zip(batches, sizes, strict=True)]
    elif dynamic:
        yield [_resized(args, dynamic, batch, None) for batch in batches]
    else:
        yield [args]


def _resized(args: tuple[Any, ...], dynamic: Sequence[str], batch: int, sizes: Sequence[int] | None) -> tuple[Any, ...]:
    """Arguments with other sizes of the open axes, of random numbers."""
    generator, result = torch.Generator().manual_seed(0), []
    for value in args:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            result.append(value)
            continue
        shape, named = list(value.shape), axes_of(value)
        for axis, name in named.items():
            if name in dynamic and axis == 0:
                shape[0] = batch
            elif name in dynamic and sizes:
                shape[axis] = sizes[axis % 2] // (4 if value.dim() == 5 else 1)
        result.append(torch.randn(shape, generator=generator))
    return tuple(result)


def capture_open(
    model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str]
) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
    """Capture a model with the asked axes open.

    Args:
        model: a module in evaluation mode.
        args: its arguments.
        dynamic: names of the open axes.

    Returns:
        Arguments of several sizes, the program captured with the first of them.

    Raises:
        ValueError: if the model cannot have these axes.
    """
    failure: Exception | None = None
    for inputs in open_inputs(args, dynamic):
        try:
            if dynamic:
                with torch.no_grad():
                    for each in inputs:
                        model(*each)
            program = capture(model, inputs[0], shapes_of(inputs[0], dynamic))
            _check_open(program, inputs[0], dynamic)
            _check_branches(program, model, inputs[1:])
            return inputs, program
        except (RuntimeError, AssertionError, torch._dynamo.exc.UserError) as error:
            if not dynamic:
                raise
            failure = error
    raise ValueError(
        f"the model does not run at every size of {', '.join(dynamic)}: {str(failure).strip().splitlines()[0]}; "
        "leave fewer axes open (dynamic=('batch',), or () for none) and give an example of the size to fix"
    ) from failure


def _check_open(program: ExportedProgram, args: tuple[Any, ...], dynamic: Sequence[str]) -> None:
    """Refuse a program that fixed an axis."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, value in zip(names, args, strict=True):
        if not isinstance(value, Tensor):
            continue
        for axis, axis_name in axes_of(value).items():
            if axis_name not in dynamic:
                continue
            size = nodes[str(name)].meta["val"].shape[axis]
            if isinstance(size, int):
                raise RuntimeError(f"it fixes {axis_name} at {size}")


def unguarded(module: nn.Module) -> GraphModule:
    """Take torch.export's checks of sizes out of a program's module: they refuse maps of one cell, and do not trace.

    Args:
        module: a program's module; changed in place.

    Returns:
        The module.
    """
    assert isinstance(module, GraphModule)
    for node in module.graph.nodes:
        if node.target == "_guards_fn":
            module.graph.erase_node(node)
    module.recompile()
    module._forward_pre_hooks.clear()
    return module


def _check_branches(program: ExportedProgram, model: nn.Module, inputs: list[tuple[Any, ...]]) -> None:
    """Refuse a program that is another function than the model at other sizes: a branch of its code on the size."""
    module = unguarded(program.module())
    for args in inputs:
        shapes = [list(each.shape) for each in args if isinstance(each, Tensor)]
        try:
            with torch.no_grad():
                pairs = zip(tree_leaves(module(*args)), tree_leaves(model(*args)), strict=True)
                same = all(_close(a, b) for a, b in pairs if isinstance(a, Tensor))
        except (RuntimeError, AssertionError):
            same = False
        if not same:
            raise RuntimeError(f"it takes another path at inputs {shapes}")


def _close(a: Tensor, b: Tensor) -> bool:
    # The same operators on the same machine: far closer than two paths through a model are.
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-3 * b.abs().max())
