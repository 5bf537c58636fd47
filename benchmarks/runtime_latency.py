"""Latency of each lowering in a runtime against the floor: the same graph with x in place of the sparse map.

One process, one thread, the files in turn in every round, ratios of medians of the process's CPU time; in the browser
ratios of the fastest runs.
`python benchmarks/runtime_latency.py litert`; docs/runtimes.md says how to install the runtimes.
"""

import argparse
import dataclasses
import importlib
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
from onnx_files import RUNTIMES, floor
from torch import nn
from turns import in_turns

import poolskip_zoo
from poolskip_zoo.export import to_onnx
from poolskip_zoo.export.converted import lower_for
from poolskip_zoo.export.lower import capture, lower_program
from poolskip_zoo.export.open_sizes import unguarded

LOWERINGS = {
    "onnxruntime": ("keys", "arith", "native", "scatter"),
    "openvino": ("keys", "arith", "scatter"),
    "litert": ("keys", "arith", "scatter"),
    "executorch": ("keys", "arith", "scatter"),
    "ncnn": ("arith",),
    "mnn": ("keys", "arith", "native", "scatter"),
    "web": ("keys", "arith", "native", "scatter"),
}


def block(channels=64):
    """A convolution with Pool Skip, as in the first stage of resnet18_poolskip (at 56×56)."""
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
    poolskip_zoo.add_pool_skip(model, ["0"])
    return model


def floor_form(values, x, window, ceil_mode, own):
    """What no lowering can be faster than."""
    return x


def converted(model, args, runtime, folder, names):
    """Programs of LiteRT or ExecuTorch."""
    make = importlib.import_module(f"poolskip_zoo.export.to_{runtime}")._make
    suffix = {"litert": ".tflite", "executorch": ".pte"}[runtime]
    lowered = {each: lower_for(model, args, runtime, each) for each in names}
    module = unguarded(lower_program(capture(model, args, None), runtime, "keys", {"keys": floor_form}))
    lowered = {"floor": dataclasses.replace(lowered[names[0]], module=module), **lowered}
    return {name: make(each, folder / f"{name}{suffix}") for name, each in lowered.items()}


def of_onnx(model, args, folder, names, load):
    """Programs of runtimes that are given ONNX files."""
    programs = {}
    for name in ("floor", *names):
        path = folder / f"{name}.onnx"
        with floor() if name == "floor" else nullcontext():
            to_onnx(model, args, path, dynamic=(), lowering="keys" if name == "floor" else name)
        programs[name] = load(path)
    return programs


def in_ncnn(path):
    """Load in ncnn."""
    from poolskip_zoo.export.to_ncnn import _convert

    return _convert(path.with_suffix(".param"))


def in_mnn(path):
    """Load in MNN."""
    # What the command `mnnconvert` calls, without what it does besides: install a package and send a log of its use.
    import _tools
    import MNN

    target = path.with_suffix(".mnn")
    command = ["", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(target), "--bizCode", "x"]
    _tools.mnnconvert(command)
    net = MNN.nn.load_module_from_file(str(target), [], [], backend=MNN.expr.Backend.CPU, thread_num=1)

    def run(arrays):
        given = [MNN.expr.convert(MNN.expr.const(each, each.shape), MNN.expr.NC4HW4) for each in arrays]
        return [MNN.expr.convert(each, MNN.expr.NCHW).read().copy() for each in net.onForward(given)]

    return run


def in_chromium(folder, names, x, rounds):
    """Times by the page's own clock, for no other process sees the browser's."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from browser import Browser

    page = Browser("chromium", Path(os.environ["POOLSKIP_NODE_MODULES"], "onnxruntime-web", "dist"), folder)
    try:
        results, times = page.run([f"{name}.onnx" for name in names], [x.numpy()], rounds)
    finally:
        page.close()
    return [outputs[0] for outputs in results], [spent[2:] for spent in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=LOWERINGS)
    parser.add_argument("model", nargs="?", default="block", help="a timm name, or block: one convolution at 64×56×56")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--lowerings", nargs="*", help="default: all that the runtime may take")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = (block() if args.model == "block" else timm.create_model(args.model)).eval()
    x = torch.randn(1, 64, 56, 56) if args.model == "block" else torch.randn(1, 3, args.size, args.size)
    names = args.lowerings or LOWERINGS[args.runtime]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.runtime == "web":
            written = list(of_onnx(model, (x,), folder, names, lambda path: path))
            outputs, times = in_chromium(folder, written, x, args.rounds)
            outputs, times = dict(zip(written, outputs, strict=True)), dict(zip(written, times, strict=True))
        else:
            if args.runtime in ("litert", "executorch"):
                programs = converted(model, (x,), args.runtime, folder, names)
            else:
                load = {**RUNTIMES, "mnn": in_mnn, "ncnn": in_ncnn}[args.runtime]
                programs = of_onnx(model, (x,), folder, names, load)
            calls = {name: partial(run, [x.numpy()]) for name, run in programs.items()}
            found, seconds = in_turns(calls, args.rounds)
            outputs = {name: arrays[0] for name, arrays in found.items()}
            times = {name: [1e3 * each for each in spent] for name, spent in seconds.items()}
    with torch.no_grad():
        expected = model(x)
    # The page's clock counts what other processes take, the fastest run has least of that.
    typical = min if args.runtime == "web" else statistics.median
    fastest = typical(times["floor"])
    for name, values in times.items():
        error = (torch.from_numpy(outputs[name]) - expected).abs().max() / expected.abs().max()
        ms = typical(values)
        print(f"{args.runtime} {name}: {ms:.2f} ms, {ms / fastest:.2f}×, relative error {error:.1e}")


if __name__ == "__main__":
    main()
