"""The predictor beside an exported file: same answers as the package, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_nets import SegNet
from PIL import Image

from poolskip_zoo import export
from poolskip_zoo.cli import main
from poolskip_zoo.export import to_onnx, to_openvino
from poolskip_zoo.export.predictor import Predictor
from poolskip_zoo.inference import Classifier, read_image
from poolskip_zoo.samples import sample_paths

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NAME = "test_resnet_poolskip"
CARDS = Path(__file__).resolve().parent.parent / "hub_cards"
SEGMENTS = "deeplabv3plus_resnet18_poolskip.camvid_r180"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A classifier and its exported file."""
    import timm

    folder = tmp_path_factory.mktemp("exported")
    model = timm.create_model(NAME, num_classes=12).eval()
    # Random weights give near-equal classes: sharper ones rank without ties.
    model.get_classifier().weight.data.mul_(30)
    classifier = Classifier(model)
    from poolskip_zoo.cli.export import _of_classification
    from poolskip_zoo.cli.subject import FRESH, Subject

    facts = _of_classification(Subject("net", model, FRESH))
    facts["class_names"] = [f"class {i}" for i in range(12)]
    classifier.labels = facts["class_names"]
    to_onnx(model, torch.randn(1, *facts["input_size"]), folder / "net.onnx", metadata=facts)
    return classifier, folder, facts


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files wider, taller and smaller than the crop, of other modes, and turned."""
    folder = tmp_path_factory.mktemp("pictures")
    image = read_image(sample_paths()[0])
    files = []
    for i, size in enumerate([(300, 201), (121, 250), (40, 37), (224, 224)]):
        files.append(folder / f"{i}.png")
        image.resize(size).save(files[-1])
    files.append(folder / "palette.png")
    image.convert("P").save(files[-1])
    files.append(folder / "16 bits.png")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(files[-1])
    files.append(folder / "32 bits.tif")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257).save(files[-1])
    files.append(folder / "turned.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90° to show
    image.resize((300, 201)).save(files[-1], exif=exif)
    return files


def same(got, expected):
    assert [label for label, _ in got[:5]] == [label for label, _ in expected[:5]]
    np.testing.assert_allclose([p for _, p in got], [p for _, p in expected], rtol=1e-3, atol=1e-5)


RUNTIMES = [
    "onnxruntime",
    pytest.param(
        "openvino",
        marks=pytest.mark.skipif(
            torch.__version__.startswith("2.6."), reason="OpenVINO wants ranks that torch 2.6 does not write into ONNX"
        ),
    ),
]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_same_ranking(exported, pictures, runtime):
    pytest.importorskip(runtime)
    classifier, folder, _ = exported
    predictor = Predictor(folder / "net.onnx", runtime)
    for picture, expected in zip(pictures, classifier([read_image(each) for each in pictures]), strict=True):
        same(predictor(picture), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_mode": "squash"},
        {"crop_pct": 1.0},
        {"interpolation": "bilinear"},
        {"input_size": [3, 96, 64]},
        {"input_size": [3, 96, 64], "crop_mode": "squash", "interpolation": "nearest"},
    ],
    ids=str,
)
def test_prepares_images_as_timm(exported, pictures, change):
    from timm.data import create_transform

    _, folder, facts = exported
    predictor = Predictor(folder / "net.onnx")
    predictor.metadata.update(change)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{key: {**facts, **change}[key] for key in keys})
    for picture in pictures:
        image = read_image(picture)
        got = predictor._normalise(predictor._crop(image))[0]
        torch.testing.assert_close(torch.from_numpy(got), transform(image), rtol=0, atol=1e-6)


WITHOUT_TORCH = """
import json, sys
for name in ("torch", "torchvision", "timm", "poolskip_zoo", "onnx"):
    sys.modules[name] = None
