"""TorchScript and torch.export files: several sizes, and loading without this package."""

import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from contract.common import enliven
from export_nets import PairNet, SegNet
from torch.export import Dim, _unlift

from poolskip_zoo import MaxPool2d, MaxUnpool2d
from poolskip_zoo.export import to_exported_program, to_onnx, to_torchscript
from poolskip_zoo.export.open_sizes import capture_bounded

OPEN = ("batch", "height", "width")

LOAD = """
import sys
sys.modules["poolskip_zoo"] = None
import torch
values, *paths = sys.argv[1:]
models = [torch.jit.load(p) if p.endswith(".pt") else torch.export.load(p).module() for p in paths]
with torch.no_grad():
    torch.save([[model(x) for x in torch.load(values)] for model in models], values)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files of each kind, their models, and the reports."""
    folder = tmp_path_factory.mktemp("written")
    files = {}
    for name in ("test_resnet_cifar_poolskip", "segnet"):
        model = SegNet().eval() if name == "segnet" else enliven(timm.create_model(name)).eval()
        x = torch.randn(1, 3, 64, 64)
        options = {"dynamic": OPEN, "metadata": {"class_names": ["a"]}}
        path = folder / f"{name}.pt"
        files[path] = model, to_torchscript(model, x, path, **options)
        path = folder / f"{name}.pt2"
        files[path] = model, to_exported_program(model, x, path, **options)
        path = folder / f"{name}_script.pt"
        if name == "segnet":
            # torch's unpooling module does not script.
            with pytest.raises(RuntimeError):
                to_torchscript(model, x, path, "script", **options)
        else:
            files[path] = model, to_torchscript(model, x, path, "script", **options)
    assert sorted(folder.iterdir()) == sorted([*files, *(path.with_name(f"{path.name}.json") for path in files)])
    return files


def test_reports_and_metadata(written):
    for path, (_, report) in written.items():
        assert report["outputs"]["max_relative_error"] <= 1e-4
        assert len(report["outputs"]["inputs"]) >= 2
        extra = {"poolskip_zoo": ""}
        if path.suffix == ".pt":
            torch.jit.load(path, _extra_files=extra)
            assert report["lowering"] == (["keys"] if path.stem == "segnet" else [])
        else:
            torch.export.load(path, extra_files=extra)
            assert report["lowering"] == ["keys"]
        assert json.loads(extra["poolskip_zoo"])["class_names"] == ["a"]


def test_loads_without_this_package(written, tmp_path):
    inputs = [torch.randn(3, 3, 71, 90), torch.randn(1, 3, 130, 97)]
    torch.save(inputs, tmp_path / "values")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "values"), *map(str, written)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for outputs, (model, _) in zip(torch.load(tmp_path / "values"), written.values(), strict=True):
        for got, x in zip(outputs, inputs, strict=True):
            torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.fx.experimental._config, "backed_size_oblivious"), reason="torch 2.6 cannot")
def test_programs_take_maps_of_one_cell(tmp_path):
    model = enliven(timm.create_model("test_resnet_poolskip")).eval()
    to_exported_program(model, torch.randn(1, 3, 64, 64), tmp_path / "net.pt2", dynamic=OPEN)
    program = torch.export.load(tmp_path / "net.pt2").module()
    for shape in [(2, 3, 64, 33), (1, 3, 32, 32), (3, 3, 1, 1)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x).detach(), rtol=1e-4, atol=1e-5)


class Branches(torch.nn.Module):
    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x):
        y, i = torch.nn.functional.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        u = torch.nn.functional.max_unpool2d(y, i, 2, output_size=x.shape[2:])
        return 2 * u if self.condition(x) else u


