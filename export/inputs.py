"""Arguments of a model: checked, at other sizes, and the names of their axes."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from .targets import check_drop_in, check_mode, check_target
from .verify import first_line

__all__ = [
    "OPEN_SIZES",
    "as_args",
    "axes_of",
    "bounded",
    "checked",
    "first_fit",
    "odd_inputs",
    "open_inputs",
    "random_args",
    "run_at",
    "runnable",
    "shapes_of",
    "smaller_inputs",
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
    """Axes of an argument that may be open, to names: `batch`, and `length`, `height`, `width` or `depth` by rank."""
    if not 3 <= value.dim() <= 5:
        return {0: "batch"} if value.dim() else {}
    return {0: "batch", **{i + 2: name for i, name in enumerate(_AXES[value.dim() - 2])}}


def as_args(example: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """Positional arguments of a model, of one tensor or of all arguments: a tuple, without gradients."""
    args = (example,) if isinstance(example, Tensor) else tuple(example)
    return tuple(each.detach() if isinstance(each, Tensor) else each for each in args)


def checked(
    model: nn.Module,
    example: Tensor | Sequence[Any],
    dynamic: Sequence[str],
    target: str = "onnxruntime",
    lowering: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """The arguments of a model to export; ValueError names what about it, them or an option no file can have."""
    for key, value in (metadata or {}).items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata: {key!r} is not JSON-ready: {error}") from error
    choice, args = check_target(target, lowering), as_args(example)
    _check_arguments(model, args, dynamic)
    if dynamic and not choice.dynamic:
        raise ValueError(f"dynamic={tuple(dynamic)!r}: {target} takes only fixed sizes; pass dynamic=()")
    check_mode(model)
    check_drop_in(model, target, lowering)
    return args


def _check_arguments(model: nn.Module, args: tuple[Any, ...], dynamic: Sequence[str]) -> None:
    """Raise ValueError for arguments that are no tensors or bfloat16, what is off the CPU, and names of no axis."""
    for i, value in enumerate(args, 1):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"example: argument {i} is {type(value).__name__}, and files take only tensors, by position: wrap the "
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
    """`dynamic_shapes` of `torch.export.export` for the named open axes, one entry per argument."""
    return tuple(
        dict.fromkeys((axis for axis, name in axes_of(value).items() if name in dynamic), Dim.AUTO) for value in args
    )


def random_args(args: tuple[Any, ...], shapes: Iterable[Sequence[int]], seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of other shapes; of integers and truth values some of the given: others may mean nothing."""
    generator, result = torch.Generator().manual_seed(seed), []
    for value, shape in zip(args, shapes, strict=True):
        if value.is_floating_point():
            result.append(torch.randn(tuple(shape), generator=generator).to(value.dtype))
        else:
            result.append(value.flatten()[torch.randint(value.numel(), tuple(shape), generator=generator)])
    return tuple(result)


