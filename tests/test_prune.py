"""Pruning of what is inert: what goes, what stays, and that the rest computes what it did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_training import PLAIN, call, data, recipe  # noqa: F401  data is a fixture
from timm import create_model
from torch import nn

from poolskip_zoo.cli import prune as verb
from poolskip_zoo.data import Split, load_split
from poolskip_zoo.export import to_onnx
from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.models.cifar import PadShortcut
from poolskip_zoo.pruning import prune_inert
from poolskip_zoo.training import train

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def built(name: str, **kwargs: Any) -> Any:
    """A model whose norms have other statistics and shifts than at first."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


@torch.no_grad()
def silence(model: Any, place: str, number: int, channels: list[int], *, unread: bool = True) -> None:
    """Let a norm scale channels to nothing; Pool Skip does not read them either."""
    norm = model.get_submodule(f"{place}.bn{number}")
    norm.weight[channels], norm.bias[channels] = 0, -0.1 if number == 1 else 0
    skip = getattr(model.get_submodule(f"{place}.conv{number}"), "pool_skip", None)
    if skip is not None and skip.conv.groups == 1 and unread:
        skip.conv.weight[:, channels] = 0


def sizes(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_resnet_cifar", {}),
        ("test_resnet_cifar_poolskip", {}),
        ("test_resnet_cifar_poolskip", {"pool_skip": {"groups": "depthwise"}}),
    ],
)
def test_channels_inside_blocks_go_and_the_outputs_stay(name: str, kwargs: dict[str, Any]) -> None:
    model = built(name, **kwargs)
    silence(model, "layer1.0", 1, [1, 5])
    silence(model, "layer3.0", 1, [0, 1, 31])
    before = sizes(model)
    pruned, what = prune_inert(model, X[:1])
    expected = {"layer1.0.conv1": 2, "layer3.0.conv1": 3}
    expected |= {f"{conv}.pool_skip.conv": count for conv, count in expected.items() if "poolskip" in name}
    assert what.removed == expected
    assert not what.left
    assert sizes(model) == before  # a copy was pruned
    assert sizes(pruned) == {conv: count - expected.get(conv, 0) for conv, count in before.items()}
    torch.testing.assert_close(pruned(X), model(X), rtol=0, atol=1e-5)
    assert pool_skip_modules(pruned).keys() == pool_skip_modules(model).keys()
    assert all(isinstance(block.downsample, PadShortcut) for block in (*pruned.layer2, *pruned.layer3))
    pruned.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_a_channel_that_pool_skip_reads_or_fills_stays() -> None:
    model = built("test_resnet_cifar_poolskip")
    silence(model, "layer1.0", 1, [1, 5], unread=False)
    with torch.no_grad():
        model.layer2[0].conv1.weight[3] = 0  # Pool Skip fills the channel
    pruned, what = prune_inert(model, X[:1])
    assert not what.removed
    assert what.left == {"layer1.0.conv1": 2, "layer1.0.conv1.pool_skip.conv": 2, "layer2.0.conv1": 1}
    assert torch.equal(pruned(X), model(X))
    place = model.layer2[0]
    with torch.no_grad():  # now it does not, and what it reads there is zero
        place.conv1.pool_skip.conv.weight[3], place.conv1.pool_skip.conv.bias[3] = 0, 0
        place.bn1.running_mean[3], place.bn1.bias[3] = 0, -0.1
    pruned, what = prune_inert(model, X[:1])
    assert what.removed == {"layer2.0.conv1": 1, "layer2.0.conv1.pool_skip.conv": 1}
    torch.testing.assert_close(pruned(X), model(X), rtol=0, atol=1e-5)


def test_residual_channels_go_where_all_branches_are_idle() -> None:
    model = built("test_resnet_cifar")
    silence(model, "layer2.0", 2, [3, 9, 15])  # the shortcut fills channel 3, and pads the others with zeros
    pruned, what = prune_inert(model, X[:1])
    assert (what.removed, what.left) == ({"layer2.0.conv2": 2}, {"layer2.0.conv2": 1})
    torch.testing.assert_close(pruned(X), model(X), rtol=0, atol=1e-5)
    assert isinstance(pruned.layer2[0].downsample, PadShortcut)
    assert pruned.layer2[0].downsample.extra_chs == 6
    # The next shortcut now leaves channels 9 and 15 out, which no padding does.
    shortcut = pruned.layer3[0].downsample
    assert isinstance(shortcut, nn.Conv2d)
    assert not shortcut.weight.requires_grad
    silence(model, "layer3.0", 2, [9, 15, 20, 31])
    pruned, what = prune_inert(model, X[:1])
    assert what.removed == {"layer2.0.conv2": 2, "layer3.0.conv2": 4}
    torch.testing.assert_close(pruned(X), model(X), rtol=0, atol=1e-5)
    assert isinstance(pruned.layer3[0].downsample, PadShortcut)


def test_dead_channels_are_found_with_images() -> None:
    model = built("test_resnet_cifar")
    with torch.no_grad():
        model.layer1[0].bn1.bias[2] = -100
    assert not prune_inert(model, X[:1])[1].removed
    pruned, what = prune_inert(model, X[:1], [X])
    assert what.removed["layer1.0.conv1"] == 1
    torch.testing.assert_close(pruned(X), model(X), rtol=0, atol=1e-5)


