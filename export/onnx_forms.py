"""The forms of a max-unpooling as ONNX graphs, each behind one operator of torch's.

The pass writes these operators, `torch.onnx.export` translates them. Written by hand the graphs have what torch's own
trace cannot: one Slice for all axes, none where the window divides a fixed size, and no padding against guards.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import forms
from .verify import torch_pool

__all__ = ["OPERATORS", "Translation", "Writer", "constant", "translations"]


def _native(values: Tensor, x: Tensor, window: list[int], ceil_mode: bool, own: bool) -> Tensor:
    # As in ONNX: of the same values as keys, in torch by indices.
    _, indices = torch_pool(x, window, ceil_mode)
    return forms.scatter(values, indices, list(x.shape[2:]))


def _like_map(values: Tensor, x: Tensor, *_: Any) -> Tensor:
    return values.new_empty(x.shape)


def _of_size(values: Tensor, indices: Tensor, size: list[int]) -> Tensor:
    return values.new_empty([*values.shape[: values.dim() - len(size)], *size])


_BY_MASK = "(Tensor values, Tensor x, int[] window, bool ceil_mode, bool own) -> Tensor"
_BY_INDICES = "(Tensor values, Tensor indices, SymInt[] size) -> Tensor"
# What the pass calls for each lowering.
OPERATORS: dict[str, Callable[..., Tensor]] = {}
for _name, _form, _schema, _fake in (
    ("keys", forms.keys, _BY_MASK, _like_map),
    ("arith", forms.arith, _BY_MASK, _like_map),
    ("native", _native, _BY_MASK, _like_map),
    ("scatter", forms.scatter, _BY_INDICES, _of_size),
):
    torch.library.custom_op(f"poolskip_zoo::{_name}", _form, mutates_args=(), schema=_schema).register_fake(_fake)
    OPERATORS[_name] = getattr(torch.ops.poolskip_zoo, _name).default


@dataclass
class Translation:
    """ONNX values of one unpooling, named once the export is done.

    It is computed from the pooled map (after the values where those are others), or from values, indices and the output
    sizes that are not fixed.
    """

    inputs: list[Any]
    output: Any

    def __post_init__(self) -> None:
        # The exporter takes out what changes nothing (x + 0, a view of the same shape): then they read another value.
        self._reads = [value.uses() for value in self.inputs]

    def input_names(self) -> list[str]:
        """Names of the inputs in the exported graph, as the nodes that read them have them."""
        names = []
        for value, reads in zip(self.inputs, self._reads, strict=True):
            read = next((node.inputs[place] for node, place in reads if node.graph is not None), None)
            names.append(_kept(value if read is None else read).name)
        return names


def translations(made: list[Translation]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operators to functions, for `torch.onnx.export`; `made` receives a record per unpooling, in the graph's order."""

    def of_pair(lowering: str) -> Callable[..., Any]:
        def translate(values, x, window, ceil_mode, own):
            output = Writer(x, window, ceil_mode).write(lowering, values, own)
            made.append(Translation([x] if own else [values, x], output))
            return output

        return translate

    def scatter(values, indices, size):
        output = _write_scatter(values, indices, size)
        open_sizes = [each for each in size if not isinstance(each, int)]
        made.append(Translation([values, indices, *open_sizes], output))
        return output

    return {
        operator: scatter if lowering == "scatter" else of_pair(lowering) for lowering, operator in OPERATORS.items()
    }


def _kept(value: Any) -> Any:
    """The value behind identities, which the exporter takes out (dropout leaves one)."""
    while value.producer() is not None and value.producer().op_type == "Identity":
        value = value.producer().inputs[0]
    return value


def constant(op: Any, value: Any, dtype: Any = np.int64) -> Any:
    """Write a constant, of what NumPy takes for an array."""
    from onnx import numpy_helper

    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))


def _opset() -> Any:
    from onnxscript import opset18

    return opset18


