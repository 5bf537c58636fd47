"""Measures of every convolution of a model. docs/diagnostics.md defines them."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..layers import pool_skip_modules
from ..layers.placement import norm_after
from .activity import Activity, Batches, Loss, observe
from .measures import filters_of, l2_l1, orthogonality, small_scale, small_weights, sparsity, variance_entropy

__all__ = ["KINDS", "Diagnosis", "LayerDiagnosis", "diagnose"]

# Convolutions of the model itself, and those inside Pool Skip layers.
KINDS = ("base", "pool_skip")
# Parts of the names of norms and convolutions that give each filter by itself another size when they run.
_RESCALING = ("BatchNorm", "InstanceNorm", "StdConv")


@dataclass(frozen=True)
class LayerDiagnosis:
    """Measures of one convolution; None where a measure does not apply.

    Attributes:
        name: dotted name of the module.
        kind: one of `KINDS`.
        depth: place in the model's order, from 1; a Pool Skip has that of the module that it follows.
        type: class name.
        kernel_size: size along each spatial axis.
        groups: its groups.
        filters: number of filters, one for each output channel.
        l2_l1: norm of all weights over the sum of their sizes.
        norm: name of the norm that directly follows and has one scale a channel.
        small_weights: indices of the filters of small norm that no norm makes up for.
        small_scale: indices of the filters that the norm scales to almost nothing.
        sparsity: share of 3×3 kernels of small weights.
        variance_entropy: of 3×3 kernels, 0 to log₁₀ 9.
        orthogonality: of filters of 3×3 kernels, 0 to 1.
        zero_share: share of zeros behind the ReLU, by channel.
        read_elsewhere: whether something else than that ReLU read the channels on their way to it.
        gradient: norm of the gradient, by filter.
    """

    name: str
    kind: str
    depth: int
    type: str
    kernel_size: tuple[int, ...]
    groups: int
    filters: int
    l2_l1: float | None
    norm: str | None
    small_weights: list[int]
    small_scale: list[int]
    sparsity: float | None
    variance_entropy: float | None
    orthogonality: float | None
    zero_share: list[float] | None
    read_elsewhere: bool | None
    gradient: list[float] | None

    @property
    def inert(self) -> list[int]:
        """Indices of the filters that their weights or the norm's scale make inert."""
        return sorted({*self.small_weights, *self.small_scale})

    @property
    def dead(self) -> list[int] | None:
        """Indices of the channels that were zero behind the ReLU at every position of every image."""
        if self.zero_share is None:
            return None
        return [channel for channel, share in enumerate(self.zero_share) if share == 1]


