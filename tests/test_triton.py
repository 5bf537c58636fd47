"""The Triton kernels: interpreted on a CPU, compiled where there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from poolskip_zoo.layers import PoolSkip2d, kernels, max_pool_unpool2d


def test_interpreted_kernels_equal_torch_to_the_bit():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_interpreted.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "24 cases\n"


def test_a_cpu_tensor_takes_torch_s_own():
    assert not kernels.applies(torch.zeros(1, 1, 4, 4), [2, 2])


# pytest -m gpu tests/test_triton.py
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("e", [2, 4])
def test_compiled_kernels_equal_torch_to_the_bit(dtype, layout, e, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(4, 64, 57, 43, device="cuda").mul(4).round().to(dtype).contiguous(memory_format=layout)
    layer = PoolSkip2d(64, e, groups=64).to("cuda", dtype)

    def run():
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.sum().backward()
        return max_pool_unpool2d(x, e), y.detach(), leaf.grad

    monkeypatch.setenv(kernels.TRITON_VARIABLE, "1")
    assert kernels.applies(x, [e, e])
    fused = run()
    monkeypatch.setenv(kernels.TRITON_VARIABLE, "0")
    assert not kernels.applies(x, [e, e])
    for one, other in zip(fused, run(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