@pytest.mark.skipif(not hasattr(_unlift, "GuardsFn"), reason="this torch writes no checks of branches")
def test_programs_refuse_sizes_at_which_the_model_takes_another_path(tmp_path):
    model = Branches(lambda x: x.shape[-1] % 5 == 0).eval()
    to_exported_program(model, torch.randn(1, 3, 48, 64), tmp_path / "net.pt2", dynamic=OPEN)
    program = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.randn(2, 3, 21, 34)
    assert torch.equal(program(x), model(x))
    with pytest.raises((AssertionError, RuntimeError)):
        program(torch.randn(2, 3, 21, 35))


@pytest.mark.parametrize("suffix", ["pt2", "onnx", "pt"])
@pytest.mark.parametrize(
    "condition",
    [lambda x: x.shape[-1] == x.shape[-2], lambda x: x.shape[-1] % 2 == 0, lambda x: x.shape[-1] < 20],
)
def test_models_with_a_path_for_squares_or_even_or_small_sizes_are_refused(suffix, condition, tmp_path):
    model = Branches(condition).eval()
    write = {"pt2": to_exported_program, "onnx": to_onnx, "pt": to_torchscript}[suffix]
    with pytest.raises((ValueError, RuntimeError), match=r"takes another path at inputs|outputs differ"):
        write(model, torch.randn(1, 3, 48, 64), tmp_path / f"net.{suffix}", dynamic=OPEN)
    assert not list(tmp_path.iterdir())


# .pt2 files refuse these by torch's checks (above).
@pytest.mark.parametrize("suffix", ["onnx", "pt"])
@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.shape[-1] % 5 == 0,
        lambda x: x.shape[-1] > 400,
        lambda x: x.shape[0] == 7,
        lambda x: x.shape[-1] == x.shape[-2] + 13,
        lambda x: x.shape[-1] * x.shape[-2] > 100_000,
        lambda x: math.ceil(x.shape[-1] / 3) % 5 == 0,
        # Behind other choices.
        lambda x: tuple(x.shape[2:]) == (224, 224),
        lambda x: x.shape[-1] > 200 and x.shape[-1] % 7 == 0,
        lambda x: x.shape[-1] >= 290 and x.shape[-1] >= 320,
        lambda x: x.shape[-1] <= 100 and x.shape[-1] == 11,
        lambda x: (x.shape[-1] % 7 == 0 and x.shape[-1] > 300) if x.shape[-1] > 200 else (x.shape[-1] % 7 == 9),
    ],
)
def test_a_path_at_sizes_that_no_list_holds_is_found_by_torch_s_checks(suffix, condition, tmp_path):
    write = {"onnx": to_onnx, "pt": to_torchscript}[suffix]
    with pytest.raises((ValueError, RuntimeError), match=r"takes another path at inputs|outputs differ"):
        write(Branches(condition).eval(), torch.randn(1, 3, 48, 64), tmp_path / f"net.{suffix}", dynamic=OPEN)
    assert not list(tmp_path.iterdir())


class Two(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, z):
        return self.function(Branches(lambda x: False)(x), z)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x, z: (x + z) * (2 if z.shape[-1] % 5 == 0 else 1), (1, 3, 64, 64)),
        (lambda x, z: x * (2 if x.shape[0] == 5 else 1) * z[:, :, None, None], (1, 3)),
        (lambda x, z: (x * z, x.mean() if x.shape[-1] > 300 else None), (1, 3, 64, 64)),
        (lambda x, z: (x * z, x.mean() if x.shape[-1] < 300 else None), (1, 3, 64, 64)),
        (lambda x, z: x * z * (2 if int(x.shape[-1]) == 333 else 1), (1, 3, 64, 64)),
    ],
)
def test_sizes_that_two_inputs_share_and_outputs_that_come_and_go(function, shape, tmp_path):
    with pytest.raises(ValueError, match=r"another path at inputs|it fixes width at"):
        to_onnx(
            Two(function).eval(), (torch.randn(1, 3, 64, 64), torch.randn(shape)), tmp_path / "net.onnx", dynamic=OPEN
        )


