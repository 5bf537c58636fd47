"""What a model's convolutions do on images: zeros behind the ReLU, and gradients of the loss."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..contexts import evaluating
from .measures import filters_of

__all__ = ["Activity", "Batches", "Loss", "observe"]

Batches = Iterable[Tensor | tuple[Tensor, Tensor]]
Loss = Callable[[Any, Tensor], Tensor]

# Functions, without underscores, that leave a channel what it was: the way from a convolution to its ReLU.
_PASSED = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm", "local_response_norm"}
_PASSED |= {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_PASSED |= {"contiguous", "float", "to"}
_PASSED |= {f"{prefix}{name}" for prefix in ("", "i", "r") for name in ("add", "mul")}


@dataclass(frozen=True)
class Activity:
    """What was seen.

    Attributes:
        images: number of images.
        zero_share: by name of convolution, the share of zeros behind its ReLU for each channel; without convolutions
            that no ReLU follows.
        read_elsewhere: names of convolutions whose channels something else than their ReLU read on the way.
        gradient: by name of convolution, the norm of the mean loss's gradient for each filter; empty without labels.
    """

    images: int = 0
    zero_share: Mapping[str, list[float]] = field(default_factory=dict)
    read_elsewhere: Set[str] = frozenset()
    gradient: Mapping[str, list[float]] = field(default_factory=dict)


def observe(model: nn.Module, convolutions: Mapping[str, Any], batches: Batches, loss: Loss) -> Activity:
    """Run a model in evaluation mode over images; it is left as it was.

    Args:
        model: any module that takes a batch of images.
        convolutions: its convolutions by name.
        batches: images, or images and labels, on the model's device.
        loss: mean loss of what the model returns and labels.

    Returns:
        What was seen.

    Raises:
        ValueError: if there are no images, only some batches have labels, or the gradient is not finite.
    """
    watch = _ReluWatch()
    sums: dict[str, Tensor] = {}
    images = labelled = 0
    with evaluating(model), watch.hooks(convolutions):
        for batch in batches:
            x, labels = (batch, None) if isinstance(batch, Tensor) else batch
            images += len(x)
            with torch.no_grad(), watch:
                model(x)
            if labels is not None:
                labelled += len(x)
                _add_gradients(sums, model, convolutions, len(x), x, labels, loss)
    if not images:
        raise ValueError("there are no images to diagnose with")
    if labelled not in (0, images):
        raise ValueError(f"{labelled} of {images} images have labels: give all of them labels, or none")
    return Activity(images, watch.shares(), watch.read_elsewhere, _by_filter(sums, convolutions, images))


class _ReluWatch(TorchFunctionMode):
    """Counts zeros behind the first ReLU that the output of each convolution reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: Any = WeakTensorKeyDictionary()  # tensor to the convolutions whose output is in it
        self.waiting: set[str] = set()
        self.zeros: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.read_elsewhere: set[str] = set()

    @contextmanager
    def hooks(self, convolutions: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch these convolutions; a Pool Skip, whose hook is older, has run when the output is seen."""
        handles = [module.register_forward_hook(self._note(name)) for name, module in convolutions.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shares(self) -> dict[str, list[float]]:
        """Share of zeros by convolution and channel."""
        return {name: (zeros.cpu().double() / self.counts[name]).tolist() for name, zeros in self.zeros.items()}

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.sources[output] = self.sources.get(output, frozenset()) | {name}
                self.waiting.add(name)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(each, Tensor) for each in tree_leaves(result)):
            return result  # a size or the like
        name = getattr(func, "__name__", "").strip("_")
        rectifies = name in ("relu", "relu6") or (name == "hardtanh" and _floor(args, kwargs) == 0)
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each in self.sources]
        names = _union(self.sources[each] for each in read)
        passed: frozenset[str] = frozenset()
        if isinstance(result, Tensor):
            if rectifies or name in _PASSED:
                passed = _union(self.sources[each] for each in read if each.shape == result.shape)
            # A changed tensor is another one, also where it was changed in place.
            self.sources.pop(result, None)
        self.read_elsewhere |= names - passed
        if rectifies:
            self.read_elsewhere |= passed - self.waiting  # by a second ReLU
            self._count(passed & self.waiting, result)
        elif passed:
            self.sources[result] = passed
        return result

    def _count(self, names: frozenset[str], result: Tensor) -> None:
        if names and not result.isfinite().all():
            raise ValueError(f"what reaches the ReLU behind {min(names)} is not finite")
        for name in names:
            zeros = (result == 0).transpose(0, 1).flatten(1)
            self.zeros[name] = self.zeros.get(name, 0) + zeros.sum(1)
            self.counts[name] = self.counts.get(name, 0) + zeros.shape[1]
        self.waiting -= names


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def _floor(args: Any, kwargs: Any) -> Any:
    """`min_val` of hardtanh, which torch's ReLU6 is made of."""
    return args[1] if len(args) > 1 else (kwargs or {}).get("min_val", -1)


def _add_gradients(
    sums: dict[str, Tensor], model: nn.Module, convolutions: Mapping[str, Any], count: int, *batch: Any
) -> None:
    """Add a batch's gradient times its number of images; frozen weights are measured too."""
    x, labels, loss = batch
    # Weights that a parametrisation computes anew at each call have no gradient of their own.
    weights = {name: each.weight for name, each in convolutions.items() if isinstance(each.weight, nn.Parameter)}
    if not weights:
        return
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(model(x), labels), list(weights.values()), allow_unused=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            sums[name] = sums.get(name, 0) + gradient.float() * count


def _by_filter(sums: Mapping[str, Tensor], convolutions: Mapping[str, Any], images: int) -> dict[str, list[float]]:
    norms = {}
    for name, total in sums.items():
        norms[name] = filters_of(total / images, convolutions[name]).flatten(1).norm(dim=1)
        if not norms[name].isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite")
    return {name: norm.tolist() for name, norm in norms.items()}
