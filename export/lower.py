"""The graph pass: max-unpooling without index tensors, for any model that torch.export captures."""

import dataclasses
import logging
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node

from ..layers import functional
from . import forms
from .targets import check_drop_in, check_mode, check_target

__all__ = ["Block", "as_args", "blocks_of", "capture", "lower_program", "lower_unpooling", "unpoolings"]

_logger = logging.getLogger(__name__)

_aten = torch.ops.aten
_POOLS = {
    _aten.max_pool1d_with_indices.default: 1,
    _aten.max_pool2d_with_indices.default: 2,
    _aten.max_pool3d_with_indices.default: 3,
}
_UNPOOLS = {_aten.max_unpool2d.default: 2, _aten.max_unpool3d.default: 3}
# What hands indices on unchanged.
_THROUGH = {
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.unsqueeze.default,
}
_LAYERS = str(Path(functional.__file__).parent)
# Up to here a position in the window survives 8 bits.
MOST_CELLS = 256


@dataclass(frozen=True)
class Block:
    """One unpooling and what became of it.

    Args:
        name: name of the unpooling's node.
        source: file, line and text of the user's code.
        lowering: form that was written.
        window: pooling window.
        ceil_mode: whether partial windows count.
        own: whether the pooled map itself is unpooled, not other values.
        reason: why the lowering is not the one asked for, or None.
    """

    name: str
    source: str
    lowering: str
    window: tuple[int, ...]
    ceil_mode: bool
    own: bool
    reason: str | None = None

    def to_dict(self, half: bool = False) -> dict[str, Any]:
        """Plain data for a report.

        Args:
            half: whether the file computes in float16.

        Returns:
            The attributes, JSON-ready; a window has two sizes at least, for F.max_unpool1d works on (N, C, L, 1).
        """
        window = [*self.window, 1] if len(self.window) == 1 else list(self.window)
        return {**dataclasses.asdict(self), "window": window, "half": half}


def lower_unpooling(
    model: nn.Module | ExportedProgram,
    example: Tensor | tuple[Any, ...] | None = None,
    target: str = "onnxruntime",
    lowering: str | None = None,
    dynamic_shapes: Any = "auto",
) -> GraphModule:
    """Replace the index tensors of every max pooling and unpooling by a form that runtimes run well.

    Finds each `max_pool*d(return_indices=True)` with its `max_unpool*d`, functional or module, in one to three
    dimensions, with the pooled values or others. For finite values the result equals the original (zeros may have
    another sign). Pairs that the form does not fit (overlapping windows, padding, dilation, windows of more than 256
    cells, an output of another size than the pooled map) keep an index tensor and a scatter; a warning says so.

    Args:
        model: a module in evaluation mode, or a program of `torch.export.export`.
        example: the module's positional arguments, a tensor or a tuple; not needed for a program. A size of 1 stays
            fixed.
        target: runtime to lower for, one of `TARGETS`.
        lowering: `keys`, `scatter` or `arith` in place of the target's own; `native` stays torch's own pair here,
            which `to_onnx` writes as MaxUnpool.
        dynamic_shapes: as for `torch.export.export`; "auto" leaves batch and spatial sizes open where the model
            allows it, None fixes all.

    Returns:
        A module that runs in eager mode and exports again; `blocks_of` gives what was done.

    Raises:
        ValueError: if an option is unknown, the module trains, or an unpooling cannot be lowered; the message names
            the node, the line of the model's code, and the way out.

    Example:
        >>> import torch
        >>> from poolskip_zoo.export import blocks_of, lower_unpooling
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         y, i = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        ...         return torch.nn.functional.max_unpool2d(y + 1, i, 2, output_size=x.shape[2:])
        >>> lowered = lower_unpooling(Net().eval(), torch.randn(2, 3, 9, 7))
        >>> x = torch.randn(1, 3, 6, 11)
        >>> torch.equal(lowered(x), Net()(x)), [block.lowering for block in blocks_of(lowered)]
        (True, ['keys'])
    """
    check_target(target, lowering, onnx=False)
    if not isinstance(model, ExportedProgram):
        if example is None:
            raise ValueError("example=None: a module is captured with example arguments; pass a tensor or a tuple")
        check_drop_in(model, target, lowering)
        model = capture(model, as_args(example), dynamic_shapes)
    else:
        model = _functional(model)
    return lower_program(model, target, lowering, {"keys": forms.keys, "arith": forms.arith, "scatter": forms.scatter})


