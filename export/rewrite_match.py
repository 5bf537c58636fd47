"""The unpoolings of an ONNX graph: found by following a pooling's indices, proved by running what is done with them.

Exporters write one unpooling in many ways (MaxUnpool; arithmetic that turns indices per plane, or those of TensorFlow's
last-axis layout, into ONNX's; scatters along one axis or four). No list of patterns would hold them all, so the nodes
between the pooling, the values and the output are cut out and run: if the values come to lie at the places of the
maxima, they are an unpooling, whatever they are made of.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnxscript import ir

from .lower_pair import MOST_CELLS
from .rewrite_cut import SIZES, Seen, cases, cut, inside, region

__all__ = ["NoUnpooling", "Unpooling", "find", "named"]

# Nodes that place values by indices, and which operands those are.
_PLACING = {"MaxUnpool": (0, 1), "ScatterND": (2, 1), "ScatterElements": (2, 1), "Scatter": (2, 1)}
# Nodes that only lay values out anew.
_LAYOUT = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
_WAY_OUT = "; lowering='scatter' keeps the index tensor"

Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


class NoUnpooling(RuntimeError):
    """A scatter that is no unpooling at the sizes it was run at."""


@dataclass
class Unpooling:
    """One unpooling, and the values between which it lies.

    Args:
        node: the node that places values by indices.
        pooling: the MaxPool that made the indices, or None for a MaxUnpool of other indices; `x` is the map it pools.
        inputs: where the values may be taken, from the node upwards.
        outputs: where the result may be put, from the node downwards.
        values: one of the inputs, once proved.
        output: one of the outputs, once proved.
        values_last: whether channels are the last axis of `values`.
        output_last: whether channels are the last axis of `output`.
        own: whether the values are the pooled map itself.
        proof: the model between the ends, its first output the unpooled map, and the names of its further inputs.
    """

    node: ir.Node
    pooling: Any
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    values: Any = None
    output: Any = None
    values_last: bool = False
    output_last: bool = False
    own: bool = False
    proof: Any = None

    def __post_init__(self) -> None:
        # A node that is taken out of the graph forgets its inputs.
        self.x: Any = self.pooling.inputs[0] if self.pooling is not None else None

    @property
    def window(self) -> list[int]:
        """Pooling window."""
        return list(self.pooling.attributes["kernel_shape"].value)

    def ends(self) -> list[Any]:
        """Values that a block is computed from."""
        return [self.x] if self.own else [self.x, self.values]

    def watched(self) -> list[Any]:
        """All values whose sizes are needed."""
        outputs = [self.node.outputs[0], *self.outputs]
        if self.pooling is None:
            return [*self.node.inputs[:2], *outputs]
        _, sizes = region(outputs[-1:], {self.x, *self.inputs})
        return [self.x, self.pooling.outputs[0], *self.inputs, *outputs, *sizes]

    def ceil_mode(self, seen: dict[str, Seen]) -> bool:
        """Whether partial windows at the far edges count, be it by padding."""
        whole, part = self._counts(seen)
        attributes = self.pooling.attributes
        padded = _text(attributes.get("auto_pad")) == "SAME_UPPER" or any(_ints(attributes.get("pads")))
        asked = "ceil_mode" in attributes and bool(attributes["ceil_mode"].value)
        return whole and (not part or padded or asked)

    def _cells(self, seen: dict[str, Seen]) -> list[tuple[int, int, int]]:
        """Size, pooled size and window of each axis in each run."""
        shapes = zip(seen[self.x.name].shapes, seen[self.pooling.outputs[0].name].shapes, strict=True)
        return [each for x, y in shapes for each in zip(x[2:], y[2:], self.window, strict=True)]

    def _counts(self, seen: dict[str, Seen]) -> tuple[bool, bool]:
        """Whether the pooled sizes are always the quotients rounded up, and always rounded down."""
        cells = self._cells(seen)
        return all(-(-s // e) == p for s, p, e in cells), all(s // e == p for s, p, e in cells)

    def misfit(self, seen: dict[str, Seen], open_sizes: bool) -> str | None:
        """Why only an index tensor describes it, or None; `open_sizes`: the file leaves spatial sizes open."""
        attributes, window = self.pooling.attributes, self.window
        stride = _ints(attributes.get("strides")) or [1] * len(window)
        pads = _ints(attributes.get("pads")) or [0] * 2 * len(window)
        before, after = pads[: len(window)], pads[len(window) :]
        dilation = _ints(attributes.get("dilations"))
        automatic = _text(attributes.get("auto_pad"))
        if stride != window:
            return f"stride {stride} differs from the window {window}"
        if any(each != 1 for each in dilation):
            return f"dilation {dilation}"
        if math.prod(window) > MOST_CELLS:
            return f"a window of {math.prod(window)} cells has more than {MOST_CELLS}"
        if seen[self.x.name].dtype not in (np.float16, np.float32):  # ONNX Runtime resizes no others
            return f"values of type {seen[self.x.name].dtype}"
        if attributes.get("storage_order") is not None and attributes["storage_order"].as_int():
            return "storage_order 1: its indices count by columns"
        if automatic == "SAME_LOWER" or (automatic == "SAME_UPPER" and self._padded_before(seen, open_sizes)):
            return f"padding {automatic}"
        # Where sizes are open, only padding of one cell less than the window is ceil_mode at every size.
        partial = open_sizes and any(after) and after != [each - 1 for each in window]
        if any(before) or partial or not any(self._counts(seen)):
            return f"padding {pads}"
        return None

    def _padded_before(self, seen: dict[str, Seen], open_sizes: bool) -> bool:
        lacking = [p * e - s for s, p, e in self._cells(seen)]
        return max(lacking) > 1 or (open_sizes and max(self.window) > 2)

    def prove(self, graph: ir.Graph, seen: dict[str, Seen], start: Callable[[Any], Run], file: Any) -> None:
        """Choose ends between which the graph puts values where the pooling's indices say; NoUnpooling if none are."""
        if self.pooling is None:
            self.output = self.outputs[0]
            return
        for ends in self._ends(seen):
            self.values, self.values_last, self.output, self.output_last = ends
            self.own = self.values is self.pooling.outputs[0]
            outputs = [self.output, *self.pooling.outputs]
            try:
                block, sizes = cut(graph, self.ends(), outputs, seen, file)
            except LookupError:
                continue
            run = start(block)
            if all(self._places(run(arrays)[:3], arrays) for _, arrays in cases(self.ends(), seen, sizes)):
                self.proof = block, sizes
                return
        shapes = {each.name: seen[each.name].dims for each in (self.x, self.node.outputs[0]) if each.name in seen}
        raise NoUnpooling(
            f"{named(self.node)} does not put values back to the places of the maxima of {named(self.pooling)}: shapes "
            f"{shapes}. MaxUnpool and ScatterND count over the whole tensor, torch's indices over one plane"
        )

    def _ends(self, seen: dict[str, Seen]) -> Iterator[tuple[Any, bool, Any, bool]]:
        """Ends of fitting shapes, those that need no transposition first."""
        x, pooled = seen[self.x.name].shapes, seen[self.pooling.outputs[0].name].shapes
        for last in ((False, False), (True, False), (False, True), (True, True)):
            for values in self.inputs:
                if _in_layout(seen[values.name].shapes, last[0]) == pooled:
                    for output in self.outputs:
                        if _in_layout(seen[output.name].shapes, last[1]) == x:
                            yield values, last[0], output, last[1]

    def _places(self, found: Sequence[np.ndarray], arrays: Sequence[np.ndarray]) -> bool:
        output, pooled, indices = found
        output = np.moveaxis(output, -1, 1) if self.output_last else output
        values = pooled if self.own else np.moveaxis(arrays[1], -1, 1) if self.values_last else arrays[1]
        expected = np.zeros(arrays[0].shape, values.dtype)
        expected.flat[indices.ravel()] = values.ravel()
        return np.array_equal(output, expected)


