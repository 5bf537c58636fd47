"""ONNX files: every lowering in its runtime, open and fixed sizes, and nothing left behind by a failed check."""

import json
from fnmatch import filter as matching

import pytest
import timm
import torch
import torch.nn.functional as F
from contract.common import enliven
from export_nets import PairNet, SegNet

from poolskip_zoo.export import to_exported_program, to_onnx, to_openvino, to_torchscript, verify
from poolskip_zoo.export.converted import lower_for
from poolskip_zoo.export.open_sizes import capture_open
from poolskip_zoo.export.to_onnx import Half
from poolskip_zoo.layers import PoolSkip2d, add_pool_skip, pool_skip_modules
from poolskip_zoo.registry.catalogue import registered_models

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OPEN = ("batch", "height", "width")
FILES = ("net.onnx", "net.onnx.json", "poolskip_predictor.py")


@pytest.fixture(autouse=True)
def _seed():
    """Random weights and inputs: whether a near-tie flips must not differ from run to run."""
    torch.manual_seed(0)


def run(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("options", "lowerings", "has"),
    [
        ({}, ["keys", "keys"], "Resize"),
        ({"target": "web"}, ["native", "keys"], "MaxUnpool"),
        ({"lowering": "native"}, ["native", "native"], "MaxUnpool"),
        ({"lowering": "scatter"}, ["scatter", "scatter"], "ScatterElements"),
        ({"lowering": "arith"}, ["arith", "arith"], "Min"),
        ({"target": "openvino"}, ["keys", "keys"], "Resize"),
    ],
    ids=lambda value: "-".join(value.values()) or "onnxruntime" if isinstance(value, dict) else None,
)
def test_open_sizes(tmp_path, options, lowerings, has):
    if options.get("target") == "openvino":
        pytest.importorskip("openvino")
    model, path = SegNet().eval(), tmp_path / "net.onnx"
    report = to_onnx(model, torch.randn(1, 3, 32, 32), path, dynamic=OPEN, **options)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(FILES)
    assert [block["lowering"] for block in report["blocks"]] == lowerings
    # Three kinds of numbers at three sizes; of indices one.
    assert report["bit_comparisons"] == 2 * (1 if lowerings[0] == "scatter" else 9)
    assert report["outputs"]["max_relative_error"] <= 1e-3
    assert report["outputs"]["agreement"] >= 0.995
    assert json.loads((tmp_path / "net.onnx.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert has in operators(path)
    assert "Equal" not in operators(path) or lowerings[0] != "arith"
    dims = [dim.dim_param or dim.dim_value for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]
    for size in ((50, 31), (7, 6)):
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(run(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 3])
def test_sequences_and_volumes(tmp_path, dims):
    model = PairNet(dims).eval()
    names = {1: ("batch", "length"), 3: ("batch", "depth", "height", "width")}[dims]
    report = to_onnx(model, torch.randn(1, 4, *[9, 8, 7][:dims]), tmp_path / "net.onnx", dynamic=names)
    assert [block["lowering"] for block in report["blocks"]] == ["keys"]
    x = torch.randn(3, 4, *[10, 7, 9][:dims])
    torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_fixed_size_needs_no_shapes_and_no_slices(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    add_pool_skip(model, ["0"])
    to_onnx(model.eval(), torch.randn(1, 3, 8, 12), tmp_path / "net.onnx", dynamic=())
    used = set(operators(tmp_path / "net.onnx"))
    assert {"MaxPool", "Resize"} <= used
    assert not used & {"Shape", "Slice", "Pad", "Range", "Tile", "Where", "ScatterND"}


def test_the_file_says_what_it_is_and_not_where_it_was_made(tmp_path):
    path = tmp_path / "net.onnx"
    to_onnx(PairNet(2).eval(), torch.randn(1, 4, 9, 9), path, metadata={"class_names": ["a", "b"], "checkpoint": "x.y"})
    model = onnx.load(path)
    facts = json.loads({entry.key: entry.value for entry in model.metadata_props}["poolskip_zoo"])
    assert facts["class_names"] == ["a", "b"]
    assert facts["checkpoint"] == "x.y"
    assert facts["lowering"] == ["keys"]
    assert facts["target"] == "onnxruntime"
    assert facts["package_version"]
    assert b"export_nets.py" not in path.read_bytes()


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 gives BatchNorm wrong types in float16")
def test_float16(tmp_path):
    model = enliven(timm.create_model("test_resnet_poolskip")).eval()
    report = to_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / "net.onnx", half=True, dynamic=())
    assert report["half"]
    assert report["bit_comparisons"] == 3 * len(pool_skip_modules(model))
    assert report["beside_float32"]["max_relative_error"] < 0.1
    types = {each.data_type for each in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    assert run(tmp_path / "net.onnx", torch.randn(1, 3, 64, 64)).dtype == torch.float32


@pytest.mark.parametrize("name", matching(registered_models(test=True), "test_*_poolskip"))
def test_every_tiny_variant(tmp_path, name):
    if torch.__version__.startswith("2.6.") and name in ("test_vgg_poolskip", "test_vit_poolskip"):
        pytest.skip("torch 2.6 fixes the sizes of VGG's pooling, and cannot write the resampling of a ViT's positions")
    model = enliven(timm.create_model(name)).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    report = to_onnx(model, x, tmp_path / "net.onnx", dynamic=OPEN)
    assert len(report["blocks"]) == len(pool_skip_modules(model))
    assert len({str(shape) for shape in report["outputs"]["inputs"]}) == 4 + (tuple(x.shape[2:]) != (64, 64))


class Branches(PairNet):
    """Another function below some size."""

    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] > 100 else -y


class Fixed(PairNet):
    """One size alone."""

    def forward(self, x):
        return super().forward(x).reshape(-1, 4 * 9 * 9)


@pytest.mark.parametrize(("net", "why"), [(Branches, "it takes another path at inputs"), (Fixed, "invalid for input")])
def test_axes_that_a_model_cannot_leave_open(tmp_path, net, why):
    model, x, path = net(2).eval(), torch.randn(1, 4, 9, 9), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=rf"not run at every size of batch, height, width: .*{why}.*'batch'"):
        to_onnx(model, x, path, dynamic=OPEN)
    assert not list(tmp_path.iterdir())
    to_onnx(model, x, path)
    torch.testing.assert_close(run(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


# Minutes: pytest -m slow tests/test_export_onnx.py
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50_poolskip", "vgg11_bn_poolskip", "vit_tiny_patch16_224_poolskip"])
def test_one_full_size_of_each_family(tmp_path, name):
    model = timm.create_model(name).eval()
    if not name.startswith("vgg"):  # which hides no branch; at random gains its flipped near-ties change classes
        enliven(model)
    dynamic = ("batch",) if name.startswith("vit") else OPEN
    for target in ("onnxruntime", "openvino"):
        report = to_onnx(model, torch.randn(1, 3, 224, 224), tmp_path / "net.onnx", target, dynamic=dynamic)
        assert len(report["blocks"]) == len(pool_skip_modules(model))


# Minutes: pytest -m slow tests/test_export_onnx.py
@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "encoder"),
    [
        ("unet_poolskip", "test_resnet_poolskip"),
        ("deeplabv3_poolskip", "test_resnet_poolskip"),
        ("deeplabv3plus_poolskip", "test_resnet_poolskip"),
        ("segnet", "test_vgg_poolskip"),
        ("unet", "test_vit_poolskip"),
    ],
)
def test_every_head(tmp_path, head, encoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = enliven(smp.create_model(head, encoder, encoder_weights=None, classes=5)).eval()
    for layer in pool_skip_modules(model).values():
        # A random net is chaotic: at full weight one near-tie that flips changes a quarter of all windows after it.
        layer.conv.weight.data.mul_(0.02)
    report = to_onnx(model, torch.randn(2, 3, 96, 128), tmp_path / "net.onnx", dynamic=OPEN)
    assert len(report["blocks"]) == len(pool_skip_modules(model))
    assert len({str(shape) for shape in report["outputs"]["inputs"]}) == 5


# --- inputs and outputs of other kinds


class Kinds(PairNet):
    """An image, another in bytes, a label and a number in; scores, classes, truth values and nothing out."""

    def __init__(self):
        super().__init__(2)
        self.labels = torch.nn.Embedding(7, 4)

    def forward(self, x, image, label, scale):
        scores = super().forward(x + image.float() / 255 * scale) + self.labels(label)[:, :, None, None]
        return {"scores": scores, "classes": scores.argmax(1), "sure": scores.amax(1) > 1, "loss": None}


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="OpenVINO lacks functions that torch 2.6 writes")
def test_inputs_and_outputs_of_every_kind(tmp_path):
    pytest.importorskip("openvino")
    image = torch.randint(0, 256, (1, 4, 9, 9), dtype=torch.uint8)
    example = torch.randn(1, 4, 9, 9), image, torch.tensor([6]), torch.tensor(2.0)
    report = to_openvino(Kinds().eval(), example, tmp_path / "net.xml")
    assert [shapes[1:3] for shapes in report["outputs"]["inputs"]] == [[[n, 4, 9, 9], [n]] for n in (2, 1, 3, 1, 1)]
    assert report["outputs"]["agreement"] == 1


def test_float16_leaves_integers_alone():
    class Classes(torch.nn.Module):
        def forward(self, x):
            return {"classes": x.argmax(1), "scores": x, "loss": None}

    outputs = Half(Classes())(torch.eye(5))
    assert outputs["classes"].dtype == torch.int64
    assert outputs["scores"].dtype == torch.float32


def test_integers_and_truth_values_are_made_of_the_example():
    """At other sizes too; others may mean nothing to the model."""
    example = torch.randint(100, 103, (1, 3, 9, 9), dtype=torch.uint8), torch.tensor([[True, True]])
    inputs, _ = capture_open(Both().eval(), example, OPEN)
    shapes = [[2, 3, 193, 161], [1, 3, 257, 289], [3, 3, 47, 33], [1, 3, 64, 64], [1, 3, 9, 9]]
    assert [list(image.shape) for image, _ in inputs] == shapes
    assert inputs[-1] == example
    assert all(image.dtype == torch.uint8 and {*image.unique().tolist()} == {100, 101, 102} for image, _ in inputs)
    assert [list(flags.shape) for _, flags in inputs] == [[2, 2], [1, 2], [3, 2], [1, 2], [1, 2]]
    assert all(flags.all() for _, flags in inputs)


class Both(torch.nn.Module):
    def forward(self, image, flags):
        return image.float() * flags[:, :1, None, None]


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ((torch.randn(1, 4, 9, 9), None), "argument 2 is NoneType, and files take only tensors"),
        ({"x": torch.randn(1, 4, 9, 9)}, "argument 1 is str, .* by position"),
    ],
)
def test_arguments_that_are_no_tensors(tmp_path, example, says):
    with pytest.raises(ValueError, match=says):
        to_onnx(PairNet(2).eval(), example, tmp_path / "net.onnx")