def blocks_of(lowered: GraphModule) -> tuple[Block, ...]:
    """What `lower_unpooling` did.

    Args:
        lowered: its result.

    Returns:
        One record per unpooling, in the graph's order.
    """
    return lowered.meta["unpooling"]


def as_args(example: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """Positional arguments of a model.

    Args:
        example: one tensor, or all arguments.

    Returns:
        A tuple, without gradients.
    """
    args = (example,) if isinstance(example, Tensor) else tuple(example)
    return tuple(each.detach() if isinstance(each, Tensor) else each for each in args)


def capture(model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = "auto") -> ExportedProgram:
    """`torch.export` of a model, with Pool Skip as torch's pair of pooling and unpooling.

    Args:
        model: a module in evaluation mode.
        args: its positional arguments.
        dynamic_shapes: as for `lower_unpooling`.

    Returns:
        The program.

    Raises:
        ValueError: if the module trains, or its sizes depend on values.
    """
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    check_mode(model)
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "auto":
            raise ValueError(f"dynamic_shapes={dynamic_shapes!r}: expected 'auto', None or what torch.export takes")
        dynamic_shapes = tuple(_open_sizes(value) for value in args)
    mode = torch.get_deterministic_debug_mode()
    # torch's unpooling refuses deterministic mode even where it is only recorded.
    torch.set_deterministic_debug_mode("default")
    try:
        with functional.capture_stock(), torch.no_grad():
            return _functional(torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False))
    except (GuardOnDataDependentSymNode, UserError) as error:
        if "data-dependent" not in str(error) and not isinstance(error, GuardOnDataDependentSymNode):
            raise
        raise ValueError(
            f"a size or a branch depends on values, which no graph can hold ({str(error).strip().splitlines()[0]}); "
            "compute sizes from shapes, for example output_size=x.shape[-2:], and choose values by torch.where"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(mode)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without operators in place: forms are written where the unpooling is, and read the map that was pooled."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    return program.run_decompositions({}) if any(schema and schema.is_mutable for schema in schemas) else program


def _open_sizes(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor) or value.dim() < 3:
        return None
    return dict.fromkeys((0, *range(2, value.dim())), Dim.AUTO)


def lower_program(
    program: ExportedProgram, target: str, lowering: str | None, written: dict[str, Callable[..., Tensor]]
) -> GraphModule:
    """The pass itself.

    Args:
        program: a captured program.
        target: one of `TARGETS`.
        lowering: one of `LOWERINGS`, or None for the target's own.
        written: what to call for each lowering, with the arguments of `forms.keys`; a lowering that is missing keeps
            torch's pair.

    Returns:
        The module; see `lower_unpooling`.

    Raises:
        ValueError: if an unpooling cannot be lowered.
    """
    module = program.module()
    assert isinstance(module, GraphModule)
    if lowering != "scatter":
        _check_branches(module)
    graph, choice, blocks = module.graph, check_target(target, lowering, onnx=False), []
    for unpooling, equal in unpoolings(graph).items():
        # Exporters merge equal nodes, and each unpooling is looked for in what they write.
        for each in equal:
            each.replace_all_uses_with(unpooling)
            graph.erase_node(each)
        pair = _Pair(unpooling)
        wanted = lowering if pair.pooling is None else choice.choose(pair.window, lowering)
        if wanted != "scatter":
            pair.check_indices()
        reason = None if wanted == "scatter" else pair.misfit()
        used = "scatter" if reason else wanted
        if reason:
            _logger.warning("%s: scatter in place of %s: %s", pair.place, wanted, reason)
        assert used is not None
        blocks.append(pair.block(used, reason))
        if used == "scatter":
            pair.scatter(graph, written[used])
        elif used in written:
            pair.write(graph, written[used])
    graph.eliminate_dead_code()
    for pooling in [node for node in graph.nodes if node.target in _POOLS]:
        _drop_unused_indices(graph, pooling)
    graph.eliminate_dead_code()
    module.recompile()
    module.meta["unpooling"] = tuple(blocks)
    return module


def _check_branches(module: GraphModule) -> None:
    for name, part in module.named_modules():
        for unpooling in unpoolings(part.graph) if name and isinstance(part, GraphModule) else ():
            raise ValueError(
                f"node {unpooling.name!r} ({_source(unpooling)}) lies inside torch.cond or the like, where unpoolings "
                "are not lowered: compute both branches and choose by torch.where; lowering='scatter' leaves it as is"
            )


def unpoolings(graph: Graph) -> dict[Node, list[Node]]:
    """The different unpoolings of a graph.

    Args:
        graph: a captured program's.

    Returns:
        Each, in the graph's order, with the later ones that put the same values at the same indices.
    """
    found: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.target in _UNPOOLS:
            values, indices, size = node.args[:3]
            sizes = _value(values).shape, [_value(each) for each in size]
            found.setdefault((_made(values), _made(indices), str(sizes)), []).append(node)
    return {first: equal for first, *equal in found.values()}


def _root(node: Any) -> Any:
    """The value that some nodes hand on unchanged."""
    while node.target in _THROUGH:
        node = node.args[0]
    return node


def _from_pool(node: Any) -> bool:
    return node.target is operator.getitem and node.args[0].target in _POOLS


def _made(node: Any) -> Any:
    """What makes a value: a pooling in words, for equal ones are merged too."""
    node = _root(node)
    if not _from_pool(node):
        return node
    pooling, number = node.args
    return f"{pooling.target} {pooling.args} {pooling.kwargs} {number}"


class _Pooling:
    """The arguments of a pooling."""

    def __init__(self, pooling: Any) -> None:
        _, kernel, stride, padding, dilation, ceil_mode = (*pooling.args, *[None] * 5)[:6]
        given = {"stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode}
        given.update(pooling.kwargs)
        axes = _POOLS[pooling.target]
        self.window = _spread(kernel, axes)
        self.stride = _spread(given["stride"], axes) or self.window
        self.padding = _spread(given["padding"], axes) or [0] * axes
        self.dilation = _spread(given["dilation"], axes) or [1] * axes
        self.ceil_mode = bool(given["ceil_mode"])
        self.x = pooling.args[0]
        self.batched = _value(self.x).dim() == axes + 2

    def misfit(self) -> str | None:
        """Why it is more than disjoint windows, or None."""
        if self.stride != self.window:
            return f"stride {self.stride} differs from the window {self.window}"
        if any(self.padding):
            return f"padding {self.padding}"
        if any(each != 1 for each in self.dilation):
            return f"dilation {self.dilation}"
        return None


class _Pair(_Pooling):
    """An unpooling and the pooling that made its indices, if one did."""

    def __init__(self, unpooling: Any) -> None:
        self.unpooling = unpooling
        self.dims = _UNPOOLS[unpooling.target]
        self.place = f"node {unpooling.name!r} ({_source(unpooling)})"
        self.indices = _root(unpooling.args[1])
        self.pooling = self.indices.args[0] if _from_pool(self.indices) else None
        if self.pooling is not None:
            super().__init__(self.pooling)

    def check_indices(self) -> None:
        """Refuse indices that are made elsewhere, leave the model or are computed with."""
        way_out = "; lowering='scatter' keeps the index tensor"
        if self.pooling is None:
            raise ValueError(
                f"{self.place}: its indices come from {self.indices.name!r} ({_source(self.indices)}), not straight "
                f"from a max pooling{way_out}"
            )
        waiting = [self.indices]
        while waiting:
            for user in waiting.pop().users:
                if user.target in _THROUGH:
                    waiting.append(user)
                elif user.target not in _UNPOOLS:
                    what = "leave the model" if user.op == "output" else f"are computed with in {user.name!r}"
                    raise ValueError(f"{self.place}: its indices {what} ({_source(self.pooling)}){way_out}")

    def misfit(self) -> str | None:
        """Why only an index tensor describes the pair, or None."""
        if reason := super().misfit():
            return reason
        most = min(MOST_CELLS, functional.largest_exact_key(_value(self.x).dtype))
        if math.prod(self.window) > most:
            return f"a window of {math.prod(self.window)} cells has more than {most}"
        size = [_value(each) for each in self.unpooling.args[2]]
        full = list(_value(self.x).shape)[2 if self.batched else 1 :] + [1] * (self.dims - len(self.window))
        if not all(_same(a, b) for a, b in zip(size, full, strict=True)):
            return (
                f"output size {size} may differ from that of the pooled map, {full}; "
                "give the unpooling output_size=x.shape[-2:], or export with sizes that the windows divide"
            )
        return None

    def block(self, lowering: str, reason: str | None) -> Block:
        window = tuple(self.window) if self.pooling is not None else ()
        ceil_mode = self.pooling is not None and self.ceil_mode
        return Block(
            self.unpooling.name, _source(self.unpooling), lowering, window, ceil_mode, self._own() is not None, reason
        )

    def _own(self) -> Any:
        """The pooled map if nothing else is unpooled."""
        values = _root(self.unpooling.args[0])
        pooled = values.target is operator.getitem and values.args == (self.pooling, 0)
        return values if pooled and self.pooling is not None else None

    def write(self, graph: Graph, form: Callable[..., Tensor]) -> None:
        """Call the form on batched maps of two or three axes in place of the unpooling."""
        values, x = self.unpooling.args[0], self.x
        window = [*self.window, *[1] * (self.dims - len(self.window))]
        own = self._own() is not None
        if len(self.window) == 1:
            x = _lifted(graph, self.pooling, x)
        self._exchange(graph, form, (values, x), (window, self.ceil_mode, own), self.batched)

    def scatter(self, graph: Graph, form: Callable[..., Tensor]) -> None:
        """Call the form of the index tensor on a batched map in place of the unpooling."""
        values, indices, size = self.unpooling.args[:3]
        self._exchange(graph, form, (values, indices), (size,), _value(values).dim() == self.dims + 2)

    def _exchange(
        self, graph: Graph, form: Callable[..., Tensor], maps: tuple[Any, ...], rest: tuple[Any, ...], batched: bool
    ) -> None:
        with graph.inserting_before(self.unpooling):
            if not batched:
                maps = tuple(graph.call_function(_aten.unsqueeze.default, (each, 0)) for each in maps)
            result = graph.call_function(form, (*maps, *rest))
            if not batched:
                result = graph.call_function(_aten.squeeze.dim, (result, 0))
        self.unpooling.replace_all_uses_with(result)
        graph.erase_node(self.unpooling)


def _lifted(graph: Graph, pooling: Any, x: Any) -> Node:
    """A sequence as (N, C, L, 1), which F.max_unpool1d works on; one node, for exporters merge equal ones."""
    if "lifted" not in pooling.meta:
        with graph.inserting_before(pooling):
            pooling.meta["lifted"] = graph.call_function(_aten.unsqueeze.default, (x, -1))
    return pooling.meta["lifted"]


def _drop_unused_indices(graph: Graph, pooling: Any) -> None:
    """Pool without indices where nothing uses them any more."""
    read = _Pooling(pooling)
    if read.misfit() or any(user.args[1] != 0 for user in pooling.users):
        return
    window, one = read.window, len(read.window) == 1
    with graph.inserting_before(pooling):
        # torch.export freezes the length in max_pool1d.
        x = _lifted(graph, pooling, read.x) if one else read.x
        pooled = graph.call_function(functional.pool, (x, [*window, 1] if one else window, read.ceil_mode))
        if one:
            pooled = graph.call_function(_aten.squeeze.dim, (pooled, -1))
    for user in list(pooling.users):
        user.replace_all_uses_with(pooled)
        graph.erase_node(user)


def _spread(size: Any, axes: int) -> list[int]:
    if not size and not isinstance(size, int):
        return []
    size = [size] if isinstance(size, int) else list(size)
    return size * axes if len(size) == 1 else size


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, Node) else node


def _same(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def _source(node: Any) -> str:
    """File, line and text of the innermost frame that is not torch's or this package's."""
    frames = [frame.strip() for frame in (node.meta.get("stack_trace") or "").split('File "') if frame.strip()]
    own = [f for f in frames if "/torch/" not in f.split('"')[0] and _LAYERS not in f.split('"')[0]]
    if not own:
        return "no source line recorded"
    head, *text = own[-1].splitlines()
    file, _, rest = head.partition('", line ')
    return f"{file}:{rest.split(',')[0]}" + (f": {text[0].strip()}" if text else "")
