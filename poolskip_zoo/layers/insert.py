"""Put Pool Skip after the convolutions of any model, and take it away again."""

import logging
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .functional import to_window
from .placement import Groups, PlacementLike, PoolSize, refuses, resolve_placement
from .pool_skip import PoolSkip, PoolSkip1d, PoolSkip2d, PoolSkip3d
from .tokens import TokenPoolSkip2d, attach_grid, check_grid, detach_grid

__all__ = ["Place", "add_pool_skip", "pool_skip_modules", "remove_pool_skip", "reset_pool_skip"]

_logger = logging.getLogger(__name__)
_LAYERS: dict[type[nn.Module], type[PoolSkip]] = {nn.Conv1d: PoolSkip1d, nn.Conv2d: PoolSkip2d, nn.Conv3d: PoolSkip3d}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Place:
    """A module that Pool Skip follows.

    Attributes:
        name: dotted name of the module.
        channels: channels of its output.
        pool_size: window size along each spatial axis.
        groups: groups of the 3×3 convolution.
        parameters: number of parameters that Pool Skip adds there.
    """

    name: str
    channels: int
    pool_size: tuple[int, ...]
    groups: int
    parameters: int


# tuple[Tensor] as TorchScript wants it: a convolution has one input.
def _apply_pool_skip(self, input: tuple[Tensor], output: Tensor) -> Tensor:
    if not hasattr(self, "pool_skip"):
        raise RuntimeError(
            "this module replaced one with Pool Skip and kept only its hook, as after quantisation by "
            "torch.ao: quantise the exported file, or remove_pool_skip(model) first"
        )
    if self.bias is not None and not self.pool_skip.after_bias:
        raise RuntimeError(
            "this convolution had no bias when Pool Skip was added and has one now: folding BatchNorm into it moves "
            "the norm before Pool Skip and changes the model. Fold nothing, or remove_pool_skip(model) first"
        )
    if isinstance(output, tuple):
        raise TypeError(f"{type(self).__name__} returns a tuple: Pool Skip can only follow what returns one tensor")
    return self.pool_skip(output)


def add_pool_skip(
    model: nn.Module,
    placement: PlacementLike = None,
    pool_size: PoolSize | None = None,
    groups: Groups | None = None,
    zero_init: bool = False,
    dry_run: bool = False,
) -> list[Place]:
    """Insert `y = x + conv(max_unpool(max_pool(x)))` after the modules that a placement names, in place.

    Each chosen module gets a child `pool_skip` and one forward hook that runs it. The model's own parameter names
    stay as they are; only `*.pool_skip.conv.*` is new. An optimiser made before does not know the new parameters.

    Args:
        model: any module built of Conv1d/2d/3d, or of Linear on the patch grid of a timm ViT, or their subclasses.
        placement: where; None takes the model family's default, or "auto" for a model of no known family. See
            `docs/insertion.md`.
        pool_size: window size e of at least 2 for every place, or one per axis, such as (1, 2, 2); None takes each
            rule's own.
        groups: groups of the 3×3 convolutions: a number, "auto" (the convolution's own), or "depthwise"; None takes
            each rule's own.
        zero_init: start at zero, so that the model computes what it did before.
        dry_run: change nothing, only return the places.

    Returns:
        The places in the model's order.

    Raises:
        ValueError: if the placement is unknown or matches nothing, a matched module cannot have Pool Skip, or
            `pool_size` or `groups` do not fit. The model is unchanged then.

    Example:
        >>> import timm
        >>> places = add_pool_skip(timm.create_model("resnet18"), zero_init=True)
        >>> len(places), places[0].name, sum(place.parameters for place in places)
        (16, 'layer1.0.conv1', 12537600)
    """
    chosen = resolve_placement(model, placement)
    places = []
    for name, rule in chosen.items():
        reason = refuses(model, name)
        if reason:
            raise ValueError(f"module {name!r} {reason}")
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            check_grid(model)
        e = rule.pool_size if pool_size is None else pool_size
        places.append(_plan(name, module, e, rule.groups if groups is None else groups))
    if dry_run:
        return places
    layers = [_make(model, place, zero_init) for place in places]  # first, so that a failure leaves the model as it was
    for place, layer in zip(places, layers, strict=True):
        module = model.get_submodule(place.name)
        module.pool_skip = layer
        module.register_forward_hook(_apply_pool_skip)
    total = sum(place.parameters for place in places)
    _logger.info("Pool Skip added at %d places of %s: %s parameters", len(places), type(model).__name__, f"{total:,}")
    return places


def _plan(name: str, module: Any, pool_size: PoolSize, groups: Groups) -> Place:
    linear = isinstance(module, nn.Linear)
    channels = module.out_features if linear else module.out_channels
    dims = 2 if linear else _layer_class(module).dims
    if groups == "auto":
        # A depthwise convolution may widen: its groups then divide the output's channels, one filter each.
        depthwise = not linear and module.groups == module.in_channels and module.groups > 1
        groups = channels if depthwise else 1 if linear else module.groups
    elif groups == "depthwise":
        groups = channels
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or channels % groups:
        raise ValueError(f"groups={groups!r} at {name!r}: expected 'auto', 'depthwise' or a divisor of {channels}")
    parameters = channels * (channels // groups) * 3**dims + channels
    return Place(name, channels, tuple(to_window(pool_size, dims, minimum=2)), groups, parameters)


def _layer_class(module: nn.Module) -> Any:
    return next(layer for conv, layer in _LAYERS.items() if isinstance(module, conv))


def _make(model: nn.Module, place: Place, zero_init: bool) -> PoolSkip:
    module: Any = model.get_submodule(place.name)
    options: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    options |= {"pool_size": place.pool_size, "groups": place.groups, "zero_init": zero_init}
    layer: PoolSkip
    if isinstance(module, nn.Linear):
        layer = TokenPoolSkip2d(place.channels, attach_grid(model), **options)
    else:
        layer = _layer_class(module)(place.channels, **options)
    last = _CHANNELS_LAST.get(layer.conv.weight.dim())
    if last and any(each.dim() == layer.conv.weight.dim() and _is_laid_out(each, last) for each in model.parameters()):
        layer.to(memory_format=last)
    layer.after_bias = module.bias is not None
    return layer.train(module.training)


def _is_laid_out(weight: Tensor, memory_format: torch.memory_format) -> bool:
    # Weights of 1×1 are contiguous in both layouts.
    return weight.is_contiguous(memory_format=memory_format) and not weight.is_contiguous()


def remove_pool_skip(model: ModelT) -> ModelT:
    """Undo `add_pool_skip`, in place: children, hooks and parameters go, the rest is untouched.

    Args:
        model: a model with Pool Skip, or without.

    Returns:
        The same model.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _apply_pool_skip:
                del module._forward_hooks[key]
                module._modules.pop("pool_skip", None)  # what took a module's place may have its hook alone
    detach_grid(model)
    return model


def pool_skip_modules(model: nn.Module) -> dict[str, PoolSkip]:
    """The Pool Skip layers of a model.

    Args:
        model: any module.

    Returns:
        Dotted name to layer, in the model's order.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, PoolSkip)}


def reset_pool_skip(model: nn.Module) -> None:
    """Initialise every Pool Skip layer anew, as after an initialisation that treats all convolutions alike."""
    with torch.no_grad():
        for layer in pool_skip_modules(model).values():
            layer.reset_parameters()
