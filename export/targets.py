"""What each target runtime is given."""

import math
from dataclasses import dataclass

from torch import nn

from ..layers import unpool

__all__ = ["LOWERINGS", "TARGETS", "Target", "check_drop_in", "check_target"]

# keys: a mask of ordinary operators. native: MaxPool with indices and MaxUnpool (ONNX alone). scatter: an index tensor.
# arith: the keys without comparisons.
LOWERINGS = ("keys", "native", "scatter", "arith")


@dataclass(frozen=True)
class Target:
    """Lowering and checks of one runtime.

    Args:
        lowering: form of windows of at most four cells.
        large: form of larger windows.
        runtime: where a file is checked, `onnxruntime`, `onnxruntime-cuda` or `openvino`; the nearest to the target.
        dynamic: whether the runtime takes dynamic sizes.
    """

    lowering: str = "keys"
    large: str = "keys"
    runtime: str = "onnxruntime"
    dynamic: bool = True

    def choose(self, window: list[int], lowering: str | None = None) -> str:
        """Lowering of one pooling.

        Args:
            window: its window.
            lowering: overrides the target's own.

        Returns:
            One of `LOWERINGS`.
        """
        return lowering or (self.lowering if math.prod(window) <= 4 else self.large)


TARGETS = {
    "onnxruntime": Target(),
    "onnxruntime-cuda": Target(runtime="onnxruntime-cuda"),
    "openvino": Target(runtime="openvino"),
    # In WebAssembly the keys of 4×4 windows take twice as long as pooling with indices, of 2×2 windows two thirds.
    "web": Target(large="native"),
    "ncnn": Target(lowering="arith", large="arith", dynamic=False),
    "tensorrt": Target(),
}


def check_target(target: str, lowering: str | None = None) -> Target:
    """Look a target up.

    Args:
        target: one of `TARGETS`.
        lowering: one of `LOWERINGS` or None.

    Returns:
        The target.

    Raises:
        ValueError: if either is unknown, or OpenVINO is to take MaxUnpool.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    if lowering is not None and lowering not in LOWERINGS:
        raise ValueError(f"lowering={lowering!r}: expected one of {', '.join(LOWERINGS)}")
    if target == "openvino" and lowering == "native":
        raise ValueError("lowering='native': OpenVINO has no MaxUnpool; take 'keys', 'scatter' or 'arith'")
    return TARGETS[target]


def check_drop_in(model: nn.Module, target: str, lowering: str | None) -> None:
    """Refuse this package's own pooling pair where another form than the keys is wanted: it is captured as keys.

    Args:
        model: the module.
        target: one of `TARGETS`.
        lowering: one of `LOWERINGS` or None.

    Raises:
        ValueError: naming the module and torch's, which takes every form.
    """
    for name, module in model.named_modules():
        if isinstance(module, unpool._MaxPoolNd):
            form = check_target(target, lowering).choose(module.window, lowering)
            if form != "keys":
                raise ValueError(
                    f"{name or 'the model'} is poolskip_zoo's {type(module).__name__}, which exports as keys, and "
                    f"{form!r} is wanted: take torch.nn.{type(module).__name__} with return_indices=True"
                )
