"""Writes the form of a proved unpooling into an ONNX graph."""

from functools import partial
from typing import Any

import numpy as np
from onnxscript import ir

from .onnx_forms import Writer, constant
from .rewrite_match import Unpooling

__all__ = ["write"]


class _Tape:
    """Makes the nodes that are asked of it as methods, named with a prefix, for any operator set from 11 on."""

    def __init__(self, prefix: str, opset: int) -> None:
        self.prefix, self.opset = prefix, opset
        self.nodes, self.constants = list[ir.Node](), list[ir.Value]()

    def __getattr__(self, operator: str) -> Any:
        return partial(self._add, operator)

    def _add(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        if operator == "Shape" and attributes and self.opset < 15:
            start, end = (constant(self, [number]) for number in (attributes["start"], attributes.get("end", 99)))
            return self._add("Slice", self._add("Shape", *inputs), start, end)
        if operator == "Resize" and self.opset < 13:
            # The region, which nearest sampling does not read, may be left out since 13.
            empty = constant(self, [], np.float32)
            inputs = (inputs[0], empty, *inputs[2:])
        number, outputs = len(self.nodes) + len(self.constants), 2 if operator == "MaxPool" else 1
        name = f"{self.prefix}_{number}"
        if operator == "Constant":
            tensor = ir.from_proto(attributes["value"])
            tensor.name = name
            value = ir.Value(None, index=None, name=name, type=ir.TensorType(tensor.dtype), const_value=tensor)
            self.constants.append(value)
            return value
        node = ir.Node(
            "",
            operator,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=name,
        )
        self.nodes.append(node)
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}_{i}"
        return node.outputs if outputs > 1 else node.outputs[0]


class _FileWriter(Writer):
    """The same forms in an existing graph, where the map is already pooled."""

    def __init__(self, tape: _Tape, unpooling: Unpooling, x: Any, ceil_mode: bool) -> None:
        super().__init__(x, unpooling.window, ceil_mode)
        self.op, self.pooled = tape, unpooling.pooling.outputs[0]

    def pool(self, z: Any) -> Any:
        return self.pooled if z is self.x else super().pool(z)


def write(
    graph: ir.Graph,
    unpooling: Unpooling,
    lowering: str,
    dims: list[int | None],
    ceil_mode: bool,
    replaced: dict[Any, Any],
) -> None:
    """Put another form in the place of an unpooling.

    It is proved, or a MaxUnpool of indices that no pooling made, which takes scatter alone. `dims` is the shape of the
    pooled map, None where it is open. `replaced` has values that earlier calls replaced; the unpooled map is added.
    """
    opset = graph.opset_imports.get("", 1)
    output, prefix = unpooling.output, f"{unpooling.output.name}/poolskip"
    # A file that was written here before has such names.
    while any(name.startswith(prefix) for name in [*(str(node.name) for node in graph), *graph.initializers]):
        prefix += "_"
    tape = _Tape(prefix, opset)
    if unpooling.pooling is None:
        values, indices = (replaced.get(each, each) for each in unpooling.node.inputs[:2])
        new = _scatter(tape, values, indices, _asked_size(tape, unpooling.node))
    else:
        x, values = (replaced.get(each, each) for each in (unpooling.x, unpooling.values))
        if unpooling.values_last:
            values = tape.Transpose(values, perm=[0, len(dims) - 1, *range(1, len(dims) - 1)])
        if lowering == "scatter":
            new = _scatter(tape, values, unpooling.pooling.outputs[1], tape.Shape(x))
        else:
            new = _form(tape, unpooling, lowering, x, values, dims, ceil_mode)
    if unpooling.output_last:
        new = tape.Transpose(new, perm=[0, *range(2, len(dims)), 1])
    graph.initializers.update({str(value.name): value for value in tape.constants})
    ir.convenience.replace_nodes_and_values(graph, output.producer(), [], tape.nodes, [output], [new])
    output.name = f"{prefix}_before"
    replaced[output] = new


def _form(
    tape: _Tape, unpooling: Unpooling, lowering: str, x: Any, values: Any, dims: list[int | None], ceil_mode: bool
) -> Any:
    kept = x.shape
    x.shape = ir.Shape(dims)
    try:
        return _FileWriter(tape, unpooling, x, ceil_mode).write(lowering, values, unpooling.own)
    finally:
        # What the file says of its own values, names of sizes among it, stays.
        x.shape = kept


def _scatter(tape: _Tape, values: Any, indices: Any, size: Any) -> Any:
    """ScatterElements over the whole tensor, as ONNX counts indices."""
    zero = constant(tape, [0], values.dtype.numpy())
    flat = tape.Expand(zero, tape.ReduceProd(size, keepdims=1))
    row = constant(tape, [-1])
    placed = tape.ScatterElements(flat, tape.Reshape(indices, row), tape.Reshape(values, row), axis=0)
    return tape.Reshape(placed, size)


def _asked_size(tape: _Tape, node: ir.Node) -> Any:
    """Output size of a MaxUnpool."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2]
    window = list(node.attributes["kernel_shape"].value)
    strides, pads = (node.attributes.get(key) for key in ("strides", "pads"))
    step = [1] * len(window) if strides is None else list(strides.value)
    cut = [0] * 2 * len(window) if pads is None else list(pads.value)
    # (pooled - 1) · stride + window - padding
    rest = [e - s - a - b for e, s, a, b in zip(window, step, cut, cut[len(window) :], strict=False)]
    shape = tape.Shape(node.inputs[0])
    return tape.Add(tape.Mul(shape, constant(tape, [1, 1, *step])), constant(tape, [0, 0, *rest]))
