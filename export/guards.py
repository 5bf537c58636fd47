"""Sizes at which a model may take another path than at those it was captured with."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import sympy
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.printers import PythonPrinter

from ..layers import functional
from .inputs import axes_of, random_args, runnable

__all__ = ["beyond_guards"]

Args = tuple[Any, ...]
Sizes = dict[str, int]  # of every axis of every argument
_TORCH = str(Path(torch.__file__).parent)
_NAMES = {"math": math, "torch": torch}  # in what torch prints
_TRIES = 3  # sizes per check: a model may refuse the nearest
_RUNS = 6  # on symbols; each takes about half of the time of a capture


def beyond_guards(
    model: nn.Module,
    inputs: Sequence[Args],
    dynamic: Sequence[str],
    program: ExportedProgram | None = None,
    reach: int = 4,
) -> Iterator[Args]:
    """Arguments that lead a model past the choices which it made by the sizes of others (`if width % 5 == 0`).

    torch.export keeps a check of each choice on the path that it captured. Every check is broken by the nearest size
    that leaves most others; where the choice was the model's own and not one of torch's operators, the path at that
    size is run on symbols in turn, for the choices behind it.

    The first of `inputs` are those of the capture; a check that some of them break is not broken again. `program` is
    what was captured, straight from `capture`; None runs the model on symbols. Sizes reach up to `reach` times those of
    the capture; 0 tries none.
    """
    taken, tried, known = list(inputs), [_sizes(args) for args in inputs], set[tuple[str, frozenset[str]]]()
    queue = [inputs[0]] if reach else []
    for at in queue:
        try:
            path = _captured(program) if program and at is inputs[0] else _run(model, at, dynamic)
        except Exception:  # whatever comes of code that does not run on symbols
            continue
        choices = path.choices(_sizes(at), {name: reach * size for name, size in _sizes(inputs[0]).items()})
        for place, guard in enumerate(path.guards):
            before = [each for each in path.guards[:place] if each.own]
            # A choice of the model's is another one behind other choices.
            behind = frozenset(each.code for each in before if guard.own)
            if (guard.code, behind) in known:
                continue
            known |= {(guard.code, behind), (guard.opposite, behind)}
            found = next((args for args in taken if guard.is_first_broken(_sizes(args), before)), None)
            near = [sizes for sizes, broken in choices if guard in broken] if found is None else []
            for sizes in [each for each in near[:_TRIES] if each not in tried]:
                args = _resized(at, sizes)
                tried.append(sizes)
                if list(runnable(model, [args])):
                    found = args
                    taken.append(args)
                    yield args
                    break
            if found is not None and guard.own and len(queue) <= _RUNS and all(found is not each for each in queue):
                queue.append(found)


@dataclass(frozen=True)
class _Guard:
    """A check of sizes: Python code, its opposite, and whether the choice is the model's own."""

    code: str
    opposite: str
    own: bool
    compiled: CodeType

    def holds(self, sizes: Mapping[str, int]) -> bool:
        try:
            return bool(eval(self.compiled, _NAMES, dict(sizes)))
        except (ArithmeticError, ValueError):  # sizes that divide by zero
            return True

    def is_first_broken(self, sizes: Sizes, before: Iterable["_Guard"]) -> bool:
        """Whether a path comes this far at such sizes, and turns here."""
        return not self.holds(sizes) and all(guard.holds(sizes) for guard in before)


@dataclass(frozen=True)
class _Path:
    """The open axes, each as code of those that it follows, and the checks on a path through a model."""

    axes: dict[str, str]
    guards: list[_Guard]

    def choices(self, here: Sizes, largest: Sizes) -> list[tuple[Sizes, set[_Guard]]]:
        """Sizes with one axis changed and those that follow it; first what breaks little else, then the nearest."""
        found = []
        for name in [axis for axis, code in self.axes.items() if axis == code]:
            for size in range(1, largest[name] + 1):
                sizes = here | {name: size}
                sizes |= {axis: int(eval(code, _NAMES, dict(sizes))) for axis, code in self.axes.items()}
                broken = {guard for guard in self.guards if not guard.holds(sizes)}
                found.append((len(broken), abs(size - here[name]), sizes, broken))
        return [(sizes, broken) for *_, sizes, broken in sorted(found, key=lambda choice: choice[:2])]


def _captured(program: ExportedProgram) -> _Path:
    """The path that a program holds."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return _path([values[str(name)] for name in program.graph_signature.user_inputs])


def _run(model: nn.Module, args: Args, dynamic: Sequence[str]) -> _Path:
    """The path of a model at these sizes, run on symbols."""
    mode, symbolic = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True), []
    for i, value in enumerate(args):
        named = axes_of(value)
        kinds = [DimDynamic.DYNAMIC if named.get(j) in dynamic else DimDynamic.STATIC for j in range(value.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        symbolic.append(mode.from_tensor(value, source=ConstantSource(f"x{i}"), symbolic_context=context))
    with functional.capture_stock(), torch.no_grad(), enable_python_dispatcher(), mode:
        model(*symbolic)
    return _path(symbolic)


def _path(values: Sequence[Any]) -> _Path:
    """Read the axes of symbolic arguments and the checks of their environment."""
    axes = {
        name: size.node.expr
        for name, size in _named(values)
        if isinstance(size, torch.SymInt) and not size.node.expr.is_number
    }
    if not axes:
        return _Path({}, [])
    environment = values[0].fake_mode.shape_env
    names: dict[Any, Any] = {}
    for name, expr in axes.items():
        if expr.is_symbol:
            names.setdefault(expr, sympy.Symbol(name, integer=True, positive=True))
    guards = {}
    for guard in environment.guards:
        expr = environment.replace(guard.expr)  # earlier ones may be of symbols that later ones made equal
        if expr.free_symbols <= names.keys():
            code, opposite = (_code(each.xreplace(names)) for each in (expr, sympy.Not(expr)))
            own = not str(getattr(guard.sloc.framework_loc, "filename", _TORCH)).startswith(_TORCH)
            guards[code] = _Guard(code, opposite, own, compile(code, "guard", "eval"))
    known = {name: expr for name, expr in axes.items() if expr.free_symbols <= names.keys()}
    return _Path({name: _code(expr.xreplace(names)) for name, expr in known.items()}, list(guards.values()))


def _code(expr: sympy.Expr) -> str:
    return PythonPrinter().doprint(expr)


def _named(args: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Every axis of every argument by a name of its own."""
    return ((f"x{i}_{axis}", size) for i, value in enumerate(args) for axis, size in enumerate(value.shape))


def _sizes(args: Args) -> Sizes:
    return dict(_named(args))


def _resized(args: Args, sizes: Sizes) -> Args:
    """Random arguments of these sizes."""
    return random_args(args, ([sizes[f"x{i}_{j}"] for j in range(value.dim())] for i, value in enumerate(args)))
