"""Arguments of a model at other sizes, and which of its axes stay open."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from .lower import capture
from .targets import check_mode
from .verify import first_line, relative_error

__all__ = [
    "OPEN_SIZES",
    "axes_of",
    "bounded",
    "capture_bounded",
    "capture_open",
    "check_arguments",
    "first_fit",
    "odd_inputs",
    "open_inputs",
    "random_like",
    "run_at",
    "shapes_of",
    "taken_of",
    "unguarded",
    "with_random",
]

_T = TypeVar("_T")

# Names of the axes after batch and channels, by their number.
_AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
# Sizes to capture open axes with, then a larger and a smaller one to check at: a map of 1 is frozen, so what is
# captured must leave more after five halvings and a 4×4 window. Odd sizes first; models that need multiples of 32 take
# the second. Volumes take a quarter.
OPEN_SIZES = (((193, 161), (257, 289), (47, 33)), ((192, 160), (256, 288), (64, 96)))
_SQUARE = (64, 64)  # even, too
# Sizes at which a model may refuse to run, but not take another path.
_ODD_SIZES = ((47, 33), (17, 18))


def axes_of(value: Tensor) -> dict[int, str]:
    """Names of the axes that may be open.

    Args:
        value: an argument of a model.

    Returns:
        Axis to name: `batch`, and `length`, `height`, `width` or `depth` by rank.
    """
    if not 3 <= value.dim() <= 5:
        return {0: "batch"} if value.dim() else {}
    return {0: "batch", **{i + 2: name for i, name in enumerate(_AXES[value.dim() - 2])}}


def check_arguments(model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str]) -> None:
    """Refuse arguments that are no tensors or bfloat16, what is off the CPU, and names of axes that there are not.

    Args:
        model: a module.
        args: its arguments.
        dynamic: names of axes.

    Raises:
        ValueError: naming the first such and the options.
    """
    for i, value in enumerate(args, 1):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"example: argument {i} is {type(value).__name__}, and files take tensors alone, by position: wrap the "
                "model in a module that sets the others"
            )
        if value.dtype == torch.bfloat16:
            raise ValueError(
                f"example: argument {i} is bfloat16, which NumPy does not have, by which files are checked: call "
                "model.float() first and give float32"
            )
    for name, each in (("example", args), ("model", (*model.parameters(), *model.buffers()))):
        device = next((value.device for value in each if value.device.type != "cpu"), None)
        if device is not None:
            raise ValueError(f"the {name} is on {device}, and files are checked on the CPU: call {name}.cpu() first")
    if isinstance(dynamic, str):
        raise ValueError(f"dynamic={dynamic!r}: expected a tuple of names")
    known = {name for value in args for name in axes_of(value).values()}
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
        dict.fromkeys((axis for axis, name in axes_of(value).items() if name in dynamic), Dim.AUTO) for value in args
    )


def random_like(value: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """An argument of another shape.

    Args:
        value: an argument of a model.
        shape: the shape.
        generator: source of random numbers.

    Returns:
        Random numbers; of integers and truth values some of the argument's own, for others may mean nothing.
    """
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    return value.flatten()[torch.randint(value.numel(), tuple(shape), generator=generator)]


def run_at(model: nn.Module, inputs: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Run a model at several sizes.

    Args:
        model: a module in evaluation mode.
        inputs: its arguments.

    Returns:
        The inputs.

    Raises:
        RuntimeError: with what the model says of a size that it does not take, be it by an assert or a ValueError.
        ValueError: if it returns other things than tensors and None.
    """
    for args in inputs:
        try:
            with torch.no_grad():
                outputs = tree_leaves(model(*args))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise RuntimeError(first_line(error)) from error
        for i, each in enumerate(outputs, 1):
            if not (each is None or isinstance(each, Tensor)):
                raise ValueError(
                    f"output {i} is {type(each).__name__}, and files return tensors alone: wrap the model in a module "
                    "that leaves it out"
                )
    return inputs


