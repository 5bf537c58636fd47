"""What the loop does each step, and what it leaves: seeds, average, schedule, clipping, final scores, seconds."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import PLAIN, data, recipe  # noqa: F401  data is a fixture
from timm.utils import ModelEmaV3
from torch import nn

from poolskip_zoo.data import DATASETS, EvalLoader, load_split
from poolskip_zoo.training import build, evaluate, loop, train
from poolskip_zoo.training.state import load_checkpoint

STEPS = 3  # per epoch: 96 images in batches of 32
SHORT: dict[str, Any] = {**PLAIN, "train_images": 32 * STEPS, "warmup_epochs": 0.0, "save_dtype": "float32"}
NAME = "test_resnet.tiny-s0"


class Spied:
    """A run of two epochs, two passes a step, with a moving average; and what it called."""

    recipe = recipe(**{**SHORT, "epochs": 2, "accumulation": 2, "ema_decay": 0.9})

    def __init__(self, data: Path, output: Path, patch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.seeds: list[tuple[int, ...]] = []
        self.averaged: list[int | None] = []
        seed_step, update = loop.seed_step, ModelEmaV3.update

        def seeded(*numbers: int) -> None:
            self.seeds.append(numbers)
            seed_step(*numbers)

        def averaging(ema: ModelEmaV3, model: nn.Module, step: int | None = None) -> None:
            self.averaged.append(step)
            update(ema, model, step=step)

        patch.setattr(loop, "seed_step", seeded)
        patch.setattr(ModelEmaV3, "update", averaging)
        train(self.recipe, data, output, cpu=True)
        self.folder = output / NAME
        self.rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def spied(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spied]:  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        yield Spied(data, tmp_path_factory.mktemp("spied"), patch)


def held_out_loss(state: dict[str, torch.Tensor], data: Path) -> float:  # noqa: F811
    """The loss of weights on the held-out images, in float32."""
    model, info = build.make_model(recipe(**SHORT)), DATASETS["cifar10_jpeg"]
    model.load_state_dict(state)
    val = load_split("cifar10_jpeg", "val", data, hold_out=40)
    return evaluate(model, EvalLoader(val, 250, mean=info.mean, std=info.std, image_size=32)).loss


def test_no_two_passes_of_a_run_have_the_same_random_numbers(spied: Spied) -> None:
    assert len(set(spied.seeds)) == len(spied.seeds) == 2 * 2 * STEPS


def test_the_average_is_taken_once_a_step_and_its_decay_rises_over_the_run(spied: Spied) -> None:
    assert spied.averaged == list(range(1, 2 * STEPS + 1))


def test_the_rate_falls_over_the_whole_run(spied: Spied) -> None:
    last = [STEPS - 1, 2 * STEPS - 1]  # updates of the two epochs
    rates = [0.05 * 0.5 * (1 + math.cos(math.pi * update / (2 * STEPS))) for update in last]
    assert [row["lr"] for row in spied.rows] == pytest.approx(rates, rel=1e-6)


def test_held_out_scores_are_of_the_average_which_is_what_is_saved(spied: Spied, data: Path) -> None:  # noqa: F811
    state = load_checkpoint(spied.folder)
    assert state is not None
    average, trained = (held_out_loss(state[key], data) for key in ("ema", "model"))
    assert spied.rows[-1]["val_loss"] == pytest.approx(average, rel=1e-5)
    assert trained != pytest.approx(average, rel=1e-2)


def test_the_final_scores_are_of_full_precision(data: Path, tmp_path: Path) -> None:  # noqa: F811
    metrics = train(recipe(**{**SHORT, "epochs": 1, "train_images": 32, "precision": "bf16"}), data, tmp_path, cpu=True)
    assert metrics is not None
    loss = held_out_loss(load_file(tmp_path / NAME / "model.safetensors"), data)
    assert metrics["val"]["loss"] == pytest.approx(loss, rel=1e-6)


def test_clipped_gradients_move_nothing_far(data: Path, tmp_path: Path) -> None:  # noqa: F811
    run = recipe(**{**SHORT, "epochs": 1, "train_images": 32, "clip_grad": 1e-12, "weight_decay": 0.0})
    torch.manual_seed(run.seed)
    before = dict(build.make_model(run).named_parameters())
    train(run, data, tmp_path, cpu=True)
    after = load_file(tmp_path / NAME / "model.safetensors")
    assert all(torch.allclose(after[key], value, atol=1e-6) for key, value in before.items())


def test_the_seconds_of_all_calls_count(data: Path, tmp_path: Path) -> None:  # noqa: F811
    run = recipe(**{**SHORT, "epochs": 1, "train_images": 64})
    assert train(run, data, tmp_path, cpu=True, limit_steps=1) is None
    path = tmp_path / NAME / "last.pt"
    state = torch.load(path, weights_only=False)
    assert state["seconds"] > 0
    torch.save({**state, "seconds": 5000.0}, path)
    metrics = train(run, data, tmp_path, cpu=True)
    assert metrics is not None
    assert 5000 < metrics["seconds"] < 5600