from poolskip_predictor import Predictor
print(json.dumps([Predictor(sys.argv[1], sys.argv[2])(path) for path in sys.argv[3:]]))
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runs_without_torch(exported, pictures, runtime):
    pytest.importorskip(runtime)
    classifier, folder, _ = exported
    command = [sys.executable, "-c", WITHOUT_TORCH, "net.onnx", runtime, *map(str, pictures)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    expected = classifier([read_image(each) for each in pictures])
    for got, ranked in zip(json.loads(done.stdout.splitlines()[-1]), expected, strict=True):
        same(got, ranked)


def test_on_the_command_line(exported, pictures):
    classifier, folder, _ = exported
    command = [sys.executable, folder / "poolskip_predictor.py", folder / "net.onnx", pictures[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    label, share = classifier([read_image(pictures[0])])[0][0]
    assert done.stdout.startswith(f"{pictures[0]}: {label} {share:.1%}, "), done.stderr
    assert "usage: python" in subprocess.run(command[:2], capture_output=True, text=True).stderr


def test_masks_and_openvino_files(tmp_path, pictures):
    pytest.importorskip("openvino")
    torch.manual_seed(0)  # of another net two classes may be all but equal at some pixel
    model = SegNet().eval()
    facts = {"task": "segmentation", "input_size": [3, 48, 32], "mean": [0.5] * 3, "std": [0.2] * 3}
    facts.update(interpolation="bilinear", crop_pct=1.0, class_names=["a", "b", "c"])
    to_openvino(model, torch.randn(1, 3, 48, 32), tmp_path / "net.xml", metadata=facts)
    mask = Predictor(tmp_path / "net.xml")(pictures[0])
    image = read_image(pictures[0]).resize((32, 48), Image.Resampling.BILINEAR)
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.2
    classes = model(x)[0].argmax(0).to(torch.float32)[None, None]
    # Pillow and torch both take the source cell in which the middle of the target cell lies.
    expected = torch.nn.functional.interpolate(classes, (201, 300), mode="nearest-exact")[0, 0]
    assert mask.shape == (201, 300)
    assert set(np.unique(mask)) <= {0, 1, 2}
    assert (torch.from_numpy(mask.copy()) == expected).float().mean() > 0.995


def test_a_mask_of_one_channel_is_where_that_is_above_zero(exported):
    predictor = Predictor(exported[1] / "net.onnx")
    predictor.metadata.update(task="segmentation", input_size=[3, 2, 2])
    predictor._run = lambda array: [np.array([[[[1.0, -1.0], [-1.0, 2.0]]]], np.float32)]
    assert predictor(Image.new("RGB", (4, 2))).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    predictor.metadata.update(threshold=0.5)
    predictor._run = lambda array: [np.array([[[[0.9, 0.1]], [[0.6, 0.4]], [[0.2, 0.3]]]], np.float32)]
    masks = predictor(Image.new("RGB", (2, 1)))  # that may overlap
    assert masks.tolist() == [[[1, 0]], [[1, 0]], [[0, 0]]]


@pytest.mark.parametrize("half", [False, True])
def test_masks_of_probabilities_are_cut_at_one_half(tmp_path, half):
    facts = {"task": "segmentation", "input_size": [3, 2, 2], "mean": [0.5] * 3, "std": [0.5] * 3}
    facts.update(interpolation="bilinear", crop_pct=1.0, class_names=["white"])
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid()).eval()
    torch.nn.init.ones_(net[0].weight)
    to_onnx(net, torch.randn(1, 3, 2, 2), tmp_path / "net.onnx", half=half, metadata=facts)
    image = Image.new("RGB", (8, 2))
    image.paste("white", (0, 0, 4, 2))
    assert Predictor(tmp_path / "net.onnx")(image).tolist() == [[1] * 4 + [0] * 4] * 2
    image.save(tmp_path / "x.png")
    command = [sys.executable, "poolskip_predictor.py", "net.onnx", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "x.png: white 50.0%\n", done.stderr


def test_files_that_are_none_of_ours(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(FileNotFoundError, match=r"no such model"):
        Predictor(tmp_path / "net.onnx")
    (tmp_path / "net.pt2").touch()
    with pytest.raises(ValueError, match=r"net.pt2: expected an .onnx file, or .xml"):
        Predictor(tmp_path / "net.pt2")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    graph = model.graph
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="holds no metadata"):
        Predictor(tmp_path / "net.onnx")
    helper.set_model_props(model, {"poolskip_zoo": json.dumps({"lowering": "keys"})})
    onnx.save(model, tmp_path / "net.onnx")
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match="takes exactly 4 images at once"):
            Predictor(tmp_path / "net.onnx", runtime)
    for each in (*graph.input, *graph.output):
        each.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="how images are prepared: crop_pct, input_size"):
        Predictor(tmp_path / "net.onnx")
    prepared = {"input_size": [1, 9, 9], "mean": [0.5], "std": [0.5], "interpolation": "bilinear", "crop_pct": 1.0}
    helper.set_model_props(model, {"poolskip_zoo": json.dumps(prepared)})
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="takes images of 1 channels: expected 3, RGB"):
        Predictor(tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="runtime='tvm': expected one of onnxruntime, openvino"):
        Predictor(tmp_path / "net.onnx", "tvm")


