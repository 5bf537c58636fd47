"""Training: errors that leave nothing half-written, evaluation, the two commands."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_data import encode, write_pack

from poolskip_zoo.cli import train as train_verb
from poolskip_zoo.cli import validate as validate_verb
from poolskip_zoo.data import EvalLoader, load_split
from poolskip_zoo.registry.resolve import sha256_of
from poolskip_zoo.training import build, evaluate, loop, train
from poolskip_zoo.training.recipe import Recipe, make_recipe
from poolskip_zoo.training.state import load_checkpoint, open_folder
from poolskip_zoo.training.task import Classification

# Everything that draws random numbers is on: order, crop, flip, erasing, mixup, dropout.
EVERYTHING: dict[str, Any] = {
    "name": "test_resnet.tiny",
    "model": "test_resnet",
    "model_args": {"drop_rate": 0.2},
    "dataset": "cifar10_jpeg",
    "hold_out": 40,
    "image_size": 32,
    "epochs": 2,
    "batch_size": 32,
    "accumulation": 2,
    "lr": 0.05,
    "warmup_epochs": 0.5,
    "mixup": 0.2,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "clip_grad": 1.0,
    "crop_padding": 2,
    "flip": True,
    "random_erasing": 0.3,
    "precision": "bf16",
    "channels_last": True,
}
STEPS = 8  # per epoch: 260 images in batches of 32


def recipe(**change: Any) -> Recipe:
    return make_recipe({**EVERYTHING, **change})


PLAIN = {
    "model_args": {},
    "accumulation": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.0,
    "random_erasing": 0.0,
    "precision": "fp32",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten colours with noise: learnable in a few steps."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    colours = rng.integers(40, 216, (10, 1, 1, 3))

    def part(per_class: int) -> tuple[list[bytes], list[int]]:
        labels = [label for label in range(10) for _ in range(per_class)]
        noise = rng.normal(0, 20, (len(labels), 32, 32, 3))
        pixels = np.clip(colours[labels] + noise, 0, 255).astype(np.uint8)
        return [encode(image) for image in pixels], labels

    write_pack(folder / "cifar10_jpeg.npz", train=part(30), test=part(10))
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert train(recipe(), data, output, cpu=True) is not None
    return output / "test_resnet.tiny-s0"


def assert_equal_runs(one: Path, two: Path) -> None:
    """Compare parameters, BatchNorm statistics, EMA, optimizer and losses to the bit."""
    first, second = load_checkpoint(one), load_checkpoint(two)
    assert first is not None
    assert second is not None

    def compare(a: Any, b: Any, path: str) -> None:
        assert type(a) is type(b), path
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for key in a:
                if key not in ("seconds", "images_per_second"):
                    compare(a[key], b[key], f"{path}/{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), path
            for place, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{path}/{place}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), path
        else:
            assert a == b, path

    compare(first, second, "")
    weights, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert all(torch.equal(weights[key], others[key]) for key in weights)


KILLED = """
import json, os, signal, sys
import torch
from timm.utils import ModelEmaV3
from poolskip_zoo.training import make_recipe, train

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
torch.set_num_threads(1)
updates, update = 0, ModelEmaV3.update

def killing(self, *args, **kwargs):
    global updates
    update(self, *args, **kwargs)
    updates += 1
    if updates == int(sys.argv[4]) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), int(sys.argv[5]))

