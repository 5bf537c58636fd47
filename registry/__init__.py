"""Registered models: importing this package registers every family module in it with timm, and with smp."""

import importlib
import pkgutil

from . import smp_checkpoints  # noqa: F401  their records
from .smp import register_with_smp

__all__: list[str] = []

for _module in pkgutil.iter_modules(__path__):
    # timm files a model under its module's last name, so families carry the suffix that their models carry.
    if _module.name.endswith("_poolskip"):
        importlib.import_module(f"{__name__}.{_module.name}")

# Last: smp's names derive from timm's.
register_with_smp()
