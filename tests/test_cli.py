"""The command line: what it prints, and one line for every mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import poolskip_zoo
from poolskip_zoo import inference
from poolskip_zoo.cli import main, subject
from poolskip_zoo.cli.demo import _pooled_map
from poolskip_zoo.data import DATASETS
from poolskip_zoo.layers import max_pool_unpool2d, pool_skip_modules
from poolskip_zoo.registry.resolve import hub_cards_dir
from poolskip_zoo.registry.segmentation import create_segmentation
from poolskip_zoo.samples import sample_paths


@pytest.fixture
def untrained(monkeypatch):
    """Let `predict` and `demo` take seeded, untrained nets, so that they run without weights."""

    def build(name):
        torch.manual_seed(0)
        return poolskip_zoo.create_model("test_resnet_cifar_poolskip")

    def build_segmenter(cls, name):
        torch.manual_seed(0)
        return cls(create_segmentation("unet", {"encoder_name": "tu-test_resnet"}, 11).eval(), "camvid", 64)

    monkeypatch.setattr(inference.Classifier, "from_pretrained", classmethod(lambda cls, name: cls(build(name))))
    monkeypatch.setattr(subject, "load", lambda name, *_: subject.Subject(name, build(name), subject.FRESH))
    monkeypatch.setattr(inference.Segmenter, "from_pretrained", classmethod(build_segmenter))


def test_list_matches_globs(capsys):
    assert main(["list", "resnet50*"]) == 0
    assert capsys.readouterr().out.split() == ["resnet50_poolskip", "resnet50d_poolskip"]


def test_list_keeps_warm_starts_apart(capsys):
    assert main(["list", "resnet20_cifar", "--recipes"]) == 0
    assert capsys.readouterr().out.split() == ["resnet20_cifar.c10", "resnet20_cifar.c10_e60"]
    assert main(["list", "resnet50_poolskip", "--warm-starts"]) == 0
    assert "resnet50_poolskip.a1_in1k" in capsys.readouterr().out.split()
    assert main(["list", "--pretrained"]) == 0
    trained = capsys.readouterr().out.split()
    assert trained
    assert not any("in1k" in name for name in trained)


def test_info_json(capsys):
    assert main(["info", "resnet18_poolskip", "--json", "--no-latency"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["parameters"], facts["base"]["parameters"]) == (24_227_112, 11_689_512)
    assert 1.9 < facts["macs"] / facts["base"]["macs"] < 2.1
    assert len(facts["places"]) == 16
    assert "resnet18_poolskip.a1_in1k" in facts["warm_starts"]


def test_info_of_a_tag_is_of_its_own_images(capsys):
    """And not of those of the first tag, which the bare name stands for."""
    for name, size in (("resnet50_poolskip", 64), ("resnet50_poolskip.a1_in1k", 224)):
        assert main(["info", name, "--json", "--no-latency"]) == 0
        assert json.loads(capsys.readouterr().out)["input_size"] == [3, size, size]


def test_a_stream_without_the_sign_gets_another(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["info", "test_resnet_cifar_poolskip", "--no-latency"]) == 0
    stream.flush()
    assert b"32?32" in stream.buffer.getvalue()


def test_info_measures_latency(capsys):
    assert main(["info", "test_resnet_cifar_poolskip"]) == 0
    assert "latency" in capsys.readouterr().out


@pytest.mark.usefixtures("untrained")
def test_predict_ranks_all_images(capsys, monkeypatch):
    monkeypatch.setattr("poolskip_zoo.cli.predict._BATCH", 3)
    paths = [str(path) for path in sample_paths()]
    assert main(["predict", "any", *paths, "--top", "10", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == paths
    for line in lines:
        shares = [entry["probability"] for entry in line["classes"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("untrained")
def test_demo_draws_exports_and_compares(tmp_path, capsys):
    assert main(["demo", "--name", "tiny", "--output", str(tmp_path)]) == 0
    written = ["demo.png", "poolskip_predictor.py", "road.png", "tiny.onnx", "tiny.onnx.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    with Image.open(tmp_path / "road.png") as picture:
        assert picture.width > 3 * 480  # the scene, segments and truth, and a legend
    said = capsys.readouterr().out
    assert "the same classes in PyTorch and ONNX Runtime" in said
    assert "a road scene, its segments" in said


def test_samples_of_a_model_s_classes():
    names = [path.stem for path in sample_paths()]
    known = {data: [path.stem for path in sample_paths(DATASETS[data].labels)] for data in ("cifar10", "camvid")}
    assert (len(known["cifar10"]), known["camvid"]) == (8, [])
    tiny = sample_paths(DATASETS["tiny_imagenet_jpeg"].labels)
    assert sorted(known["cifar10"] + [path.stem for path in tiny]) == sorted(names)
    # timm has synonyms too
    assert [path.stem for path in sample_paths(["teapot, billy", "German shepherd, alsatian", "shepherd"])] == [
        "German_shepherd",
        "teapot",
    ]


@pytest.mark.parametrize("name", ["test_resnet_poolskip", "test_vit_poolskip"])
def test_demo_draws_the_map_that_is_pooled(name):
    model, x = timm.create_model(name).eval(), torch.rand(2, 3, 160, 160)
    layer, kept = next(iter(pool_skip_modules(model).values())), []
    layer.conv.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    before = _pooled_map(layer, model, x)
    assert torch.equal(max_pool_unpool2d(before, tuple(layer.window)), kept[0])


def test_demo_needs_a_model_that_knows_the_images(tmp_path, monkeypatch, capsys):
    model = timm.create_model("test_resnet_poolskip", num_classes=7)
    monkeypatch.setattr(inference.Classifier, "from_pretrained", classmethod(lambda cls, name: cls(model)))
    assert main(["demo", "--name", "seven", "--output", str(tmp_path / "new")]) == 2
    assert "seven knows none of the sample images' classes" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "vit_huge*"], "no model matches 'vit_huge*'"),
        (["list", "deeplab*"], "; with --pretrained: deeplabv3plus_resnet18_poolskip.camvid_r180"),
        (["info", "resnet51_poolskip"], "similar: resnet"),
        (
            ["info", "resnet50_poolskip.nothing"],
            "has no weights 'nothing': choose tin200_r64_cpu, a1_in1k",
        ),
        (["predict", "resnet18_poolskipp", "x.jpg"], "unknown model 'resnet18_poolskipp'"),
        (["predict", "resnet420_cifar_poolskip", "x.jpg"], "has no weights"),
        (
            ["predict", "vgg11_bn_cifar_poolskip.c10_e5", "x.jpg"],
            "`poolskip train vgg11_bn_cifar_poolskip.c10_e5`",
        ),
        (["predict", "resnet18_poolskipp", "x.jpg"], "similar: resnet18_poolskip, "),
        (["info", "resnet18.a1_in1k"], "similar: resnet18_poolskip\n"),
        (["info", "deeplabv3plus_resnet18_poolskip.camvid_r180"], "is a segmentation model"),
        (["export", "vit_tiny_patch4_32_poolskip", "--no-pretrained", "--size", "64", "64"], "--size 64 64: vit_tiny"),
        (["export", "resnet20_cifar_poolskip.nope"], "has no weights 'nope': choose c10_e60, c10"),
        (["train", "no_such_recipe"], "no_such_recipe"),
        (["validate", "resnet18_poolskip", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["list", "resnet420_cifar", "--pretrained"], "`poolskip list --pretrained` prints all"),
        (["validate", "resnet18_poolskipp"], "unknown model 'resnet18_poolskipp'"),
        (["validate", "resnet420_cifar"], "resnet420_cifar has no weights; give --checkpoint"),
        (["validate", "unet_resnet50.nothing"], "unknown model 'unet_resnet50.nothing'"),
        (["predict", "deeplabv3plus_resnet50.voc2012", "x.jpg"], "no weights of deeplabv3plus_resnet50.voc2012"),
        (["validate", "deeplabv3plus_resnet50.voc2012"], "give its run's folder"),
        (["export", "test_resnet_poolskip", "--no-pretrained", "--batch", "0", "--dynamic"], "--batch 0 must be"),
        (["export", "test_resnet_poolskip", "--no-pretrained", "--size", "64", "0"], "--size 64 0 must be"),
        (["prune", "resnet20_cifar.c10", "--dataset", "cifar11"], "unknown dataset 'cifar11': one of cifar10,"),
        (
            ["prune", "resnet20_cifar.c10", "--dataset", "camvid"],
            "one of cifar10, cifar100, cifar10_jpeg, tiny_imagenet_jpeg",
        ),
        (["train-many", "c10", "--part-size", "16"], "part_size '16' is not a number with KB, MB"),
        (["validate", "resnet20_cifar", "--overlap", "0.5"], "--window and --overlap have no meaning for it"),
        (["validate", "resnet20_cifar", "--checkpoint", "."], "checkpoint . is a folder: give the file, such as model"),
        (["demo", "--name", "resnet20_cifar"], "the model has no Pool Skip to draw"),
    ],
)
def test_mistakes_end_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("poolskip: error: ")
    assert error.count("\n") == 1
    assert said in error


def test_limits_of_a_run_are_given_in_minutes_and_steps(monkeypatch):
    seen = {}
    monkeypatch.setattr("poolskip_zoo.training.train", lambda *args, **settings: seen.update(settings))
    limits = ["--limit-minutes", "2", "--limit-steps", "5", "--checkpoint-steps", "3"]
    assert main(["train", "resnet20_cifar.c10", *limits]) == 0
    assert (seen["limit_seconds"], seen["limit_steps"], seen["checkpoint_steps"]) == (120, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--pretrained", "--warm-starts"], "not allowed with"),
        (["train", "resnet20_cifar.c10", "--limit-minutes", "-1"], "'-1' is not a number of minutes of at least 0"),
        (["train-many", "c10", "--limit-minutes", "soon"], "'soon' is not a number of minutes of at least 0"),
    ],
)
def test_wrong_options_are_argparse_s(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_unreadable_images_are_named(tmp_path, capsys, content):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    assert main(["predict", "any", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
def test_top_out_of_range(capsys):
    assert main(["predict", "any", str(sample_paths()[0]), "--top", "11"]) == 2
    assert "--top 11: expected 1 to 10" in capsys.readouterr().err


@pytest.mark.usefixtures("untrained")
def test_without_standard_error_the_output_is_as_ever(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # `2>&-`: print would take standard output in its place
    assert main(["predict", "any", str(sample_paths()[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_is_no_error(unbuffered):
    script = "import sys; from poolskip_zoo.cli import main; sys.exit(main(['list']))"
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    if not Path("/dev/full").exists():  # of Linux
        return
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "poolskip: error: [Errno 28] No space left on device\n")


def test_a_segmentation_checkpoint_s_folder_is_diagnosed(capsys):
    folder = hub_cards_dir() / "deeplabv3plus_resnet18_poolskip.camvid_r180"
    assert main(["diagnose", str(folder), "--images", "0"]) == 0
    assert "decoder" in capsys.readouterr().out
    assert main(["diagnose", folder.name, "--dataset", "cityscapes", "--data-dir", "."]) == 2
    assert "segments camvid, not 'cityscapes'" in capsys.readouterr().err