def test_a_channel_that_is_constant_goes_with_its_shift() -> None:
    """As documented: the accuracy is to be measured anew."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 0, 0.5
    pruned, what = prune_inert(model, X[:1])
    assert what.removed == {"0": 1}
    # What it computes without the shift.
    nn.init.zeros_(model[1].bias[2:3])
    torch.testing.assert_close(pruned(X), model(X), rtol=0, atol=1e-5)


def test_a_pruned_model_is_in_evaluation_mode() -> None:
    model = create_model("test_resnet_cifar")
    pruned, _ = prune_inert(model, X[:1])
    assert not any(module.training for module in pruned.modules())
    assert model.training


def test_one_channel_and_the_output_always_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[3].weight[1] = 0
    pruned, what = prune_inert(model, X[:1])
    assert (what.removed, what.left) == ({"0": 3}, {"0": 1, "3": 1})
    assert pruned(X).shape == model(X).shape


def test_grouped_convolutions_and_tokens() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.ReLU())
    with torch.no_grad():
        model[1].weight[0] = 0
    assert prune_inert(model, X[:1])[1].left == {"0": 1}
    with pytest.raises(ValueError, match="Pool Skip on tokens"):
        prune_inert(create_model("test_vit_poolskip"), X[:1])


def test_the_command(
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = {"epochs": 1, "train_images": 60, "batch_size": 20, "hold_out": 20, "name": "test_resnet_cifar_poolskip.x"}
    train(recipe(**{**PLAIN, **tiny, "model": "test_resnet_cifar_poolskip"}), data, tmp_path, cpu=True)
    run = tmp_path / "test_resnet_cifar_poolskip.x-s0"
    model = built("test_resnet_cifar_poolskip")
    silence(model, "layer1.0", 1, [1, 5])
    save_file(model.state_dict(), run / "model.safetensors")
    arguments = [run, "--output", tmp_path / "net.pt2", "--json"]
    splits: list[str] = []

    def load(name: str, split: str, *folder: Any, **options: Any) -> Split:
        splits.append(split)
        return load_split(name, split, *folder, **options)

    monkeypatch.setattr("poolskip_zoo.data.load_split", load)
    monkeypatch.delenv("POOLSKIP_DATA_DIR", raising=False)
    with monkeypatch.context() as unwritten:
        unwritten.setattr(verb, "_write", lambda *_: None)
        assert call(verb, *arguments) == 0
        assert "top1" not in json.loads(capsys.readouterr().out.splitlines()[-1])["after"]
        assert splits == []
        assert call(verb, *arguments, "--data-dir", data) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 20  # all that the run held out
        assert splits == ["val", "test"]
    assert call(verb, *arguments, "--data-dir", data, "--images", 0) == 0
    assert splits[2:] == ["test"]
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["images"], facts["seen_in_training"]) == (0, False)
    assert facts["removed"] == {"layer1.0.conv1": 2, "layer1.0.conv1.pool_skip.conv": 2}
    # Of the convolution 2 filters of 8·9, of Pool Skip 8·8·9 - 6·6·9, of the next one 8 of 2·9; its biases, the norm.
    assert facts["before"]["parameters"] - facts["after"]["parameters"] == 144 + 252 + 144 + 2 + 4
    assert facts["before"]["macs"] > facts["after"]["macs"]
    assert facts["before"]["top1"] == facts["after"]["top1"]
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(X), model(X), rtol=0, atol=1e-4)
    for bad, said in ((["--output", tmp_path / "net.pkl"], "ends in .pt2 or .onnx"), (["--images", -1], "at least 0")):
        with pytest.raises(ValueError, match=said):
            call(verb, run, *bad)
    with pytest.raises(ValueError, match="resnet20_cifar has no tag, so its weights are fresh"):
        call(verb, "resnet20_cifar", "--output", tmp_path / "fresh.pt2")


# Half a minute of torch's ONNX exporter: pytest -m slow tests/test_prune.py
@pytest.mark.slow
def test_what_is_left_exports_to_onnx(tmp_path: Path) -> None:
    model = built("test_resnet_cifar_poolskip")
    silence(model, "layer1.0", 1, [1, 5])
    pruned, _ = prune_inert(model, X[:1])
    report = to_onnx(pruned, X[:1], tmp_path / "net.onnx")
    assert report["outputs"]["agreement"] == 1
    assert len(report["blocks"]) == 6


class TwoReaders(nn.Module):
    """A channel that its ReLU silences has another reader in front of it."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), other
        self.last = nn.Conv2d(8, 5, 1)
        nn.init.constant_(self.bn.bias[3:4], -100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        return self.last(y.relu()) + self.other(y)


@torch.jit.script
def negative(y: torch.Tensor) -> torch.Tensor:
    return y.clamp(max=0.0)


class Negative(nn.Module):
    """Takes what the ReLU silences, by a function into which the diagnosis cannot see."""

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return negative(y)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(8, 5, 1),
        lambda y: y.mean(1, keepdim=True),
        lambda y: y.chunk(8, 1)[3],
        nn.Sequential(Negative(), nn.Conv2d(8, 5, 1)),
    ],
)
def test_a_dead_channel_that_something_else_reads_stays(other: Any) -> None:
    model = TwoReaders(other).eval()
    pruned, what = prune_inert(model, X[:1], [X])
    assert what.removed == {}
    assert torch.equal(pruned(X), model(X))


@pytest.mark.parametrize("batch", [1, 2])
def test_nets_of_convolutions_alone(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    nn.init.zeros_(model[0].weight[1:2])
    nn.init.constant_(model[0].bias[1:2], -1)
    pruned, what = prune_inert(model, X[:batch])
    assert what.removed == {"0": 1}
    torch.testing.assert_close(pruned(X), model(X))
