"""Tracing, scripting, compiling and exporting."""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import set_scriptable
from timm.models import get_notrace_functions, get_notrace_modules
from torch import nn

from .common import alike, assert_same, contract, create, gradients, images

# Index tensors and their consumers, which few runtimes take.
INDEX_OPERATORS = {"MaxUnpool", "ScatterElements", "ScatterND", "GatherElements", "GatherND"}


@contract
def check_fx(name: str) -> bool:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    x = images(name)
    tracer = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}

    def use(model: nn.Module) -> Any:
        last = get_graph_node_names(model.eval(), tracer_kwargs=tracer)[1][-1]
        graph = create_feature_extractor(model, [last], tracer_kwargs=tracer)
        assert_same(graph(x)[last], model(x))
        return graph(x)[last]

    if not alike(name, use):
        return False
    use(create(name))
    return True


_LOAD_SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(("poolskip_zoo", "timm", "torchvision")))  # None: importing them raises
import torch
model, (x, y) = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
torch.testing.assert_close(model(x), y)
"""


@contract
def check_script(name: str) -> None:
    """Scripted, saved, and run by a process that has torch alone."""
    with set_scriptable(True):
        model = create(name).eval()
    x = images(name)
    y = model(x).detach()
    scripted = torch.jit.script(model)
    # An untraced size after the first runs, which specialise the graph.
    for batch in (2, 2, 3):
        inputs = images(name, batch=batch)
        torch.testing.assert_close(scripted(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        file, tensors = f"{folder}/model.pt", f"{folder}/tensors.pt"
        scripted.save(file)
        torch.save((x, y), tensors)
        done = subprocess.run([sys.executable, "-c", _LOAD_SCRIPT, file, tensors], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@contract
def check_trace(name: str) -> None:
    model = create(name).eval()
    traced = torch.jit.trace(model, images(name, batch=1), check_trace=False)
    sizes = [(3, None)] if timm.get_pretrained_cfg(name).fixed_input_size else [(3, None), (1, (75, 102))]
    for batch, size in sizes:
        x = images(name, batch=batch, size=size)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)


@contract
def check_compile(name: str) -> None:
    torch._dynamo.reset()
    model = create(name).train()
    x = images(name)
    expected = gradients(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, x), expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


@contract
def check_export(name: str) -> None:
    """One exported program for other batches, and other sizes where the model takes them."""
    from torch.export import Dim, export

    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    model = create(name).eval()
    # Large enough that no pooled map is 1×1: export freezes a size of 1.
    example = images(name, batch=2, size=None if fixed else (161, 193))
    dynamic = {0: Dim.AUTO} if fixed else {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    exported = export(model, (example,), dynamic_shapes=(dynamic,))
    # AOTInductor pools partial windows or not, as the example has them.
    pools = [node for node in exported.graph.nodes if "max_pool" in str(node.target)]
    assert pools
    assert fixed or not any(node.args[5:] for node in pools)
    program = exported.module()
    for size in [None] if fixed else [(161, 193), (131, 98)]:
        x = images(name, batch=3, size=size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


@contract
def check_onnx(name: str) -> None:
    """PyTorch's own exporter gives a file without index operators that ONNX Runtime runs to the same result."""
    import onnx
    import onnxruntime

    model = create(name).eval()
    # At the usual size: timm's VGG blows smaller maps up, with index operators of its own.
    x = images(name, batch=1, size=None if timm.get_pretrained_cfg(name).fixed_input_size else (224, 224))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        torch.onnx.export(model, (x,), file, dynamo=True, external_data=False, verbose=False)
        graph = onnx.load(file).graph
        session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in graph.node}
    assert "MaxPool" in operators
    assert not operators & INDEX_OPERATORS
    consumed = {name for node in graph.node for name in node.input}
    assert not [n for node in graph.node if node.op_type == "MaxPool" for n in node.output[1:] if n in consumed]
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Between near-equal values the maximum may flip in float32, eager mode's with AVX2 for one; float64 tells.
    eager = [model(x), model.double()(x.double())]
    assert any(np.allclose(got, each.detach().numpy(), rtol=1e-3, atol=1e-4) for each in eager)
