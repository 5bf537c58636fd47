"""What this package has registered with timm."""

import sys

from timm.models import get_arch_pretrained_cfgs, list_models

from .checkpoint import SUFFIX, find

__all__ = ["base_name", "registered_models", "warm_starts"]


def registered_models(test: bool = False) -> list[str]:
    """Names of all registered architectures, Pool Skip variants and small-image bases.

    Args:
        test: whether to include the tiny `test_*` architectures.

    Returns:
        Sorted names without tags.
    """
    package = __name__.rpartition(".")[0]
    names: set[str] = set()
    for module in list(sys.modules):
        if module.startswith(f"{package}.") and module.endswith(SUFFIX):
            names.update(list_models(module=module.rpartition(".")[2]))
    return sorted(name for name in names if test or not name.startswith("test_"))


def base_name(name: str) -> str:
    """The model that a variant adds Pool Skip to.

    Args:
        name: registered name.

    Returns:
        The name without its suffix; a base's own name.
    """
    return name.removesuffix(SUFFIX)


def warm_starts() -> list[str]:
    """Tags of timm's that a variant can start from, with Pool Skip at zero.

    Returns:
        `<arch>.<tag>` of each, by architecture, in timm's order.
    """
    return [
        name
        for arch in registered_models()
        for name, cfg in get_arch_pretrained_cfgs(arch).items()
        if cfg.has_weights and find(name) is None
    ]
