"""An unpooling of a captured graph and the pooling that made its indices: what they say, and what may replace them."""

import dataclasses
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..layers import functional

__all__ = [
    "MOST_CELLS",
    "POOLS",
    "UNPOOLS",
    "Block",
    "Pair",
    "drop_unused_indices",
    "from_pool",
    "root",
    "source",
    "unpoolings",
]

_aten = torch.ops.aten
POOLS = {
    _aten.max_pool1d_with_indices.default: 1,
    _aten.max_pool2d_with_indices.default: 2,
    _aten.max_pool3d_with_indices.default: 3,
}
UNPOOLS = {_aten.max_unpool2d.default: 2, _aten.max_unpool3d.default: 3}
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
        """JSON-ready attributes; `half`: the file computes in float16.

        A window has two sizes at least, for F.max_unpool1d works on (N, C, L, 1).
        """
        window = [*self.window, 1] if len(self.window) == 1 else list(self.window)
        return {**dataclasses.asdict(self), "window": window, "half": half}


def unpoolings(graph: Graph) -> dict[Node, list[Node]]:
    """The different unpoolings of a graph, in its order, each with the later ones of the same values and indices."""
    found: dict[Any, list[Node]] = {}
    for node in graph.nodes:
        if node.target in UNPOOLS:
            values, indices, size = node.args[:3]
            sizes = _value(values).shape, [_value(each) for each in size]
            found.setdefault((_made(values), _made(indices), str(sizes)), []).append(node)
    return {first: equal for first, *equal in found.values()}


def root(node: Any) -> Any:
    """The node that made a value, behind those that hand it on unchanged."""
    while node.target in _THROUGH:
        node = node.args[0]
    return node


def from_pool(node: Any) -> bool:
    """Whether a value is a pooling's: its maxima or its indices."""
    return node.target is operator.getitem and node.args[0].target in POOLS


def _made(node: Any) -> Any:
    """What makes a value: a pooling in words, for equal ones are merged too."""
    node = root(node)
    if not from_pool(node):
        return node
    pooling, number = node.args
    return f"{pooling.target} {pooling.args} {pooling.kwargs} {number}"


class _Pooling:
    """The arguments of a pooling."""

    def __init__(self, node: Any) -> None:
        names = (each.name for each in node.target._schema.arguments)
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        axes = POOLS[node.target]
        self.node, self.x = node, given["self"]
        self.window = spread(given["kernel_size"], axes)
        self.stride = spread(given.get("stride"), axes) or self.window
        self.padding = spread(given.get("padding", 0), axes)
        self.dilation = spread(given.get("dilation", 1), axes)
        self.ceil_mode = bool(given.get("ceil_mode"))
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


