"""Files for the runtimes of phones and browsers, in those runtimes.

Those that need one skip where it is not installed (docs/runtimes.md says how): pytest -m slow tests/test_runtimes.py
"""

import json
import operator
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from export_nets import PairNet, SegNet

from poolskip_zoo import PoolSkip2d, cli, export
from poolskip_zoo.export import verify
from poolskip_zoo.export.converted import check_forms, lower_for, of_maps

SUFFIXES = {"litert": ".tflite", "executorch": ".pte", "coreml": ".mlpackage", "ncnn": ".param"}
PACKAGES = {
    "litert": ("litert_torch",),
    "executorch": ("executorch",),
    "coreml": ("coremltools",),
    "ncnn": ("ncnn", "pnnx", "onnxscript", "onnxruntime"),
}


def in_torch(model, change=lambda outputs: outputs):
    """A runtime that is PyTorch itself."""

    def run(arrays):
        with torch.no_grad():
            return [each.numpy() for each in change(list(model(*map(torch.from_numpy, arrays))))]

    return run


def lowered_in_torch(side, inputs, target, form, dynamic=(), change=lambda outputs: outputs):
    module = lower_for(side, inputs, target, form, dynamic).module
    assert not any("max_unpool" in str(node.target) for node in module.graph.nodes)
    return in_torch(module, change)


@pytest.mark.parametrize(
    ("lowering", "dims", "others"),
    [("keys", 1, True), ("keys", 2, False), ("arith", 2, True), ("scatter", 2, True)],
)
def test_unpoolings_side_by_side_are_those_of_the_model(lowering, dims, others):
    size = (13, 9)[:dims]
    lowered = lower_for(PairNet(dims, True, others).eval(), torch.randn(1, 4, *size), "litert", lowering)
    shape = [1, 4, *size, 1][:4]
    assert lowered.shapes == [(shape, shape)]
    seen = []

    def build(side, inputs, form):
        seen.append((form, [list(each.shape) for each in inputs]))
        return lowered_in_torch(side, inputs, "litert", form)

    assert check_forms(lowered.blocks, lowered.shapes, build) == 6
    assert seen == [(lowering, [shape, [1, 3, 17, 1] if dims == 1 else [1, 3, 17, 13]])]

    def wrong(side, inputs, form):
        return lowered_in_torch(side, inputs, "litert", form, (), lambda outputs: [*outputs[:-1], outputs[-1] + 1])

    with pytest.raises(RuntimeError, match=rf"export_nets\.py:\d+.*{lowering!r} differs from torch in \d+ of"):
        check_forms(lowered.blocks, lowered.shapes, wrong)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="needs torch 2.7")