@dataclass(frozen=True)
class Diagnosis:
    """Measures of a model.

    Attributes:
        layers: its convolutions, in the model's order.
        left_out: name to reason of those that cannot be measured.
        images: number of images that it was run on, 0 where only weights were measured.
    """

    layers: list[LayerDiagnosis]
    left_out: dict[str, str]
    images: int

    def __repr__(self) -> str:  # the layers have numbers of every channel
        return f"Diagnosis(images={self.images}, summary={self.summary()})"

    def summary(self) -> dict[str, dict[str, int | None]]:
        """Counts by kind.

        Returns:
            For each kind that the model has: convolutions, filters, inert filters, and, of the channels that a ReLU
            follows (`watched`), the dead ones; both None without images.
        """
        found: dict[str, dict[str, int | None]] = {}
        for kind in KINDS:
            layers = [layer for layer in self.layers if layer.kind == kind]
            if layers:
                watched = [layer for layer in layers if layer.dead is not None]
                found[kind] = {
                    "convolutions": len(layers),
                    "filters": sum(layer.filters for layer in layers),
                    "inert": sum(len(layer.inert) for layer in layers),
                    "watched": sum(layer.filters for layer in watched) if self.images else None,
                    "dead": sum(len(layer.dead or ()) for layer in watched) if self.images else None,
                }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            The attributes, `inert` and `dead` of each layer, and the summary.
        """
        layers = [{**dataclasses.asdict(layer), "inert": layer.inert, "dead": layer.dead} for layer in self.layers]
        return {"summary": self.summary(), "images": self.images, "layers": layers, "left_out": self.left_out}


def diagnose(model: nn.Module, batches: Batches | None = None, loss: Loss = F.cross_entropy) -> Diagnosis:
    """Measure every convolution of a model: its weights and, with images, what it does on them.

    Args:
        model: any module that holds convolutions; it is left as it was.
        batches: images, or pairs of images and labels, on the model's device; None measures the weights alone.
        loss: mean loss of what the model returns and labels.

    Returns:
        The measures.

    Raises:
        ValueError: if the model holds no convolutions, weights are missing (meta device) or not finite, there are no
            images, only some batches have labels, or what reaches a ReLU or a gradient is not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> net[1].weight.data[2] = 0
        >>> found = diagnose(net, [torch.randn(2, 3, 8, 8)])
        >>> found.layers[0].norm, found.layers[0].inert, found.layers[0].dead
        ('1', [2], [2])
    """
    left_out, places = {}, []
    for place in _places(model):
        name, module = place[0], place[-1]
        if is_lazy(module.weight):
            left_out[name] = "lazy, without weights: run the model once first"
            continue
        _check(name, module)
        places.append(place)
    if not places and not left_out:
        raise ValueError(f"{type(model).__name__} holds no convolutions (scripted and quantised ones are not seen)")
    activity = Activity()
    if batches is not None:
        activity = observe(model, {name: module for name, *_, module in places}, batches, loss)
    return Diagnosis([_measure(model, activity, *place) for place in places], left_out, activity.images)


def _places(model: nn.Module) -> Iterator[tuple[str, str, int, Any]]:
    """Name, kind, depth and module of each convolution."""
    pool_skips = {f"{name}.conv" for name in pool_skip_modules(model)}
    depths: dict[str, int] = {}
    latest = 0
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            kind = KINDS[name in pool_skips]
            depth = depths.get(_followed(name, kind), latest + 1)
            latest = max(latest, depth)
            depths[name] = depth
            yield name, kind, depth, module


def _followed(name: str, kind: str) -> str:
    """Name of the module that a Pool Skip follows, or of the convolution itself."""
    return name.removesuffix(".conv").removesuffix(".pool_skip") if kind == "pool_skip" else name


def _check(name: str, module: Any) -> None:
    if module.weight.is_meta:
        raise ValueError(f"{name or 'the model'} is on the meta device: it has no weights to measure")
    if not module.weight.isfinite().all():
        raise ValueError(f"{name or 'the model'} has weights that are not finite")


def _measure(model: nn.Module, activity: Activity, name: str, kind: str, depth: int, module: Any) -> LayerDiagnosis:
    filters = filters_of(module.weight, module)
    norm = _norm_after(model, _followed(name, kind), len(filters))
    flat = tuple(module.kernel_size) == (3, 3)
    return LayerDiagnosis(
        name=name,
        kind=kind,
        depth=depth,
        type=type(module).__name__,
        kernel_size=tuple(module.kernel_size),
        groups=module.groups,
        filters=len(filters),
        l2_l1=l2_l1(filters),
        norm=norm,
        small_weights=_small_weights(filters, module, model.get_submodule(norm) if norm else None),
        small_scale=small_scale(model.get_submodule(norm).weight) if norm else [],  # type: ignore[arg-type]
        sparsity=sparsity(filters) if flat else None,
        variance_entropy=variance_entropy(filters) if flat else None,
        orthogonality=orthogonality(filters, module.groups) if flat else None,
        zero_share=activity.zero_share.get(name),
        read_elsewhere=name in activity.read_elsewhere if name in activity.zero_share else None,
        gradient=activity.gradient.get(name),
    )


def _small_weights(filters: torch.Tensor, convolution: nn.Module, norm: Any) -> list[int]:
    """Those of small norm, but for those whose size the norm, or the convolution itself, makes up for."""
    small = small_weights(filters)
    variance = getattr(norm, "running_var", None)
    if variance is not None:
        gain = norm.weight.detach().abs() / (variance + norm.eps).sqrt()
        still = set(small_weights(filters.flatten(1) * gain.float()[:, None]))
        return [f for f in small if f in still]
    names = type(convolution).__name__, type(norm).__name__
    made_up = any(word in name for word in _RESCALING for name in names)
    size = len(filters) // getattr(norm, "num_groups", 1)  # GroupNorm makes up for what is small in a whole group
    still = {start + f for start in range(0, len(filters), size) for f in small_weights(filters[start : start + size])}
    return [f for f in small if f in still and not (made_up and filters[f].any())]


def _norm_after(model: nn.Module, name: str, channels: int) -> str | None:
    """Name of the norm that directly follows a module and has one scale for each channel."""
    path, norm = norm_after(model, name) or (None, None)
    scale = getattr(norm, "weight", None)
    if not isinstance(scale, torch.Tensor) or scale.shape != (channels,):
        return None
    if not scale.isfinite().all():
        raise ValueError(f"{path} has a scale that is not finite")
    return path
