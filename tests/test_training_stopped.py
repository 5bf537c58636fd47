"""Runs that are stopped or killed go on, and end equal to the bit to those that were not."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_training import (  # noqa: F401  the fixtures too
    EVERYTHING,
    PLAIN,
    STEPS,
    _one_thread,
    assert_equal_runs,
    data,
    finished,
    recipe,
    run_killed,
)

from poolskip_zoo.training import train
from poolskip_zoo.training.state import load_checkpoint


def test_a_run_that_grows_its_images_resumes_exactly(data: Path, tmp_path: Path) -> None:  # noqa: F811
    growing = recipe(**PLAIN, sizes=[[0, 16], [1, 24]])
    folders = [tmp_path / name / "test_resnet.tiny-s0" for name in ("whole", "parts")]
    assert train(growing, data, tmp_path / "whole", cpu=True) is not None
    for steps in (5, 5):  # in the first epoch of small images, then in that of large ones
        assert train(growing, data, tmp_path / "parts", cpu=True, limit_steps=steps) is None
    assert train(growing, data, tmp_path / "parts", cpu=True) is not None
    assert_equal_runs(*folders)


def test_killed_run_ends_equal_to_the_bit(data: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    run_killed(data, tmp_path, at=STEPS + 5)  # mid-epoch, and two steps after the last checkpoint
    folder = tmp_path / finished.name
    state = load_checkpoint(folder)
    assert state is not None
    assert (state["epoch"], state["step"]) == (1, 3)
    assert not (folder / "metrics.json").exists()
    assert train(recipe(), data, tmp_path, cpu=True) is not None
    assert_equal_runs(finished, folder)
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_sigterm_ends_a_run_with_a_checkpoint(data: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    run_killed(data, tmp_path, at=STEPS + 5, by=signal.SIGTERM)
    state = load_checkpoint(tmp_path / finished.name)
    assert state is not None
    assert (state["epoch"], state["step"]) == (1, 5)
    assert train(recipe(), data, tmp_path, cpu=True) is not None
    assert_equal_runs(finished, tmp_path / finished.name)


def test_ctrl_c_ends_a_run_with_a_checkpoint(data: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    run_killed(data, tmp_path, at=STEPS + 5, by=signal.SIGINT)
    state = load_checkpoint(tmp_path / finished.name)
    assert state is not None
    assert (state["epoch"], state["step"]) == (1, 5)


TWICE = """
import signal
from poolskip_zoo.training.signals import hold_signals

former = signal.default_int_handler
signal.signal(signal.SIGINT, former)  # ignored in what a shell runs in the background
with hold_signals() as stopped:
    assert not stopped()
    signal.raise_signal(signal.SIGINT)
    assert stopped()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("at once")
assert signal.getsignal(signal.SIGINT) is former
"""


def test_a_second_ctrl_c_is_not_held_back() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "at once\n"), done.stderr
    assert "Ctrl-C again stops at once" in done.stderr


def test_a_run_without_a_checkpoint_keeps_no_other_from_its_folder(data: Path, tmp_path: Path) -> None:  # noqa: F811
    wrong = recipe(**{**PLAIN, "epochs": 1, "model_args": {"drop_rate": 7.0}})
    with pytest.raises(ValueError, match="7"):
        train(wrong, data, tmp_path, cpu=True)
    assert train(recipe(**PLAIN, epochs=1), data, tmp_path, cpu=True, limit_steps=1) is None
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        train(recipe(**PLAIN, epochs=2), data, tmp_path, cpu=True)


def test_lost_weights_are_written_again(data: Path, tmp_path: Path) -> None:  # noqa: F811
    short = recipe(**PLAIN, epochs=1)
    metrics = train(short, data, tmp_path, cpu=True)
    path = tmp_path / "test_resnet.tiny-s0" / "model.safetensors"
    weights = path.read_bytes()
    path.unlink()
    again = train(short, data, tmp_path, cpu=True)
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}  # writing them took some, too
    assert path.read_bytes() == weights


HANDLED = """
import json, signal, sys
from pathlib import Path
import torch
from timm.utils import ModelEmaV3
from poolskip_zoo.training import make_recipe, train

torch.set_num_threads(1)
update = ModelEmaV3.update

def updated(self, *args, **kwargs):
    update(self, *args, **kwargs)
    signal.raise_signal(signal.SIGTERM)

def handler(*_):
    print("handled", (Path(sys.argv[3]) / "test_resnet.tiny-s0" / "last.pt").exists())

ModelEmaV3.update = updated
arguments = make_recipe(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]
signal.signal(signal.SIGTERM, handler)
assert train(*arguments, cpu=True) is None
assert signal.getsignal(signal.SIGTERM) is handler
signal.signal(signal.SIGTERM, signal.SIG_IGN)
assert train(*arguments, cpu=True, limit_steps=2) is None  # ignored, so not the end
"""


def test_a_handler_of_sigterm_is_called_after_the_checkpoint_is_written(data: Path, tmp_path: Path) -> None:  # noqa: F811
    command = [sys.executable, "-c", HANDLED, json.dumps(EVERYTHING), str(data), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    handled = [line for line in result.stdout.splitlines() if line.startswith("handled")]
    assert handled == ["handled True"]
    state = load_checkpoint(tmp_path / "test_resnet.tiny-s0")
    assert state is not None
    assert (state["epoch"], state["step"]) == (0, 3)


def test_trains_outside_the_main_thread(data: Path, tmp_path: Path) -> None:  # noqa: F811
    with ThreadPoolExecutor(1) as pool:  # where Python has no signals
        assert pool.submit(train, recipe(**PLAIN, epochs=1), data, tmp_path, cpu=True).result() is not None


def test_stopping_at_every_few_steps_changes_nothing(data: Path, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    calls = 0
    while train(recipe(), data, tmp_path, limit_steps=5, cpu=True) is None:
        calls += 1
    assert calls == 3  # at steps 5, 10, 15 of 16
    assert_equal_runs(finished, tmp_path / finished.name)


@pytest.mark.slow
def test_two_processes_resume_exactly_and_agree_with_one(data: Path, tmp_path: Path) -> None:  # noqa: F811
    # ResNet's BatchNorm sees half of the batch in each process: test_vit has none, and so reaches the loss of one
    vit = {**PLAIN, "model": "test_vit", "model_args": {"img_size": 32}, "ema_decay": 0.9, "lr": 0.01}
    folders = [tmp_path / name for name in ("whole", "killed", "one")]
    for folder in folders:
        folder.mkdir()
    run_killed(data, folders[0], at=0, processes=2, **vit)
    run_killed(data, folders[1], at=STEPS + 5, processes=2, **vit)
    run_killed(data, folders[1], at=2, processes=2, by=signal.SIGTERM, **vit)  # in one of the two
    run_killed(data, folders[1], at=0, processes=2, **vit)
    train(recipe(**vit), data, folders[2], cpu=True)
    name = "test_resnet.tiny-s0"
    assert_equal_runs(folders[0] / name, folders[1] / name)
    histories = [load_checkpoint(folder / name)["history"] for folder in (folders[0], folders[2])]  # type: ignore[index]
    for two, one in zip(*histories, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
