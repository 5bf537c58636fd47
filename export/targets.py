"""What each target runtime is given."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..layers import unpool

__all__ = [
    "LOWERINGS",
    "TARGETS",
    "Target",
    "check_drop_in",
    "check_mode",
    "check_output",
    "check_target",
]

# keys: a mask of ordinary operators. native: MaxPool with indices and MaxUnpool (ONNX alone). scatter: an index tensor.
# arith: the keys without comparisons.
LOWERINGS = ("keys", "native", "scatter", "arith")


@dataclass(frozen=True)
class Target:
    """Lowering and checks of one runtime.

    Args:
        lowering: form of windows of at most four cells.
        large: form of larger windows.
        runtime: where an ONNX file is checked, `onnxruntime`, `onnxruntime-cuda` or `openvino`; the nearest to the
            target.
        dynamic: whether files of open sizes are written for it.
        writer: function that writes the target's files, where they are no ONNX files.
    """

    lowering: str = "keys"
    large: str = "keys"
    runtime: str = "onnxruntime"
    dynamic: bool = True
    writer: str | None = None

    def choose(self, window: list[int], lowering: str | None = None) -> str:
        """Lowering of a pooling of this window; one that is given overrides the target's own."""
        return lowering or (self.lowering if math.prod(window) <= 4 else self.large)


TARGETS = {
    "onnxruntime": Target(),
    "onnxruntime-cuda": Target(runtime="onnxruntime-cuda"),
    "openvino": Target(runtime="openvino"),
    # In WebAssembly the keys of 4×4 windows take twice as long as pooling with indices, of 2×2 windows two thirds.
    "web": Target(large="native"),
    "ncnn": Target(lowering="arith", large="arith", dynamic=False),
    "tensorrt": Target(),
    "coreml": Target(writer="to_coreml"),
    "litert": Target(dynamic=False, writer="to_litert"),
    # What XNNPACK lacks of the keys (comparing, remainders) takes longer than all of arith.
    "executorch": Target(lowering="arith", large="arith", writer="to_executorch"),
}


def check_target(target: str, lowering: str | None = None, onnx: bool = False) -> Target:
    """Look up one of `TARGETS`; `onnx`: it is to be given an ONNX file.

    Raises ValueError if it or the lowering is unknown, or it takes no ONNX file or no MaxUnpool where that is wanted.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    if lowering is not None and lowering not in LOWERINGS:
        raise ValueError(f"lowering={lowering!r}: expected one of {', '.join(LOWERINGS)}")
    choice = TARGETS[target]
    if choice.writer and onnx:
        raise ValueError(f"target={target!r} takes no ONNX file; {choice.writer} writes its own")
    if lowering == "native" and (choice.writer or target == "openvino"):
        name = "OpenVINO" if target == "openvino" else target
        raise ValueError(f"lowering='native': {name} has no MaxUnpool; take 'keys', 'scatter' or 'arith'")
    return choice


def check_output(path: str | os.PathLike[str], *suffixes: str) -> Path:
    """The path of a file or, of Core ML, a folder, if it can be written and ends in one of the format's suffixes.

    Raises ValueError, before the work, if not.
    """
    path = Path(path)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"path={str(path)!r}: expected a name in UTF-8, which all writers take") from error
    if path.suffix not in suffixes:
        raise ValueError(f"path={str(path)!r}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir() and path.suffix != ".mlpackage":
        raise ValueError(f"path={str(path)!r} is a folder: expected a file")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "cannot be written" if folder.is_dir() else "is a file"
        raise ValueError(f"path={str(path)!r}: {folder} {why}")
    return path


def check_mode(model: nn.Module) -> None:
    """Raise ValueError if any module is in training mode: to run the model would change its running statistics."""
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'} is in training mode: call model.eval() first")


def check_drop_in(model: nn.Module, target: str, lowering: str | None) -> None:
    """Raise ValueError if this package's own pooling pair, which is captured as keys, is to have another form."""
    for name, module in model.named_modules():
        if isinstance(module, unpool.MaxPoolNd):
            form = check_target(target, lowering).choose(module.window, lowering)
            if form != "keys":
                raise ValueError(
                    f"{name or 'the model'} is poolskip_zoo's {type(module).__name__}, which exports as keys, and "
                    f"{form!r} is wanted: take torch.nn.{type(module).__name__} with return_indices=True"
                )