def find(graph: ir.Graph, lenient: bool) -> list[Unpooling]:
    """All nodes that place values by a max pooling's indices, not yet proved, in the graph's order.

    `lenient` leaves index tensors alone that are used otherwise, too. ValueError names the node and the way out if
    indices are computed with or leave the graph, or an unpooling lies inside another node.
    """
    for node in graph:
        _check_inside(node, lenient)
    found, explained = [], set[ir.Node]()
    for node in graph:
        if node.op_type not in _PLACING or node.domain not in ("", "ai.onnx"):
            continue
        operands: list[Any] = list(node.inputs)
        values, indices = (operands[i] for i in _PLACING[node.op_type])
        nodes, poolings = _origin(indices)
        explained |= nodes | {node}
        pools = [each for each in poolings if math.prod(each.attributes["kernel_shape"].value) > 1] or poolings
        if len(pools) == 1:
            found.append(Unpooling(node, pools[0], _upwards(values), _downwards(node.outputs[0])))
        elif not lenient and (pools or node.op_type == "MaxUnpool"):
            made = " and ".join(map(named, pools)) or repr(indices.name)
            raise ValueError(f"{named(node)}: its indices come from {made}, not from one max pooling{_WAY_OUT}")
        elif node.op_type == "MaxUnpool":
            found.append(Unpooling(node, None, outputs=[node.outputs[0]]))
    for node in graph:
        if node.op_type == "MaxPool" and len(node.outputs) > 1 and not lenient:
            _check_uses(graph, node, explained)
    return found


