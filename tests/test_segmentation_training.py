"""Segmentation in the same loop: exact resume, records, and from a run to a checkpoint and its pictures."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file
from test_segmentation_data import VOID, write_camvid
from test_training import EVERYTHING, assert_equal_runs, call, run_killed

from poolskip_zoo.cli import hub as hub_verb
from poolskip_zoo.cli import main
from poolskip_zoo.cli import predict as predict_verb
from poolskip_zoo.cli import validate as validate_verb
from poolskip_zoo.data.scene_loader import SceneEvalLoader
from poolskip_zoo.data.scenes import load_scenes
from poolskip_zoo.hub.card import check_front_matter
from poolskip_zoo.hub.verify import FILES, verify_folder
from poolskip_zoo.inference import Segmenter, draw_segments, segment
from poolskip_zoo.registry import checkpoint as checkpoint_module
from poolskip_zoo.registry import resolve
from poolskip_zoo.training import build, train
from poolskip_zoo.training import recipe as recipe_module
from poolskip_zoo.training.many import train_many
from poolskip_zoo.training.recipe import Recipe, make_recipe
from poolskip_zoo.training.state import load_checkpoint
from poolskip_zoo.training.task import make_task

NAME = "unet_test_resnet_poolskip.tiny"
# Everything that draws random numbers is on: order, scale, crop, flip, jitter, dropout.
SETTINGS: dict[str, Any] = {
    "name": NAME,
    "model": "unet",
    "model_args": {"encoder_name": "test_resnet_poolskip", "decoder_channels": [32, 16, 16, 8, 8], "drop_rate": 0.1},
    "dataset": "camvid",
    "hold_out": -1,
    "image_size": 32,
    "epochs": 2,
    "batch_size": 2,
    "lr": 0.05,
    "encoder_lr": 0.5,
    "scheduler": "poly",
    "loss": "ce+dice",
    "class_weights": "balanced",
    "label_smoothing": 0.05,
    "ema_decay": 0.9,
    "crop_size": [32, 32],
    "scale": [0.8, 1.25],
    "color_jitter": 0.2,
    "flip": True,
    "precision": "bf16",
    "channels_last": True,
}
STEPS = 6  # per epoch: 12 images


def recipe(**change: Any) -> Recipe:
    return make_recipe({**SETTINGS, **change})


# What `run_killed` sets for classification, put back.
AS_SEGMENTATION = {**{key: getattr(recipe(), key) for key in EVERYTHING}, **SETTINGS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_camvid(folder)
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert train(recipe(), data, output, cpu=True) is not None
    return output / f"{NAME}-s0"


def test_killed_run_ends_equal_to_the_bit(data: Path, finished: Path, tmp_path: Path) -> None:
    run_killed(data, tmp_path, at=STEPS + 5, **AS_SEGMENTATION)
    folder = tmp_path / finished.name
    state = load_checkpoint(folder)
    assert state is not None
    assert (state["epoch"], state["step"]) == (1, 3)
    assert train(recipe(), data, tmp_path, cpu=True) is not None
    assert_equal_runs(finished, folder)


@pytest.mark.slow  # a minute or two: pytest -m slow -o addopts="" tests/test_segmentation_training.py
def test_two_processes_resume_exactly_and_score_as_one(data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, at in ((whole, 0), (parts, 5), (parts, 0)):  # 3 steps per epoch
        folder.mkdir(exist_ok=True)
        run_killed(data, folder, at=at, processes=2, **{**AS_SEGMENTATION, "batch_size": 4, "precision": "fp32"})
    assert_equal_runs(whole / f"{NAME}-s0", parts / f"{NAME}-s0")
    state = load_checkpoint(whole / f"{NAME}-s0")
    assert state is not None
    task = make_task(recipe())
    model = task.make_model()
    model.load_state_dict(state["ema"])
    loader = SceneEvalLoader(
        load_scenes("camvid", ("val",), data, hold_out=-1)[0], image_size=32, mean=task.info.mean, std=task.info.std
    )
    scores = task.evaluate(model.eval(), loader)
    row = state["history"][-1]
    assert (row["val_miou"], row["val_pixel_accuracy"]) == pytest.approx((scores.miou, scores.pixel_accuracy))
    assert row["val_loss"] == pytest.approx(scores.loss, rel=1e-5)


def test_stopping_at_every_few_steps_changes_nothing(data: Path, finished: Path, tmp_path: Path) -> None:
    calls = 0
    while train(recipe(), data, tmp_path, limit_steps=4, cpu=True) is None:
        calls += 1
    assert calls == 2  # at steps 4 and 8 of 12
    assert_equal_runs(finished, tmp_path / finished.name)


@pytest.fixture(scope="module")
def learnt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learns: nothing averaged, nothing rounded."""
    output = tmp_path_factory.mktemp("learnt")
    change = {"ema_decay": 0.0, "precision": "fp32", "save_dtype": "float32", "epochs": 6, "encoder_lr": 1.0}
    assert train(recipe(**change), data, output, cpu=True) is not None
    return output / f"{NAME}-s0"