def test_other_types_of_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"middle\.weight is torch\.float64: call model\.float\(\) first"):
        to_onnx(PairNet(2).eval().double(), torch.randn(1, 4, 9, 9).double(), tmp_path / "net.onnx")


def test_maps_of_other_types_are_refused_by_their_node(tmp_path):
    class Doubled(torch.nn.Module):
        def forward(self, x):
            y, indices = F.max_pool2d(x.double(), 2, return_indices=True)
            return F.max_unpool2d(y, indices, 2, output_size=x.shape[-2:])

    with pytest.raises(ValueError, match=r"node 'max_unpool2d' unpools torch\.float64: expected torch\.float32"):
        to_onnx(Doubled().eval(), torch.randn(1, 4, 9, 9), tmp_path / "net.onnx")


@pytest.mark.parametrize(("write", "suffix"), [(to_exported_program, "pt2"), (to_torchscript, "pt")])
def test_bfloat16_is_refused(tmp_path, write, suffix):
    with pytest.raises(ValueError, match=r"argument 1 is bfloat16, which NumPy does not have.* model\.float\(\) first"):
        write(PairNet(2).eval().bfloat16(), torch.randn(1, 4, 9, 9).bfloat16(), tmp_path / f"net.{suffix}")


@pytest.mark.parametrize("part", ["the model", "0"])
@pytest.mark.parametrize("write", [to_onnx, to_exported_program, to_torchscript])
def test_a_model_that_trains_keeps_its_statistics(tmp_path, write, part):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), PairNet(2))
    model.train(part == "the model")[0].train()
    suffix = {to_onnx: "onnx", to_exported_program: "pt2"}.get(write, "pt")
    with pytest.raises(ValueError, match=rf"^{part} is in training mode: call model\.eval\(\) first$"):
        write(model, torch.randn(2, 4, 9, 9), tmp_path / f"net.{suffix}")
    assert model[0].training
    assert model[0].num_batches_tracked == 0


