"""Run by test_triton.py with TRITON_INTERPRET=1: the kernels on the CPU against torch's pair, then the layer."""

import itertools

import torch
import torch.nn.functional as F

from poolskip_zoo.layers import PoolSkip2d, max_pool_unpool2d
from poolskip_zoo.layers import kernels as choice
from poolskip_zoo.layers.kernels import window_maxima as kernels

torch.manual_seed(0)
CASES = itertools.product(
    [torch.float32, torch.float16, torch.bfloat16],
    [torch.contiguous_format, torch.channels_last],
    [([2, 2], (2, 3, 7, 9)), ([4, 4], (1, 5, 9, 6)), ([2, 3], (1, 2, 1, 8)), ([4, 4], (1, 1, 90, 90))],
)
ran = 0
for dtype, layout, (window, shape) in CASES:
    x = torch.randn(shape).mul(2).round().to(dtype).contiguous(memory_format=layout)  # many ties
    x[torch.rand(shape) < 0.1] = float("nan")
    x[torch.rand(shape) < 0.1] = float("inf")
    x[torch.rand(shape) < 0.3] = float("-inf")
    values, indices = F.max_pool2d(x, window, window, ceil_mode=True, return_indices=True)
    u = F.max_unpool2d(values, indices, window, window, output_size=shape[2:])
    wide = (window[0] - 1) * shape[3] + window[1] - 1 >= 256
    pooled, offsets, filled = kernels.pool(x, window, torch.int16 if wide else torch.uint8, fill=True)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(filled, u, **same)
    torch.testing.assert_close(pooled, values, **same)
    torch.testing.assert_close(kernels.maxima(x, window), u, **same)
    torch.testing.assert_close(kernels.scatter(pooled, offsets, window, x.shape[2:]), u, **same)
    other = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    whole = other.mul(4).round()  # sums are exact: the interpreter does not round bfloat16 as a GPU does
    crossed = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    for base in (whole, whole[..., :1].expand_as(u), whole.contiguous(memory_format=crossed)):
        summed = kernels.scatter(pooled, offsets, window, x.shape[2:], base)
        torch.testing.assert_close(summed, u + base, **same)
    read = other.flatten(2).gather(2, indices.flatten(2)).view(values.shape)
    torch.testing.assert_close(kernels.gather(other, offsets, window), read, **same)
    assert pooled.stride() == values.stride()
    assert kernels.maxima(x, window).stride() == x.stride()
    ran += 1


def stock_maxima(x):
    indexed = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
    return F.max_unpool2d(*indexed, 2, 2, output_size=x.shape[2:])


def stock_layer(x, weight, bias):
    return x + F.conv2d(stock_maxima(x), weight, bias, padding=1, groups=4)


def our_layer(x, weight, bias):
    return torch.func.functional_call(layer, {"conv.weight": weight, "conv.bias": bias}, x)


def outcome(call, *inputs):
    """Output, gradients by themselves and on the way to a second derivative, and that."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    plain = torch.autograd.grad(call(*leaves).float().square().sum(), leaves)
    y = call(*leaves)
    grads = torch.autograd.grad(y.float().square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(grads[0].float().square().sum(), leaves[0])
    return [y, *plain, *grads, *second]


layer = PoolSkip2d(4, 2, groups=4)
launched = set()
launch = kernels._launch


def recorded_launch(kernel, *args):
    launched.add((kernel.fn.__name__, args[-1] is not None))
    launch(kernel, *args)


kernels._launch = recorded_launch
choice.applies = lambda x, window: True
for layout, size, autocast in itertools.product(
    [torch.contiguous_format, torch.channels_last], [(6, 8), (5, 7)], [False, True]
):
    x = torch.randn(2, 4, *size).contiguous(memory_format=layout)
    near = {"rtol": 2e-2, "atol": 2e-2} if autocast else {}
    for call, stock, inputs in (
        (our_layer, stock_layer, (x, *layer.parameters())),
        (lambda x: max_pool_unpool2d(x, 2), stock_maxima, (x,)),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, expected = outcome(call, *inputs), outcome(stock, *inputs)
        torch.testing.assert_close(got, expected, **near)
        # but for the second derivative, which torch makes contiguous
        assert [each.stride() for each in got[:-1]] == [each.stride() for each in expected[:-1]]
    ran += 1
fused = {("_pool_kernel", True), ("_scatter_kernel", True)}  # with the map, onto x's own gradient
assert launched == fused | {("_pool_kernel", False), ("_scatter_kernel", False), ("_gather_kernel", True)}, launched
print(ran, "cases")
