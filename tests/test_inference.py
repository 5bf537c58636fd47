"""Classifying and segmenting images: names of classes, types, and what is refused."""

import re

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf

from poolskip_zoo.inference import Classifier, Segmenter, load_model, read_image, segment
from poolskip_zoo.registry import resolve

IMAGE = Image.effect_noise((40, 50), 90).convert("RGB")


def test_class_names_are_of_the_head_that_there_is():
    labels = Classifier(timm.create_model("resnet20_cifar_poolskip", pretrained=True)).labels
    assert (labels[0], len(labels)) == ("airplane", 10)
    for classes in (5, 20):
        fresh = Classifier(timm.create_model("resnet20_cifar_poolskip", pretrained=True, num_classes=classes))
        assert fresh.labels == [str(i) for i in range(classes)]
        assert len(fresh([IMAGE])[0]) == classes
    assert Classifier(timm.create_model("test_resnet_poolskip")).labels[0].startswith("tench")
    fall = timm.create_model("vit_tiny_patch16_224_poolskip.augreg_in21k", depth=1)
    assert len(Classifier(fall).labels) == fall.num_classes == 21843
    assert not Classifier(fall).labels[0].isdigit()


def test_a_classifier_does_not_train():
    assert not Classifier(timm.create_model("test_resnet_cifar_poolskip").train()).model.training


def test_half_precision():
    model = timm.create_model("resnet20_cifar_poolskip", pretrained=True)
    expected = Classifier(model)([IMAGE])[0][0]
    label, probability = Classifier(model.bfloat16())([IMAGE])[0][0]
    assert label == expected[0]
    assert probability == pytest.approx(expected[1], abs=0.05)
    net = torch.nn.Conv2d(3, 11, 1)
    (labels,), (half,) = (Segmenter(each, "camvid")([IMAGE]) for each in (net, net.bfloat16()))
    assert (labels == half).float().mean() > 0.9


def test_a_model_of_other_classes_is_no_segmenter_of_the_data_set():
    with pytest.raises(ValueError, match=r"the model has 1 classes, CamVid .* has 11"):
        Segmenter(torch.nn.Conv2d(3, 1, 1), "camvid")([IMAGE])


def test_a_model_with_a_classifier_beside_segments():
    class WithLabels(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x.mean((2, 3))

    net = WithLabels(3, 11, 1)
    images = torch.rand(1, 3, 40, 50)
    torch.testing.assert_close(segment(net, images, (40, 50), (32, 32)), net(images)[0])


def test_images_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90° to show
    IMAGE.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").size == IMAGE.size[::-1]


def test_sixteen_bits_are_no_white_picture(tmp_path):
    grey = np.asarray(IMAGE.convert("L"))
    for name, values in (("16.png", grey.astype(np.uint16) * 257), ("32.tif", grey.astype(np.int32) * 257)):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(np.asarray(read_image(tmp_path / name))[..., 0], grey), name


def test_what_is_no_image_is_named(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    IMAGE.save(whole)
    cut.write_bytes(whole.read_bytes()[:500])
    for path in (cut, tmp_path, whole):
        if path == whole:  # Pillow's guard against decompression bombs has a class of its own
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
        with pytest.raises(ValueError, match=f"{path} is not a readable image: "):
            read_image(path)
    monkeypatch.undo()
    assert read_image(whole).size == IMAGE.size
    (tmp_path / "odd.dds").write_bytes(b"DDS " + bytes([124, 0, 0, 0]) + bytes(120))
    with pytest.raises(ValueError, match=r"odd\.dds is not a readable image: "):
        read_image(tmp_path / "odd.dds")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18_poolskipp", "unknown model 'resnet18_poolskipp'"),
        ("resnet20_cifar_poolskip.nope", "has no weights 'nope': choose c10_e60, c10"),
        ("test_resnet_poolskip.nope", "has no weights 'nope': it has none"),
        ("resnet420_cifar", "resnet420_cifar has no weights; `poolskip list --pretrained` prints"),
        ("local-dir:bert", "config.json is not a timm configuration: it names no architecture"),
        ("local-dir:list", "config.json is not a timm configuration: it names no architecture"),
        ("local-dir:cut", "config.json is not valid JSON: "),
        ("local-dir:none", "config.json cannot be read: No such file"),
    ],
)
def test_models_that_there_are_not(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, text in {"bert": '{"model_type": "bert"}', "list": "[]", "cut": '{"architecture": '}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_model(name)


def test_a_hub_out_of_reach_is_told_at_once_of_timm_s_models_too(monkeypatch, tmp_path):
    def offline():
        raise ConnectionError("no route")

    monkeypatch.setattr(resolve, "_connect", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"cannot get timm's weights for resnet18.a1_in1k .* no route"):
        load_model("resnet18.a1_in1k")


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_of_windows_out_of_range(overlap):
    with pytest.raises(ValueError, match=f"overlap={overlap}: expected 0 to 0.9"):
        segment(torch.nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 64, 64), (64, 64), (32, 32), overlap)


@pytest.mark.parametrize(
    ("length", "window", "overlap", "steps"), [(64, 32, 0.9, 10), (128, 32, 0.8, 15), (65, 32, 0, 2)]
)
def test_windows_are_no_more_than_the_overlap_asks(length, window, overlap, steps):
    rows = []
    model = torch.nn.Conv2d(1, 1, 1)
    model.register_forward_hook(lambda _, inputs, __: rows.append(int(inputs[0][0, 0, 0, 0])))
    images = torch.arange(float(length)).expand(1, 1, 32, length)
    segment(model, images, (32, length), (32, window), overlap)
    assert rows == [round(place * (length - window) / steps) for place in range(steps + 1)]


@pytest.mark.parametrize("window", [(0, 32), (32,)])
def test_a_window_that_is_none(window):
    with pytest.raises(ValueError, match=re.escape(f"window={window}: expected height and width in pixels")):
        segment(torch.nn.Conv2d(3, 2, 1), torch.zeros(1, 3, 64, 64), (64, 64), window)


def test_a_model_of_other_channels_is_refused_and_a_folder_is_a_name(tmp_path):
    for channels in (1, 3):
        save_for_hf(timm.create_model("test_resnet_cifar_poolskip", in_chans=channels), tmp_path / str(channels))
    assert len(Classifier.from_pretrained(str(tmp_path / "3")).labels) == 10
    with pytest.raises(ValueError, match="PoolSkipCifarResNet takes 1 channels: images are read as RGB"):
        Classifier.from_pretrained(str(tmp_path / "1"))
