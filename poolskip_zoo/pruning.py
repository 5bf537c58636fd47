"""Removal of filters that do nothing, by torch-pruning. docs/diagnostics.md defines them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .diagnostics import LayerDiagnosis, diagnose
from .diagnostics.measures import small_weights
from .layers import pool_skip_modules
from .layers.tokens import TokenPoolSkip2d
from .models.cifar import PadShortcut

__all__ = ["Pruned", "prune_inert"]

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Pruned:
    """What was taken out.

    Attributes:
        removed: name of a convolution to the number of its filters that went; without those that kept all.
        left: name of a convolution to the number of inert or dead filters that stayed, since others write to the
            channel too, Pool Skip reads it, or it is the model's output or the last one.
    """

    removed: dict[str, int]
    left: dict[str, int]


def prune_inert(
    model: ModelT, example: Tensor, batches: Sequence[Tensor | tuple[Tensor, Tensor]] | None = None
) -> tuple[ModelT, Pruned]:
    """Remove the channels that nothing writes to: all convolutions that could have inert filters there, or dead ones.

    A residual channel goes only if the filters of all its branches are inert or dead, and one with Pool Skip only if
    that adds nothing to it and carries nothing of it to other channels. Behind a dead filter nothing changes on the
    images given; one whose channel something else than its ReLU reads stays. An inert one may have added a constant,
    its norm's shift, which is lost: measure the accuracy anew.

    Args:
        model: any model of convolutions; it is not changed.
        example: input for tracing, on the model's device.
        batches: images, or pairs of images and labels, to find dead filters with; None takes inert ones alone.

    Returns:
        A model without them, in evaluation mode, and what was removed. Attributes that only describe the model, such as
        timm's `feature_info` and `num_features`, still speak of the whole one.

    Raises:
        ValueError: if the model has Pool Skip on tokens, or is none that `diagnose` measures.
        ImportError: if torch-pruning is missing; it names the extra to install.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> net[1].weight.data[2] = 0
        >>> pruned, what = prune_inert(net, torch.zeros(1, 3, 8, 8))
        >>> what.removed, pruned[3].in_channels
        ({'0': 1}, 3)
    """
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ImportError("pruning needs torch-pruning: pip install 'poolskip-zoo[prune]'") from error
    if any(isinstance(layer, TokenPoolSkip2d) for layer in pool_skip_modules(model).values()):
        raise ValueError(f"{type(model).__name__} has Pool Skip on tokens: only networks of convolutions can be pruned")
    model = copy.deepcopy(model).eval()
    before = _filters(model)
    shortcuts = _unfold_shortcuts(model, example)
    while True:
        found = diagnose(model, batches).layers
        idle = _idle(model, found)
        with _spread(model), torch.enable_grad():
            graph = DependencyGraph()
            # The input asks for a gradient, so that frozen models are traced as well; torch-pruning stumbles over that
            # at a batch of 1.
            traced = torch.cat([example.detach()] * 2).requires_grad_(True)
            graph.build_dependency(model, traced, verbose=False)
            if not _prune_round(graph, idle):
                break
    _fold_shortcuts(model, shortcuts)
    model.eval()  # the modules that were put in are new
    after = _filters(model)
    removed = {name: before[name] - after[name] for name in before if before[name] > after[name]}
    counts = {layer.name: len({*layer.inert, *(layer.dead or ())}) for layer in found}
    return model, Pruned(removed, {name: count for name, count in counts.items() if count and name in before})


def _filters(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, _ConvNd)}


def _idle(model: nn.Module, found: list[LayerDiagnosis]) -> dict[nn.Module, set[int]]:
    """Inert and dead filters of every convolution that nothing reads before the norm and the ReLU do their part."""
    idle: dict[nn.Module, set[int]] = {}
    for layer in found:
        module: Any = model.get_submodule(layer.name)
        # What something else than the ReLU reads need not be zero there.
        dead = () if layer.read_elsewhere else layer.dead or ()
        idle[module] = {*layer.inert, *dead}
        skip = getattr(module, "pool_skip", None)
        if skip is not None and skip.conv.groups == 1:
            # Pool Skip reads the channel there and carries it to others.
            unread = small_weights(skip.conv.weight.detach().float().transpose(0, 1))
            idle[module] &= {*layer.small_weights, *unread}
    return idle


def _prune_round(graph: Any, idle: dict[nn.Module, set[int]]) -> bool:
    """Remove what can go, and tell whether anything did."""
    pruned = False
    for group in list(graph.get_all_groups(root_module_types=[_ConvNd])):
        root, prune_out = group[0].dep.target.module, group[0].dep.handler
        chosen = sorted(_removable(graph, group, idle))
        while chosen:
            smaller = graph.get_pruning_group(root, prune_out, chosen)
            if graph.check_pruning_group(smaller):  # at least one channel stays
                smaller.prune()
                pruned = True
                break
            chosen.pop()
    return pruned


def _removable(graph: Any, group: Any, idle: dict[nn.Module, set[int]]) -> set[int]:
    """Channels, by their index in the group's root, at which all that could write to them is idle."""
    from torch_pruning.ops import OPTYPE

    channels = set(group[0].root_idxs)
    for item in group:
        target = item.dep.target
        module = target.module
        writes = graph.is_out_channel_pruning_fn(item.dep.handler)
        if target.type == OPTYPE.OUTPUT or (writes and not target.outputs):
            return set()  # the model's own output
        if isinstance(module, _ConvNd):
            if 1 < module.groups < module.out_channels:
                return set()  # each group would have to lose as many
            if writes:
                pairs = zip(item.idxs, item.root_idxs, strict=True)
                channels -= {root for index, root in pairs if index not in idle.get(module, ())}
        elif writes and isinstance(module, nn.Linear | nn.Parameter):
            return set()
    return channels