@pytest.mark.parametrize(
    ("target", "dims", "others", "dynamic"),
    [
        ("executorch", 2, True, ("batch", "height", "width")),
        ("coreml", 2, False, ("height", "width")),
        ("coreml", 1, True, ("batch", "length")),
    ],
)
def test_open_unpoolings_run_at_smaller_sizes(target, dims, others, dynamic):
    example = torch.randn(3 if "batch" in dynamic else 1, 4, *(50, 41)[:dims])
    lowered = lower_for(PairNet(dims, True, others).eval(), example, target, None, dynamic)
    ((declared, largest),) = lowered.shapes
    assert largest == [*example.shape, 1][:4]
    assert declared == [
        None if name in dynamic else n
        for name, n in zip(["batch", "", "length" if dims == 1 else "height", "width"], largest, strict=True)
    ]
    assert [list(args[0].shape[2:]) for args in lowered.inputs] == [[50, 41][:dims], [25, 21][:dims], [13, 11][:dims]]
    runs = []

    def wrong_at_25(outputs):
        return [each + 1 if each.shape[2] == 25 else each for each in outputs]

    def build(side, inputs, form, change=lambda outputs: outputs):
        run = lowered_in_torch(side, inputs, target, form, of_maps(dynamic), change)
        return lambda arrays: (runs.append(list(arrays[0].shape)), run(arrays))[1]

    assert check_forms(lowered.blocks, lowered.shapes, build) == 9
    batches = (3, 1, 1) if "batch" in dynamic else (1, 1, 1)
    widths = (1, 1, 1) if dims == 1 else (41, 21, 11)
    assert runs[::3] == [[n, 4, h, w] for n, h, w in zip(batches, (50, 25, 13), widths, strict=True)]
    with pytest.raises(RuntimeError, match=r"differs from torch in \d+ of \d+ values on random values of size \[25, "):
        check_forms(lowered.blocks, lowered.shapes, lambda *args: build(*args, wrong_at_25))


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="needs torch 2.7")
def test_open_sizes_are_checked_and_reported(tmp_path, monkeypatch):
    """Whatever the converter: here torch.export itself."""
    programs = []

    def make(lowered, path):
        path.write_text("a file")
        if path.name == "net.pte":
            programs.append(lowered.export())
        flat = (lambda outputs: (outputs,)) if path.name == "net.pte" else (lambda outputs: outputs)
        return in_torch(lambda *x: flat(lowered.module(*x)))

    monkeypatch.setattr(sys.modules[export.to_executorch.__module__], "_make", make)
    dynamic = ("batch", "height", "width")
    report = export.to_executorch(PairNet(2).eval(), torch.randn(4, 4, 49, 38), tmp_path / "net.pte", dynamic=dynamic)
    assert report["dynamic"] == list(dynamic)
    assert report["outputs"]["inputs"] == [[[4, 4, 49, 38]], [[2, 4, 25, 19]], [[1, 4, 13, 9]]]
    assert report["bit_comparisons"] == 9
    assert {block["lowering"] for block in report["blocks"]} == {"arith"}
    uppers = [sorted(int(each.upper) for each in program.range_constraints.values()) for program in programs]
    assert uppers == [[4, 38, 49]]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="needs torch 2.7")
