"""Tools of others on a model as `timm.create_model` makes it, without this package's exporter: one table row each.

Example of two images, square; outputs at it and at an odd size against eager mode. What needs a package that the
interpreter lacks is named and passed over: docs/runtimes.md has the table of all, and says which need environments of
their own. `python benchmarks/existing_tools.py --name resnet50_poolskip --tools torch timmx`
"""

import argparse
import contextlib
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from torch.export import Dim

import poolskip_zoo  # noqa: F401

OPEN = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
TOLERANCE = 1e-3


def in_onnxruntime(path):
    """Load in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def in_openvino(model):
    """Compile for OpenVINO's CPU plugin, in float32 as the model is."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: compiled([x.numpy()])[0]


def in_executorch(path):
    """Load in ExecuTorch."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(str(path)).load_method("forward")
    return lambda x: method.execute([x])[0]


def in_litert(path):
    """Load in LiteRT."""
    import litert_torch

    loaded = litert_torch.load(str(path))
    return lambda x: loaded(x.numpy())


def eager(model, x, folder):
    return lambda y: model(y * (1 + 1e-7 * torch.randn_like(y))), "the yardstick: input changed by 1e-7"


def trace(model, x, folder):
    return torch.jit.trace(model, x), ""


def script(model, x, folder):
    return torch.jit.script(model), ""


def export(model, x, folder):
    return torch.export.export(model, (x,), dynamic_shapes=(OPEN,)).module(), ""


def onnx(model, x, folder):
    path = folder / "net.onnx"
    torch.onnx.export(model, (x,), path, dynamic_shapes=(OPEN,), dynamo=True)
    return in_onnxruntime(path), ""


def openvino(model, x, folder):
    from openvino import convert_model

    return in_openvino(convert_model(model, example_input=x)), ""


def coreml(capture, model, x, folder):
    import coremltools

    # float16, the default, would make ties of unequal values.
    precision = coremltools.precision.FLOAT32
    inputs = [coremltools.TensorType(shape=x.shape)] if capture is torch.jit.trace else None
    captured = capture(model, x if inputs else (x,))
    program = captured if inputs else captured.run_decompositions({})
    coremltools.convert(program, inputs=inputs, compute_precision=precision, skip_model_load=True)
    return None, "converts; running needs a Mac"


def litert(model, x, folder):
    import litert_torch

    path = folder / "net.tflite"
    litert_torch.convert(model, (x,)).export(str(path))
    return in_litert(path), ""


def add_graph(model, x, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        writer.add_graph(model, x)
    return None, f"{len(EventAccumulator(str(folder)).Reload().Graph().node)} nodes in the file"


def flops(model, x, folder):
    from fvcore.nn import FlopCountAnalysis
    from torch.utils.flop_counter import FlopCounterMode

    counted = FlopCountAnalysis(model, x)
    counted.unsupported_ops_warnings(False)
    with FlopCounterMode(display=False) as mode:
        model(x)
    both = 1e-9 * counted.total() / len(x), 0.5e-9 * mode.get_total_flops() / len(x)
    passed_over = ", ".join(sorted(each.removeprefix("aten::") for each in counted.unsupported_ops()))
    return None, "{:.4g} GMACs an image, {:.4g} by torch's counter; not counted: ".format(*both) + passed_over


def timmx(form, model, x, folder):
    """Through `python -m poolskip_zoo -m`, for timmx imports timm alone; with the model's own weights."""
    suffix, load, _ = FORMS[form]
    weights, path = folder / "net.pth", folder / f"net{suffix}"
    torch.save(model.state_dict(), weights)
    command = [sys.executable, "-m", "poolskip_zoo", "-m", "timmx", "export", form]
    command += [model.pretrained_cfg["architecture"], "--checkpoint", weights, "--output", path]
    # ncnn has no batch axis.
    command += ["--batch-size", "1" if form == "ncnn" else str(len(x)), "--input-size", *map(str, x.shape[1:])]
    quiet = {**os.environ, "NO_COLOR": "1", "COLUMNS": "1000"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=quiet)
    said = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise RuntimeError("; ".join(re.findall(r"layer .* not exists|error: .*", said)) or said[-150:])
    return load and load(path), "its own check: " + "".join(re.findall(r"verify: (.*)", said)[-1:])