class Two(torch.nn.Module):
    """Two images, each of a size of its own."""

    def __init__(self):
        super().__init__()
        self.net = PairNet(2)

    def forward(self, x, z):
        return self.net(x).tanh(), self.net(z).tanh().mean((2, 3))


def test_sizes_of_two_inputs_are_apart(tmp_path):
    model, path = Two().eval(), tmp_path / "net.onnx"
    report = to_onnx(model, (torch.randn(1, 4, 24, 16), torch.randn(1, 4, 12, 9)), path, dynamic=OPEN)
    assert report["outputs"]["inputs"][-1] == [[2, 4, 193, 161], [1, 4, 257, 289]]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shapes = [["batch", 4, "height", "width"], ["batch_z", 4, "height_z", "width_z"]]
    assert [each.shape for each in session.get_inputs()] == shapes
    x, z = torch.randn(2, 4, 30, 20), torch.randn(3, 4, 11, 16)
    for got, expected in zip(session.run(None, {"x": x.numpy(), "z": z.numpy()}), model(x, z), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), expected.detach(), rtol=1e-4, atol=1e-5)


class Multiples(PairNet):
    """Sizes of a number alone."""

    def __init__(self, number, error):
        super().__init__(2)
        self.number, self.error = number, error

    def forward(self, x):
        if x.shape[-1] % self.number:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(
    # A bare assert says nothing.
    ("error", "says"),
    [(AssertionError(), "AssertionError"), (ValueError("no multiple\nof it"), "no multiple")],
)
def test_models_that_check_their_sizes(error, says):
    x = torch.randn(1, 4, 64, 64)
    inputs, _ = capture_open(Multiples(32, error).eval(), (x,), OPEN)
    assert [list(each.shape[2:]) for (each,) in inputs] == [[192, 160], [256, 288], [64, 96], [64, 64], [64, 64]]
    with pytest.raises(ValueError, match=f"not run at every size of batch, height, width: {says}; leave fewer"):
        capture_open(Multiples(37, error).eval(), (x,), OPEN)


