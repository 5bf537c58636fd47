"""ONNX files as other exporters write them, rewritten: equal to the bit."""

import json
import logging

import numpy as np
import pytest
import torch
from export_nets import SegNet
from rewrite_nets import PLACING, Net, channels_last, flat, one, operators, per_plane, run, same, segnet

from poolskip_zoo.cli import main
from poolskip_zoo.export import rewrite_onnx

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper  # noqa: E402


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_crossing_pairs_of_maxunpool(tmp_path, opset):
    source = segnet(tmp_path / "in.onnx", opset=opset)
    report = rewrite_onnx(source, tmp_path / "out.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.onnx", "out.onnx", "out.onnx.json"]
    assert json.loads((tmp_path / "out.onnx.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    assert [(block["lowering"], block["window"], block["own"]) for block in report["blocks"]] == [
        ("keys", [2, 3], True),
        ("keys", [2, 2], False),
    ]
    assert {block["name"] for block in report["blocks"]} == {"maxunpool_7_0", "maxunpool_9_0"}
    assert report["bit_comparisons"] == 6
    assert report["original_in"] == "onnxruntime"
    assert report["outputs"]["max_relative_error"] == 0
    assert not operators(tmp_path / "out.onnx") & PLACING
    same(source, tmp_path / "out.onnx", (2, 3, 8, 12))


@pytest.mark.parametrize(
    ("options", "has"),
    [
        ({"target": "openvino"}, "Resize"),
        ({"target": "openvino", "lowering": "scatter"}, "ScatterElements"),
        ({"target": "web"}, "MaxUnpool"),
        ({"target": "ncnn"}, "Min"),
    ],
)
def test_targets(tmp_path, options, has):
    if options["target"] == "openvino":
        pytest.importorskip("openvino")
    report = rewrite_onnx(segnet(tmp_path / "in.onnx"), tmp_path / "out.onnx", **options)
    assert report["checked_in"].startswith("openvino" if options["target"] == "openvino" else "onnxruntime")
    assert report["outputs"]["max_relative_error"] < 1e-5
    assert has in operators(tmp_path / "out.onnx")
    assert ("MaxUnpool" in operators(tmp_path / "out.onnx")) == (has == "MaxUnpool")


@pytest.mark.parametrize("shape", [("n", 3, "h", "w"), ("n", 3, 9, 7)])
def test_open_sizes(tmp_path, shape):
    source = one(tmp_path / "in.onnx", shape, place=per_plane)
    report = rewrite_onnx(source, tmp_path / "out.onnx")
    assert report["bit_comparisons"] == 9
    assert [block["lowering"] for block in report["blocks"]] == ["keys"]
    assert ("Shape" in operators(tmp_path / "out.onnx")) == ("h" in shape)
    for size in ((9, 7), (4, 5), (3, 2)) if "h" in shape else ((9, 7),):
        same(source, tmp_path / "out.onnx", (5, 3, *size))


def test_open_sizes_that_the_windows_divide_alone(tmp_path):
    source = segnet(tmp_path / "in.onnx", shape=("n", 3, "h", "w"), sized=False)
    with pytest.raises(ValueError, match=r"without output_shape, .*\[\[2, 3\], \[2, 2\]\] .*example=\[…\]\)"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    report = rewrite_onnx(source, tmp_path / "out.onnx", example=[np.ones((1, 3, 8, 12), np.float32)])
    assert [block["lowering"] for block in report["blocks"]] == ["keys", "keys"]
    same(source, tmp_path / "out.onnx", (2, 3, 4, 18))


@pytest.mark.parametrize(
    ("shape", "size", "batches"),
    [(("n", 3, "h", "w"), (8, 18), 3), ((2, 3, 8, "w"), (12,), 1)],
)
def test_open_sizes_that_are_asked_for(tmp_path, shape, size, batches):
    source = segnet(tmp_path / "in.onnx", shape=shape, sized=False)
    report = rewrite_onnx(source, tmp_path / "out.onnx", size=size)
    full = [8, size[-1]]
    assert report["outputs"]["inputs"] == [[[batch, 3, *full]] for batch in (2, 1, 3)[:batches]]
    assert report["bit_comparisons"] == 6 * batches
    same(source, tmp_path / "out.onnx", (2, 3, 8, 24))


def test_an_if_elsewhere_stays(tmp_path):
    """It reads the map that is pooled later, and its result is measured for the unpooling."""
    net = Net("n", 3, "h", "w")
    a = net.Relu(net.conv("x", 3, 4))
    large = net.Greater(net.ReduceMax(a, keepdims=0), net.constant(np.float32(2)))
    branches = {"then_branch": net.inner(lambda: net.Neg(a)), "else_branch": net.inner(lambda: net.Abs(a))}
    b = net.If(large, **branches)
    pooled, indices = net.MaxPool(b, kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    y = flat(net, net.conv(pooled, 4, 4), indices, x=b)
    source = net.save(tmp_path / "in.onnx", y)
    (block,) = rewrite_onnx(source, tmp_path / "out.onnx")["blocks"]
    assert block["lowering"] == "keys"
    assert "If" in operators(tmp_path / "out.onnx")
    for scale in (1, 9):
        x = (scale * np.random.default_rng(scale).standard_normal((2, 3, 9, 7))).astype(np.float32)
        np.testing.assert_array_equal(run(tmp_path / "out.onnx", x), run(source, x))


def test_an_if_that_reads_the_unpooled_map_stays(tmp_path):
    net = Net(2, 3, 6, 8)
    pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    y = net.MaxUnpool(pooled, indices, kernel_shape=[2, 2], strides=[2, 2])
    shape, branches = net.ints(3, 2, 8, 6), {}
    branches["then_branch"] = net.inner(lambda: net.Reshape(y, shape))
    branches["else_branch"] = net.inner(lambda: net.Reshape("x", shape))
    source = net.save(tmp_path / "in.onnx", net.If(net.constant(True), **branches))
    rewrite_onnx(source, tmp_path / "out.onnx")
    same(source, tmp_path / "out.onnx", (2, 3, 6, 8))


@pytest.mark.parametrize("four", [False, True], ids=["flat", "four"])
@pytest.mark.parametrize("batch_in_index", [False, True])
def test_channels_last_indices(tmp_path, batch_in_index, four):
    source = one(tmp_path / "in.onnx", (2, 3, 6, 8), place=channels_last(batch_in_index, four))
    rewrite_onnx(source, tmp_path / "out.onnx")
    assert not operators(tmp_path / "out.onnx") & {*PLACING, "Transpose", "Mod", "Range"}
    same(source, tmp_path / "out.onnx", (2, 3, 6, 8))


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 5, 4, 7)], ids=["sequence", "volume"])
@pytest.mark.parametrize("lowering", ["keys", "scatter"])
def test_sequences_and_volumes(tmp_path, shape, lowering):
    source = one(tmp_path / "in.onnx", shape, place=per_plane)
    rewrite_onnx(source, tmp_path / "out.onnx", lowering=lowering)
    same(source, tmp_path / "out.onnx", shape)


