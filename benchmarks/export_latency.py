"""Latency of exported files against the floor: the same graph with x in place of the sparse map.

Beside it the bare model and torch's graph of the index form, as plain `torch.onnx.export` writes them. One process, one
thread; all files of a model, fixed and open sizes, in turn in every round; ratios of medians of the process's CPU time.
`python benchmarks/export_latency.py --help`.
"""

import argparse
import logging
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from onnx_files import RUNTIMES, floor
from torch import nn
from turns import in_turns

import poolskip_zoo  # noqa: F401
from poolskip_zoo.export import to_onnx
from poolskip_zoo.layers import functional, max_pool_unpool2d

FORMS = ("floor", "keys", "bare", "index")


class Operator(nn.Module):
    """The window maxima alone."""

    def forward(self, x):
        return max_pool_unpool2d(x, 2)


def build(name):
    """A model and the shape of one input."""
    if name == "operator":
        return Operator().eval(), (64, 56, 56)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        # timm starts the last scale of each residual branch at 0, where Pool Skip has no influence on the output.
        if parameter.dim() == 1 and key.endswith("weight") and not parameter.any():
            nn.init.constant_(parameter, 0.2)
    return model, (3, 224, 224)


def plain(model, x, path, dynamic):
    """What `torch.onnx.export` writes by itself."""
    axes = dict.fromkeys((0, 2, 3) if dynamic else (), torch.export.Dim.AUTO)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(axes,), external_data=False, verbose=False)


def write(model, shape, folder, dynamic, runtime):
    """The four graphs."""
    captured = torch.randn(2, shape[0], 193, 161) if dynamic else torch.randn(1, *shape)
    axes = ("batch", "height", "width") if dynamic else ()
    folder.mkdir()
    to_onnx(model, captured, folder / "keys.onnx", runtime, dynamic=axes)
    with floor():
        to_onnx(model, captured, folder / "floor.onnx", runtime, dynamic=axes)
    plain(model, captured, folder / "bare.onnx", dynamic)
    with functional.capture_stock():
        plain(model, captured, folder / "index.onnx", dynamic)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models",
        nargs="*",
        default=["operator", "resnet18_poolskip", "resnet50_poolskip"],
        help="timm names, or operator: the window maxima of 64×56×56",
    )
    parser.add_argument("--runtime", default="onnxruntime", choices=RUNTIMES)
    parser.add_argument("--runs", type=int, default=25, help="rounds, after two that do not count")
    parser.add_argument("--size", type=int, help="height and width (default: 224, of the operator 56)")
    parser.add_argument("--static", action="store_true", help="fixed sizes alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    for name in args.models:
        model, (channels, *size) = build(name)
        shape = (channels, *([args.size] * 2 if args.size else size))
        x = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
        with tempfile.TemporaryDirectory() as folder:
            programs = {}
            for kind in ("fixed",) if args.static else ("fixed", "open"):
                write(model, shape, Path(folder, kind), kind == "open", args.runtime)
                load = RUNTIMES[args.runtime]
                programs.update({(kind, form): load(Path(folder, kind, f"{form}.onnx")) for form in FORMS})
            calls = {name: partial(program, [x]) for name, program in programs.items()}
            outputs, seconds = in_turns(calls, args.runs)
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        found = {name: 1e3 * statistics.median(spent) for name, spent in seconds.items()}
        for (kind, form), ms in found.items():
            over, faster = ms / found[kind, "floor"], found[kind, "index"] / ms
            error = np.abs(outputs[kind, form][0] - expected).max() / np.abs(expected).max()
            print(
                f"{args.runtime} {name} {kind} {form}: {ms:.2f} ms, {over:.2f}× floor, {faster:.2f}× as fast as index"
                + ("" if form == "floor" else f", relative error {error:.1e}"),
                flush=True,
            )


if __name__ == "__main__":
    main()
