"""Runs that cannot begin, go on or end: models for other images, other data, weights that are no good."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import PLAIN, data, recipe  # noqa: F401  # a fixture

from poolskip_zoo.training import train

FIXED = {"img_size": 32, "dynamic_img_size": False}


@pytest.mark.parametrize("hold_out", [40, 0])
def test_a_run_that_diverges_at_its_last_update_is_not_finished(data: Path, tmp_path: Path, hold_out: int) -> None:  # noqa: F811
    wild = recipe(**PLAIN, epochs=1, batch_size=100, hold_out=hold_out, train_images=100, lr=1e38, warmup_epochs=0)
    with pytest.raises(RuntimeError, match=r"the trained model's loss is not finite; a lower lr or clip_grad may help"):
        train(wild, data, tmp_path, cpu=True)
    folder = tmp_path / "test_resnet.tiny-s0"
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "metrics.json").exists()
    (row,) = (
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    )
    assert row["val_loss"] is None


def test_other_data_are_refused_when_a_run_goes_on(data: Path, tmp_path: Path) -> None:  # noqa: F811
    assert train(recipe(), data, tmp_path, limit_steps=1, cpu=True) is None
    path = tmp_path / "test_resnet.tiny-s0" / "last.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "images": state["images"] + 8}, path)
    with pytest.raises(
        ValueError, match=r"was begun with \d+ training images, and there are \d+: give it the same data"
    ):
        train(recipe(), data, tmp_path, cpu=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"image_size": 48},
            r"does not take images \(Input height \(48\).* of 48×48 pixels: set model_args.img_size=48",
        ),
        ({"sizes": [[0, 32], [1, 64]]}, r"of 64×64 pixels: set model_args.img_size=64, or model_args.dynamic_img_size"),
        ({"model_args": {**FIXED, "features_only": True}}, r"gives list, not \[1, 10\], for one image of 32×32"),
        ({"model_args": {**FIXED, "global_pool": ""}}, r"gives \[1, \d+, 10\], not \[1, 10\], for one image"),
    ],
)
def test_a_model_that_does_not_take_the_images_is_refused_first(
    data: Path,  # noqa: F811
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
) -> None:
    net = {**PLAIN, "model": "test_vit", "model_args": FIXED, **change}
    with pytest.raises(ValueError, match=said):
        train(recipe(**net), data, tmp_path, cpu=True)
    assert not any(tmp_path.iterdir())
