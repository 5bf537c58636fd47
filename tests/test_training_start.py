"""Runs that start from the weights of others, and runs on crops of their images."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from contract.common import enliven
from safetensors.torch import load_file
from test_training import EVERYTHING, PLAIN, STEPS, assert_equal_runs, data, recipe  # noqa: F401  # a fixture
from torch import nn

from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.registry.checkpoint import find
from poolskip_zoo.training import train
from poolskip_zoo.training.recipe import make_recipe
from poolskip_zoo.training.start import init_file, init_seconds, init_weights
from poolskip_zoo.training.state import save_weights

SHORT = {**PLAIN, "epochs": 1, "warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a finished run of the base."""
    output = tmp_path_factory.mktemp("start")
    assert train(recipe(**SHORT), data, output, cpu=True) is not None
    return output / "test_resnet.tiny-s0"


def test_a_variant_goes_on_from_its_base_and_resumes_exactly(data: Path, base: Path, tmp_path: Path) -> None:  # noqa: F811
    new = recipe(**SHORT, name="test_resnet_poolskip.late", model="test_resnet_poolskip", init="test_resnet.tiny")
    folders = []
    for name in ("whole", "parts"):
        shutil.copytree(base, tmp_path / name / base.name)
        folders.append(tmp_path / name / "test_resnet_poolskip.late-s0")
    metrics = train(new, data, tmp_path / "whole", cpu=True)
    assert metrics is not None
    assert metrics["init"] == "test_resnet.tiny"
    assert train(new, data, tmp_path / "parts", cpu=True, limit_steps=STEPS // 2) is None
    shutil.rmtree(tmp_path / "parts" / base.name)  # what was begun needs it no more
    assert train(new, data, tmp_path / "parts", cpu=True) is not None
    assert_equal_runs(*folders)
    fresh = train(recipe(**SHORT, name="a.fresh"), data, tmp_path, cpu=True)
    assert fresh is not None
    assert metrics["val"]["loss"] < fresh["val"]["loss"]
    weights = load_file(folders[0] / "model.safetensors")
    # They learn, from zero; their biases have no gradient, for a norm follows.
    assert all(weights[key].any() for key in weights if ".pool_skip.conv.weight" in key)


def test_the_time_of_the_first_weights_counts(data: Path, base: Path) -> None:  # noqa: F811
    metrics = base / "metrics.json"
    text = metrics.read_text(encoding="utf-8")
    try:
        seconds = text.split('"seconds": ')[1].partition(",")[0]
        metrics.write_text(text.replace(f'"seconds": {seconds}', '"seconds": 5000.0'), encoding="utf-8")
        later = train(recipe(**SHORT, name="a.later", init="test_resnet.tiny"), data, base.parent, cpu=True)
    finally:
        metrics.write_text(text, encoding="utf-8")
    assert later is not None
    assert 5000 < later["seconds"] < 5600


def test_a_warm_start_gives_the_output_of_its_base(tmp_path: Path) -> None:
    model = enliven(timm.create_model("test_resnet", num_classes=10)).eval()
    variant = timm.create_model("test_resnet_poolskip", num_classes=10).eval()
    save_weights(tmp_path / "model.safetensors", model, torch.float32)
    weights, fresh = init_weights(tmp_path / "model.safetensors", variant)
    variant.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 64)
    assert fresh == []
    assert torch.equal(variant(x), model(x))
    # What has Pool Skip already keeps it.
    for layer in pool_skip_modules(variant).values():
        torch.nn.init.ones_(layer.conv.weight)
    save_weights(tmp_path / "variant.safetensors", variant, torch.float32)
    weights, fresh = init_weights(tmp_path / "variant.safetensors", timm.create_model("test_resnet_poolskip"))
    assert fresh == ["fc.weight", "fc.bias"]  # for 1000 classes
    assert all((weights[key] == 1).all() for key in weights if ".pool_skip.conv.weight" in key)


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet20_cifar_poolskip"])
def test_checkpoints_of_the_zoo_are_found_and_fit(name: str, tmp_path: Path) -> None:
    given = recipe(init=f"{name}.c10")
    path = init_file(given, tmp_path)
    weights, fresh = init_weights(path, timm.create_model(name, num_classes=100))
    assert fresh == ["fc.weight", "fc.bias"]
    assert weights.keys() == timm.create_model(name).state_dict().keys()


def test_a_run_that_tells_no_time_counts_none(tmp_path: Path) -> None:
    run = tmp_path / "resnet20_cifar_poolskip-s0" / "model.safetensors"
    # Not a checkpoint's, though the name of its architecture is in front of several.
    assert init_seconds(recipe(init="resnet20_cifar_poolskip"), run) == 0
    hours = find("resnet20_cifar_poolskip.c10").hours
    assert init_seconds(recipe(init="resnet20_cifar_poolskip.c10"), run) == 3600 * hours > 0


def test_crops_are_trained_on_and_fit_the_images(data: Path, tmp_path: Path) -> None:  # noqa: F811
    cut = recipe(**SHORT, name="a.cut", crop_padding=2, crop_size=[24, 24], sizes=[[0, 16]])
    assert train(cut, data, tmp_path, cpu=True) is not None
    with pytest.raises(ValueError, match=r"crop_size=\[40, 40\] is larger than the images with their padding, 36"):
        train(recipe(**SHORT, name="a.large", crop_padding=2, crop_size=[40, 40]), data, tmp_path, cpu=True)


def test_what_cannot_be_started_from_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"init='gone.c10'.*`poolskip train gone.c10 --output"):
        init_file(recipe(init="gone.c10"), tmp_path)
    with pytest.raises(ValueError, match=r"init='a\.b' is the run itself"):
        make_recipe({**EVERYTHING, "name": "a.b", "init": "a.b"})
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=rf"starts from init='{path}', and there is no such file"):
        init_file(recipe(init=str(path)), tmp_path)
    path.write_bytes(b"<html>")
    assert init_file(recipe(init=str(path)), tmp_path) == path
    model = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        init_weights(path, model)
    for other, lacks in (("test_vit", r"lacks \d\d, has \d\d in excess"), ("test_resnet_poolskip", "lacks 0, has 14")):
        save_weights(path, timm.create_model(other), torch.float16)
        with pytest.raises(ValueError, match=rf"of another model: of \d+ tensors it {lacks}"):
            init_weights(path, model)
    save_weights(path, timm.create_model("test_resnet", num_classes=10, in_chans=1), torch.float16)
    with pytest.raises(ValueError, match=r"1 of another shape \(conv1"):
        init_weights(path, model)
    # A head for other classes is made anew, and no model has two.
    nets = [nn.ModuleDict({"a": nn.Linear(4, classes), "b": nn.Linear(4, classes)}) for classes in (3, 5)]
    save_weights(path, nets[0], torch.float32)
    with pytest.raises(ValueError, match=r"of another model: .* 4 of another shape"):
        init_weights(path, nets[1])
