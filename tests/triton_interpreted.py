"""Run by test_triton.py with TRITON_INTERPRET=1: the kernels on the CPU against torch's pair."""

import itertools

import torch
import torch.nn.functional as F

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
    pooled, offsets = kernels.pool(x, window, torch.int16 if wide else torch.uint8)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(pooled, values, **same)
    torch.testing.assert_close(kernels.maxima(x, window), u, **same)
    torch.testing.assert_close(kernels.scatter(pooled, offsets, window, x.shape[2:]), u, **same)
    other = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    read = other.flatten(2).gather(2, indices.flatten(2)).view(values.shape)
    torch.testing.assert_close(kernels.gather(other, offsets, window), read, **same)
    assert pooled.stride() == values.stride()
    assert kernels.maxima(x, window).stride() == x.stride()
    ran += 1
print(ran, "cases")
