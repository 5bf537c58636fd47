"""The Triton kernels: interpreted on a CPU, compiled for a GPU, and run where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from poolskip_zoo.layers import PoolSkip2d, kernels, max_pool_unpool2d


def test_interpreted_kernels_equal_torch_to_the_bit():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("triton_interpreted.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "32 cases\n"


class _Driver:
    """A GPU that is not there: enough for Triton to compile for it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.mark.parametrize(
    ("dtype", "layout", "window", "size"),
    [
        (torch.float32, torch.contiguous_format, [2, 2], (12, 28)),
        (torch.float32, torch.channels_last, [2, 2], (12, 28)),
        (torch.float16, torch.contiguous_format, [3, 3], (13, 29)),
        (torch.bfloat16, torch.channels_last, [4, 4], (13, 29)),
    ],
)
def test_kernels_compile_for_a_gpu(dtype, layout, window, size, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    compiled = []
    run = triton.runtime.JITFunction.run
    compile_only = lambda self, *args, warmup, **options: compiled.append(run(self, *args, warmup=True, **options))  # noqa: E731
    monkeypatch.setattr(triton.runtime.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.jit, "driver", SimpleNamespace(active=_Driver()))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(2, 64, *size, dtype=dtype).contiguous(memory_format=layout)
    fused = kernels.load()
    values, offsets, _ = fused.pool(x, window, torch.uint8, fill=True)
    fused.maxima(x, window)
    fused.scatter(values, offsets, window, x.shape[2:])
    fused.scatter(values, offsets, window, x.shape[2:], x)
    fused.gather(x, offsets, window)
    assert len(compiled) == 5
    for kernel in compiled:
        assert kernel.asm["cubin"]
    if dtype == torch.float32:  # whole rows of windows, or four channels at once
        wide = "v4.b32" if layout == torch.channels_last else "v2.b32"
        assert all(f"st.global.{wide}" in kernel.asm["ptx"] for kernel in compiled[:4])


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
