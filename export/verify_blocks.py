"""Checks of an ONNX file's unpoolings, one by one: equal to torch's to the bit in the runtime."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .onnx_forms import Translation
from .verify import probes, runner, torch_pool, torch_unpool

__all__ = ["Exported", "check_blocks", "compare", "mask_cases"]

_Shape = list[int | None]
_Cases = Iterator[tuple[str, list[Tensor], Tensor]]
# The `onnx.ModelProto`, and what became of each unpooling in it.
Exported = tuple[Any, list[Translation]]

# Height, width and depth where the file leaves them open: odd, divisible, and below most windows.
_SIZES = ([17, 13, 9], [8, 12, 4], [5, 6, 7])


def check_blocks(
    exported: Exported, unoptimized: Callable[[], Exported], blocks: list[dict[str, Any]], runtime: str
) -> int:
    """Cut each unpooling out of the file and compare it with torch's, on ties, odd sizes and random values.

    `unoptimized` makes the same before the optimizer, which may fuse an unpooling with what follows it (a padding with
    a convolution): then it is cut out of that. Returns how many comparisons were made; RuntimeError names the first
    unpooling that is not equal, or not to be found.
    """
    sources, compared = [_Source(*exported)], 0
    for place, block in enumerate(blocks):
        if sources[0].lacks(place) and len(sources) == 1:
            sources.append(_Source(*unoptimized()))
        source = next((each for each in sources if not each.lacks(place)), None)
        if source is None:
            raise RuntimeError(f"the exported graph has lost {block['name']}, and cannot be checked")
        run = runner(source.cut(place), runtime)
        for case, tensors, expected in source.cases(place, block):
            got = torch.from_numpy(run([each.numpy() for each in tensors])[0])
            compared += 1
            compare(got, expected, block, case)
    return compared


def compare(got: Tensor, expected: Tensor, block: dict[str, Any], case: str) -> None:
    """Raise RuntimeError, naming an unpooling, its line and how many values differ, if it is not equal to torch's."""
    if not torch.equal(got, expected):
        wrong = int((got != expected).sum()) if got.shape == expected.shape else expected.numel()
        raise RuntimeError(
            f"{block['name']} ({block['source']}): the exported form {block['lowering']!r} differs from torch in "
            f"{wrong} of {expected.numel()} values on {case}"
        )


class _Source:
    """An exported model that unpoolings are cut out of."""

    def __init__(self, model: Any, made: list[Translation]) -> None:
        from onnx.utils import Extractor

        graph = model.graph
        self.extractor = Extractor(model)
        self.ends = [(each.input_names(), each.output.name) for each in made]
        self.values = {value.name for value in graph.input}.union(*(node.output for node in graph.node))
        self.fixed = {value.name: _fixed_shape(value) for value in (*graph.value_info, *graph.input, *graph.output)}

    def lacks(self, place: int) -> bool:
        names, output = self.ends[place]
        return not {*names, output} <= self.values

    def cut(self, place: int) -> bytes:
        names, output = self.ends[place]
        proto: bytes = self.extractor.extract_model(names, [output]).SerializeToString()
        return proto

    def cases(self, place: int, block: dict[str, Any]) -> _Cases:
        names, output = self.ends[place]
        if block["lowering"] == "scatter":
            return _scatter_cases(block, self.fixed[names[0]], self.fixed[output])
        return mask_cases(block, self.fixed[names[-1]])


def _fixed_shape(value: Any) -> _Shape:
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def mask_cases(block: dict[str, Any], x_shape: _Shape) -> _Cases:
    """Name, inputs and expected output of each comparison of an unpooling by a mask.

    `x_shape` is that of the pooled map, None for each open axis.
    """
    window, generator = list(block["window"]), torch.Generator().manual_seed(0)
    dtype = torch.float16 if block["half"] else torch.float32
    for sizes in _SIZES:
        spatial = [fixed or size for size, fixed in zip(sizes, x_shape[2:], strict=False)]
        shape = [(x_shape[0] or 2), (x_shape[1] or 3), *spatial]
        for kind, x in probes(shape, generator).items():
            x = x.to(dtype)
            pooled, indices = torch_pool(x.float(), window, block["ceil_mode"])
            values = (pooled if block["own"] else torch.randn(pooled.shape, generator=generator)).to(dtype)
            given = [x] if block["own"] else [values, x]
            yield f"{kind} of size {spatial}", given, torch_unpool(values, indices, spatial)
        if None not in x_shape[2:]:
            return


def _scatter_cases(block: dict[str, Any], values_shape: _Shape, output_shape: _Shape) -> _Cases:
    """The same where the indices are an input: any distinct ones."""
    generator = torch.Generator().manual_seed(0)
    spatial = [fixed or size for size, fixed in zip(_SIZES[0], output_shape[2:], strict=False)]
    cells = math.prod(spatial)
    shape = [(values_shape[0] or 2), (values_shape[1] or 3), *(fixed or 3 for fixed in values_shape[2:])]
    values = torch.randn(shape, generator=generator).to(torch.float16 if block["half"] else torch.float32)
    order = torch.rand([shape[0], shape[1], cells], generator=generator).argsort(-1)
    indices = order[..., : math.prod(shape[2:])].reshape(shape)
    open_sizes = [torch.tensor(size) for size, fixed in zip(spatial, output_shape[2:], strict=True) if fixed is None]
    yield f"indices of size {spatial}", [values, indices, *open_sizes], torch_unpool(values, indices, spatial)
