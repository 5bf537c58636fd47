"""ONNX files as other exporters write them, rewritten: equal to the bit, or refused in one line."""

import json
import logging

import numpy as np
import pytest
import torch
from export_nets import SegNet

from poolskip_zoo.cli import main
from poolskip_zoo.export import rewrite_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

RANDOM = np.random.default_rng(0)


class Net:
    """A graph under construction: `net.Conv(x, …)` adds a node and gives its output's name."""

    def __init__(self, *shape, opset=13):
        self.nodes, self.constants, self.kinds, self.shape, self.opset = [], [], {}, shape, opset

    def __getattr__(self, operator):
        def add(*inputs, outputs=1, **attributes):
            names = [f"{operator.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
            name = f"the_{operator.lower()}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(operator, inputs, names, name=name, **attributes))
            return names if outputs > 1 else names[0]

        return add

    def constant(self, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def ints(self, *values):
        return self.constant(np.array(values, np.int64))

    def conv(self, x, channels, into, axes=2):
        weight = RANDOM.standard_normal((into, channels, *[3] * axes)).astype(np.float32)
        return self.Conv(x, self.constant(weight / 9), pads=[1] * 2 * axes)

    def save(self, path, *outputs, kind=TensorProto.FLOAT):
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", kind, self.shape)],
            [
                helper.make_tensor_value_info(
                    value, self.kinds.get(value, kind), None if i else [None] * len(self.shape)
                )
                for i, value in enumerate(outputs)
            ],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        helper.set_model_props(model, {"author": "somebody"})
        model.producer_name = "another exporter"
        onnx.save(model, str(path))
        return path


def segnet(path, *, opset=13, shape=(2, 3, 8, 12), sized=True):
    """Two pairs that cross, windows of 2×2 and 2×3, the inner one of the pooled values."""
    net = Net(*shape, opset=opset)
    a = net.Relu(net.conv("x", 3, 4))
    pooled, outer = net.MaxPool(a, kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    b = net.conv(pooled, 4, 5)
    inmost, inner = net.MaxPool(b, kernel_shape=[2, 3], strides=[2, 3], outputs=2)
    sizes = [[net.Shape(each)] if sized else [] for each in (b, a)]
    c = net.MaxUnpool(inmost, inner, *sizes[0], kernel_shape=[2, 3], strides=[2, 3])
    d = net.conv(c, 5, 4)
    e = net.MaxUnpool(d, outer, *sizes[1], kernel_shape=[2, 2], strides=[2, 2])
    return net.save(path, net.conv(e, 4, 3))


def one(path, shape=(2, 3, 9, 7), *, opset=13, place=None, padded=None, **pooling):
    """One pooling, and another map placed by its indices."""
    axes = len(shape) - 2
    net = Net(*shape, opset=opset)
    pooling = {"kernel_shape": [2] * axes, "strides": [2] * axes, **pooling}
    pooled, indices = net.MaxPool("x", outputs=2, **pooling)
    values = net.Tanh(net.conv(pooled, 3, 3, axes))
    return net.save(path, net.Neg((place or flat)(net, values, indices)))


def flat(net, values, indices, x="x", operator="ScatterElements"):
    """Indices over the whole tensor, as ONNX counts."""
    row, cells = net.ints(-1), net.Shape(x)
    zeros = net.ConstantOfShape(net.ReduceProd(cells, keepdims=1))
    placed = getattr(net, operator)(zeros, net.Reshape(indices, row), net.Reshape(values, row), axis=0)
    return net.Reshape(placed, cells)


def per_plane(net, values, indices):
    """Indices per plane, as torch has them: the plane's offset is taken off, and planes are rows."""
    shape = net.Shape("x")
    planes, spatial = net.Slice(shape, net.ints(0), net.ints(2)), net.Slice(shape, net.ints(2), net.ints(9))
    rows = net.Concat(planes, net.ints(-1), axis=0)
    cells = net.ReduceProd(spatial, keepdims=1)
    zeros = net.ConstantOfShape(net.Concat(planes, cells, axis=0))
    local = net.Mod(net.Reshape(indices, rows), cells)
    placed = net.ScatterElements(zeros, local, net.Reshape(values, rows), axis=2)
    return net.Reshape(placed, shape)


def channels_last(batch_in_index, four):
    """As tf2onnx writes tf.nn.max_pool_with_argmax and tf.scatter_nd, on flat positions or on four coordinates."""

    def place(net, values, indices):
        n, h, w, c = (net.Gather(net.Shape("x"), net.ints(axis)) for axis in (0, 2, 3, 1))
        plane, image = net.Mul(h, w), net.Mul(net.Mul(h, w), c)
        scalars = [net.Squeeze(each, net.ints(0)) for each in (n, c)]
        batch, channel = (net.Range(net.constant(0), each, net.constant(1)) for each in scalars)
        batch = net.Reshape(batch, net.ints(-1, 1, 1, 1))
        mask = net.Transpose(indices, perm=[0, 2, 3, 1])
        mask = net.Add(net.Mul(net.Mod(mask, plane), c), channel)
        if batch_in_index:
            mask = net.Add(mask, net.Mul(batch, image))
        shape, row = net.Concat(n, h, w, c, axis=0), net.ints(-1)
        updates = net.Reshape(net.Transpose(values, perm=[0, 2, 3, 1]), row)
        if four:
            inside = net.Mod(mask, image)
            ones = net.ConstantOfShape(net.Shape(mask), value=numpy_helper.from_array(np.array([1])))
            places = [net.Mul(ones, batch), net.Div(inside, net.Mul(w, c)), net.Mod(net.Div(inside, c), w)]
            places = [net.Reshape(each, net.ints(1, -1)) for each in (*places, net.Mul(ones, channel))]
            where = net.Transpose(net.Concat(*places, axis=0), perm=[1, 0])
            placed = net.ScatterND(net.ConstantOfShape(shape), where, updates)
        else:
            mask = mask if batch_in_index else net.Add(mask, net.Mul(batch, image))
            zeros = net.ConstantOfShape(net.ReduceProd(shape, keepdims=1))
            placed = net.ScatterND(zeros, net.Reshape(net.Cast(mask, to=TensorProto.INT64), net.ints(-1, 1)), updates)
            placed = net.Reshape(placed, shape)
        return net.Transpose(placed, perm=[0, 3, 1, 2])

    return place


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def operators(path):
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def same(source, path, shape):
    for x in (RANDOM.standard_normal(shape), RANDOM.integers(-1, 2, shape)):
        np.testing.assert_array_equal(run(path, x.astype(np.float32)), run(source, x.astype(np.float32)))


PLACING = {"MaxUnpool", "ScatterND", "ScatterElements", "Scatter"}


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_crossing_pairs_of_maxunpool(tmp_path, opset):
    source = segnet(tmp_path / "in.onnx", opset=opset)
    report = rewrite_onnx(source, tmp_path / "out.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.onnx", "out.onnx", "out.onnx.json"]
    assert json.loads((tmp_path / "out.onnx.json").read_text()) == json.loads(json.dumps(report))
    assert [(block["lowering"], block["window"], block["own"]) for block in report["blocks"]] == [
        ("keys", [2, 3], True),
        ("keys", [2, 2], False),
    ]
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


def test_the_file_keeps_what_it_said_of_itself(tmp_path):
    source = segnet(tmp_path / "in.onnx")
    rewrite_onnx(source, tmp_path / "out.onnx")
    before, after = onnx.load(str(source)), onnx.load(str(tmp_path / "out.onnx"))
    assert after.producer_name == "another exporter"
    assert after.graph.input == before.graph.input
    assert [each.name for each in after.graph.output] == [each.name for each in before.graph.output]
    props = {each.key: each.value for each in after.metadata_props}
    assert props["author"] == "somebody"
    assert json.loads(props["poolskip_zoo"])["lowering"] == "keys"
    onnx.checker.check_model(after, full_check=True)


# --- what cannot be rewritten


def used(path, more):
    """An unpooling whose indices do something else, too."""
    net = Net(1, 3, 6, 4)
    pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    y = net.MaxUnpool(pooled, indices, kernel_shape=[2, 2], strides=[2, 2])
    return net.save(path, y, more(net, indices))


def leaving(net, indices):
    net.kinds[indices] = TensorProto.INT64
    return indices


def gathered(net, indices):
    row = net.ints(-1)
    return net.Gather(net.Reshape("x", row), net.Reshape(indices, row))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (leaving, r"'the_maxpool_0' \(MaxPool\): its indices leave the graph as 'maxpool_0_1'"),
        (gathered, r"'the_maxpool_0' \(MaxPool\): its indices are computed with in node 'the_reshape_3' \(Reshape\)"),
    ],
)
def test_indices_that_do_more_than_unpool(tmp_path, more, says):
    source = used(tmp_path / "in.onnx", more)
    with pytest.raises(ValueError, match=rf"{says}; lowering='scatter' keeps the index tensor"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["in.onnx"]
    rewrite_onnx(source, tmp_path / "out.onnx", lowering="scatter")
    assert "MaxUnpool" not in operators(tmp_path / "out.onnx")
    same(source, tmp_path / "out.onnx", (1, 3, 6, 4))


def test_maxunpool_of_indices_from_elsewhere(tmp_path):
    net = Net(1, 2, 2, 3)
    places = net.constant(np.arange(0, 48, 4).reshape(1, 2, 2, 3))
    y = net.MaxUnpool("x", places, kernel_shape=[2, 2], strides=[2, 2])
    source = net.save(tmp_path / "in.onnx", net.Neg(y))
    with pytest.raises(ValueError, match=r"node 'the_maxunpool_0' \(MaxUnpool\): its indices come from 'constant_0'"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    rewrite_onnx(source, tmp_path / "out.onnx", lowering="scatter")
    assert "ScatterElements" in operators(tmp_path / "out.onnx")
    same(source, tmp_path / "out.onnx", (1, 2, 2, 3))


def test_indices_per_plane_given_to_maxunpool(tmp_path):
    """As a plain translation of torch's operator writes it: every channel lands in the first plane."""

    def place(net, values, indices):
        local = net.Mod(indices, net.constant(np.array(48)))
        return net.MaxUnpool(values, local, kernel_shape=[2, 2], strides=[2, 2])

    source = one(tmp_path / "in.onnx", (1, 3, 6, 8), place=place)
    with pytest.raises(
        ValueError, match=r"the_maxunpool_4' \(MaxUnpool\) does not put .* torch's indices over one plane"
    ):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def add_to_x(net, values, indices):
    row = net.ints(-1)
    placed = net.ScatterElements(net.Reshape("x", row), net.Reshape(indices, row), net.Reshape(values, row), axis=0)
    return net.Reshape(placed, net.Shape("x"))


def test_a_scatter_into_other_values_is_no_unpooling(tmp_path):
    source = one(tmp_path / "in.onnx", place=add_to_x)
    with pytest.raises(ValueError, match=r"the_scatterelements_6' .* does not put values back"):
        rewrite_onnx(source, tmp_path / "out.onnx")


def test_a_file_without_unpooling(tmp_path):
    net = Net(1, 3, 6, 4)
    source = net.save(tmp_path / "in.onnx", net.MaxPool("x", kernel_shape=[2, 2]))
    with pytest.raises(ValueError, match=r"in\.onnx holds no MaxUnpool.*nothing to rewrite"):
        rewrite_onnx(source, tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("source", "path", "options", "says"),
    [
        ("in.onnx", "out.pb", {}, "ends in .onnx"),
        ("none.onnx", "out.onnx", {}, "no such file: .*none.onnx"),
        ("text.onnx", "out.onnx", {}, "text.onnx is no ONNX file"),
        ("in.onnx", "out.onnx", {"target": "nvidia"}, "target='nvidia'"),
        ("in.onnx", "out.onnx", {"target": "ncnn"}, "in.onnx leaves sizes open, .*make_dynamic_shape_fixed"),
    ],
)
def test_options_are_checked(tmp_path, source, path, options, says):
    one(tmp_path / "in.onnx", ("n", 3, 8, 8))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=says):
        rewrite_onnx(tmp_path / source, tmp_path / path, **options)


# --- failed checks leave nothing


def test_a_wrong_form_leaves_no_file(tmp_path, monkeypatch):
    from poolskip_zoo.export import onnx_forms

    # All equal maxima in place of the first one.
    monkeypatch.setattr(onnx_forms._Writer, "first", lambda self, is_max, pooled: is_max)
    source = segnet(tmp_path / "in.onnx")
    with pytest.raises(RuntimeError, match=r"the_maxunpool_.*'keys' differs from the original in .* on ties of shape"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["in.onnx"]


def test_wrong_outputs_leave_no_file(tmp_path, monkeypatch):
    from poolskip_zoo.export import verify

    source, good = segnet(tmp_path / "in.onnx"), verify.runner

    def wrong(model, runtime):
        run = good(model, runtime)
        return run if isinstance(model, bytes) else lambda arrays: [each * np.float32(1.01) for each in run(arrays)]

    monkeypatch.setattr(verify, "runner", wrong)
    with pytest.raises(RuntimeError, match=r"out\.onnx is not kept: .* differ from the original file's by 1\.0e-02"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["in.onnx"]


def test_command(tmp_path, capsys):
    source, path = str(segnet(tmp_path / "in.onnx")), str(tmp_path / "out.onnx")
    assert main(["rewrite", source, path, "--lowering", "arith"]) == 0
    out = capsys.readouterr().out
    assert "equal to the original to the bit in 6 checks" in out
    assert out.count("(MaxUnpool): arith") == 2
    assert main(["rewrite", path, source]) == 2
    assert "there is nothing to rewrite" in capsys.readouterr().err
