"""Latency of exported files against the floor: the same graph with x in place of the sparse map.

Interleaved runs in one process, one thread, ratios of medians. `python benchmarks/export_latency.py --help`.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import poolskip_zoo  # noqa: F401
from poolskip_zoo.export import to_onnx
from poolskip_zoo.export.onnx_forms import _Writer
from poolskip_zoo.layers import functional, max_pool_unpool2d


class Operator(nn.Module):
    """The window maxima alone."""

    def forward(self, x):
        return max_pool_unpool2d(x, 2)


def plain(model, x, path, dynamic):
    """What `torch.onnx.export` writes by itself."""
    axes = dict.fromkeys((0, 2, 3) if dynamic else (), torch.export.Dim.AUTO)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(axes,), external_data=False, verbose=False)


def write(model, size, folder, dynamic):
    """The four graphs."""
    captured = torch.randn(2, size[0], 193, 161) if dynamic else torch.randn(1, *size)
    axes = ("batch", "height", "width") if dynamic else ()
    to_onnx(model, captured, folder / "keys.onnx", dynamic=axes)
    original = _Writer.place
    check, _Writer.place = to_onnx.__globals__["verify"], lambda self, *args: self.op.Identity(self.x)
    kept = check.check_blocks, check.judge
    check.check_blocks, check.judge = (lambda *args: 0), (lambda *args: None)
    to_onnx(model, captured, folder / "floor.onnx", dynamic=axes)
    _Writer.place, (check.check_blocks, check.judge) = original, kept
    plain(model, captured, folder / "bare.onnx", dynamic)
    with functional.capture_stock():
        plain(model, captured, folder / "index.onnx", dynamic)


def measure(folder, x, runtime, runs):
    """Median CPU time of the calling thread (ONNX Runtime) or wall time (OpenVINO), in ms."""
    programs = {}
    for name in ("floor", "keys", "bare", "index"):
        path = str(folder / f"{name}.onnx")
        if runtime == "openvino":
            import openvino

            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
            compiled = openvino.Core().compile_model(path, "CPU", settings)
            programs[name] = lambda compiled=compiled: compiled([x])
        else:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            key = session.get_inputs()[0].name
            programs[name] = lambda session=session, key=key: session.run(None, {key: x})
    clock = time.perf_counter if runtime == "openvino" else time.thread_time
    times = {name: [] for name in programs}
    for run in range(runs + 2):
        for name, program in programs.items():
            start = clock()
            program()
            if run >= 2:
                times[name].append(clock() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["operator", "resnet18_poolskip", "resnet50_poolskip"])
    parser.add_argument("--runtime", default="onnxruntime", choices=["onnxruntime", "openvino"])
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--static", action="store_true", help="fixed sizes alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name in args.models:
        model = (Operator() if name == "operator" else timm.create_model(name)).eval()
        size = (64, 56, 56) if name == "operator" else (3, 224, 224)
        x = np.random.default_rng(0).standard_normal((1, *size), dtype=np.float32)
        for dynamic in (False,) if args.static else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                write(model, size, Path(folder), dynamic)
                found = measure(Path(folder), x, args.runtime, args.runs)
            line = ", ".join(f"{key} {value:.2f} ms ({value / found['floor']:.2f}×)" for key, value in found.items())
            print(f"{name} {'open' if dynamic else 'fixed'} sizes, {args.runtime}: {line}", flush=True)


if __name__ == "__main__":
    main()