@pytest.mark.parametrize(
    "scale", [lambda size: [1.0, 1.0][0 if size < 300 else 5], lambda size: size // (size // 30) / 5]
)
def test_sizes_at_which_a_model_fails_are_passed_over(scale, tmp_path):
    model = Two(lambda x, z: x * z * scale(x.shape[-1])).eval()
    to_onnx(model, (torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)), tmp_path / "net.onnx", dynamic=OPEN)


class Multiples(Branches):
    def forward(self, x):
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError("multiples of 32")
        return super().forward(x)


def test_checks_that_a_model_refuses_to_break_are_passed_over(tmp_path):
    x = torch.randn(1, 3, 64, 64)
    to_onnx(Multiples(lambda x: False).eval(), x, tmp_path / "net.onnx", dynamic=OPEN)
    with pytest.raises(ValueError, match=r"another path at inputs \[\[2, 3, 192, 320\]\]"):
        to_onnx(Multiples(lambda x: x.shape[-1] == 320).eval(), x, tmp_path / "other.onnx", dynamic=OPEN)


@pytest.mark.skipif(not callable(Dim.AUTO), reason="open sizes with a largest one need torch 2.7")
def test_sizes_above_the_largest_of_a_file_do_not_matter():
    x = torch.randn(4, 3, 48, 64)
    capture_bounded(Branches(lambda x: x.shape[-1] > 64).eval(), (x,), OPEN)
    with pytest.raises(ValueError, match="another path at inputs"):
        capture_bounded(Branches(lambda x: x.shape[-1] % 5 == 0).eval(), (x,), OPEN)


class Chunks(torch.nn.Module):
    def forward(self, x):
        return x.chunk(2, 1)[0].flatten(1).sum(1)


@pytest.mark.parametrize("dynamic", [("batch",), OPEN])
def test_programs_of_views_take_one_image(dynamic, tmp_path):
    to_exported_program(Chunks().eval(), torch.randn(1, 4, 48, 64), tmp_path / "net.pt2", dynamic=dynamic)
    x = torch.randn(1, 4, 48, 64)
    assert torch.equal(torch.export.load(tmp_path / "net.pt2").module()(x), Chunks()(x))


class Dictionary(SegNet):
    def forward(self, x):
        y = super().forward(x)
        return {"out": y, "classes": y.argmax(1)}


def test_outputs_in_a_dict_and_an_example_with_gradients(tmp_path):
    model, x = Dictionary().eval(), torch.randn(1, 3, 32, 32, requires_grad=True)
    to_torchscript(model, x, tmp_path / "net.pt", dynamic=())
    outputs = torch.jit.load(tmp_path / "net.pt")(x)
    torch.testing.assert_close(outputs, dict(model(x)))


class Plain(torch.nn.Module):
    def forward(self, x):
        y, i = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        return torch.nn.functional.max_unpool2d(y, i, 2)  # of the map's own size where it is even


def test_fixed_sizes_are_lowered_as_such(tmp_path):
    for write, suffix in ((to_torchscript, "pt"), (to_exported_program, "pt2")):
        report = write(Plain().eval(), torch.randn(1, 3, 16, 16), tmp_path / f"net.{suffix}")
        assert (report["lowering"], len(report["blocks"])) == (["keys"], 1)
    assert "scatter" not in str(torch.jit.load(tmp_path / "net.pt").inlined_graph)


class Bottleneck(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 8 * 8, 3 * 8 * 8)

    def forward(self, x):
        y, i = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        z = self.linear(y.view(x.size(0), -1)).view(x.size(0), 3, 8, 8)
        return torch.nn.functional.max_unpool2d(z, i, 2, output_size=x.shape[2:])