class Twice(torch.nn.Module):
    """The same values at the same places for two decoders, and for a third that pools once more."""

    def forward(self, x):
        x = x.sin()
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        z, again = F.max_pool2d(x, 2, return_indices=True)
        pairs = ((y, indices), (y, indices), (z, again), (y + 1, indices))
        return [F.max_unpool2d(*pair, 2, output_size=x.shape[2:]) + i for i, pair in enumerate(pairs)]


def test_equal_unpoolings_are_one(tmp_path):
    model, x = Twice().eval(), torch.randn(1, 4, 9, 9)
    assert len(to_onnx(model, x, tmp_path / "net.onnx")["blocks"]) == 2
    lowered = lower_for(model, x, "litert")
    assert len(lowered.blocks) == len(lowered.shapes) == 2
    for got, expected in zip(lowered.module(x), model(x), strict=True):
        assert torch.equal(got, expected)


# --- options and other formats


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": "net.pb"}, "ends in .onnx"),
        ({"path": "folder.onnx"}, "folder.onnx' is a folder"),
        ({"path": "a_file/new/net.onnx"}, "net.onnx': .*a_file is a file"),
        ({"opset": 17}, r"opset=17: expected 18 to \d\d"),
        ({"opset": 99}, r"opset=99: expected 18 to \d\d"),
        ({"dynamic": ("height", "depth")}, "dynamic='depth': the inputs have batch, height, width"),
        ({"dynamic": "batch"}, "expected a tuple"),
        ({"target": "ncnn", "dynamic": ("batch",)}, "ncnn takes only fixed sizes"),
        ({"target": "nvidia"}, "target='nvidia'"),
    ],
)
def test_options_are_checked(tmp_path, options, says):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "a_file").touch()
    path = tmp_path / options.pop("path", "net.onnx")
    with pytest.raises(ValueError, match=says):
        to_onnx(PairNet(2).eval(), torch.randn(1, 4, 9, 9), path, **options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a_file", "folder.onnx"]


def test_ncnn_has_its_few_operators(tmp_path):
    model = PairNet(2).eval()
    to_onnx(model, torch.randn(1, 4, 9, 8), tmp_path / "net.onnx", "ncnn")
    tiny = 1e-30 * torch.randn(1, 4, 9, 8)  # by which the maxima differ
    torch.testing.assert_close(run(tmp_path / "net.onnx", tiny), model(tiny).detach())
    allowed = {"MaxPool", "Conv", "Resize", "Slice", "Pad", "Sub", "Mul", "Min", "Relu", "Add", "Constant"}
    assert set(operators(tmp_path / "net.onnx")) <= allowed


def test_openvino_files(tmp_path):
    openvino = pytest.importorskip("openvino")
    model, path = SegNet().eval(), tmp_path / "net.xml"
    report = to_openvino(model, torch.randn(1, 3, 32, 32), path, dynamic=OPEN, metadata={"class_names": ["a"]})
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        ["net.xml", "net.bin", "net.xml.json", "poolskip_predictor.py"]
    )
    assert report["outputs"]["max_relative_error"] <= 1e-3
    x = torch.randn(2, 3, 21, 30)
    got = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_not_a_number_and_infinity_are_as_documented(tmp_path):
    """docs/export.md: in ONNX Runtime NaN stays NaN in its cell, and windows without one are not affected."""
    model = PairNet(2, others=False).eval()
    x = torch.rand(1, 4, 8, 8)
    x[0, 0, 0, 0], x[0, 1, 2, 3], x[0, 2, 0, 0] = torch.nan, torch.inf, -torch.inf
    for lowering in ("keys", "native"):
        to_onnx(model, torch.rand(1, 4, 8, 8), tmp_path / "net.onnx", lowering=lowering, dynamic=())
        got, expected = run(tmp_path / "net.onnx", x), model(x)
        assert got[0, 1, 2, 3] == torch.inf
        if lowering == "keys":
            assert got[0, 0, 0, 0].isnan()
            assert got[0, 2, 0, 0].isnan()
        keep = torch.ones(1, 4, 8, 8, dtype=torch.bool)
        keep[0, 0, :2, :2] = keep[0, 2, 0, 0] = False
        assert torch.equal(got[keep], expected[keep])


