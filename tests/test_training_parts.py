"""The parts of a run: schedules, optimizers, random numbers, files, evaluation."""

import errno
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file
from test_training import recipe
from torch import nn

from poolskip_zoo.contexts import write_atomic
from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.training import build, evaluate
from poolskip_zoo.training.metrics import draw_curves
from poolskip_zoo.training.recipe import make_recipe
from poolskip_zoo.training.state import load_checkpoint, save_checkpoint, save_weights, seed_step
from poolskip_zoo.training.task import make_task


@pytest.mark.parametrize(
    ("scheduler", "middle", "end"), [("cosine", 0.5 * 0.1, 0.0), ("linear", 0.5 * 0.1, 0.0), ("constant", 0.1, 0.1)]
)
def test_schedules(scheduler: str, middle: float, end: float) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule = build.make_scheduler(recipe(lr=0.1, epochs=12, warmup_epochs=2, scheduler=scheduler), optimizer, 10)

    def lr(update: int) -> float:
        schedule.step_update(update)
        return optimizer.param_groups[0]["lr"]

    assert [lr(0), lr(10), lr(20)] == pytest.approx([0.0, 0.05, 0.1])
    assert lr(70) == pytest.approx(middle)
    assert lr(119) == pytest.approx(end, abs=1.1e-3)


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_the_rate_ends_at_the_least(scheduler: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    settings = recipe(lr=0.1, epochs=2, warmup_epochs=0, scheduler=scheduler, min_lr=0.02)
    build.make_scheduler(settings, optimizer, 10).step_update(20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)


def test_mixing_is_as_the_recipe_says() -> None:
    mixup = build.make_mixup(recipe(mixup=0.2, cutmix=0.0, mix_prob=0.25, label_smoothing=0.3))
    assert mixup is not None
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.2, 0.0)
    assert (mixup.mix_prob, mixup.label_smoothing) == (0.25, 0.3)
    assert not recipe(mix_prob=0.0).mixes


@pytest.mark.parametrize(("mixup", "smoothing"), [(0.2, 0.0), (0.0, 0.1)])
def test_labels_are_smoothed_once_by_mixing_or_by_the_loss(mixup: float, smoothing: float) -> None:
    task = make_task(recipe(mixup=mixup, cutmix=0.0, label_smoothing=0.1))
    assert task.make_criterion().label_smoothing == smoothing


def test_biases_and_norms_have_no_weight_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for nesterov in (True, False):
        optimizer = build.make_optimizer(recipe(nesterov=nesterov), model)
        decayed = [p for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
        assert [p.ndim for p in decayed] == [4]
        assert optimizer.defaults["nesterov"] is nesterov


def test_all_parameters_have_weight_decay_on_demand() -> None:
    everything = {"optimizer_args": {"filter_bias_and_bn": False}}
    net = smp.Unet("tu-test_resnet", encoder_weights=None)
    scenes = {"name": "a.b", "model": "unet", "dataset": "camvid", "crop_size": [32, 32], "weight_decay": 0.01}
    for settings, model in (
        (recipe(**everything), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))),
        (make_recipe({**scenes, **everything}), net),
        (make_recipe({**scenes, **everything, "encoder_lr": 0.1}), net),
    ):
        groups = build.make_optimizer(settings, model).param_groups
        assert {group["weight_decay"] for group in groups} == {settings.weight_decay}
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_what_a_vit_exempts_is_exempt_as_an_encoder_too() -> None:
    values = {"name": "a.b", "model": "unet", "dataset": "camvid", "crop_size": [32, 32], "weight_decay": 0.01}
    for encoder_lr in (1.0, 0.5):
        recipe = make_recipe({**values, "model_args": {"encoder_name": "test_vit_poolskip"}, "encoder_lr": encoder_lr})
        model = make_task(recipe).make_model()
        groups = build.make_optimizer(recipe, model).param_groups
        decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
        decays = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
        assert len(decay) == len(decays)
        exempt = [name for name in decays if name.endswith(("pos_embed", "cls_token"))]
        assert len(exempt) == 2
        assert all(decays[name] == 0 for name in exempt)
        assert decays["decoder.blocks.0.conv1.0.weight"] == 0.01