def test_what_torch_exports(tmp_path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    auto, x = torch.export.Dim.AUTO, torch.randn(2, 3, 19, 16)
    program = torch.export.export(SegNet().eval(), (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    torch.onnx.export(program, (x,), dynamo=True, opset_version=18, verbose=False).save(str(tmp_path / "in.onnx"))
    assert "ScatterND" in operators(tmp_path / "in.onnx")
    report = rewrite_onnx(tmp_path / "in.onnx", tmp_path / "out.onnx", example=[x.numpy()])
    assert [(block["lowering"], block["ceil_mode"]) for block in report["blocks"]] == [("keys", True), ("keys", False)]
    assert not operators(tmp_path / "out.onnx") & PLACING
    same(tmp_path / "in.onnx", tmp_path / "out.onnx", (1, 3, 33, 22))


@pytest.mark.parametrize(
    ("pooling", "reason"),
    [
        ({"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, "stride [2, 2] differs from the window [3, 3]"),
        ({"pads": [1, 0, 0, 0]}, "padding [1, 0, 0, 0]"),
        ({"auto_pad": "SAME_LOWER"}, "padding SAME_LOWER"),
        ({"dilations": [2, 2]}, "dilation [2, 2]"),
        ({"storage_order": 1}, "storage_order 1: its indices count by columns"),
        ({"kernel_shape": [17, 16], "strides": [17, 16], "ceil_mode": 1}, "a window of 272 cells has more than 256"),
    ],
)
def test_what_needs_an_index_tensor_keeps_one_and_says_so(tmp_path, pooling, reason):
    source = one(tmp_path / "in.onnx", place=per_plane, **pooling)
    (block,) = rewrite_onnx(source, tmp_path / "out.onnx")["blocks"]
    assert (block["lowering"], block["reason"]) == ("scatter", reason)
    same(source, tmp_path / "out.onnx", (2, 3, 9, 7))


@pytest.mark.parametrize("padded", [{"auto_pad": "SAME_UPPER"}, {"pads": [0, 0, 1, 1]}, {"ceil_mode": 1}])
def test_padding_at_the_far_edges_is_a_partial_window(tmp_path, padded):
    source = one(tmp_path / "in.onnx", **padded)
    (block,) = rewrite_onnx(source, tmp_path / "out.onnx")["blocks"]
    assert (block["lowering"], block["ceil_mode"]) == ("keys", True)
    same(source, tmp_path / "out.onnx", (2, 3, 9, 7))


def test_padding_that_is_no_whole_partial_window_at_every_size_keeps_the_index_tensor(tmp_path):
    """One row and column of padding complete a window of three at 8 pixels alone."""
    pooling = {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [0, 0, 1, 1]}
    source = one(tmp_path / "in.onnx", ("n", 3, "h", "w"), **pooling)
    (block,) = rewrite_onnx(source, tmp_path / "out.onnx", size=(8, 8))["blocks"]
    assert block["lowering"] == "scatter"
    for size in ((8, 8), (9, 7)):
        same(source, tmp_path / "out.onnx", (2, 3, *size))


def test_scatter_of_old_operator_sets(tmp_path):
    net = Net(2, 3, 6, 4, opset=9)
    pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    y = flat(net, net.Sigmoid(pooled), indices, operator="Scatter")
    rewrite_onnx(net.save(tmp_path / "in.onnx", y), tmp_path / "out.onnx")
    assert not operators(tmp_path / "out.onnx") & PLACING
    same(tmp_path / "in.onnx", tmp_path / "out.onnx", (2, 3, 6, 4))


@pytest.mark.parametrize(
    ("kind", "lowering", "engine"),
    [(TensorProto.FLOAT16, "keys", "onnxruntime"), (TensorProto.DOUBLE, "scatter", "onnx reference")],
)
def test_other_types(tmp_path, kind, lowering, engine):
    """ONNX Runtime's MaxUnpool takes no float64, so that the original runs in onnx's reference."""
    net, dtype = Net(1, 2, 6, 4), helper.tensor_dtype_to_np_dtype(kind)
    pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    y = net.MaxUnpool(net.Neg(pooled), indices, kernel_shape=[2, 2], strides=[2, 2])
    report = rewrite_onnx(net.save(tmp_path / "in.onnx", y, kind=kind), tmp_path / "out.onnx", lowering=lowering)
    assert report["original_in"] == engine
    x = np.arange(48).reshape(1, 2, 6, 4).astype(dtype)
    # The last cell of each window is its maximum.
    expected = np.zeros_like(x)
    expected[..., 1::2, 1::2] = -x[..., 1::2, 1::2]
    np.testing.assert_array_equal(run(tmp_path / "out.onnx", x), expected)


@pytest.mark.parametrize("lowering", ["native", "scatter"])
def test_a_rewritten_file_can_be_rewritten(tmp_path, lowering):
    source = segnet(tmp_path / "in.onnx")
    rewrite_onnx(source, tmp_path / "first.onnx", lowering=lowering)
    rewrite_onnx(tmp_path / "first.onnx", tmp_path / "out.onnx")
    assert not operators(tmp_path / "out.onnx") & PLACING
    same(source, tmp_path / "out.onnx", (2, 3, 8, 12))


def test_the_file_keeps_what_it_said_of_itself(tmp_path):
    source = segnet(tmp_path / "in.onnx")
    before = onnx.load(str(source))
    facts = {"class_names": ["a"], "lowering": ["native"]}
    helper.set_model_props(before, {"author": "somebody", "poolskip_zoo": json.dumps(facts)})
    onnx.save(before, str(source))
    rewrite_onnx(source, tmp_path / "out.onnx")
    after = onnx.load(str(tmp_path / "out.onnx"))
    assert after.producer_name == "another exporter"
    assert after.graph.input == before.graph.input
    assert [each.name for each in after.graph.output] == [each.name for each in before.graph.output]
    props = {each.key: each.value for each in after.metadata_props}
    assert props["author"] == "somebody"
    told = json.loads(props["poolskip_zoo"])
    assert (told["class_names"], told["lowering"]) == (["a"], ["keys"])
    onnx.checker.check_model(after, full_check=True)


def test_command(tmp_path, capsys):
    source, path = str(segnet(tmp_path / "in.onnx")), str(tmp_path / "out.onnx")
    assert main(["rewrite", source, path, "--lowering", "arith"]) == 0
    out = capsys.readouterr().out
    assert "equal to the original to the bit in 6 checks" in out
    assert out.count("(MaxUnpool): arith") == 2
    assert main(["rewrite", path, source]) == 2
    assert "there is nothing to rewrite" in capsys.readouterr().err


def test_command_with_a_size(tmp_path, capsys):
    source = str(segnet(tmp_path / "in.onnx", shape=("n", 3, "h", "w"), sized=False))
    assert main(["rewrite", source, str(tmp_path / "out.onnx")]) == 2
    assert "give a size that it runs at (--size" in capsys.readouterr().err
    assert main(["rewrite", source, str(tmp_path / "out.onnx"), "--size", "8", "12"]) == 0
    assert "at inputs [[[2, 3, 8, 12]], [[1, 3, 8, 12]], [[3, 3, 8, 12]]]" in capsys.readouterr().out
