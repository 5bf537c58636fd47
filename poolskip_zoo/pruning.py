"""Removal of filters that do nothing, by torch-pruning. docs/diagnostics.md defines them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

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
        left: name of a convolution to the number of inert or dead filters that stayed: others write to the channel too,
            Pool Skip reads it, it is the model's output or the last one, or the model without it would compute
            something else (channels that are shuffled or normed together).
    """

    removed: dict[str, int]
    left: dict[str, int]


def prune_inert(
    model: ModelT, example: Tensor, batches: Sequence[Tensor | tuple[Tensor, Tensor]] | None = None
) -> tuple[ModelT, Pruned]:
    """Remove the channels that nothing writes to: all convolutions that could have inert filters there, or dead ones.

    Each removal is checked by running the model, and undone where it changes more than the channels that are silent. A
    residual channel goes only if the filters of all its branches are inert or dead, and one with Pool Skip only if
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
        ValueError: if the model has Pool Skip on tokens, is none that `diagnose` measures, cannot be traced by
            torch-pruning, or returns other things than tensors in tuples, lists or dicts.
        ImportError: if torch-pruning is missing; it names the extra to install.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> net[1].weight.data[2] = 0
        >>> pruned, what = prune_inert(net, torch.zeros(1, 3, 8, 8))
        >>> what.removed, pruned[3].in_channels
        ({'0': 1}, 3)
    """
    try:
        import torch_pruning  # noqa: F401
    except ImportError as error:
        raise ImportError("pruning needs torch-pruning: pip install 'poolskip-zoo[prune]'") from error
    if any(isinstance(layer, TokenPoolSkip2d) for layer in pool_skip_modules(model).values()):
        raise ValueError(f"{type(model).__name__} has Pool Skip on tokens: only networks of convolutions can be pruned")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model = copy.deepcopy(model).eval()
    before = _filters(model)
    shortcuts = _unfold_shortcuts(model, example)
    probes, stuck, changed, found = _probes(example, batches), set[str](), True, list[LayerDiagnosis]()
    while True:
        if changed:
            found = diagnose(model, batches).layers
        tried = len(stuck)
        model, changed = _prune_round(model, found, probes, stuck)
        if not changed and len(stuck) == tried:
            break
    _fold_shortcuts(model, shortcuts)
    model.eval()  # the modules that were put in are new
    for name, parameter in model.named_parameters():  # and parameters that lost channels
        parameter.requires_grad_(trained.get(name, False))
    after = _filters(model)
    removed = {name: before[name] - after[name] for name in before if before[name] > after[name]}
    counts = {layer.name: len({*layer.inert, *(layer.dead or ())}) for layer in found}
    return model, Pruned(removed, {name: count for name, count in counts.items() if count and name in before})


def _filters(model: nn.Module) -> dict[str, int]:
    return {name: module.out_channels for name, module in model.named_modules() if isinstance(module, _ConvNd)}