def run_at(model: nn.Module, inputs: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Run a model at several sizes, and return the inputs.

    Raises RuntimeError for whatever the model raises at a size, ValueError for outputs other than tensors and None.
    """
    for args in inputs:
        try:
            with torch.no_grad():
                outputs = tree_leaves(model(*args))
        except Exception as error:  # whatever a model raises
            raise RuntimeError(first_line(error)) from error
        for i, each in enumerate(outputs, 1):
            if not (each is None or isinstance(each, Tensor)):
                raise ValueError(
                    f"output {i} is {type(each).__name__}, and files return only tensors: wrap the model in a module "
                    "that leaves it out"
                )
    return inputs


def with_random(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Two tuples of arguments: the given ones, and random values of the same shapes."""
    return [args, random_args(args, (each.shape for each in args), seed=1)]


def open_inputs(args: tuple[Any, ...], dynamic: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
    """Lists of arguments, those to capture with first, then some of other sizes of the open axes and the example.

    There is one list where no spatial axis is open; else one of odd sizes, then one of multiples of 32.
    """
    if any(name != "batch" for name in dynamic):
        for sizes in OPEN_SIZES:
            batches = zip((2, 1, 3, 1), (*sizes, _SQUARE), strict=True)
            yield [*(_of_size(args, dynamic, *each) for each in batches), args]
    elif dynamic:
        yield [*(_of_size(args, dynamic, batch) for batch in (2, 1, 3)), args]
    else:
        yield with_random(args)


def odd_inputs(args: tuple[Any, ...], dynamic: Sequence[str]) -> list[tuple[Any, ...]]:
    """Small arguments of sizes that a model need not take; none where no spatial axis is open."""
    if all(name == "batch" for name in dynamic):
        return []
    return [_of_size(args, dynamic, 1, sizes) for sizes in _ODD_SIZES]


def _of_size(args: tuple[Any, ...], dynamic: Sequence[str], batch: int, sizes: Sequence[int] = ()) -> tuple[Any, ...]:
    """Random arguments of this size, a quarter of it for volumes, on the open axes."""
    return _resized(args, dynamic, lambda x, axis: sizes[axis % 2] // (4 if x.dim() == 5 else 1) if axis else batch)


def _resized(
    args: tuple[Any, ...], dynamic: Sequence[str], size: Callable[[Tensor, int], int], seed: int = 0
) -> tuple[Any, ...]:
    """Random arguments, each open axis of the size that a function of argument and axis gives."""
    shapes = [list(value.shape) for value in args]
    for value, shape in zip(args, shapes, strict=True):
        for axis, name in axes_of(value).items():
            if name in dynamic:
                shape[axis] = size(value, axis)
    return random_args(args, shapes, seed)


def bounded(args: tuple[Any, ...], dynamic: Sequence[str]) -> tuple[Any, ...] | None:
    """`dynamic_shapes` of `torch.export.export`, with the arguments' sizes as the largest; None where no axis is open.

    Raises ValueError if axes are open and torch is older than 2.7.
    """
    if not dynamic:
        return None
    if not callable(Dim.AUTO):
        raise ValueError(f"dynamic={tuple(dynamic)!r}: open sizes with a largest one need torch 2.7 or newer")
    return tuple(
        {axis: hint(max=value.shape[axis]) for axis, hint in shapes.items()}
        for value, shapes in zip(args, shapes_of(args, dynamic), strict=True)
    )


def smaller_inputs(args: tuple[Any, ...], dynamic: Sequence[str], part: int, step: int) -> tuple[Any, ...]:
    """Random arguments of a part of the open axes' sizes: 2 for halves, 4 for quarters and one image.

    Spatial sizes are multiples of `step`, odd ones with 1, and never larger than the given ones.
    """

    def size(value: Tensor, axis: int) -> int:
        full, smaller = value.shape[axis], max(1, value.shape[axis] // part)
        if axis == 0:
            return smaller if part < 4 else 1
        return min(full, smaller | 1 if step == 1 else -(-smaller // step) * step)

    return _resized(args, dynamic, size, seed=part)


def first_fit(
    choices: Iterable[list[tuple[Any, ...]]],
    dynamic: Sequence[str],
    fit: Callable[[list[tuple[Any, ...]]], _T],
    way_out: str = "",
) -> _T:
    """What `fit` returns for the first list of arguments that it takes.

    Raises ValueError if it takes none, with what it says of the last, and `way_out`: what else to do.
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
        f"the model does not run at every size of {', '.join(dynamic)}: {first_line(failure).rstrip('.')}; "
        f"leave fewer axes open (dynamic=('batch',), or () for none) and give an example of the size to fix{way_out}"
    ) from failure


def runnable(model: nn.Module, choices: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Those of the arguments at which a model runs."""
    for args in choices:
        try:
            run_at(model, [args])
        except RuntimeError:
            continue
        yield args
