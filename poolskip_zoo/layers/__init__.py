"""The operator, the layer, the drop-in pooling pair, and their insertion into models."""

from .functional import max_pool_unpool1d, max_pool_unpool2d, max_pool_unpool3d
from .insert import Place, add_pool_skip, pool_skip_modules, remove_pool_skip
from .placement import Rule, register_placements
from .pool_skip import PoolSkip1d, PoolSkip2d, PoolSkip3d
from .unpool import MaxPool1d, MaxPool2d, MaxPool3d, MaxUnpool1d, MaxUnpool2d, MaxUnpool3d

__all__ = [
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MaxUnpool1d",
    "MaxUnpool2d",
    "MaxUnpool3d",
    "Place",
    "PoolSkip1d",
    "PoolSkip2d",
    "PoolSkip3d",
    "Rule",
    "add_pool_skip",
    "max_pool_unpool1d",
    "max_pool_unpool2d",
    "max_pool_unpool3d",
    "pool_skip_modules",
    "register_placements",
    "remove_pool_skip",
]
