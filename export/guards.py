"""Sizes at which a captured model may take another path: those that break torch.export's checks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from .inputs import random_like, taken_of

__all__ = ["beyond_guards"]

_TRIES = 3  # sizes per check: a model may refuse the nearest


def beyond_guards(
    program: ExportedProgram, model: nn.Module, inputs: Sequence[tuple[Any, ...]], reach: int = 4
) -> Iterator[tuple[Any, ...]]:
    """Arguments that break the checks of sizes under which torch.export captured a model.

    A check stands wherever the model, or torch in it, chose by a size (`if width % 5 == 0`): without its checks a
    program may be another function beyond them. Most are torch's own, beyond which nothing changes.

    Args:
        program: what was captured, straight from `capture`.
        model: the module, in evaluation mode.
        inputs: its arguments, first those of the capture; checks that the others break are passed over.
        reach: the largest sizes to try, in multiples of those of the capture; 0 for none.

    Yields:
        For each check, arguments that break it and that the model takes, where some were found.
    """
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    sizes = [[_code(size) for size in placeholders[str(name)].shape] for name in program.graph_signature.user_inputs]
    captured = _symbols(sizes, inputs[0])
    guards = _guards(placeholders.values(), captured)
    met = {i for args in inputs for i in _broken(guards, _symbols(sizes, args))}
    choices = []
    for name, size in captured.items():
        for other in range(1, reach * size + 1):
            values = captured | {name: other}
            choices.append((_broken(guards, values), abs(other - size), values))
    # First those that break little else, which the model may refuse; of them the nearest.
    choices.sort(key=lambda choice: (len(choice[0]), choice[1]))
    for guard in range(len(guards)):
        near = [(broken, values) for broken, _, values in choices if guard in broken and guard not in met]
        for broken, values in near[:_TRIES]:
            shapes = [[int(eval(size, {}, dict(values))) for size in shape] for shape in sizes]
            generator = torch.Generator().manual_seed(0)
            args = tuple(random_like(*each, generator) for each in zip(inputs[0], shapes, strict=True))
            if list(taken_of(model, [args])):
                met |= broken
                yield args
                break


def _code(size: int | torch.SymInt) -> str:
    """A size as Python code of torch's symbols."""
    return str(size) if isinstance(size, int) else PythonPrinter().doprint(size.node.expr)


def _symbols(sizes: list[list[str]], args: tuple[Any, ...]) -> dict[str, int]:
    """What arguments set torch's symbols to."""
    pairs = (pair for shape, value in zip(sizes, args, strict=True) for pair in zip(shape, value.shape, strict=True))
    return {name: size for name, size in pairs if name.isidentifier()}


def _guards(values: Iterable[Any], symbols: Mapping[str, int]) -> list[CodeType]:
    """torch's checks of these symbols, compiled."""
    shape_env = next((value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor)), None)
    exprs = [guard.expr for guard in shape_env.guards] if shape_env else []
    known = [expr for expr in exprs if {str(each) for each in expr.free_symbols} <= symbols.keys()]
    return [compile(code, "guard", "eval") for code in dict.fromkeys(map(PythonPrinter().doprint, known))]


def _broken(guards: list[CodeType], values: Mapping[str, int]) -> set[int]:
    """Numbers of the checks that these values of the symbols break; none for sizes that divide by zero."""
    try:
        return {i for i, guard in enumerate(guards) if not eval(guard, {}, dict(values))}
    except ZeroDivisionError:
        return set()
