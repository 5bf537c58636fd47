"""Pruning checks what it removes: nets that torch-pruning misreads lose nothing that counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from poolskip_zoo.diagnostics import diagnose
from poolskip_zoo.pruning import prune_inert

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def zero(conv: Any, *filters: int, bias: float = 0.0) -> Any:
    """A convolution some of whose filters are zero; with a bias below zero they are dead instead."""
    if not bias:
        conv.weight[list(filters)] = 0
    if conv.bias is not None:
        conv.bias[list(filters)] = bias
    return conv


class Net(nn.Module):
    """A convolution of which channels 1 and 4 are dead, something, and a convolution that reads `width` channels."""

    def __init__(self, between: Callable[[Tensor], Any], width: int = 8) -> None:
        super().__init__()
        self.conv, self.last = zero(nn.Conv2d(3, 8, 3), 1, 4, bias=-100.0), nn.Conv2d(width, 5, 3)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.last(self.between(self.conv(x).relu()))


def test_channels_that_nothing_mixes_go() -> None:
    for between in (nn.Identity(), nn.PReLU(8), nn.InstanceNorm2d(8), nn.Dropout2d(), nn.Upsample(scale_factor=2)):
        model = Net(between).eval()
        pruned, what = prune_inert(model, X[:1], [X])
        assert (what.removed, what.left) == ({"conv": 2}, {}), between
        torch.testing.assert_close(pruned(X), model(X))


@pytest.mark.parametrize(
    ("between", "width"),
    [
        (lambda y: F.channel_shuffle(y, 2), 8),
        (lambda y: y.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), 8),
        (lambda y: y.flip(1), 8),
        (lambda y: y.roll(1, 1), 8),
        (lambda y: F.pad(y, (0, 0, 0, 0, 1, 0)), 9),
        (lambda y: y.softmax(1), 8),
        (lambda y: F.local_response_norm(y, 3, alpha=0.5), 8),
        (lambda y: y[:, ::2], 4),
        (lambda y: y[:, torch.arange(7, -1, -1)], 8),
        (lambda y: F.pixel_shuffle(y, 2), 2),
        (lambda y: y * torch.arange(8.0).view(1, 8, 1, 1), 8),
        (nn.GroupNorm(1, 8), 8),
        (nn.GroupNorm(2, 8), 8),
        (lambda y: F.layer_norm(y.movedim(1, -1), (8,)).movedim(-1, 1), 8),
    ],
)
def test_channels_that_something_moves_or_mixes_stay(between: Callable[[Tensor], Any], width: int) -> None:
    model = Net(between, width).eval()
    pruned, what = prune_inert(model, X[:1], [X])
    assert (what.removed, what.left) == ({}, {"conv": 2})
    assert torch.equal(pruned(X), model(X))


class Ghost(nn.Module):
    """Channels beside their own depthwise images."""

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Sequential(zero(nn.Conv2d(3, 8, 1, bias=False), 0, 1), nn.ReLU())
        self.cheap = nn.Sequential(zero(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 0, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)


def test_no_filter_that_is_alive_goes() -> None:
    depthwise = zero(nn.Conv2d(16, 16, 3, groups=16, bias=False), 0, 1, 2, 3)
    model = nn.Sequential(Ghost(), depthwise, nn.Conv2d(16, 5, 1)).eval()
    pruned, _ = prune_inert(model, X[:1])
    torch.testing.assert_close(pruned(X), model(X))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.norm2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv, self.last = zero(nn.Conv2d(8, 8, 3, padding=1), 1), nn.Conv2d(8, 5, 3)
        nn.init.constant_(self.norm1.bias[1:2], -100)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y + self.conv(self.norm1(y).relu())
        return self.last(self.norm2(y).relu())


def test_a_channel_that_a_second_relu_reads_stays() -> None:
    model = PreActivation().eval()
    stem = diagnose(model, [X]).layers[0]
    assert (stem.dead, stem.read_elsewhere) == ([1], True)
    pruned, what = prune_inert(model, X[:1], [X])
    assert not what.removed
    assert torch.equal(pruned(X), model(X))


@pytest.mark.parametrize("build", [lambda y, head: (head, y), lambda y, head: {"maps": [y], "logits": head}])
def test_every_output_keeps_its_channels(build: Callable[..., Any]) -> None:
    class Outputs(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.conv(x).relu()
            return build(y, self.last(y))

    pruned, what = prune_inert(Outputs(nn.Identity()).eval(), X[:1], [X])
    assert what.left == {"conv": 2}
    features = create_model("test_efficientnet", features_only=True).eval()
    for name, norm in features.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and name.startswith("blocks.0"):
            nn.init.zeros_(norm.weight[:1])
            nn.init.zeros_(norm.bias[:1])
    pruned, _ = prune_inert(features, X[:1])
    assert [each.shape for each in pruned(X)] == [each.shape for each in features(X)]


def test_a_norm_of_another_convolution_silences_nothing() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm1, self.norm2, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu())

    model = Crossed().eval()
    nn.init.zeros_(model.norm1.weight[1:2])
    assert diagnose(model).layers[1].inert == [1]  # as its next sibling says
    pruned, what = prune_inert(model, X[:1])
    assert "conv2" not in what.removed
    torch.testing.assert_close(pruned(X), model(X))


def test_group_norm_makes_up_for_small_groups() -> None:
    def inert(groups: int, filters: list[int], factor: float) -> list[int]:
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.GroupNorm(groups, 8), nn.ReLU(), nn.Conv2d(8, 5, 3))
        with torch.no_grad():
            model[0].weight[filters] *= factor
        return diagnose(model).layers[0].inert

    assert inert(8, [2], 0.005) == inert(4, [2, 3], 0.005) == []
    assert inert(8, [2], 0.0) == [2]
    assert inert(4, [2], 0.001) == inert(1, [2], 0.001) == [2]


def test_what_was_frozen_stays_frozen() -> None:
    model = Net(nn.Identity()).eval()
    model.conv.requires_grad_(False)
    pruned, what = prune_inert(model, X[:1], [X])
    assert what.removed == {"conv": 2}
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_torch_pruning_cannot_do_stays_or_is_refused() -> None:
    # A depthwise convolution of the image, whose channels are the model's input.
    model = nn.Sequential(zero(nn.Conv2d(3, 3, 3, groups=3), 1), nn.ReLU(), nn.Conv2d(3, 5, 1)).eval()
    assert prune_inert(model, X[:1])[1].left == {"0": 1}
    # A parametrised convolution: torch-pruning stumbles.
    model = Net(nn.Identity()).eval()
    parametrizations.weight_norm(model.last)
    assert prune_inert(model, X[:1], [X])[1].left == {"conv": 2}
    model = Net(nn.Identity()).eval()
    prune.random_unstructured(model.last, "weight", 0.2)
    with torch.no_grad():
        model(X)  # torch copies a masked weight only of a run without gradients
    assert prune_inert(model, X[:1], [X])[1].left == {"conv": 2}

    @dataclass
    class Output:
        logits: Tensor

    with pytest.raises(ValueError, match="an output is Output, not tensors in tuples, lists or dicts"):
        prune_inert(nn.Sequential(nn.Conv2d(3, 4, 3), Wrap(Output)), X[:1])


class Wrap(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        return self.kind(x)