# Of timmx: the suffix of the file, how it is run, packages.
FORMS = {
    "onnx": (".onnx", in_onnxruntime, ("onnxscript", "onnxslim", "onnxruntime")),
    "torchscript": (".pt", torch.jit.load, ()),
    "torch-export": (".pt2", lambda path: torch.export.load(path).module(), ()),
    "openvino": (".xml", in_openvino, ("openvino",)),
    "coreml": (".mlpackage", None, ("coremltools",)),
    "litert": (".tflite", in_litert, ("litert-torch",)),
    "executorch": (".pte", in_executorch, ("executorch",)),
    "ncnn": ("", None, ("ncnn", "pnnx")),
}
TOOLS = {
    "eager": (("torch",), eager),
    "torch.jit.trace": (("torch",), trace),
    "torch.jit.script": (("torch",), script),
    "torch.export": (("torch",), export),
    "torch.onnx.export, dynamo": (("torch", "onnxscript", "onnxruntime"), onnx),
    "openvino.convert_model": (("openvino",), openvino),
    "litert_torch.convert": (("litert-torch",), litert),
    "TensorBoard add_graph": (("tensorboard",), add_graph),
    "fvcore FlopCountAnalysis": (("fvcore",), flops),
    "coremltools.convert of a trace": (("coremltools",), functools.partial(coreml, torch.jit.trace)),
    "coremltools.convert of torch.export": (("coremltools",), functools.partial(coreml, torch.export.export)),
    **{
        f"timmx export {form}": (("timmx", *needs), functools.partial(timmx, form))
        for form, (_, _, needs) in FORMS.items()
    },
}


def lively(name):
    """A model of random weights in which every branch counts, as in a trained one."""
    model = timm.create_model(name)
    for each in model.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.momentum = 1.0
            # timm starts residual branches, which hold Pool Skip, at zero. At 0.5 and above a net of random weights
            # is chaotic: the row `eager` tells how much of a difference is the model's own.
            if not each.weight.any():
                torch.nn.init.constant_(each.weight, 0.2)
    with torch.no_grad():
        # Takes the statistics that keep the values in range.
        model.train()(torch.randn(4, *model.pretrained_cfg["input_size"]))
    return model.eval()


def error(run, model, x):
    """Largest difference from eager mode, over the largest output."""
    with torch.no_grad():
        expected, output = model(x), torch.as_tensor(run(x))
    if output.shape != expected.shape:
        raise RuntimeError(f"output of shape {tuple(output.shape)}, expected {tuple(expected.shape)}")
    return float((output - expected).abs().max() / expected.abs().max())


def row(packages, tool, model, x, other):
    """Version, verdict, relative difference, sizes and note of one tool."""
    try:
        version = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in packages)
    except importlib.metadata.PackageNotFoundError:
        return "", "not installed", "", "", f"`pip install {' '.join(packages)}`"
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            run, note = tool(model, x, Path(folder))
            apart = None if run is None else error(run, model, x)
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [""]
            return version, "**no**", "", "", f"{type(problem).__name__}: {lines[0][:150]}".replace("|", "/")
        if run is None:
            return version, "yes", "", "", note
        try:
            sizes = "open" if error(run, model, other) <= TOLERANCE else "**wrong at others**"
        except Exception:
            sizes = "fixed"
    return version, "yes" if apart <= TOLERANCE else "**wrong**", f"{apart:.0e}", sizes, note


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="test_resnet_poolskip", help="a timm name")
    parser.add_argument("--tools", nargs="*", help="words that start the names of the tools to run; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lively(args.name)
    size = model.pretrained_cfg["input_size"][-1]
    x, other = torch.randn(2, 3, size, size), torch.randn(3, 3, size + 37, size - 27)
    print("| tool | version | works | relative difference | sizes | note |\n|---|---|---|---|---|---|", flush=True)
    for name, (packages, tool) in TOOLS.items():
        if args.tools is None or name.startswith(tuple(args.tools)):
            # Tools print as they like: the table alone goes to standard output.
            with contextlib.redirect_stdout(sys.stderr):
                cells = row(packages, tool, model, x, other)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
