"""Files for the runtimes of phones and browsers, in those runtimes.

Those that need one skip where it is not installed (docs/runtimes.md says how): pytest -m slow tests/test_runtimes.py
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from export_nets import PairNet, SegNet

from poolskip_zoo import cli, export
from poolskip_zoo.export import verify
from poolskip_zoo.export.converted import check_forms, lower_fixed

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


@pytest.mark.parametrize(
    ("lowering", "dims", "others"),
    [("keys", 1, True), ("keys", 2, False), ("arith", 2, True), ("scatter", 2, True)],
)
def test_unpoolings_side_by_side_are_those_of_the_model(lowering, dims, others):
    size = (13, 9)[:dims]
    lowered = lower_fixed(PairNet(dims, True, others).eval(), torch.randn(1, 4, *size), "litert", lowering)
    assert lowered.shapes == [[1, 4, *size, 1][:4]]
    seen = []

    def build(side, inputs, form):
        seen.append((form, [list(each.shape) for each in inputs]))
        module = lower_fixed(side, inputs, "litert", form).module
        assert not any("max_unpool" in str(node.target) for node in module.graph.nodes)
        return in_torch(module)

    assert check_forms(lowered.blocks, lowered.shapes, build) == 6
    (form, shapes), *more = seen
    assert not more
    assert form == lowering
    assert len(shapes) == (4 if others else 2)
    assert shapes[-1][1:] == ([3, 17, 1] if dims == 1 else [3, 17, 13])

    def wrong(side, inputs, form):
        return in_torch(
            lower_fixed(side, inputs, "litert", form).module, lambda outputs: [*outputs[:-1], outputs[-1] + 1]
        )

    with pytest.raises(RuntimeError, match=rf"export_nets\.py:\d+.*{lowering!r} differs from torch in \d+ of"):
        check_forms(lowered.blocks, lowered.shapes, wrong)


@pytest.mark.parametrize(("shift", "flips"), [(0.0, None), (1e-2, 0.0)])
def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch, shift, flips):
    """Whatever the converter: here PyTorch, of which the whole model is shifted and the unpoolings are not."""

    def make(module, args, path):
        path.write_text("a file")
        scale = 1.0 + (shift if path.name == "net.tflite" else 0.0)
        flat = (lambda outputs: (outputs,)) if path.name == "net.tflite" else (lambda outputs: outputs)
        return in_torch(lambda *x: flat(module(*x)), lambda outputs: [each * scale for each in outputs])

    monkeypatch.setattr(sys.modules[export.to_litert.__module__], "_make", make)
    call = (SegNet().eval(), torch.randn(1, 3, 17, 14), tmp_path / "net.tflite")
    if flips is None:
        report = export.to_litert(*call, metadata={"class_names": ["a"]})
        assert sorted(each.name for each in tmp_path.iterdir()) == ["net.tflite", "net.tflite.json"]
        assert json.loads((tmp_path / "net.tflite.json").read_text()) == json.loads(json.dumps(report))
        assert report["bit_comparisons"] == 12
        assert report["class_names"] == ["a"]
    else:
        with pytest.raises(RuntimeError, match=r"net\.tflite is not kept.*1\.0e-02.*no near-tie flipped"):
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
    monkeypatch.setitem(sys.modules, PACKAGES[target][0], None)
    with pytest.raises(ImportError, match="pip install"):
        write(PairNet(2).eval(), x, path)
    assert not list(tmp_path.iterdir())


def test_the_target_names_the_format(tmp_path, monkeypatch):
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
    assert cli.main(["export", name, "--no-pretrained", "--target", "litert", "--dynamic", "batch"]) != 0


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

    assert check_forms(report["blocks"], [[1, 4, 33, 50], [1, 6, 16, 25]], build) == 12
