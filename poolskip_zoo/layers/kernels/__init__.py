"""Triton kernels for CUDA: one pass over memory each, equal to the bit to torch's pooling and unpooling.

They were checked by Triton's interpreter and compiled, but not run on a GPU yet: the environment variable
`POOLSKIP_TRITON=1` turns them on.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["TRITON_VARIABLE", "applies", "load"]

TRITON_VARIABLE = "POOLSKIP_TRITON"


def applies(x: Tensor, window: list[int]) -> bool:
    """Whether the kernels take this tensor.

    Args:
        x: any tensor.
        window: window size along each spatial axis.

    Returns:
        True for a 2-D map of float32, float16 or bfloat16 on a CUDA device, contiguous or channels_last, and windows of
        at most 64 cells (the kernels take them one by one, without a loop).
    """
    return (
        x.device.type == "cuda"
        and type(x) in (Tensor, torch.nn.Parameter)  # subclasses may hold no memory, or several
        and len(window) == 2
        and window[0] * window[1] <= 64
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        and x.numel() > 0
        and os.environ.get(TRITON_VARIABLE, "0") == "1"
        and _installed()
    )


def load() -> ModuleType:
    """The module of the kernels, which needs Triton to be imported.

    Returns:
        `poolskip_zoo.layers.kernels.window_maxima`.
    """
    return importlib.import_module(f"{__name__}.window_maxima")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
