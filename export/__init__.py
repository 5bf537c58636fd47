"""Export of models with max-unpooling: one graph pass, several runtimes, every file checked before it is kept."""

from .lower import blocks_of, lower_unpooling
from .lower_pair import Block
from .predictor import Predictor
from .rewrite import rewrite_onnx
from .targets import LOWERINGS, TARGETS
from .to_coreml import to_coreml
from .to_executorch import to_executorch
from .to_exported_program import to_exported_program
from .to_litert import to_litert
from .to_ncnn import to_ncnn
from .to_onnx import to_onnx
from .to_openvino import to_openvino
from .to_torchscript import to_torchscript

__all__ = [
    "LOWERINGS",
    "TARGETS",
    "Block",
    "Predictor",
    "blocks_of",
    "lower_unpooling",
    "rewrite_onnx",
    "to_coreml",
    "to_executorch",
    "to_exported_program",
    "to_litert",
    "to_ncnn",
    "to_onnx",
    "to_openvino",
    "to_torchscript",
]
