"""What the words of a verb stand for: runs, folders, files and names, each with what is known of its training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from contract import assert_same, images
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import nn

from poolskip_zoo.cli import main
from poolskip_zoo.cli.subject import FRESH, load
from poolskip_zoo.data import DATASETS
from poolskip_zoo.registry.resolve import sha256_of
from poolskip_zoo.training.recipe import make_recipe
from poolskip_zoo.training.task import make_task

ARCH = ENCODER = "test_resnet_poolskip"
CLASSIFIES = {"model": ARCH, "dataset": "tiny_imagenet_jpeg", "image_size": 48, "model_args": {"stem_stride": 2}}
SEGMENTS = {"model": "unet", "dataset": "camvid", "crop_size": [32, 32], "model_args": {"encoder_name": ENCODER}}


def finish(folder: Path, name: str, settings: dict[str, Any]) -> nn.Module:
    """Leave what a run leaves that matters here, by the task's own functions."""
    torch.manual_seed(0)
    recipe = make_recipe({"name": name, "hold_out": 7, **settings})
    task = make_task(recipe)
    model = task.make_model(trained=True).eval()
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    for file, content in task.files(model).items():
        (folder / file).write_text(json.dumps(content))
    return model


def told_of(path: str) -> dict[str, Any]:
    """What a file for ONNX Runtime says of itself."""
    ort = pytest.importorskip("onnxruntime")
    return json.loads(ort.InferenceSession(path).get_modelmeta().custom_metadata_map["poolskip_zoo"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """A run of classification, in a folder that looks like a name with a tag."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POOLSKIP_DATA_DIR", raising=False)
    folder = Path(f"{ARCH}.mine-s0")
    return folder, finish(folder, f"{ARCH}.mine", CLASSIFIES)


def test_a_run_by_its_folder_its_file_and_its_name(run: tuple[Path, nn.Module]) -> None:
    folder, model = run
    x = images(ARCH, size=(48, 48))
    weights = folder / "model.safetensors"
    forms = ((str(folder),), (str(weights),), (str(folder.absolute()),), (ARCH, str(weights)))
    for named in forms:
        found = load(*named)
        assert_same(found.model(x), model(x))
        assert (found.name, found.dataset, found.weights) == (named[0], "tiny_imagenet_jpeg", f"trained by {ARCH}.mine")
        assert (found.input_size, found.sha256) == ((3, 48, 48), sha256_of(weights))
        assert (found.recipe.hold_out, found.has_seen_all, found.segments) == (7, False, False)
    assert load(str(folder), pretrained=None).weights == f"trained by {ARCH}.mine"
    fresh = load(str(folder), pretrained=False)
    assert (fresh.weights, fresh.sha256) == (FRESH, None)
    assert not torch.equal(fresh.model(x), model(x))


def test_a_run_is_a_folder_of_timm(run: tuple[Path, nn.Module]) -> None:
    """With its classes, its size, its preprocessing and its arguments."""
    folder, model = run
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(ARCH, size=(48, 48))
    assert_same(loaded(x), model(x))
    data = DATASETS["tiny_imagenet_jpeg"]
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["input_size"], config["crop_pct"]) == ((3, 48, 48), 1.0)
    assert (tuple(config["mean"]), tuple(config["std"])) == (data.mean, data.std)
    assert list(loaded.pretrained_cfg["label_names"]) == list(data.labels or ())
    head = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
    assert head(x).shape == (2, 3)
    assert_same(head.forward_features(x), model.forward_features(x))  # type: ignore[operator]


def test_a_run_predicts_and_exports(run: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    Image.effect_noise((70, 60), 90).convert("RGB").save("noise.png")
    labels = DATASETS["tiny_imagenet_jpeg"].labels or ()
    weights = str(folder / "model.safetensors")
    told = []
    for named in ([str(folder)], [ARCH, "--checkpoint", weights]):
        assert main(["predict", *named, "noise.png", "--json", "--top", "200"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert main(["predict", str(folder), "noise.png", "--dataset", "cifar10"]) == 2
    assert f"of {folder} it is known: tiny_imagenet_jpeg" in capsys.readouterr().err
    classes = json.loads(told[0])["classes"]
    assert {each["label"] for each in classes} == set(labels)
    assert main(["export", str(folder)]) == 0
    assert f"{folder.name}.onnx" in capsys.readouterr().out
    facts = told_of(f"{folder.name}.onnx")
    assert (facts["checkpoint"], facts["input_size"]) == (folder.name, [3, 48, 48])
    assert facts["class_names"] == list(labels)


@pytest.mark.parametrize("first", [{"pretrained": True}, {"checkpoint_path": "elsewhere/base.pth"}])
def test_a_run_that_began_with_other_weights_does_not_fetch_them_again(tmp_path: Path, first: dict[str, Any]) -> None:
    settings = {"model": "resnet18.a1_in1k", "dataset": "cifar10", "model_args": first}
    model = finish(tmp_path / "run", "resnet18.mine", settings)
    assert_same(load(str(tmp_path / "run")).model(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))


def test_a_run_of_segmentation_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = finish(tmp_path / "street", "unet_test.mine", SEGMENTS)
    x = torch.rand(1, 3, 64, 64)
    assert_same(load("street").model(x), model(x))
    assert load("street").segments
    assert main(["export", "street", "--size", "64", "64"]) == 0
    facts = told_of("street.onnx")
    assert (facts["task"], facts["class_names"][0]) == ("segmentation", "Sky")


def test_a_base_with_arguments_of_ours_is_no_folder_of_timm(tmp_path: Path) -> None:
    """timm has no ResNet with `stem_stride`, and a configuration of the variant would bring Pool Skip back."""
    model = finish(tmp_path / "run", "test_resnet.mine", {**CLASSIFIES, "model": "test_resnet"})
    assert not (tmp_path / "run" / "config.json").exists()
    x = images(ARCH, size=(48, 48))
    assert_same(load(str(tmp_path / "run")).model(x), model(x))


def test_weights_of_timm_s_scripts_need_their_data_set(run: tuple[Path, nn.Module], tmp_path: Path) -> None:
    model = timm.create_model(ARCH, num_classes=10).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
    found = load(ARCH, "last.pth.tar", "cifar10")
    x = images(ARCH, size=(32, 32))
    assert_same(found.model(x), model(x))
    assert (found.dataset, found.input_size, found.recipe) == ("cifar10", (3, 32, 32), None)
    with pytest.raises(ValueError, match=r"last\.pth\.tar has no recipe\.yaml next to it: give its data set with"):
        load(ARCH, "last.pth.tar")
    with pytest.raises(ValueError, match="give its data set with --data"):  # a bare name is of no checkpoint of ours
        load("resnet20_cifar_poolskip", "last.pth.tar")


def test_folders_of_timm_and_smp(run: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("test_resnet_cifar_poolskip").eval()
    save_for_hf(model, "timm", safe_serialization=True)
    x = images("test_resnet_cifar_poolskip")
    for name in ("timm", "local-dir:timm", "timm/model.safetensors"):
        found = load(name)
        assert_same(found.model(x), model(x))
        assert (found.dataset, found.recipe) == (None, None)
    other = timm.create_model("test_resnet_cifar_poolskip").eval()
    save_file(other.state_dict(), "timm/other.safetensors")
    assert_same(load("timm/other.safetensors").model(x), other(x))
    net = smp.Unet("resnet18", encoder_weights=None, classes=2).eval()
    net.save_pretrained("smp")
    capsys.readouterr()
    assert_same(load("smp").model(torch.ones(1, 3, 32, 32)), net(torch.ones(1, 3, 32, 32)))
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="smp is a folder of smp, which can only be read with its weights"):
        load("smp", pretrained=False)
    for words, said in (
        (["export", "smp"], "load its model in Python (smp's folders by smp.from_pretrained)"),
        (["predict", "smp", "x.png"], "Unet is not a timm classifier: it does not say what images it takes"),
        (["validate", "smp", "--dataset", "cifar10"], "smp does not say what size of images it takes"),
        (["prune", "smp", "--images", "0"], "smp does not say what size of images it takes"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_a_name_goes_before_a_folder_of_that_name(run: tuple[Path, nn.Module]) -> None:
    folder, _ = run
    folder.rename("test_resnet")
    assert load("test_resnet", pretrained=None).weights == FRESH
    assert load("./test_resnet").weights == f"trained by {ARCH}.mine"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"recipe.yaml": "model: 3\n"}, ValueError, "recipe"),
        ({"model.safetensors": None}, FileNotFoundError, "has no model.safetensors: the run is not finished"),
        ({"model.safetensors": "cut"}, RuntimeError, "is not a readable safetensors file"),
        ({"recipe.yaml": None, "config.json": None}, ValueError, "neither recipe.yaml nor config.json next to it"),
        (
            {"recipe.yaml": None, "config.json": None, "model.safetensors": None},
            ValueError,
            "mine-s0 has neither recipe.yaml nor config.json: no run, no model of timm or smp",
        ),
    ],
)
def test_damaged_runs(
    run: tuple[Path, nn.Module], change: dict[str, str | None], error: type[Exception], said: str
) -> None:
    folder, _ = run
    for file, text in change.items():
        (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(error, match=said):
        load(str(folder))


def test_a_repository_of_the_hub_comes_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(name: str, pretrained: bool, way_out: str) -> nn.Module:
        assert pretrained
        return timm.create_model("test_resnet_cifar")

    monkeypatch.setattr("poolskip_zoo.inference.load_model", load_model)
    assert load("hf-hub:somebody/net", pretrained=None).weights != FRESH


def test_a_recorded_checkpoint_has_its_recipe() -> None:
    found = load("resnet20_cifar.c10")
    assert (found.recipe.name, found.dataset, found.weights) == ("resnet20_cifar.c10", "cifar10_jpeg", "weights c10")
    assert dataclasses.asdict(found.recipe)["hold_out"] == 5000
    assert load("resnet20_cifar", pretrained=None).weights == FRESH