def test_what_core_ml_is_given(tmp_path, monkeypatch):
    """Ranges up to the example's sizes, and no division of sizes, which its converter does in floating point."""
    given = {}

    def convert(program, inputs, **options):
        given.update(program=program, shapes=[each["shape"] for each in inputs])
        raise ValueError("it cannot\nfor reasons")

    fake = SimpleNamespace(RangeDim=range, TensorType=dict, convert=convert)
    fake.precision, fake.target = SimpleNamespace(FLOAT32=0), SimpleNamespace(iOS16=0)
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    model = torch.nn.Sequential(torch.nn.MaxPool2d(2), PairNet(2)).eval()
    with pytest.raises(RuntimeError, match=r"dynamic=.*: coremltools fails \(it cannot\); pass dynamic=\(\)$"):
        export.to_coreml(model, torch.randn(2, 4, 50, 36), tmp_path / "net.mlpackage", dynamic=("batch", "height"))
    assert given["shapes"] == [[range(1, 2, 2), 4, range(13, 50, 50), 36]]
    assert not {operator.floordiv} & {node.target for node in given["program"].graph.nodes}
    x = torch.randn(1, 4, 33, 36)
    torch.testing.assert_close(given["program"].module()(x), model(x))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shift", "mixed", "says"),
    [(0.0, 0.0, None), (1e-2, 0.0, "1.0e-02.*no near-tie flipped"), (0.0, 0.1, "a window that flipped differs by")],
)
def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch, shift, mixed, says):
    """Whatever the converter: here PyTorch, of which the whole model is shifted and the unpoolings are not."""

    def make(lowered, path):
        path.write_text("a file")
        scale = 1.0 + (shift if path.name == "net.tflite" else 0.0)
        flat = (lambda outputs: (outputs,)) if path.name == "net.tflite" else (lambda outputs: outputs)
        mix = 0.0 if path.name == "forms.tflite" else mixed
        run = in_torch(lambda *x: flat(lowered.module(*x)), lambda outputs: [each * scale for each in outputs])
        return lambda arrays: run([each + np.float32(mix) * each[..., ::-1] for each in arrays])

    monkeypatch.setattr(sys.modules[export.to_litert.__module__], "_make", make)
    call = (SegNet().eval(), torch.randn(1, 3, 17, 14), tmp_path / "net.tflite")
    if says is None:
        report = export.to_litert(*call, metadata={"class_names": ["a"]})
        assert sorted(each.name for each in tmp_path.iterdir()) == ["net.tflite", "net.tflite.json"]
        assert json.loads((tmp_path / "net.tflite.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
        assert report["bit_comparisons"] == 12
        assert report["class_names"] == ["a"]
    else:
        with pytest.raises(RuntimeError, match=rf"net\.tflite is not kept.*{says}"):
            export.to_litert(*call)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", SUFFIXES)
def test_options_are_checked(tmp_path, target, monkeypatch):
    write, x = getattr(export, f"to_{target}"), torch.randn(1, 4, 8, 8)
    path = tmp_path / f"net{SUFFIXES[target]}"
    with pytest.raises(ValueError, match=rf"expected a name that ends in \{SUFFIXES[target]}"):
        write(PairNet(2).eval(), x, tmp_path / "net.bin")
    if target == "ncnn":
        with pytest.raises(ValueError, match="one image at a time"):
            write(PairNet(2).eval(), x.expand(2, -1, -1, -1), path)
    else:
        with pytest.raises(ValueError, match=f"{target} has no MaxUnpool"):
            write(PairNet(2).eval(), x, path, lowering="native")
        with pytest.raises(ValueError, match=f"takes no ONNX file; to_{target} writes its own"):
            export.to_onnx(PairNet(2).eval(), x, tmp_path / "net.onnx", target)
    if target in ("litert", "ncnn"):
        with pytest.raises(
            ValueError, match=rf"dynamic=\('batch',\): {target} takes only fixed sizes; pass dynamic=\(\)"
        ):
            write(PairNet(2).eval(), x, path, dynamic=("batch",))
    elif not torch.__version__.startswith("2.6."):
        with pytest.raises(ValueError, match="sizes are the largest that the file takes, and its batch is 1; give an"):
            write(PairNet(2).eval(), x, path, dynamic=("batch",))
        one_size = torch.nn.Sequential(PairNet(2), torch.nn.Flatten(2), torch.nn.Linear(64, 3)).eval()
        with pytest.raises(
            ValueError, match=r"not run at every size of height: .*cannot be multiplied.* or a larger one$"
        ):
            write(one_size, x, path, dynamic=("height",))
        with pytest.raises(ValueError, match=r"dynamic='depth': the inputs have batch, height, width"):
            write(PairNet(2).eval(), x, path, dynamic=("depth",))
    monkeypatch.setitem(sys.modules, PACKAGES[target][0], None)
    with pytest.raises(ImportError, match="pip install"):
        write(PairNet(2).eval(), x, path)
    assert not list(tmp_path.iterdir())


def test_the_target_names_the_format(tmp_path, monkeypatch, capsys):
    seen = {}

    def write(model, example, path, metadata, **options):
        seen.update(path=path, options=options, size=list(example.shape))
        path.mkdir()
        (path / "weights").write_bytes(b"0" * 100_000)
        return {"outputs": {"max_relative_error": 0.0, "agreement": 1.0, "inputs": []}}

    monkeypatch.setattr(export, "to_coreml", write)
    monkeypatch.chdir(tmp_path)
    name = "test_resnet_poolskip"
    assert cli.main(["export", name, "--no-pretrained", "--target", "coreml", "--lowering", "arith"]) == 0
    assert seen == {"path": Path(f"{name}.mlpackage"), "options": {"lowering": "arith"}, "size": [1, 3, 160, 160]}
    options = ["--batch", "4", "--size", "64", "96", "--dynamic", "batch", "height"]
    assert cli.main(["export", name, "--no-pretrained", "--target", "coreml", *options, "--output", "b.mlpackage"]) == 0
    assert seen["options"] == {"dynamic": ("batch", "height")}
    assert seen["size"] == [4, 3, 64, 96]
    capsys.readouterr()
    assert cli.main(["export", name, "--no-pretrained", "--target", "litert", "--dynamic", "batch"]) != 0
    assert "dynamic=('batch',): litert takes only fixed sizes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segnet", "test_resnet_poolskip"])
@pytest.mark.parametrize("target", SUFFIXES)
def test_files_run(tmp_path, target, name):
    for package in PACKAGES[target]:
        pytest.importorskip(package)
    model = (SegNet() if name == "segnet" else timm.create_model(name, num_classes=10)).eval()
    path = tmp_path / f"net{SUFFIXES[target]}"
    report = getattr(export, f"to_{target}")(model, torch.randn(1, 3, 65, 50), path)
    assert path.exists()
    assert report["bit_comparisons"] >= 12
    assert report["outputs"]["max_relative_error"] <= 1e-4
    assert {block["lowering"] for block in report["blocks"]} == {export.TARGETS[target].lowering}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segnet", "test_resnet_poolskip"])
