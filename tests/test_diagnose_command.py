"""`poolskip diagnose`: models by name, file, folder or function; images; mistakes."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import nn

import poolskip_zoo
from poolskip_zoo.cli import main
from poolskip_zoo.cli.images import image_batches
from poolskip_zoo.cli.subject import Subject, load
from poolskip_zoo.data import DATASETS, datasets, load_split


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.delenv("POOLSKIP_DATA_DIR", raising=False)


@pytest.mark.usefixtures("no_data")
def test_command_tells_and_compares(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["diagnose", "test_resnet_cifar", "--compare", "test_resnet_cifar_poolskip", "--output", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("test_resnet_cifar: fresh weights; weights alone\ntest_resnet_cifar_poolskip: fresh")
    assert "layer3.0.conv2.pool_skip.conv" in said
    assert str(tmp_path / "l2_l1.png") in said
    assert (tmp_path / "l2_l1.png").is_file()


@pytest.fixture
def run_folder(tmp_path):
    """What `poolskip train` leaves that matters here, with one filter planted."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = {"name": "tiny", "dataset": "cifar10", "model": "test_resnet_cifar_poolskip", "hold_out": 2}
    (folder / "recipe.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
    model = poolskip_zoo.create_model("test_resnet_cifar_poolskip", num_classes=10, zero_init_last=False)
    model.conv1.weight.data[6] = 0
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_command_takes_runs(run_folder, capsys, file):
    assert main(["diagnose", str(run_folder / file), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["weights"] == "trained by tiny"
    assert (found["images"], found["dataset"]) == (0, None)
    assert found["summary"]["base"]["inert"] == 1
    assert found["layers"][0]["inert"] == [6]


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_command_takes_folders_of_timm(prefix, tmp_path, capsys):
    model = poolskip_zoo.create_model("test_resnet_cifar_poolskip", zero_init_last=False)
    model.conv1.weight.data[6] = 0
    save_for_hf(model, tmp_path, safe_serialization=False)
    assert main(["diagnose", f"{prefix}{tmp_path}", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["layers"][0]["inert"] == [6]


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("call", "convolutions"),
    [
        ("segmentation_models_pytorch:Unet('resnet18', encoder_weights=None)", 31),
        ("monai.networks.nets:UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,))", 3),
        ("nets_of_ones_own:Nets.one", 1),
    ],
)
def test_command_takes_what_a_function_makes(call, convolutions, capsys, tmp_path, monkeypatch):
    pytest.importorskip(call.partition(":")[0].partition(".")[0].replace("nets_of_ones_own", "torch"))
    source = "from torch import nn\n\nclass Nets:\n    one = staticmethod(lambda: nn.Conv2d(3, 4, 3))\n"
    (tmp_path / "nets_of_ones_own.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", call, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert (found["name"], len(found["layers"])) == (call, convolutions)
    assert "" not in sys.path


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Forty training images, each of a brightness of its own."""
    images = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8).reshape(40, 1, 1, 1), (40, 32, 32, 3))
    labels = np.arange(40) % 10

    def read(folder, test, download):
        assert not test
        return images, labels, list("abcdefghij")

    monkeypatch.setitem(datasets._READERS, "cifar10", read)
    monkeypatch.setenv("POOLSKIP_DATA_DIR", str(tmp_path))


@pytest.mark.usefixtures("cifar10")
def test_images_are_spread_evenly_over_what_was_held_out():
    held_out = load_split("cifar10", "val", hold_out=9).images[:, 0, 0, 0]
    subject = Subject("none of timm's", nn.Conv2d(3, 4, 3), "fresh", "cifar10")
    (shown,) = image_batches(subject, None, 3, torch.device("cpu"), 9)
    info = DATASETS["cifar10"]
    expected = (held_out[[0, 4, 8]] / 255 - info.mean[0]) / info.std[0]
    torch.testing.assert_close(shown[:, 0, 16, 16], expected)


@pytest.mark.usefixtures("cifar10")
def test_command_shows_held_out_images(run_folder, capsys):
    arguments = ["diagnose", str(run_folder), "--compare", "test_resnet_cifar", "--json"]
    assert main(arguments) == 0
    run, fresh = json.loads(capsys.readouterr().out)["models"]
    # The recipe holds out two images, and the model beside it is shown the same.
    assert (run["images"], fresh["images"]) == (2, 2)
    assert (run["dataset"], fresh["dataset"]) == ("cifar10", "cifar10")
    assert len(run["layers"][0]["gradient"]) == len(fresh["layers"][0]["gradient"]) == 8
    assert main([*arguments, "--images", "0"]) == 0
    assert [each["images"] for each in json.loads(capsys.readouterr().out)["models"]] == [0, 0]
    # A model without a configuration takes the data set's size; of its classes nothing is known.
    assert main(["diagnose", str(run_folder), "--compare", "torch.nn:Conv2d(3, 4, 3)", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)["models"][1]
    assert (other["images"], other["layers"][0]["gradient"]) == (2, None)
    # Of two runs that held out other numbers of images both are shown what neither was trained on.
    more = shutil.copytree(run_folder, run_folder.with_name("more"))
    text = (more / "recipe.yaml").read_text(encoding="utf-8")
    (more / "recipe.yaml").write_text(text.replace("hold_out: 2", "hold_out: 3"))
    assert main(["diagnose", str(more), "--compare", str(run_folder), "--json"]) == 0
    assert [each["images"] for each in json.loads(capsys.readouterr().out)["models"]] == [2, 2]


def test_a_recorded_checkpoint_is_shown_what_its_own_recipe_held_out():
    chosen, last = (load(f"resnet20_cifar.{tag}") for tag in ("c10", "c10_e60"))
    assert (chosen.recipe.hold_out, chosen.has_seen_all) == (5000, False)
    assert (last.recipe.hold_out, last.has_seen_all) == (0, True)
    last.dataset = "cifar100"  # by --dataset
    assert not last.has_seen_all


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resnet51", "--output", f"{__file__}/pictures"], "Not a directory"),
        (["nowhere:net"], "nowhere:net: ModuleNotFoundError"),
        (["torch.nn:Conv9d"], "has no attribute 'Conv9d'"),
        (["torch.nn:Conv2d(1, 2)"], "torch.nn:Conv2d(1, 2): TypeError"),
        (["torch.nn:Conv2d(3, width, 3)"], "must be literals"),
        (["torch.nn:Conv2d(3, 4, 3"], "a file, a folder or a call MODULE:FUNCTION(ARGUMENTS)"),
        (["torch:zeros(3)"], "is Tensor, no torch.nn.Module"),
        (["resnet51"], "unknown model 'resnet51': neither a name"),
        (["resnet18.nothing"], "resnet18 has no weights 'nothing'"),
        (["resnet18", "--compare", "resnet18"], "the two are the same"),
        (["resnet18", "--images", "-1"], "--images -1"),
        (["test_resnet_cifar", "--data-dir", "."], "give --dataset"),
        (["test_resnet_cifar", "--dataset", "cifar"], "unknown dataset 'cifar'"),
        (["test_resnet_cifar", "--dataset", "cifar10"], "no data folder"),
        (["test_resnet_cifar", "--dataset", "camvid"], "does not segment"),
    ],
)
def test_mistakes_of_the_command(arguments, said, capsys):
    assert main(["diagnose", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("no_data")
def test_a_file_that_stands_alone_is_refused(run_folder, capsys):
    (run_folder / "recipe.yaml").unlink()
    assert main(["diagnose", str(run_folder)]) == 2
    assert "neither recipe.yaml nor config.json" in capsys.readouterr().err