class Pair:
    """The node of an unpooling, and the pooling that made its indices, if one did."""

    def __init__(self, unpooling: Any) -> None:
        self.unpooling = unpooling
        self.dims = UNPOOLS[unpooling.target]
        self.place = f"node {unpooling.name!r} ({source(unpooling)})"
        self.indices = root(unpooling.args[1])
        self.pooling = _Pooling(self.indices.args[0]) if from_pool(self.indices) else None

    def _check_indices(self) -> None:
        """Raise ValueError, naming the node, if indices are made elsewhere, leave the model or are computed with."""
        way_out = "; lowering='scatter' keeps the index tensor"
        if self.pooling is None:
            raise ValueError(
                f"{self.place}: its indices come from {self.indices.name!r} ({source(self.indices)}), not straight "
                f"from a max pooling{way_out}"
            )
        waiting = [self.indices]
        while waiting:
            for user in waiting.pop().users:
                if user.target in _THROUGH:
                    waiting.append(user)
                elif user.target not in UNPOOLS:
                    what = "leave the model" if user.op == "output" else f"are computed with in {user.name!r}"
                    raise ValueError(f"{self.place}: its indices {what} ({source(self.pooling.node)}){way_out}")

    def misfit(self) -> str | None:
        """Why only an index tensor describes the pair, or None; ValueError if its indices are needed otherwise, too."""
        self._check_indices()
        assert self.pooling is not None
        if reason := self.pooling.misfit():
            return reason
        window, batched, x = self.pooling.window, self.pooling.batched, _value(self.pooling.x)
        if batched != (_value(self.unpooling.args[0]).dim() == self.dims + 2):
            return "only one of pooling and unpooling has a batch axis"
        most = min(MOST_CELLS, functional.largest_exact_key(x.dtype))
        if math.prod(window) > most:
            return f"a window of {math.prod(window)} cells has more than {most}"
        size = [_value(each) for each in self.unpooling.args[2]]
        full = list(x.shape)[2 if batched else 1 :] + [1] * (len(window) == 1)
        if len(size) != len(full) or not all(map(_same, size, full)):
            return (
                f"output size {size} may differ from that of the pooled map, {full}; "
                "give the unpooling output_size=x.shape[-2:], or export with sizes that the windows divide"
            )
        return None

    def block(self, lowering: str, reason: str | None) -> Block:
        """Record the form that was written, and why not the one asked for, or None."""
        window, ceil_mode = (tuple(self.pooling.window), self.pooling.ceil_mode) if self.pooling else ((), False)
        return Block(self.unpooling.name, source(self.unpooling), lowering, window, ceil_mode, self._own(), reason)

    def _own(self) -> bool:
        """Whether the pooled map itself is unpooled."""
        values = root(self.unpooling.args[0])
        return self.pooling is not None and from_pool(values) and values.args == (self.pooling.node, 0)

    def write(self, graph: Graph, form: Callable[..., Tensor], lowering: str) -> None:
        """Call the function of a form on batched maps of two or three axes, in the place of the unpooling."""
        values, indices, size = self.unpooling.args[:3]
        batched = _value(values).dim() == self.dims + 2
        maps: tuple[Any, ...] = (values, indices)
        rest: tuple[Any, ...] = (size,)
        if lowering != "scatter":
            pooling = self.pooling
            assert pooling is not None
            one = len(pooling.window) == 1
            maps = (values, _lifted(graph, pooling) if one else pooling.x)
            rest = ([*pooling.window, 1] if one else pooling.window, pooling.ceil_mode, self._own())
        with graph.inserting_before(self.unpooling):
            if not batched:
                maps = tuple(graph.call_function(_aten.unsqueeze.default, (each, 0)) for each in maps)
            result = graph.call_function(form, (*maps, *rest))
            if not batched:
                result = graph.call_function(_aten.squeeze.dim, (result, 0))
        result.meta.update(_facts(self.unpooling))
        self.unpooling.replace_all_uses_with(result)
        graph.erase_node(self.unpooling)


def _lifted(graph: Graph, pooling: _Pooling) -> Node:
    """A sequence as (N, C, L, 1), which F.max_unpool1d works on; one node, for exporters merge equal ones."""
    meta = pooling.node.meta
    if "lifted" not in meta:
        with graph.inserting_before(pooling.node):
            meta["lifted"] = graph.call_function(_aten.unsqueeze.default, (pooling.x, -1))
    return meta["lifted"]


def drop_unused_indices(graph: Graph, pooling: Any) -> None:
    """Pool without indices where nothing uses them any more."""
    read = _Pooling(pooling)
    if read.misfit() or any(user.args[1] != 0 for user in pooling.users):
        return
    window, one = read.window, len(read.window) == 1
    with graph.inserting_before(pooling):
        # torch.export freezes the length in max_pool1d.
        x = _lifted(graph, read) if one else read.x
        pooled = graph.call_function(functional.pool, (x, [*window, 1] if one else window, read.ceil_mode))
        if one:
            pooled = graph.call_function(_aten.squeeze.dim, (pooled, -1))
    for user in list(pooling.users):
        pooled.meta.update(_facts(user))
        user.replace_all_uses_with(pooled)
        graph.erase_node(user)


def spread(size: Any, axes: int) -> list[int]:
    if not size and not isinstance(size, int):
        return []
    size = [size] if isinstance(size, int) else list(size)
    return size * axes if len(size) == 1 else size


def _facts(node: Any) -> dict[str, Any]:
    """What the next pooling or unpooling asks of a value, for the node that takes its place."""
    return {key: node.meta[key] for key in ("val", "stack_trace") if key in node.meta}


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, Node) else node


def _same(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(a == b)


def source(node: Any) -> str:
    """File, line and text of the innermost frame of a node's stack trace that is not torch's or this package's."""
    frames = [frame.strip() for frame in (node.meta.get("stack_trace") or "").split('File "') if frame.strip()]
    own = [f for f in frames if "/torch/" not in f.split('"')[0] and _LAYERS not in f.split('"')[0]]
    if not own:
        return "no source line recorded"
    head, *text = own[-1].splitlines()
    file, _, rest = head.partition('", line ')
    return f"{file}:{rest.split(',')[0]}" + (f": {text[0].strip()}" if text else "")