# --- the command


def test_command(tmp_path, capsys):
    path = tmp_path / "net.onnx"
    assert main(["export", NAME, "--no-pretrained", "--size", "64", "96", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "equal to torch's to the bit" in out
    assert "largest relative error" in out
    metadata = Predictor(path).metadata
    assert metadata["input_size"] == [3, 64, 96]
    assert "checkpoint" not in metadata
    assert len(metadata["class_names"]) == 1000


def test_command_on_a_folder_and_other_formats(tmp_path):
    folder = CARDS / "resnet20_cifar_poolskip.c10"
    assert main(["export", str(folder), "--output", str(tmp_path / "net.pth")]) == 0
    extra = {"poolskip_zoo": ""}
    torch.jit.load(tmp_path / "net.pth", _extra_files=extra)
    facts = json.loads(extra["poolskip_zoo"])
    assert facts["class_names"][0] == "airplane"
    assert facts["checkpoint"] == "resnet20_cifar_poolskip.c10"
    assert main(["export", NAME, "--no-pretrained", "--size", "64", "64", "--output", str(tmp_path / "net.pt2")]) == 0
    assert (tmp_path / "net.pt2").is_file()


def test_command_on_a_segmentation_checkpoint(tmp_path, monkeypatch, capsys):
    """And the size that it prints is that of both files."""
    seen = {}

    def write(model, example, path, metadata):
        seen.update(metadata, shapes=[list(example.shape), list(model(example).shape)])
        path.write_bytes(b"0" * 100_000)
        path.with_suffix(".bin").write_bytes(b"0" * 500_000)
        return {"outputs": {"max_relative_error": 0.0, "agreement": 1.0, "inputs": []}}

    monkeypatch.setattr(export, "to_openvino", write)
    path = tmp_path / "net.xml"
    assert main(["export", SEGMENTS, "--no-pretrained", "--output", str(path)]) == 0
    assert f"{path} (0.6 MB)" in capsys.readouterr().out
    assert seen["shapes"] == [[1, 3, 192, 192], [1, 11, 192, 192]]
    assert (seen["task"], seen["input_size"], seen["class_names"][:2]) == (
        "segmentation",
        [3, 192, 192],
        ["Sky", "Building"],
    )
    assert "checkpoint" not in seen


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no_such_model"], "unknown model 'no_such_model'"),
        ([str(CARDS / SEGMENTS)], f"give its name, {SEGMENTS}, or"),
        ([NAME], f"{NAME} has no weights; --no-pretrained"),
        (
            [NAME, "--no-pretrained", "--output", "net.pt", "--half"],
            "--half: torchscript files take no such option but --dynamic",
        ),
        ([NAME, "--no-pretrained", "--output", "net.engine"], "--output net.engine: expected a name that ends in one"),
        ([NAME, "--no-pretrained", "--target", "phone"], "target='phone': expected one of onnxruntime"),
    ],
)
def test_command_errors(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