def _check_inside(node: ir.Node, lenient: bool) -> None:
    """Refuse unpoolings in the branches or the body of a node: what they are run on there is not seen from outside."""
    for inner in inside(node):
        indices = inner.outputs[1] if inner.op_type == "MaxPool" and len(inner.outputs) > 1 else None
        used = indices is not None and (indices.uses() or indices.is_graph_output())
        if inner.op_type == "MaxUnpool" or (used and not lenient):
            raise ValueError(
                f"{named(inner)} lies inside {named(node)}, and only the main graph is rewritten: export the model "
                f"without that {node.op_type}"
            )


def named(node: Any) -> str:
    """A node in words: its name (its output's where it has none) and operator."""
    return f"node {node.name or node.outputs[0].name!r} ({node.op_type})"


def _origin(indices: Any) -> tuple[set[ir.Node], list[ir.Node]]:
    """Nodes that compute indices, and the poolings at their root."""
    nodes, poolings, waiting = set[ir.Node](), list[ir.Node](), [indices]
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or node in nodes or node.op_type in _PLACING or node.op_type in SIZES:
            continue
        if node.op_type == "MaxPool":
            if value is not node.outputs[0] and node not in poolings:
                poolings.append(node)
            continue
        nodes.add(node)
        waiting.extend(node.inputs)
    return nodes, poolings


def _check_uses(graph: ir.Graph, pooling: ir.Node, explained: set[ir.Node]) -> None:
    """Refuse indices that do more than place values."""
    waiting, visited = [pooling.outputs[1]], set[ir.Node]()
    while waiting:
        value = waiting.pop()
        if any(value is each for each in graph.outputs):
            raise ValueError(f"{named(pooling)}: its indices leave the graph as {value.name!r}{_WAY_OUT}")
        for node in {use[0] for use in value.uses()} - visited:
            visited.add(node)
            if node.op_type in SIZES or (node in explained and node.op_type in _PLACING):
                continue
            if node not in explained:
                raise ValueError(f"{named(pooling)}: its indices are computed with in {named(node)}{_WAY_OUT}")
            waiting.extend(node.outputs)


def _upwards(value: Any) -> list[Any]:
    found = [value]
    while (node := found[-1].producer()) is not None and node.op_type in _LAYOUT:
        found.append(node.inputs[0])
    return found


def _downwards(value: Any) -> list[Any]:
    found = [value]
    while len(uses := list(found[-1].uses())) == 1 and not found[-1].is_graph_output():
        node, index = uses[0]
        # A node of the same graph, and none in a branch.
        if node.op_type not in _LAYOUT or index != 0 or node.graph is not value.producer().graph:
            break
        found.append(node.outputs[0])
    return found


def _in_layout(shapes: Any, last: bool) -> Any:
    return tuple((s[0], s[-1], *s[1:-1]) if last and len(s) > 1 else s for s in shapes)


def _ints(attribute: Any) -> list[int]:
    return [] if attribute is None else list(attribute.value)


def _text(attribute: Any) -> str:
    value = "" if attribute is None else attribute.value
    return value.decode() if isinstance(value, bytes) else value