ModelEmaV3.update = killing
train(make_recipe(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3], checkpoint_steps=3, cpu=True)
"""


def run_killed(
    data: Path, output: Path, at: int, processes: int = 1, by: signal.Signals = signal.SIGKILL, **change: Any
) -> None:
    script = output / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    settings = json.dumps({**EVERYTHING, **change})
    command = [sys.executable, *launcher, str(script), settings, str(data), str(output), str(at), str(int(by))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if at:
        assert result.returncode == (1 if processes > 1 else -by), result.stderr
    else:
        assert result.returncode == 0, result.stderr


def test_a_run_learns_and_leaves_its_records(data: Path, tmp_path: Path) -> None:
    metrics = train(recipe(**PLAIN, epochs=3, save_dtype="float32"), data, tmp_path, cpu=True)
    folder = tmp_path / "test_resnet.tiny-s0"
    assert metrics is not None
    assert metrics["val"]["top1"] > 50  # chance: 10
    assert metrics["val"]["images"] == 40
    assert metrics == json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert {"torch", "timm", "accelerate", "poolskip-zoo"} <= set(metrics["versions"])
    assert "CPU" in metrics["hardware"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[2]["train_loss"] < rows[0]["train_loss"]
    assert rows[2]["val_top1"] == metrics["val"]["top1"]  # float32 weights, float32 evaluation: the same numbers
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert not list(folder.glob(".*"))  # no temporary files
    import timm

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in loaded.state_dict().items())


def test_saved_weights_are_the_moving_average_in_float16(finished: Path) -> None:
    state, saved = load_checkpoint(finished), load_file(finished / "model.safetensors")
    assert state is not None
    assert saved.keys() == state["ema"].keys()
    for key, value in state["ema"].items():
        assert torch.equal(saved[key], value.half() if value.is_floating_point() else value)
    assert not torch.equal(
        state["ema"]["conv1.0.weight" if "conv1.0.weight" in saved else "conv1.weight"],
        state["model"]["conv1.0.weight" if "conv1.0.weight" in saved else "conv1.weight"],
    )


def test_finished_run_is_not_trained_again_but_starts_over_on_demand(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    before = (finished / "last.pt").stat().st_mtime_ns
    metrics = train(recipe(), data / "nowhere", finished.parent, cpu=True)
    assert metrics == json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    assert (finished / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"holds a run of another recipe \(lr 0.05 -> 0.1\): .*--no-resume"):
        train(recipe(lr=0.1), data, finished.parent, cpu=True)
    folder = tmp_path / finished.name
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe(lr=0.3).to_yaml())
    (folder / "last.pt").write_bytes(b"damaged")
    (folder / "diagnosis.json").write_text("{}")  # of the study: it tells of the weights that go
    (folder / "notes.txt").write_text("a user's")
    assert train(recipe(), data, tmp_path, resume=False, limit_steps=1, cpu=True) is None
    assert (folder / "notes.txt").exists()
    assert not (folder / "diagnosis.json").exists()
    (folder / "last.pt").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"checkpoint .*last\.pt cannot be read \(.*\): start over with --no-resume"):
        train(recipe(), data, tmp_path, cpu=True)


def test_loss_that_is_not_finite_stops_with_its_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "make_mixup", lambda recipe: broken)
    calls = 0

    def broken(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        return (images * float("nan") if calls == 2 * (STEPS + 3) else images), labels

    with pytest.raises(RuntimeError, match=f"the loss is nan at epoch 2, step 3 of {STEPS}"):
        train(recipe(), data, tmp_path, cpu=True)
    state = load_checkpoint(tmp_path / "test_resnet.tiny-s0")
    assert state is not None
    assert (state["epoch"], state["step"]) == (1, 0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_ends_clearly_and_keeps_the_last_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert train(recipe(), data, tmp_path, limit_steps=3, cpu=True) is None
    folder = tmp_path / "test_resnet.tiny-s0"
    before = (folder / "last.pt").read_bytes()
    sync = os.fsync

    def full(descriptor: int) -> None:
        if "last.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    said = r"no space left on the disk to write .*last\.pt; the last checkpoint .* intact"
    with pytest.raises(RuntimeError, match=said):
        train(recipe(), data, tmp_path, limit_steps=3, cpu=True)
    assert (folder / "last.pt").read_bytes() == before
    assert not list(folder.glob(".*"))
    monkeypatch.undo()
    assert train(recipe(), data, tmp_path, limit_steps=3, cpu=True) is None


def test_one_process_at_a_time_trains_in_a_folder(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test_resnet.tiny-s0"
    lock = open_folder(folder, resume=True)
    assert lock is not None
    (folder / ".tmp1").mkdir()
    (folder / ".tmp1" / "last.pt").write_text("half-written by a killed process")
    with pytest.raises(RuntimeError, match=r"another process trains in .*tiny-s0: wait for it"):
        train(recipe(lr=0.3), data, tmp_path, resume=False, cpu=True)
    assert [path.name for path in folder.iterdir()] == [".tmp1"]
    os.close(lock)
    for _ in range(2):  # the first call lets the second in
        assert train(recipe(), data, tmp_path, limit_steps=1, cpu=True) is None
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({}, "nowhere", "data folder .*nowhere does not exist"),
        ({"model": "test_resnett"}, "", "unknown model 'test_resnett'; similar: test_resnet"),
        ({"model_args": {"drop_rat": 1}}, "", "test_resnet does not take model_args="),
        ({"optimizer": "sdg"}, "", "unknown optimizer 'sdg'"),
        ({"optimizer": "adahessian"}, "", "unknown optimizer 'adahessian'"),
        ({"optimizer_args": {"beta": 1}}, "", "no optimizer sgd with optimizer_args="),
        ({"batch_size": 512}, "", "batch_size=512 is larger than the 260 training images"),
        ({"batch_size": 34, "accumulation": 2}, "", "need an even batch per forward pass, not 17"),
        ({"hold_out": 300}, "", "hold_out=300 must be"),
    ],
)
def test_errors_before_training_leave_no_folder(
    data: Path, tmp_path: Path, change: dict, where: str, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe(**change), data / where, tmp_path / "runs", cpu=True)
    assert not (tmp_path / "runs").exists()


def test_switches_of_torch_are_as_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.set_deterministic_debug_mode("warn")
    try:
        for deterministic in (False, True):
            with pytest.raises(FileNotFoundError):
                train(recipe(deterministic=deterministic), data / "nowhere", tmp_path, cpu=True)
            assert torch.get_deterministic_debug_mode() == 1
            assert not torch.backends.cudnn.benchmark
    finally:
        torch.set_deterministic_debug_mode("default")


def test_one_process_fetches_the_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def first(self: Accelerator) -> Iterator[None]:
        order.append("one process")
        yield
        order.append("the others")

    def load(self: Classification, *args: object) -> tuple[object, None]:
        order.append("loads")
        return SimpleNamespace(steps=1), None

    monkeypatch.setattr(Accelerator, "local_main_process_first", first)
    monkeypatch.setattr(Classification, "make_loaders", load)
    monkeypatch.setattr(loop._Run, "fit", lambda *args: False)
    assert train(recipe(), data, tmp_path, download=True, cpu=True) is None
    assert order == ["one process", "loads", "the others"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do fp16")
def test_precision_that_the_device_lacks(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU"):
        train(recipe(precision="fp16"), data, tmp_path)


def test_accumulation_takes_the_step_of_the_whole_batch(data: Path, tmp_path: Path) -> None:
    vit = {**PLAIN, "model": "test_vit", "model_args": {"img_size": 32}, "epochs": 1, "warmup_epochs": 0}
    weights = []
    for accumulation in (1, 4):
        output = tmp_path / str(accumulation)
        train(recipe(**{**vit, "accumulation": accumulation, "save_dtype": "float32"}), data, output, cpu=True)
        weights.append(load_file(output / "test_resnet.tiny-s0" / "model.safetensors"))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)


def call(verb: Any, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize(("units", "precision"), [(False, "bf16"), (True, "bf16"), (False, "fp32")])
def test_emulated_bfloat16_is_said(
    data: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch, units: bool, precision: str
) -> None:
    monkeypatch.setattr("poolskip_zoo.training.loop.has_bf16_units", lambda: units)
    train(recipe(**{**PLAIN, "precision": precision}), data, tmp_path, cpu=True, limit_steps=1)
    assert ("this CPU emulates bfloat16" in "".join(capfd.readouterr())) == (precision == "bf16" and not units)


def test_commands(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe(**PLAIN).to_yaml())
    common = ("--data-dir", data, "--output", tmp_path / "runs", "--cpu", "--set", "seed=3")
    assert call(train_verb, path, *common, "--limit-steps", 2) == 0
    assert "stopped at the limit; the same command goes on" in capsys.readouterr().out
    assert call(train_verb, path, *common) == 0
    assert "held-out top-1" in capsys.readouterr().out
    weights = tmp_path / "runs" / "test_resnet.tiny-s3" / "model.safetensors"
    arguments = ("test_resnet", "--checkpoint", weights, "--data-dir", data)
    assert call(validate_verb, *arguments, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["dataset"], result["images"]) == ("cifar10_jpeg", 100)
    assert result["sha256"] == sha256_of(weights)

    # The run's folder says all of it; timm's scripts and `save_for_hf` leave the same weights in their own forms.
    assert call(validate_verb, weights.parent, "--data-dir", data, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {**result, "name": "test_resnet.tiny"}

    import timm

    model = timm.create_model("test_resnet", num_classes=10)
    model.load_state_dict(load_file(weights))
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    timm.models.save_for_hf(model, tmp_path / "saved")
    theirs = ("--dataset", "cifar10_jpeg", "--data-dir", data, "--json")
    for named in (("test_resnet", "--checkpoint", tmp_path / "last.pth.tar"), (tmp_path / "saved",)):
        assert call(validate_verb, *named, *theirs) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 100
    torch.save({"state_dict": model.state_dict(), "net": model}, tmp_path / "net.pth.tar")
    with pytest.raises(RuntimeError, match=r"net\.pth\.tar is not a readable checkpoint: "):
        call(validate_verb, "test_resnet", "--checkpoint", tmp_path / "net.pth.tar", *theirs)
    for content, said in ((b"", "EOFError|Ran out of input"), (b"error: 404\n", ".+")):
        (tmp_path / "net.pth.tar").write_bytes(content)
        with pytest.raises(RuntimeError, match=rf"net\.pth\.tar is not a readable checkpoint: ({said})"):
            call(validate_verb, "test_resnet", "--checkpoint", tmp_path / "net.pth.tar", *theirs)
    weights.with_name("last.pt").touch()
    with pytest.raises(ValueError, match=r"last\.pt is the state that training goes on from; the run's weights are"):
        call(validate_verb, "test_resnet", "--checkpoint", weights.with_name("last.pt"), *theirs)
    settings = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "image_size": 32}
    scores = evaluate(model, EvalLoader(load_split("cifar10_jpeg", "test", data), 64, **settings))
    assert result["top1"] == scores.top1
    assert result["loss"] == pytest.approx(scores.loss, rel=1e-4)
    assert call(validate_verb, *arguments) == 0
    assert "test_resnet on CIFAR-10 (JPEG copy), 100 test images: top-1" in capsys.readouterr().out


def test_validate_refuses_what_does_not_fit(data: Path, finished: Path, tmp_path: Path) -> None:
    weights = finished / "model.safetensors"
    common = ("--data-dir", data, "--dataset", "cifar10_jpeg")
    for error, message, arguments in (
        (ValueError, "what 'test_resnet' was trained on is unknown: give --dataset", ("test_resnet",)),
        (ValueError, "unknown dataset 'mnist'", ("test_resnet", "--dataset", "mnist")),
        (ValueError, "unknown model 'nope'", ("nope", *common)),
        (ValueError, "--batch-size 0 must be", ("test_resnet", *common, "--batch-size", 0)),
        (ValueError, "was trained as 'test_resnet', not 'test_vit'", ("test_vit", *common, "--checkpoint", weights)),
        (FileNotFoundError, "does not exist", ("test_resnet", *common, "--checkpoint", tmp_path / "no")),
    ):
        with pytest.raises(error, match=message):
            call(validate_verb, *arguments)
    copy = tmp_path / "w.safetensors"
    copy.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"w\.safetensors is not a readable safetensors file"):
        call(validate_verb, "test_resnet", *common, "--checkpoint", copy)
    copy.write_bytes(weights.read_bytes())
    with pytest.raises(RuntimeError, match=r"w\.safetensors does not fit VisionTransformer: it lacks \d+ keys"):
        call(validate_verb, "test_vit", *common, "--checkpoint", copy)
