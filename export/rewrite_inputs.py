"""What an ONNX file is run on where nobody gives arrays."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .inputs import OPEN_SIZES

__all__ = ["check_size", "made_up", "open_axes"]


def open_axes(value: Any) -> set[int]:
    """Axes of an input (an `onnx.ValueInfoProto`) that have no fixed size; 0 is the batch."""
    return {i for i, dim in enumerate(value.type.tensor_type.shape.dim) if not dim.dim_value}


def check_size(inputs: Sequence[Any], size: Sequence[int], file: str) -> None:
    """Raise ValueError if sizes are not one, of at least 1, for each axis after the batch that is left open."""
    dims = {
        each.name: [dim.dim_value or dim.dim_param or "?" for dim in each.type.tensor_type.shape.dim] for each in inputs
    }
    numbers = {each.name: len(open_axes(each) - {0}) for each in inputs}
    if not any(numbers.values()):
        raise ValueError(f"size={tuple(size)!r}: {file} leaves no size after the batch open: {dims}")
    for name, number in numbers.items():
        if number not in (0, len(size)):
            raise ValueError(
                f"size={tuple(size)!r}: expected {number}, one for each axis after the batch left open by {name!r}: "
                f"{dims[name]}"
            )
    if min(size) < 1:
        raise ValueError(f"size={tuple(size)!r}: expected sizes of at least 1")


def made_up(inputs: Sequence[Any], size: Sequence[int] | None) -> Iterator[list[list[np.ndarray]]]:
    """Lists of inputs, each of several batches where that is open: of odd sizes, then of multiples of 32.

    There is one list where no size is open, or `size` gives those of the open axes after the batch.
    """
    several = size is None and any(open_axes(value) - {0} for value in inputs)
    batches = (2, 1, 3) if several or any(0 in open_axes(value) for value in inputs) else (1,)
    for sizes in OPEN_SIZES if several else ([size or ()] * 3,):
        yield [
            [_array(value, batch, each, 4 if several and _rank(value) == 5 else 1) for value in inputs]
            for batch, each in zip(batches, sizes, strict=False)
        ]


def _rank(value: Any) -> int:
    return len(value.type.tensor_type.shape.dim)


def _array(value: Any, batch: int, sizes: Sequence[int], part: int) -> np.ndarray:
    """Random numbers; open axes after the first take a part of `sizes`, again from the first where they are few."""
    from onnx import helper

    generator, free = np.random.default_rng(0), open_axes(value)
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if 0 in free:
        dims[0] = batch
    for axis, size in zip(sorted(free - {0}), itertools.cycle(sizes), strict=False):
        dims[axis] = size // part
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    if dtype.kind == "f":
        return generator.standard_normal(dims).astype(dtype)
    return generator.integers(0, 256 if dtype == np.uint8 else 2, dims).astype(dtype)