def with_random(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The example, and other values of the same shapes.

    Args:
        args: a model's arguments.

    Returns:
        Two tuples of arguments.
    """
    generator = torch.Generator().manual_seed(1)
    return [args, tuple(random_like(each, each.shape, generator) for each in args)]


def open_inputs(args: tuple[Any, ...], dynamic: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    """Lists of arguments, those to capture with first, then some of other sizes of the open axes and the example.

    Args:
        args: a model's arguments.
        dynamic: names of the open axes.

    Yields:
        One list where no spatial axis is open; else one of odd sizes, then one of multiples of 32.
    """
    batches = (2, 1, 3, 1) if "batch" in dynamic else (0,) * 4
    if any(name != "batch" for name in dynamic):
        for sizes in OPEN_SIZES:
            yield [*(_resized(args, dynamic, *each) for each in zip(batches, (*sizes, _SQUARE), strict=True)), args]
    elif dynamic:
        yield [*(_resized(args, dynamic, batch, None) for batch in batches[:3]), args]
    else:
        yield with_random(args)


def odd_inputs(args: tuple[Any, ...], dynamic: Sequence[str]) -> list[tuple[Any, ...]]:
    """Arguments of sizes that a model need not take.

    Args:
        args: a model's arguments.
        dynamic: names of the open axes.

    Returns:
        Some small ones; none where no spatial axis is open.
    """
    if all(name == "batch" for name in dynamic):
        return []
    return [_resized(args, dynamic, 1 if "batch" in dynamic else 0, sizes) for sizes in _ODD_SIZES]


def _resized(args: tuple[Any, ...], dynamic: Sequence[str], batch: int, sizes: Sequence[int] | None) -> tuple[Any, ...]:
    """Arguments with other sizes of the open axes, of random numbers."""
    generator, result = torch.Generator().manual_seed(0), []
    for value in args:
        shape, named = list(value.shape), axes_of(value)
        for axis, name in named.items():
            if name in dynamic and axis == 0:
                shape[0] = batch
            elif name in dynamic and sizes:
                shape[axis] = sizes[axis % 2] // (4 if value.dim() == 5 else 1)
        result.append(random_like(value, shape, generator))
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
    odd = odd_inputs(args, dynamic)
    return _first_captured(model, open_inputs(args, dynamic), dynamic, lambda each: shapes_of(each, dynamic), "", odd)


def capture_bounded(
    model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str]
) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
    """Capture a model with the asked axes open up to the sizes of its arguments.

    Args:
        model: a module in evaluation mode.
        args: its arguments, of the largest sizes.
        dynamic: names of the open axes.

    Returns:
        The arguments and smaller ones, the program captured with the first of them.

    Raises:
        ValueError: if the model cannot have these axes.
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
    choices = [[args, *(_parted(args, dynamic, part, step) for part in (2, 4))] for step in steps]
    choices = choices if dynamic else [with_random(args)]
    # What shrinks to one cell at the largest size is fixed.
    way_out = ", or a larger one"
    return _first_captured(model, choices, dynamic, lambda each: bounded(each, dynamic), way_out)


def bounded(args: tuple[Any, ...], dynamic: Sequence[str]) -> tuple[Any, ...] | None:
    """`dynamic_shapes` of `torch.export.export`, with the sizes of the arguments as the largest.

    Args:
        args: a model's arguments.
        dynamic: names of the open axes.

    Returns:
        One entry per argument; None where no axis is open.

    Raises:
        ValueError: if axes are open and torch is older than 2.7.
    """
    if not dynamic:
        return None
    if not callable(Dim.AUTO):
        raise ValueError(f"dynamic={tuple(dynamic)!r}: open sizes with a largest one need torch 2.7 or newer")
    return tuple(
        {axis: hint(max=value.shape[axis]) for axis, hint in shapes.items()}
        for value, shapes in zip(args, shapes_of(args, dynamic), strict=True)
    )


def _parted(args: tuple[Any, ...], dynamic: Sequence[str], part: int, step: int) -> tuple[Any, ...]:
    """Arguments of a part of the sizes of the open axes, odd ones or multiples of `step`; one image at last."""
    generator, result = torch.Generator().manual_seed(part), []
    for value in args:
        shape = list(value.shape)
        for axis, name in axes_of(value).items():
            if name in dynamic:
                size = max(1, shape[axis] // part)
                fitting = size | 1 if step == 1 else -(-size // step) * step
                shape[axis] = min(shape[axis], fitting) if axis else size if part < 4 else 1
        result.append(random_like(value, shape, generator))
    return tuple(result)


def first_fit(
    choices: Iterable[list[tuple[Any, ...]]],
    dynamic: Sequence[str],
    fit: Callable[[list[tuple[Any, ...]]], _T],
    way_out: str = "",
) -> _T:
    """What a function gives for the first list of arguments that it takes.

    Args:
        choices: lists of a model's arguments.
        dynamic: names of the open axes.
        fit: the function.
        way_out: what else to do where it takes none, for the message.

    Returns:
        Its result.

    Raises:
        ValueError: if it takes none, with what it says of the last.
    """
    failure: Exception | None = None
    for inputs in choices:
        try:
            return fit(inputs)
        except (RuntimeError, AssertionError, torch._dynamo.exc.UserError) as error:
            failure = error
    if not dynamic:
        shapes = [list(each.shape) for each in inputs[0]]
        raise ValueError(
            f"the model does not export at inputs {shapes}: {first_line(failure)}; give an example that it takes"
        ) from failure
    raise ValueError(
        f"the model does not run at every size of {', '.join(dynamic)}: {first_line(failure)}; "
        f"leave fewer axes open (dynamic=('batch',), or () for none) and give an example of the size to fix{way_out}"
    ) from failure


def _first_captured(
    model: nn.Module,
    choices: Iterable[list[tuple[Any, ...]]],
    dynamic: Sequence[str],
    shapes: Callable[[tuple[Any, ...]], Any],
    way_out: str,
    odd: Sequence[tuple[Any, ...]] = (),
) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
    """The first list of arguments at all of which the model is one function, and its capture."""

    def fit(inputs: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], ExportedProgram]:
        run_at(model, inputs)
        program = capture(model, inputs[0], shapes(inputs[0]))
        inputs = [*inputs, *_apart(program, inputs, dynamic)]
        _check_branches(program, model, [*inputs[1:], *taken_of(model, odd)])
        return inputs, program

    check_mode(model)
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
                if isinstance(size, int):
                    raise RuntimeError(f"it fixes {axis_name} at {size}")
                known = symbols[axis_name]
                known += [str(size)] if str(size) not in known else []
                sizes[i][axis] = inputs[known.index(str(size)) % 3][i].shape[axis]
    if any(len(known) > 1 for known in symbols.values()):
        generator = torch.Generator().manual_seed(0)
        yield tuple(random_like(*each, generator) for each in zip(inputs[0], sizes, strict=True))


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


def taken_of(model: nn.Module, choices: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Those arguments at which a model runs.

    Args:
        model: a module in evaluation mode.
        choices: several of its arguments.

    Yields:
        Some of them.
    """
    for args in choices:
        try:
            run_at(model, [args])
        except RuntimeError:
            continue
        yield args


def _check_branches(program: ExportedProgram, model: nn.Module, inputs: list[tuple[Any, ...]]) -> None:
    """Refuse a program that is another function than the model at other sizes: a branch of its code on the size."""
    module = unguarded(program.module())
    for args in inputs:
        shapes = [list(each.shape) for each in args]
        try:
            with torch.no_grad():
                pairs = zip(tree_leaves(module(*args)), tree_leaves(model(*args)), strict=True)
                same = all(_close(a, b) for a, b in pairs if isinstance(a, Tensor))
        except (RuntimeError, AssertionError, ValueError):
            same = False
        if not same:
            raise RuntimeError(f"it takes another path at inputs {shapes}")


def _close(a: Tensor, b: Tensor) -> bool:
    # The same operators on the same machine: far closer than two paths through a model are.
    return a.shape == b.shape and relative_error(a, b) <= 1e-3
