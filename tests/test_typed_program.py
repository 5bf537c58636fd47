"""A program by the rules of `mypy --strict`, which `make lint` holds it to: what it may write, and what it gets."""

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typing_extensions import assert_type

import poolskip_zoo
from poolskip_zoo import PoolSkip2d, add_pool_skip, remove_pool_skip
from poolskip_zoo.data import EvalLoader, Split
from poolskip_zoo.diagnostics import Diagnosis, diagnose, draw
from poolskip_zoo.export import to_torchscript
from poolskip_zoo.inference import Classifier
from poolskip_zoo.layers import Place, Rule, register_placements
from poolskip_zoo.training import Outcome, Scores, evaluate, join_weights, load_recipe


class Named:
    """A path of another library."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


class Net(nn.Sequential):
    """A family with a placement of its own."""


def test_placements_and_models() -> None:
    net = Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    places = add_pool_skip(net, [Rule("0"), "2"], groups="depthwise", dry_run=True)
    assert_type(places, list[Place])
    assert [place.name for place in places] == ["0", "2"]
    register_placements(Net, {"default": [Rule("2")]})
    assert [place.name for place in add_pool_skip(net)] == ["2"]
    assert_type(remove_pool_skip(net), Net)
    with pytest.raises(ValueError, match="deptwise"):
        add_pool_skip(net, groups="deptwise")  # type: ignore[arg-type]


def test_paths_of_any_kind(tmp_path: Path) -> None:
    path: str | os.PathLike[str] = Named(tmp_path / "net.pt")
    to_torchscript(PoolSkip2d(2).eval(), torch.rand(2, 2, 8, 8), path)
    assert (tmp_path / "net.pt").is_file()
    with pytest.raises(FileNotFoundError, match="lacks all"):
        join_weights(str(tmp_path))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(load_recipe("resnet20_cifar.c10").to_yaml(), encoding="utf-8")
    assert load_recipe(Named(recipe)) == load_recipe(recipe)
    assert Outcome(load_recipe(recipe), "done").state != "finished"  # type: ignore[arg-type]
    found = diagnose(nn.Conv2d(3, 4, 3))
    assert_type(found, Diagnosis)
    assert draw(str(tmp_path / "pictures"), {"conv": found})[0].parent == tmp_path / "pictures"


def test_scores_and_labels() -> None:
    model = timm.create_model("test_resnet_poolskip", num_classes=2)
    images = Split(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["a", "b"])
    loader = EvalLoader(images, 2, mean=(0, 0, 0), std=(1, 1, 1), image_size=32)
    scores = evaluate(model, loader, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_type(scores, Scores)
    assert scores.images == 4
    assert_type(Classifier(model).labels, list[str])


def test_parts_of_the_package() -> None:
    assert poolskip_zoo.diagnostics.diagnose is diagnose
    with pytest.raises(AttributeError, match="no attribute 'diagnose'"):
        poolskip_zoo.diagnose  # type: ignore[attr-defined]  # noqa: B018