def test_a_trace_that_froze_a_size_says_so(tmp_path):
    model, x = Bottleneck().eval(), torch.randn(1, 3, 16, 16)
    with pytest.raises(
        RuntimeError,
        match=r"fails at input .*mat1 and mat2 shapes cannot be multiplied.*take method='script', dynamic=\(\)",
    ):
        to_torchscript(model, x, tmp_path / "net.pt")
    assert not list(tmp_path.iterdir())
    assert to_torchscript(model, x, tmp_path / "net.pt", dynamic=())["outputs"]["max_relative_error"] <= 1e-4


class Signs(torch.nn.Module):
    """Its path is chosen by the numbers, of which a trace knows one choice."""

    def forward(self, x):
        return x if x.abs().max() < 1.5 else 2 * x


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_fixed_sizes_is_tried_on_other_numbers(tmp_path):
    with pytest.raises(RuntimeError, match="is not kept"):
        to_torchscript(Signs().eval(), torch.ones(1, 3, 4, 4), tmp_path / "net.pt", dynamic=())
    assert not list(tmp_path.iterdir())


class DropIn(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.unpool = MaxPool2d(2), MaxUnpool2d(2)

    def forward(self, x):
        return self.unpool(*self.pool(x), x.shape)


def test_options_are_checked(tmp_path, monkeypatch):
    model, x = SegNet().eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="method='jit'"):
        to_torchscript(model, x, tmp_path / "net.pt", "jit")
    with pytest.raises(ValueError, match=r"ends in \.pt or "):
        to_torchscript(model, x, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="expected a name in UTF-8"):
        to_exported_program(model, x, os.fsdecode(b"/tmp/\xfc.pt2"))
    with pytest.raises(ValueError, match=r"\.pt2"):
        to_exported_program(model, x, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"model\.eval"):
        to_torchscript(SegNet(), x, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="lowering='kesy'"):
        to_exported_program(model, x, tmp_path / "net.pt2", lowering="kesy")
    with pytest.raises(ValueError, match="poolskip_zoo's MaxPool2d, which exports as keys, and 'scatter' is wanted"):
        to_exported_program(DropIn().eval(), x, tmp_path / "net.pt2", lowering="scatter")
    with pytest.raises(ValueError, match="dynamic='depth'"):
        to_exported_program(model, x, tmp_path / "net.pt2", dynamic=("depth",))
    with pytest.raises(ValueError, match=r"metadata: 'mean' is not JSON-ready: .* float32"):
        to_torchscript(model, x, tmp_path / "net.pt", metadata={"checkpoint": "a.b", "mean": [np.float32(0.5)]})
    # Before the model is captured, which may take a minute.
    monkeypatch.delattr(sys.modules[to_exported_program.__module__], "capture_open")
    with pytest.raises(ValueError, match="metadata: 'std' is not JSON-ready"):
        to_exported_program(model, x, tmp_path / "net.pt2", metadata={"std": x})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_a_program_at_once(tmp_path, monkeypatch):
    tries = []

    def full(*args, **kwargs):
        tries.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(RuntimeError, match="no space left on the disk to write"):
        to_exported_program(PairNet(2).eval(), torch.randn(2, 4, 9, 9), tmp_path / "net.pt2")
    assert len(tries) == 1
    assert not list(tmp_path.iterdir())


class Unnamed(torch.nn.Module):
    """A pair with arguments that have no names of their own."""

    def forward(self, x, *more):
        y, indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        return torch.nn.functional.max_unpool2d(y, indices, 2, output_size=x.shape[2:]) + sum(more)


@pytest.mark.parametrize("write", [to_exported_program, to_torchscript])
@pytest.mark.parametrize("dynamic", [(), OPEN])
def test_arguments_without_names(tmp_path, write, dynamic):
    path = tmp_path / ("net.pt2" if write is to_exported_program else "net.pt")
    args = tuple(torch.randn(2, 4, 16, 12) for _ in range(3))
    report = write(Unnamed().eval(), args, path, dynamic=dynamic)
    assert report["outputs"]["max_relative_error"] < 1e-6
    assert {block["lowering"] for block in report["blocks"]} == {"keys"}
