"""Pool Skip models for timm and segmentation-models-pytorch. Importing this package registers them with timm."""

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