def test_a_run_learns_and_leaves_its_records(learnt: Path) -> None:
    metrics = json.loads((learnt / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["val"]["miou"] > 50  # chance on three classes: below 20
    assert metrics["val"]["images"] == 4
    assert [value is None for value in metrics["val"]["class_iou"]].count(False) >= 3
    rows = [json.loads(line) for line in (learnt / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[5]["train_loss"] < rows[0]["train_loss"]
    assert rows[5]["val_miou"] == metrics["val"]["miou"]
    assert {"val_loss", "val_pixel_accuracy"} <= set(rows[0])
    assert "val_top1" not in rows[0]
    assert (learnt / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_folder_is_a_folder_of_smp(data: Path, learnt: Path) -> None:
    ours = make_task(recipe()).make_model(trained=True)
    ours.load_state_dict(load_file(learnt / "model.safetensors"))
    theirs = smp.from_pretrained(str(learnt)).eval()
    x = torch.rand(1, 3, 64, 32)
    with torch.inference_mode():
        assert torch.equal(theirs(x), ours.eval()(x))
    assert json.loads((learnt / "config.json").read_text(encoding="utf-8"))["encoder_weights"] is None


def test_a_list_of_runs_may_hold_segmentation(data: Path, tmp_path: Path) -> None:
    change = {"epochs": 1, "ema_decay": 0.0, "class_weights": "none", "loss": "ce"}

    def measure(folder: Path) -> dict[str, Any]:
        return validate_verb.measure_run(folder, str(data))

    (outcome,) = train_many([recipe(**change)], data, tmp_path, cpu=True, measure=measure)
    assert (outcome.state, outcome.error) == ("finished", "")
    assert outcome.scores is not None
    assert (outcome.scores["name"], outcome.scores["images"]) == (NAME, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "unett"}, "unknown segmentation model 'unett': one of unet, "),
        ({"model_args": {"encoder_name": "resnet19"}}, "unet does not take model_args=.*resnet19"),
        ({"model_args": {"encoder_name": 5}}, "encoder_name=5: expected a name"),
        ({"model_args": {"encoder_depht": 3}}, "unet on resnet34 does not take model_args encoder_depht"),
        ({"batch_size": 16}, "batch_size=16 is larger than the 12 training images"),
        ({"hold_out": 12}, "hold_out=12 must be"),
    ],
)
def test_errors_before_training_leave_no_folder(data: Path, tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(**change), data, tmp_path / "runs", cpu=True)
    assert not (tmp_path / "runs").exists()


# --- optimizer


def test_encoder_has_its_own_rate_at_every_update() -> None:
    model = smp.Unet("tu-test_resnet", encoder_weights=None)
    settings = recipe(lr=0.1, encoder_lr=0.1, epochs=10, weight_decay=0.01)
    optimizer = build.make_optimizer(settings, model)
    schedule = build.make_scheduler(settings, optimizer, 10)
    encoder = {id(parameter) for parameter in model.encoder.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for update, rate in ((0, 0.1), (50, 0.1 * 0.5**0.9), (90, 0.1 * 0.1**0.9)):
        schedule.step_update(update)
        for group in optimizer.param_groups:
            inside = {id(parameter) in encoder for parameter in group["params"]}
            assert len(inside) == 1
            assert group["lr"] == pytest.approx(rate * (0.1 if inside.pop() else 1))
            assert group["weight_decay"] == (0.01 if group["params"][0].ndim > 1 else 0)


# --- from a run to a checkpoint


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Path) -> None:
    """The tiny run's recipe, as if it were shipped; an empty hub_cards/."""
    from poolskip_zoo.hub import card

    folder = tmp_path / "shipped" / "recipes"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.yaml").write_text((learnt / "recipe.yaml").read_text(encoding="utf-8"))
    monkeypatch.setattr(recipe_module, "RECIPE_DIR", folder)
    monkeypatch.setattr(card, "files", lambda package: folder.parent)
    (tmp_path / "hub_cards").mkdir()
    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: tmp_path / "hub_cards")


@pytest.mark.usefixtures("shipped")
def test_from_a_run_to_a_checkpoint(
    data: Path, learnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from poolskip_zoo.registry.checkpoint import SegmentationCheckpoint

    arguments = (NAME, "--checkpoint", learnt / "model.safetensors", "--data-dir", data)
    assert call(validate_verb, *arguments, "--json") == 0
    text = capsys.readouterr().out
    scores = json.loads(text)
    assert (scores["dataset"], scores["images"]) == ("camvid", 4)
    assert scores["class_iou"]["Road"] > 50
    assert scores["miou"] == pytest.approx(np.mean([v for v in scores["class_iou"].values() if v is not None]))
    assert call(validate_verb, *arguments, "--window", 32, 32, "--overlap", 0) == 0
    shown = capsys.readouterr().out
    assert "CamVid (SegNet's split), 4 test images: mIoU" in shown
    assert f"mIoU {scores['miou']:.2f} %" not in shown  # other windows, other scores

    image = Image.fromarray(load_scenes("camvid", ("test",), data)[0].items[0][0].permute(1, 2, 0).numpy())
    image.save(tmp_path / "street.png")
    assert call(predict_verb, learnt, tmp_path / "street.png", "--output", tmp_path) == 0
    assert "street_segmented.png" in capsys.readouterr().out
    (tmp_path / "scores.json").write_text(json.dumps({**scores, "window": [32, 32]}))
    with pytest.raises(ValueError, match=r"measured with window=\[32, 32\], the recipe has \[\]"):
        call(hub_verb, "add", learnt, "--scores", tmp_path / "scores.json")
    (tmp_path / "scores.json").write_text(text)
    assert call(hub_verb, "add", learnt, "--scores", tmp_path / "scores.json") == 0
    source = "\n".join(line for line in capsys.readouterr().out.splitlines() if not line.startswith("#"))
    (record,) = eval(f"({source})", {"SegmentationCheckpoint": SegmentationCheckpoint})
    folder = tmp_path / "hub_cards" / NAME
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert (record.metrics["miou"], record.image_size) == (round(scores["miou"], 4), 32)
    assert (record.window, record.overlap) == ((), 0.5)
    assert record.model_args == SETTINGS["model_args"]
    verify_folder(record, folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    check_front_matter(card)
    for said in ("segmentation-models-pytorch", "image-segmentation", "random weights", "| Road |", "research use",
                 "pool-skip", "`unet_test_resnet`, not trained", f"| {scores['miou']:.2f} |"):  # fmt: skip
        assert said in card, said
    namespace: dict[str, Any] = {}
    code = card.split("```python\n")[1].partition("```")[0].replace(f"poolskip-zoo/{NAME}", str(folder))
    exec(code, namespace)
    assert namespace["logits"].shape == (1, 11, 256, 256)

    monkeypatch.setitem(checkpoint_module._CHECKPOINTS, NAME, record)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["hub", "card", NAME]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert main(["hub", "verify", NAME]) == 0
    assert main(["list", "--pretrained", NAME]) == 0
    capsys.readouterr()
    # By its name alone the checkpoint has the card's scores, and segments.
    assert call(validate_verb, NAME, "--data-dir", data, "--json") == 0
    assert json.loads(capsys.readouterr().out) == scores
    labels = Segmenter.from_pretrained(NAME)([image, image.resize((50, 33))])
    assert [tuple(each.shape) for each in labels] == [(48, 64), (33, 50)]
    # A record of a run that was measured by windows segments by them.
    monkeypatch.setitem(checkpoint_module._CHECKPOINTS, NAME, dataclasses.replace(record, window=(32, 32), overlap=0.0))
    assert not torch.equal(Segmenter.from_pretrained(NAME)([image])[0], labels[0])
    # A changed file is noticed by every way in.
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    for arguments in ((validate_verb, NAME, "--data-dir", data), (predict_verb, NAME, "x.png")):
        with pytest.raises(RuntimeError, match="not the recorded file"):
            call(*arguments)


def test_a_pool_skip_checkpoint_has_its_twin_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from poolskip_zoo.hub.card import card_text
    from poolskip_zoo.registry.checkpoint import SegmentationCheckpoint

    names = ("deeplabv3plus_resnet18", "deeplabv3plus_resnet18_poolskip")
    for name, encoder, miou in zip(names, ("tu-resnet18", "resnet18_poolskip"), (50.0, 51.5), strict=True):
        record = SegmentationCheckpoint(
            f"{name}.camvid_r180", "camvid", "0" * 64, {"miou": miou, "pixel_accuracy": 88.0}, f"{name}.camvid_r180", 0,
            "a CPU", 1.0, model="deeplabv3plus", model_args={"encoder_name": encoder}, image_size=180,
            class_iou=(*[50.0] * 10, None),
        )  # fmt: skip
        monkeypatch.setitem(checkpoint_module._CHECKPOINTS, record.name, record)
    base, variant = (card_text(checkpoint_module._CHECKPOINTS[f"{name}.camvid_r180"]) for name in names)
    for card in (base, variant):
        assert "| `deeplabv3plus_resnet18.camvid_r180` | 50.00 | 88.00 | 12.33 |" in card
        assert "| `deeplabv3plus_resnet18_poolskip.camvid_r180` | 51.50 | 88.00 | 24.87 |" in card
    assert "not to the paper" in variant
    assert "not to the paper" not in base


def test_predict_draws_an_overlay_with_a_legend(
    data: Path, learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = load_scenes("camvid", ("test",), data)[0].items[1]
    path = tmp_path / "scene.png"
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    arguments = (NAME, path, "--checkpoint", learnt / "model.safetensors", "--output", tmp_path / "out")
    assert call(predict_verb, *arguments, "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["classes"][0]["label"] == "Road"
    assert sum(entry["share"] for entry in line["classes"]) == pytest.approx(1, abs=0.2)
    picture = np.asarray(Image.open(line["overlay"]))
    assert picture.shape[0] >= 48
    assert picture.shape[1] > 64
    assert not np.array_equal(picture[:48, :64], image.permute(1, 2, 0))
    assert (picture[:, 64:] == (128, 64, 128)).all(-1).any()  # road's colour in the legend
    assert call(predict_verb, *arguments) == 0
    assert "scene_segmented.png" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--top 12: expected 1 to 11"):
        call(predict_verb, *arguments, "--top", 12)
    with pytest.raises(ValueError, match=r"two images named scene would share an overlay"):
        call(predict_verb, NAME, path, *arguments[1:])
    with pytest.raises(ValueError, match=f"was trained as '{NAME}', not 'unet'"):
        call(predict_verb, "unet", *arguments[1:])


def test_void_is_left_uncoloured() -> None:
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    labels = torch.full((8, 8), VOID, dtype=torch.uint8)
    labels[:4] = 0
    picture = np.asarray(draw_segments(image, [labels, labels], ["a"] * 11, [(250, 0, 0)] * 11))
    assert (picture[4:8, :16] == (10, 200, 30)).all()
    assert (picture[:4, :16, 0] > 100).all()
    assert picture.shape[1] > 16


def test_a_segmenter_sees_what_an_evaluation_sees(data: Path, learnt: Path) -> None:
    model = smp.from_pretrained(str(learnt)).eval()
    scenes = load_scenes("camvid", ("test",), data)[0]
    info = Segmenter(model, "camvid", 32).info
    loader = SceneEvalLoader(scenes, image_size=32, mean=info.mean, std=info.std)
    ((batch, labels),) = loader
    with torch.inference_mode():
        expected = segment(model, batch, labels.shape[1:]).argmax(1)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in scenes.items]
    # Made ready here: smp's models come in training mode.
    found = torch.stack(Segmenter(model.train(), "camvid", 32)(images)).long()
    assert (found == expected).float().mean() > 0.999
    with pytest.raises(ValueError, match="'cifar10' is not a segmentation data set: expected one of camvid"):
        Segmenter(model, "cifar10")