def test_eight_bits_keep_the_masks_of_a_plain_export(tmp_path):
    """onnxruntime quantises pooling, resizing and products too; a mask by equal keys would lose its places."""
    from onnxruntime import quantization

    before = torch.nn.Conv2d(4, 4, 1, bias=False)
    torch.nn.init.dirac_(before.weight)
    model = torch.nn.Sequential(before, PoolSkip2d(4, pool_size=4)).eval()
    images = torch.randint(-128, 128, (8, 4, 13, 12)) * 0.05
    assert (images.min(), images.max()) == (-6.4, 6.35), "8 bits hold these, so that no maximum moves"
    plain, quantised = tmp_path / "plain.onnx", tmp_path / "int8.onnx"
    torch.onnx.export(model, (images,), plain, input_names=["x"], dynamo=True, external_data=False)
    if "Identity" in operators(plain):
        pytest.skip("nodes that torch 2.6 leaves in the file keep what is pooled from its map's own scale")
    batches = iter([{"x": images.numpy()}, None])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(batches)

    # 7 bits of weight: without VNNI the sums of x86 saturate otherwise, in any net.
    quantization.quantize_static(plain, quantised, Reader(), reduce_range=True)
    assert verify.relative_error(run(quantised, images), model(images).detach()) < 0.03