@pytest.mark.parametrize("target", ["executorch", "coreml"])
def test_open_files_run(tmp_path, target, name):
    pytest.importorskip(PACKAGES[target][0])
    model = (SegNet() if name == "segnet" else timm.create_model(name, num_classes=10)).eval()
    path, dynamic = tmp_path / f"net{SUFFIXES[target]}", ("batch", "height", "width")
    report = getattr(export, f"to_{target}")(model, torch.randn(4, 3, 129, 98), path, dynamic=dynamic)
    assert path.exists()
    assert report["outputs"]["inputs"] == [[[4, 3, 129, 98]], [[2, 3, 65, 49]], [[1, 3, 33, 25]]]
    assert report["outputs"]["max_relative_error"] <= 1e-4
    assert report["bit_comparisons"] >= 18
    if target == "coreml":
        import coremltools

        (value,) = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description.input
        ranges = [(each.lowerBound, each.upperBound) for each in value.type.multiArrayType.shapeRange.sizeRanges]
        assert ranges == [(1, 4), (3, 3), (33, 129), (25, 98)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with ONNX Runtime Web, and the folder it reads."""
    from browser import Browser

    pytest.importorskip("onnxruntime")
    chromium, modules = shutil.which("chromium"), os.environ.get("POOLSKIP_NODE_MODULES")
    if not chromium or not modules:
        pytest.skip("needs chromium, and POOLSKIP_NODE_MODULES with onnxruntime-web")
    folder = tmp_path_factory.mktemp("web")
    page = Browser(chromium, Path(modules) / "onnxruntime-web" / "dist", folder)
    yield page, folder
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["keys", "native", "scatter", "arith"])
def test_web(browser, lowering):
    page, folder = browser
    model, path = SegNet().eval(), folder / f"{lowering}.onnx"
    report = export.to_onnx(
        model, torch.randn(1, 3, 32, 32), path, "web", dynamic=("batch", "height", "width"), lowering=lowering
    )
    for shape in ((1, 3, 33, 50), (2, 3, 65, 31)):
        outputs = verify.check_outputs(
            lambda arrays: page.run([path.name], arrays)[0][0], model, [(torch.randn(shape),)], False
        )
        assert outputs["max_relative_error"] <= 1e-4

    def build(side, inputs, form):
        file = folder / f"forms_{form}.onnx"
        export.to_onnx(side, inputs, file, "web", dynamic=(), lowering=form)
        return lambda arrays: page.run([file.name], arrays)[0][0]

    assert check_forms(report["blocks"], [(shape, shape) for shape in ([1, 4, 33, 50], [1, 6, 16, 25])], build) == 12


@pytest.mark.slow
@pytest.mark.parametrize("window", [2, 4])
def test_nncf_keeps_the_masks_that_it_is_told_to_leave(tmp_path, window):
    """With its defaults it rounds one side of the masks' comparison."""
    nncf, openvino = (pytest.importorskip(package) for package in ("nncf", "openvino"))
    torch.manual_seed(0)
    before = torch.nn.Conv2d(4, 4, 1, bias=False)
    torch.nn.init.dirac_(before.weight)
    model = torch.nn.Sequential(before, PoolSkip2d(4, pool_size=window)).eval()
    images = torch.randn(32, 4, 13, 12)
    export.to_openvino(model, images[:1], tmp_path / "net.xml", dynamic=())

    def error(**options):
        batches = nncf.Dataset([image.numpy() for image in images.split(1)])
        net = nncf.quantize(openvino.Core().read_model(tmp_path / "net.xml"), batches, **options)
        run = openvino.compile_model(net, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        expected = model(images[:1]).detach()
        return (torch.from_numpy(run(images[:1].numpy())[0]) - expected).abs().mean() / expected.abs().mean()

    assert error(ignored_scope=nncf.IgnoredScope(types=["Equal", "Interpolate"])) < 0.03
    assert error() > 0.1, "NNCF needs no scope any more: say so in docs/export.md"
