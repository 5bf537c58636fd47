"""The operator and its block on this machine, beside torch's own composition: time, saved bytes, peak memory.

    python benchmarks/operator_speed.py [--threads 1] [--rounds 15] > table.md

The variants take turns within one run; a number is the ratio of their medians, so that a busy machine disturbs both.
On a CPU with one thread, time is that of the thread alone; on a GPU the Triton kernels are on unless POOLSKIP_TRITON=0.
Prints Markdown tables.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import medians, table

from poolskip_zoo.layers import PoolSkip2d, max_pool_unpool2d
from poolskip_zoo.layers.kernels import TRITON_VARIABLE

# (batch, channels, height, width), e: maps of ResNets at 224 and 32 pixels
SHAPES = [
    ((8, 64, 56, 56), 2),
    ((8, 256, 28, 28), 4),
    ((64, 16, 32, 32), 2),
    ((2, 64, 112, 112), 2),
    ((2, 256, 56, 56), 4),
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def stock_maxima(x: Tensor, e: int) -> Tensor:
    """torch's pair, as the reference composes it."""
    values, indices = F.max_pool2d(x, e, e, ceil_mode=True, return_indices=True)
    return F.max_unpool2d(values, indices, e, e, output_size=x.shape[2:])


def stock_block(layer: PoolSkip2d, x: Tensor) -> Tensor:
    """The reference's composition."""
    return x + layer.conv(stock_maxima(x, layer.window[0]))


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor, layer: nn.Module) -> float:
    """Bytes kept for the backward per element of x, storages counted once, parameters not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function(x.clone().requires_grad_() * 1)
    del kept
    return sum(size for place, size in found.items() if place not in own) / x.numel()


def operator_rows(device: str, dtype: torch.dtype, rounds: int, threads: int) -> list[list[str]]:
    """Window maxima without gradient: stock / ours, and ours over a copy; then in training: stock / ours."""
    rows = [["map, e", "layout", "stock, ms", "ours, ms", "stock / ours", "ours / copy"]]
    rows[0] += ["forward and backward: stock / ours", "backward alone"]
    for shape, e in SHAPES:
        for name, layout in LAYOUTS.items():
            x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
            calls = [lambda: stock_maxima(x, e), lambda: max_pool_unpool2d(x, e), lambda: x.clone()]  # noqa: B023
            with torch.no_grad():
                stock, ours, copy = medians(calls, rounds, device, threads)
            rows.append([f"{shape}, {e}", name, *(f"{1e3 * t:.2f}" for t in (stock, ours))])
            rows[-1] += [f"{stock / ours:.2f}", f"{ours / copy:.1f}"]
            leaf, out, both = x.clone().requires_grad_(), torch.randn_like(x), (stock_maxima, max_pool_unpool2d)
            training = [lambda f=f: torch.autograd.grad(f(leaf, e), leaf, out) for f in both]  # noqa: B023
            backward = [
                lambda u=u: torch.autograd.grad(u, leaf, out, retain_graph=True)  # noqa: B023
                for u in [f(leaf, e) for f in both]
            ]
            for calls in (training, backward):
                stock, ours = medians(calls, rounds, device, threads)
                rows[-1].append(f"{stock / ours:.2f}")
    return rows


def block_rows(device: str, dtype: torch.dtype, rounds: int, threads: int) -> list[list[str]]:
    """Forward and backward of the block: stock / ours, and the bytes that each keeps."""
    rows = [["map, e", "layout", "3×3", "stock, ms", "ours, ms", "stock / ours", "saved: stock", "ours"]]
    for shape, e in SHAPES:
        for name, layout in LAYOUTS.items():
            for kind, groups in (("dense", 1), ("depthwise", shape[1])):
                layer = PoolSkip2d(shape[1], e, groups=groups).to(device, dtype, memory_format=layout)
                x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
                out = torch.randn_like(x)

                def step(function: Callable[[Tensor], Tensor], x: Tensor = x, out: Tensor = out) -> None:
                    function(x).backward(out)

                composed = lambda x, layer=layer: stock_block(layer, x)  # noqa: E731
                stock, ours = medians([lambda: step(composed), lambda: step(layer)], rounds, device, threads)  # noqa: B023
                rows.append([f"{shape}, {e}", name, kind, *(f"{1e3 * t:.2f}" for t in (stock, ours))])
                rows[-1].append(f"{stock / ours:.2f}")
                rows[-1] += [f"{saved_bytes(call, x.detach(), layer):.3f}" for call in (composed, layer)]
    return rows


def peak(kind: str, e: int, relu: bool) -> int:
    """Growth of this process's peak memory over forward and backward of 8 chained depthwise blocks, bytes."""
    torch.set_num_threads(1)
    x = torch.randn(8, 64, 112, 112).contiguous(memory_format=torch.channels_last).requires_grad_()
    layers = [PoolSkip2d(64, e, groups=64).to(memory_format=torch.channels_last) for _ in range(8)]

    def run(x: Tensor) -> None:
        for layer in layers:
            x = layer(x) if kind == "ours" else stock_block(layer, x)
            x = x.relu() if relu else x
        x.sum().backward()

    run(x[:1, :, :32, :32])  # libraries load now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(x)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def peak_rows() -> list[list[str]]:
    """Peak memory, each measured in a process of its own."""
    rows = [["8 chained depthwise blocks", "e", "stock, bytes per element and block", "ours", "stock / ours"]]
    for relu in (False, True):
        for e in (2, 4):
            sizes = []
            for kind in ("stock", "ours"):
                command = [sys.executable, __file__, "--peak", kind, str(e), str(int(relu))]
                # Every tensor gets pages of its own, which go back when it is freed: nothing else is in the peak.
                env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
                sizes.append(int(done.stdout))
            per = [size / (8 * 8 * 64 * 112 * 112) for size in sizes]
            name = "with a ReLU after each" if relu else "alone"
            rows.append([name, str(e), *(f"{each:.1f}" for each in per), f"{per[0] / per[1]:.2f}"])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1]), args.peak[2] == "1"))
        return
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault(TRITON_VARIABLE, "1")
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} thread(s)"
    dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
    for dtype in dtypes if args.only != "memory" else ():
        print(f"\n### {where}, {str(dtype).removeprefix('torch.')}: window maxima\n")
        print(table(operator_rows(device, dtype, args.rounds, args.threads)))
        print("\n### Block, forward and backward; saved bytes per element\n")
        print(table(block_rows(device, dtype, args.rounds, args.threads)), flush=True)
    if device == "cpu" and args.only != "speed":
        print("\n### Peak memory, float32, channels_last\n")
        print(table(peak_rows()))


if __name__ == "__main__":
    main()