def test_a_tag_changes_nothing_of_a_recipe_s_arguments() -> None:
    values = {"name": "a.b", "dataset": "cifar10"}
    for name in ("resnet20_cifar_poolskip", "resnet20_cifar_poolskip.c10"):
        model = build.make_model(make_recipe({**values, "model": name, "model_args": {"pool_skip": {"pool_size": 4}}}))
        assert {tuple(layer.window) for layer in pool_skip_modules(model).values()} == {(4, 4)}
    for name in ("resnet18", "resnet18.a1_in1k"):
        base = build.make_model(make_recipe({**values, "model": name, "model_args": {"stem_stride": 2}}))
        assert base(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
        assert not pool_skip_modules(base)


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("vit_tiny_patch4_32_poolskip", {"num_heads": 5}, "AssertionError"),
        ("resnet18_poolskip", {"output_stride": 5}, "AssertionError"),
        ("resnet18", {"norm_layer": "foo"}, "KeyError"),
    ],
)
def test_what_timm_refuses_is_one_clear_error(model: str, arguments: dict, said: str) -> None:
    recipe = make_recipe({"name": "a.b", "model": model, "dataset": "cifar10", "model_args": arguments})
    with pytest.raises(ValueError, match=f"{model} does not take model_args=.*{said}"):
        build.make_model(recipe)


def test_steps_have_random_numbers_of_their_own() -> None:
    draws = []
    for arguments in ((1, 2, 0), (1, 2, 1), (1, 3, 0), (2, 2, 0), (1, 2, 0)):
        seed_step(*arguments)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[4]
    assert [len(set(each)) for each in zip(*draws, strict=True)] == [4, 4, 4]


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "input/output error")))
    with pytest.raises(OSError, match="input/output error"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_weights_that_overflow_float16_stay_exact(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(2)
    model.running_var.fill_(1e6)  # type: ignore[union-attr]
    model.running_mean.fill_(-1e6)  # type: ignore[union-attr]
    save_weights(tmp_path / "w.safetensors", model, torch.float16)
    saved = load_file(tmp_path / "w.safetensors")
    assert saved["running_var"].tolist() == [1e6, 1e6]
    assert saved["running_mean"].tolist() == [-1e6, -1e6]
    assert saved["weight"].dtype == torch.float16
    assert saved["num_batches_tracked"].dtype == torch.int64


def test_checkpoints_hold_no_pickled_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"bad": SimpleNamespace()})
    with pytest.raises(RuntimeError, match="cannot be read"):
        load_checkpoint(tmp_path)


class Fixed(nn.Module):
    """Returns its input's first pixels as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.was_training: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.was_training.append(self.training)
        return x.flatten(1)[:, :7] * self.scale


def test_evaluate_counts_over_uneven_batches() -> None:
    logits = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (10,), generator=torch.Generator().manual_seed(1))
    model = Fixed()
    scores = evaluate(model, [(logits[:8], labels[:8]), (logits[8:], labels[8:])])
    order = logits.argsort(1, descending=True)
    assert scores.top1 == 100 * (order[:, 0] == labels).double().mean()
    assert scores.top5 == 100 * (order[:, :5] == labels[:, None]).any(1).double().mean()
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert scores.images == 10
    assert model.training
    assert model.was_training == [False, False]
    model.frozen = nn.BatchNorm2d(1).eval()  # stays so
    evaluate(model, [(logits, labels)])
    assert model.training
    assert not model.frozen.training
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [])


def test_the_recipe_alone_says_how_gradients_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weight = torch.ones(3, requires_grad=True)
    build.make_accelerator(recipe(), cpu=True).backward(weight.sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1, 1]


def test_curves_of_a_run_whose_name_looks_like_mathematics(tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", [{"epoch": 1, "train_loss": 2.0, "lr": 0.1}], "a$x_$b, seed 0")
    assert (tmp_path / "curves.png").exists()
