"""Pool Skip models for timm and segmentation-models-pytorch. Importing this package registers them with timm."""

import typing as _typing
from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "registry" / "__init__.py").is_file() and (_root / "pyproject.toml").is_file():
    # In a checkout, where this folder shadows an installed package, the sub-packages lie beside it.
    __path__.append(str(_root))

from timm import create_model  # noqa: E402

from . import registry  # noqa: E402, F401
from .layers import (  # noqa: E402
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    MaxUnpool1d,
    MaxUnpool2d,
    MaxUnpool3d,
    PoolSkip1d,
    PoolSkip2d,
    PoolSkip3d,
    add_pool_skip,
    max_pool_unpool1d,
    max_pool_unpool2d,
    max_pool_unpool3d,
    remove_pool_skip,
)

if _typing.TYPE_CHECKING:
    from . import diagnostics as diagnostics
    from . import export as export
    from . import inference as inference
    from . import pruning as pruning
    from . import training as training
else:

    def __getattr__(name: str) -> object:
        """Import a sub-package when it is first asked for, so that `poolskip_zoo.export.to_onnx` needs no import."""
        if name in ("diagnostics", "export", "inference", "pruning", "training"):
            from importlib import import_module

            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "PoolSkip1d",
    "PoolSkip2d",
    "PoolSkip3d",
    "add_pool_skip",
    "create_model",
    "max_pool_unpool1d",
    "max_pool_unpool2d",
    "max_pool_unpool3d",
    "remove_pool_skip",
]
