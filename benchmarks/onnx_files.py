"""What the benchmarks of exported files share: the floor below all forms, and runtimes of one thread."""

import sys
from contextlib import contextmanager

from poolskip_zoo.export import to_onnx
from poolskip_zoo.export.onnx_forms import Writer


@contextmanager
def floor():
    """Write x in place of the sparse map, and check nothing."""
    module = sys.modules[to_onnx.__module__]
    verify, verify_blocks = module.verify, module.verify_blocks
    kept = Writer.write, module._flips, verify_blocks.check_blocks, verify.check_outputs, verify.judge
    Writer.write, module._flips = (lambda self, *_: self.op.Identity(self.x)), (lambda *_: {})
    verify_blocks.check_blocks, verify.check_outputs, verify.judge = (lambda *_: 0), (lambda *_: {}), (lambda *_: None)
    try:
        yield
    finally:
        Writer.write, module._flips, verify_blocks.check_blocks, verify.check_outputs, verify.judge = kept


def in_onnxruntime(path):
    """Load in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    key = session.get_inputs()[0].name
    return lambda arrays: session.run(None, {key: arrays[0]})


def in_openvino(path):
    """Load in OpenVINO."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda arrays: list(compiled(list(arrays)).values())


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
