"""What this package has registered with timm."""

import sys
from typing import Any

from timm.models import create_model, get_arch_pretrained_cfgs, is_model, list_models
from torch import nn

from ..layers import remove_pool_skip
from .checkpoint import SUFFIX, find

__all__ = ["base_name", "create_base", "is_name", "registered_models", "warm_starts"]


def registered_models(test: bool = False) -> list[str]:
    """Sorted names, without tags, of all registered architectures, Pool Skip variants and small-image bases.

    `test` includes the tiny `test_*` ones.
    """
    package = __name__.rpartition(".")[0]
    names: set[str] = set()
    for module in list(sys.modules):
        if module.startswith(f"{package}.") and module.endswith(SUFFIX):
            names.update(list_models(module=module.rpartition(".")[2]))
    return sorted(name for name in names if test or not name.startswith("test_"))


def is_name(name: str) -> bool:
    """Tell a name from a folder's, which may look like one: `resnet20_cifar_poolskip.c10-s0`.

    True for a registered model, if there is a tag one that it has, and for a recorded checkpoint of segmentation.
    """
    arch, tagged, _ = name.partition(".")
    known = is_model(arch) and (not tagged or name in get_arch_pretrained_cfgs(arch))
    return known or (bool(tagged) and find(name) is not None)


def base_name(name: str) -> str:
    """Name of the model that a variant adds Pool Skip to; a base's own name."""
    return name.removesuffix(SUFFIX)


def create_base(name: str, **kwargs: Any) -> nn.Module:
    """Build the model that a variant adds Pool Skip to, beside which the variant is measured.

    timm's ResNet takes no `stem_stride`: with it the model is the variant's class after `remove_pool_skip`, whose
    parameters and their names are timm's.

    Args:
        name: name of a variant or of its base, with or without tag.
        kwargs: keywords of `timm.create_model` and the variant's class; `pool_skip` has no effect.

    Returns:
        The model.

    Raises:
        RuntimeError: timm's, if there is no such model.
        TypeError: for an unknown keyword.
    """
    arch, dot, tag = name.partition(".")
    base = base_name(arch)
    kwargs.pop("pool_skip", None)
    if "stem_stride" in kwargs and is_model(base + SUFFIX):
        return remove_pool_skip(create_model(base + SUFFIX + dot + tag, **kwargs))
    return create_model(base + dot + tag, **kwargs)


def warm_starts() -> list[str]:
    """`<arch>.<tag>` of timm's tags that a variant can start from, with Pool Skip at zero, by architecture."""
    return [
        name
        for arch in registered_models()
        for name, cfg in get_arch_pretrained_cfgs(arch).items()
        if cfg.has_weights and find(name) is None
    ]