def _probes(example: Tensor, batches: Sequence[Any] | None) -> list[Tensor]:
    """Random inputs like the example, and the first images that dead filters were found with."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn((2, *example.shape[1:]), generator=generator).to(example)
    return [random, *(batch if isinstance(batch, Tensor) else batch[0] for batch in (batches or ())[:1])]


def _prune_round(
    model: ModelT, found: Sequence[LayerDiagnosis], probes: list[Tensor], stuck: set[str]
) -> tuple[ModelT, bool]:
    """Remove what can go, and tell whether anything did; `stuck` gains a convolution whose channels cannot.

    torch-pruning takes what it does not know for operations that keep channels apart, so each removal is checked: the
    smaller model must compute what the whole one does with those channels at zero, and on the images that dead filters
    were found with, what it does with the inert ones at zero.
    """
    norms = _norms(model, found, probes[0])
    inert, idle = _idle(model, found, norms)
    names = {module: name for name, module in model.named_modules()}
    graph, changed, touched = _graph(model, probes[0]), False, set[nn.Module]()
    for root in [module for module in graph.module2node if idle.get(module) and names[module] not in stuck]:
        try:
            group, writers = _removable(graph, root, idle)
        except Exception:  # whatever torch-pruning raises
            continue
        if not writers or touched & writers.keys():  # the latter wait for the next round
            continue
        silent = [writers, {module: channels & inert[module] for module, channels in writers.items()}]
        cases = list(zip(probes, silent if silent[0] != silent[1] else silent[:1], strict=False))
        expected = [_run(model, probe, channels, norms) for probe, channels in cases]
        whole = copy.deepcopy(model)  # after a run without gradients: weights under a mask have none then
        try:
            group.prune()
            same = all(map(_same, (_run(model, probe) for probe, _ in cases), expected))
        except Exception:  # whatever torch-pruning raises, and a model that counts on its sizes
            same = False
        if not same:
            stuck.add(names[root])
            return whole, changed
        changed = True
        touched |= writers.keys()
    return model, changed


def _norms(model: nn.Module, found: Sequence[LayerDiagnosis], probe: Tensor) -> dict[nn.Module, nn.Module]:
    """The norm of each convolution, where it reads what the convolution, or Pool Skip behind it, writes."""
    pairs = {
        model.get_submodule(layer.name): (model.get_submodule(_written_by(layer)), model.get_submodule(layer.norm))
        for layer in found
        if layer.norm
    }
    written: dict[nn.Module, Any] = {}
    read: dict[nn.Module, Any] = {}
    with ExitStack() as hooks:
        for writer, norm in pairs.values():
            for handle in (
                writer.register_forward_hook(lambda module, _, output: written.update({module: output})),
                norm.register_forward_pre_hook(lambda module, inputs: read.update({module: inputs[0]})),
            ):
                hooks.callback(handle.remove)
        _run(model, probe)
    return {module: norm for module, (writer, norm) in pairs.items() if written.get(writer) is read.get(norm, model)}


def _written_by(layer: LayerDiagnosis) -> str:
    """Name of the module whose output the norm of a layer reads: with Pool Skip the one that this follows."""
    return layer.name.removesuffix(".conv").removesuffix(".pool_skip") if layer.kind == "pool_skip" else layer.name


def _idle(
    model: nn.Module, found: Sequence[LayerDiagnosis], norms: Mapping[nn.Module, nn.Module]
) -> tuple[dict[nn.Module, set[int]], dict[nn.Module, set[int]]]:
    """Inert filters of every convolution, and those, inert or dead, that nothing reads before the norm and the ReLU."""
    inert: dict[nn.Module, set[int]] = {}
    idle: dict[nn.Module, set[int]] = {}
    for layer in found:
        module: Any = model.get_submodule(layer.name)
        inert[module] = {*layer.small_weights, *(layer.small_scale if module in norms else ())}
        # What something else than the ReLU reads need not be zero there.
        idle[module] = inert[module] | {*(() if layer.read_elsewhere else layer.dead or ())}
        skip = getattr(module, "pool_skip", None)
        if skip is not None and skip.conv.groups == 1:
            # Pool Skip reads the channel there and carries it to others.
            unread = small_weights(skip.conv.weight.detach().float().transpose(0, 1))
            idle[module] &= {*layer.small_weights, *unread}
    return inert, idle


def _graph(model: nn.Module, probe: Tensor) -> Any:
    """torch-pruning's graph of what hangs together, each output of the model behind an operation of its own."""
    from torch_pruning import DependencyGraph

    graph = DependencyGraph()
    try:
        with _spread(model), torch.enable_grad():
            # The input asks for a gradient, so that frozen models are traced as well.
            traced = probe.clone().requires_grad_(True)
            graph.build_dependency(
                model, traced, forward_fn=lambda net, x: [each * 1 for each in _outputs(net(x))], verbose=False
            )
    except Exception as error:  # whatever torch-pruning raises
        what = f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
        raise ValueError(f"{type(model).__name__} cannot be pruned: torch-pruning cannot trace it ({what})") from error
    return graph