@contextmanager
def _spread(model: nn.Module) -> Iterator[None]:
    """Run Pool Skip as a module behind its convolution, not by the hook: the trace then sees the two apart."""
    places = []
    for name, module in list(model.named_modules()):
        if isinstance(getattr(module, "pool_skip", None), nn.Module):
            parent, _, child = name.rpartition(".")
            places.append((model.get_submodule(parent), child, module, module._forward_hooks))
    for parent, child, module, hooks in places:
        module._forward_hooks = type(hooks)()
        setattr(parent, child, nn.Sequential(module, module.pool_skip))
    try:
        yield
    finally:
        for parent, child, module, hooks in places:
            module._forward_hooks = hooks
            setattr(parent, child, module)


def _unfold_shortcuts(model: nn.Module, example: Tensor) -> list[str]:
    """Turn zero-padded shortcuts into fixed 1×1 convolutions, whose channels can go one by one.

    torch-pruning takes padding for an operation that keeps the number of channels.
    """
    shortcuts = {name: module for name, module in model.named_modules() if isinstance(module, PadShortcut)}
    channels: dict[nn.Module, int] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: channels.update({module: inputs[0].shape[1]}))
        for module in shortcuts.values()
    ]
    with torch.no_grad():
        model(example)
        for handle in handles:
            handle.remove()
        for name, pad in shortcuts.items():
            kept = channels[pad]
            conv = nn.Conv2d(kept, kept + pad.extra_chs, 1, pad.stride, bias=False).to(example)
            conv.weight.copy_(_eye(conv))
            model.set_submodule(name, conv.requires_grad_(False))
    return list(shortcuts)


def _fold_shortcuts(model: nn.Module, names: list[str]) -> None:
    """Turn fixed 1×1 convolutions back into zero-padded shortcuts where they still are such."""
    for name in names:
        conv: Any = model.get_submodule(name).requires_grad_(False)  # torch-pruning makes new parameters
        if conv.out_channels >= conv.in_channels and torch.equal(conv.weight, _eye(conv)):
            model.set_submodule(name, PadShortcut(conv.in_channels, conv.out_channels, conv.stride[0]))


def _eye(conv: nn.Conv2d) -> Tensor:
    return torch.eye(conv.out_channels, conv.in_channels).to(conv.weight)[:, :, None, None]
