"""Blocks cut out of an ONNX graph, and what they are run on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnxscript import ir

from .verify import probes

__all__ = ["SIZES", "Seen", "cases", "cut", "inside", "region"]

# Nodes that read nothing of a value but its size.
SIZES = {"Shape", "Size"}


@dataclass(frozen=True)
class Seen:
    """The type of a value of the graph, and its shape in each of some runs."""

    dtype: np.dtype
    shapes: tuple[tuple[int, ...], ...]

    @property
    def dims(self) -> list[int | None]:
        """Sizes that were the same in all runs, None for the others."""
        return [each[0] if len(set(each)) == 1 else None for each in zip(*self.shapes, strict=True)]


def cut(
    graph: ir.Graph, inputs: list[Any], outputs: list[Any], seen: dict[str, Seen], file: Any, whole: bool = False
) -> tuple[Any, list[str]]:
    """Cut the nodes between some values out of `file` (the `onnx.ModelProto`), as a model.

    With it come the names of further inputs, of which only the sizes matter: none if `whole`. LookupError as `region`.
    """
    from onnx import helper

    nodes, sizes = region(outputs, set(inputs), whole)
    used: set[Any] = {value for node in nodes for value in _read(node)}
    constants = [value for value in used if value is not None and _is_constant(value)]

    def typed(value: Any) -> Any:
        fact = seen.get(value.name, Seen(np.dtype(np.int64), ()))
        dims = fact.dims if fact.shapes else None
        return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(fact.dtype), dims)

    proto = helper.make_graph(
        [ir.to_proto(node) for node in graph if node in nodes],
        "block",
        [typed(value) for value in (*inputs, *sizes)],
        [typed(value) for value in outputs],
        [ir.to_proto(value.const_value) for value in constants],
    )
    model = helper.make_model(proto, opset_imports=file.opset_import, ir_version=file.ir_version)
    return model, [value.name for value in sizes]


def cases(ends: list[Any], seen: dict[str, Seen], sizes: list[str]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Named inputs to compare a block on: random values, ties and rectified values, in each shape that was seen.

    `ends` are the map that is pooled and, where they are others, the values; `sizes` names the further inputs.
    """
    generator = torch.Generator().manual_seed(0)
    pooled, *others = facts = [seen[value.name] for value in ends]
    for i, shape in enumerate(pooled.shapes):
        for kind, x in probes(shape, generator).items():
            drawn = [x.abs() if pooled.dtype.kind == "u" else x]
            drawn += [torch.randn(each.shapes[i], generator=generator) for each in others]
            # Three times as large: integers differ, too.
            arrays = [(3 * each).numpy().astype(fact.dtype) for each, fact in zip(drawn, facts, strict=True)]
            arrays += [np.zeros(seen[name].shapes[i], seen[name].dtype) for name in sizes]
            yield f"{kind} of shape {list(shape)}", arrays


def region(outputs: list[Any], stops: set[Any], whole: bool = False) -> tuple[set[ir.Node], list[Any]]:
    """The nodes above some outputs as far as the stops, and further values that matter by their sizes alone.

    `whole` follows sizes to what they are of, too. LookupError if the outputs depend on an input beside the stops.
    """
    nodes, measured, waiting = set[ir.Node](), [], list(outputs)
    while waiting:
        value = waiting.pop()
        if value is None or value in stops or _is_constant(value):
            continue
        node = value.producer()
        if node is None:
            raise LookupError(value.name)
        if node in nodes:
            continue
        nodes.add(node)
        if node.op_type in SIZES and not whole:
            measured.append(node.inputs[0])
        else:
            waiting.extend(_read(node))
    made = {output for node in nodes for output in node.outputs} | stops
    return nodes, [value for value in dict.fromkeys(measured) if value not in made and not _is_constant(value)]


def inside(node: ir.Node) -> list[ir.Node]:
    """Nodes of the graphs that an If, Loop or Scan holds, of all depths."""
    return [each for graph in _graphs(node) for inner in graph for each in (inner, *inside(inner))]


def _graphs(node: ir.Node) -> list[Any]:
    return [each.value for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH]


def _read(node: ir.Node) -> list[Any]:
    """Values from outside that a node reads, itself or in the graphs that it holds."""
    values: list[Any] = list(node.inputs)
    for graph in _graphs(node):
        own = {*graph.inputs, *graph.initializers.values(), *(value for inner in graph for value in inner.outputs)}
        values += [value for inner in graph for value in _read(inner) if value not in own]
    return values


def _is_constant(value: Any) -> bool:
    return value.producer() is None and value.const_value is not None