def _removable(
    graph: Any, root: nn.Module, idle: Mapping[nn.Module, set[int]]
) -> tuple[Any, dict[nn.Module, set[int]]]:
    """Channels at which all that could write to them is idle: what removes them, and the writing convolutions' own.

    What is refused here by its kind is what running the model would refuse, at the cost of a copy and two runs.
    """
    from torch_pruning.ops import OPTYPE

    prune_out = graph.get_pruner_of_module(root).prune_out_channels
    channels = set(idle[root])
    for item in graph.get_pruning_group(root, prune_out, sorted(channels)):
        module = item.dep.target.module
        writes = graph.is_out_channel_pruning_fn(item.dep.handler)
        if item.dep.target.type == OPTYPE.OUTPUT:
            return None, {}  # the model's own output
        mixes = isinstance(module, nn.GroupNorm) and module.num_groups < module.num_channels
        if mixes or isinstance(module, nn.LayerNorm):
            return None, {}
        if isinstance(module, _ConvNd):
            if 1 < module.groups < module.out_channels:
                return None, {}  # each group would have to lose as many
            if writes:
                pairs = zip(item.idxs, item.root_idxs, strict=True)
                channels -= {root for index, root in pairs if index not in idle.get(module, ())}
        elif writes and isinstance(module, nn.Linear | nn.Parameter):
            return None, {}
    chosen = sorted(channels)
    while chosen:
        group = graph.get_pruning_group(root, prune_out, chosen)
        writers: dict[nn.Module, set[int]] = {
            item.dep.target.module: set(item.idxs)
            for item in group
            if isinstance(item.dep.target.module, _ConvNd) and graph.is_out_channel_pruning_fn(item.dep.handler)
        }
        # At least one channel stays; a convolution that two ways lead to (GhostNet) may lose others, too.
        if graph.check_pruning_group(group) and all(idle.get(each, set()) >= own for each, own in writers.items()):
            # Depthwise ones alone write to what is the model's input.
            return (group, writers) if any(getattr(each, "groups", 1) == 1 for each in writers) else (None, {})
        chosen.pop()
    return None, {}


def _run(
    model: nn.Module,
    probe: Tensor,
    silent: Mapping[nn.Module, set[int]] | None = None,
    norms: Mapping[nn.Module, nn.Module] | None = None,
) -> list[Tensor]:
    """What a model computes, with channels of some convolutions and of their norms at zero."""

    def silence(channels: set[int]) -> Any:
        places = torch.tensor(sorted(channels), dtype=torch.long, device=probe.device)
        return lambda x: x.index_fill(1, places, 0)

    with ExitStack() as hooks, torch.no_grad():
        for module, channels in (silent or {}).items():
            zero = silence(channels)
            # Pool Skip's hook is older, and so runs first.
            for each in (module, (norms or {}).get(module)):
                if each is not None:
                    handle = each.register_forward_hook(lambda _, __, output, zero=zero: zero(output))
                    hooks.callback(handle.remove)
            skip = getattr(module, "pool_skip", None)
            if skip is not None:
                handle = skip.register_forward_pre_hook(lambda _, inputs, zero=zero: (zero(inputs[0]),))
                hooks.callback(handle.remove)
        return _outputs(model(probe))


def _outputs(output: Any) -> list[Tensor]:
    """The tensors of an output."""
    leaves = tree_leaves(output)
    unknown = next((each for each in leaves if not isinstance(each, Tensor | int | float | str | None)), None)
    if unknown is not None:
        raise ValueError(f"an output is {type(unknown).__name__}, not tensors in tuples, lists or dicts")
    return [each for each in leaves if isinstance(each, Tensor)]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(_close, some, others))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not b.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(1e-4, 16 * torch.finfo(b.dtype).eps)
    return not a.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max())


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
        conv: Any = model.get_submodule(name)
        if conv.out_channels >= conv.in_channels and torch.equal(conv.weight, _eye(conv)):
            model.set_submodule(name, PadShortcut(conv.in_channels, conv.out_channels, conv.stride[0]))


def _eye(conv: nn.Conv2d) -> Tensor:
    return torch.eye(conv.out_channels, conv.in_channels).to(conv.weight)[:, :, None, None]