class Writer:
    """Writes nodes for one pooled map `x` (N, C, *spatial)."""

    def __init__(self, x: Any, window: list[int], ceil_mode: bool) -> None:
        self.op, self.x, self.window, self.ceil_mode = _opset(), x, list(window), ceil_mode
        self.rank = len(self.window)
        sizes = list(x.shape)[2:]
        # Sizes that are not fixed are no ints.
        self.size = [int(size) for size in sizes] if all(isinstance(size, int) for size in sizes) else None
        self.divides = self.size is not None and all(s % e == 0 for s, e in zip(self.size, self.window, strict=True))
        self.dtype = x.dtype.numpy()

    def number(self, value: Any) -> Any:
        """Constant of the type of `x`."""
        return constant(self.op, value, self.dtype)

    def ints(self, values: list[int]) -> Any:
        return constant(self.op, values)

    def spatial(self, value: Any) -> Any:
        """Spatial sizes of `x` where they are fixed, else of a value at run time."""
        if value is self.x and self.size is not None:
            return self.ints(self.size)
        return self.op.Shape(value, start=2)

    def pool(self, z: Any) -> Any:
        # Partial windows by padding, which never wins: OpenVINO refuses maps smaller than the window in ceil mode.
        last = [e - 1 if self.ceil_mode and not self.divides else 0 for e in self.window]
        pooled, _ = self.op.MaxPool(z, kernel_shape=self.window, strides=self.window, pads=[0] * self.rank + last)
        return pooled

    def cut(self, z: Any) -> Any:
        """The first cells of `z`, as many as `x` has."""
        axes = list(range(2, self.rank + 2))
        return self.op.Slice(z, self.ints([0] * self.rank), self.spatial(self.x), self.ints(axes))

    def up(self, z: Any, fill: float) -> Any:
        """Repeat each element over its window; `fill` where floor mode pools nothing."""
        z = self.extended(z, fill)
        z = self.op.Resize(
            z,
            None,
            constant(self.op, [1, 1, *self.window], np.float32),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        return z if self.divides else self.cut(z)

    def extended(self, z: Any, fill: float) -> Any:
        """Pooled cells for all of `x`: floor mode lacks one at the far edges."""
        if self.ceil_mode or self.divides:
            return z
        pads = self.ints([0] * (self.rank + 2) + [0, 0] + [1] * self.rank)
        return self.op.Pad(z, pads, self.number(fill))

    def window_keys(self, pooled: Any) -> Any:
        """Keys e²…1 over each window, (1, 1, *spatial)."""
        tile = np.arange(math.prod(self.window), 0, -1).reshape(1, 1, *self.window)
        if self.size is not None:
            repeats = [-(-s // e) for s, e in zip(self.size, self.window, strict=True)]
            whole: tuple[Any, ...] = (..., *(slice(size) for size in self.size))
            keys = np.tile(tile, (1, 1, *repeats))[whole]
            return self.number(keys)
        repeats = self.op.Shape(self.extended(pooled, 0.0), start=2)
        return self.cut(self.op.Tile(self.number(tile), self.op.Concat(self.ints([1, 1]), repeats, axis=0)))

    def keys_mask(self) -> Any:
        """1 at the first maximum of each window, else 0: `relu(k - (up(pool(k)) - 1))`."""
        pooled = self.pool(self.x)
        is_max = self.op.Cast(self.op.Equal(self.x, self.up(pooled, 0.0)), to=int(self.x.dtype))
        return self.first(is_max, pooled)

    def arith_mask(self) -> Any:
        """The same without comparisons; see `forms.arith`."""
        pooled = self.pool(self.x)
        info = np.finfo(self.dtype)
        below = self.op.Sub(self.up(pooled, info.max), self.x)
        step, one = self.number(forms.unit_step(info)), self.number(1)
        for _ in range(2):
            below = self.op.Min(self.op.Mul(below, step), one)
        return self.first(self.op.Sub(one, below), pooled)

    def first(self, is_max: Any, pooled: Any) -> Any:
        ranks = self.op.Mul(is_max, self.window_keys(pooled))
        # relu: a window with NaN has no maximum, and none is chosen.
        before = self.op.Relu(self.op.Sub(self.pool(ranks), self.number(1)))
        return self.op.Relu(self.op.Sub(ranks, self.up(before, float(math.prod(self.window)))))

    def write(self, lowering: str, values: Any, own: bool) -> Any:
        """The unpooled map by keys, arith or native."""
        if lowering == "native":
            return self.native(values, own)
        placed = self.x if own else self.up(values, 0.0)
        return self.op.Mul(placed, self.keys_mask() if lowering == "keys" else self.arith_mask())

    def native(self, values: Any, own: bool) -> Any:
        """Pad or crop to whole windows, MaxPool with indices, MaxUnpool, and back: MaxUnpool fails on partial ones."""
        op, axes = self.op, self.ints(list(range(2, self.rank + 2)))
        none, window, whole = self.ints([0] * self.rank), self.ints(self.window), self.x
        if not self.divides:
            size = self.spatial(self.x)
            if self.ceil_mode:
                lacking = op.Mod(op.Neg(size), window)
                pads = op.Concat(self.ints([0] * (self.rank + 4)), lacking, axis=0)
                whole = op.Pad(self.x, pads, self.number(-math.inf))
            else:
                covered = op.Mul(op.Div(size, window), window)
                whole = op.Slice(self.x, none, covered, axes)
        pooled, indices = op.MaxPool(whole, kernel_shape=self.window, strides=self.window)
        placed = op.MaxUnpool(pooled if own else values, indices, kernel_shape=self.window, strides=self.window)
        if self.divides:
            return placed
        if self.ceil_mode:
            return self.cut(placed)
        pads = op.Concat(self.ints([0] * (self.rank + 4)), op.Sub(size, covered), axis=0)
        return op.Pad(placed, pads, self.number(0))


def _write_scatter(values: Any, indices: Any, size: list[Any]) -> Any:
    """ScatterElements on flattened planes."""
    op = _opset()
    outer = len(values.shape) - len(size)
    planes = op.Shape(values, start=0, end=outer)
    ends = [constant(op, [each]) if isinstance(each, int) else op.Reshape(each, constant(op, [1])) for each in size]
    spatial = op.Concat(*ends, axis=0)
    flat = op.Concat(planes, op.ReduceProd(spatial, keepdims=1), axis=0)
    zero = constant(op, 0, values.dtype.numpy())
    # 0 keeps a size, -1 takes the rest.
    row = constant(op, [0] * outer + [-1])
    placed = op.ScatterElements(op.Expand(zero, flat), op.Reshape(indices, row), op.Reshape(values, row), axis=outer)
    return op.Reshape(placed, op.Concat(planes, spatial, axis=0))
