"""`poolskip validate`: what it shows a model."""

import json
from pathlib import Path

import pytest
import timm
import torch
from test_training import call, data  # noqa: F401  data is a fixture
from timm.models._hub import save_for_hf

from poolskip_zoo.cli import validate as verb
from poolskip_zoo.data import EvalLoader, load_split
from poolskip_zoo.training import evaluate


def test_images_are_prepared_as_the_weights_want_them(
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By their own configuration, which need not be the data set's."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_cifar", num_classes=10)
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    save_for_hf(model, tmp_path / "saved")
    given = ("--dataset", "cifar10_jpeg", "--data-dir", data, "--json")
    assert call(verb, tmp_path / "saved", *given) == 0
    test = load_split("cifar10_jpeg", "test", data)
    expected = evaluate(model, EvalLoader(test, 64, **own, image_size=32)).loss
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, rel=1e-4)
