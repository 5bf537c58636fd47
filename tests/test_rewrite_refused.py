"""ONNX files that cannot be rewritten: refused in one line, and nothing is left behind."""

import numpy as np
import pytest
from rewrite_nets import Net, flat, one, operators, run, same, segnet

from poolskip_zoo.export import rewrite_onnx

onnx = pytest.importorskip("onnx")

from onnx import TensorProto  # noqa: E402


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


def placed_inside(net):
    pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    return lambda: net.MaxUnpool(pooled, indices, kernel_shape=[2, 2], strides=[2, 2])


def pooled_inside(net):
    def make():
        pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
        return flat(net, pooled, indices)

    return make


def scattered_inside(net):
    pooled, indices = net.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    return lambda: flat(net, pooled, indices)


def deeper(net):
    make = pooled_inside(net)
    return lambda: net.If(net.constant(True), then_branch=net.inner(make), else_branch=net.inner(lambda: net.Neg("x")))


@pytest.mark.parametrize(
    ("inside", "says"),
    [
        (placed_inside, r"'the_maxunpool_1' \(MaxUnpool\) lies inside node 'the_if_\d' \(If\), .* without that If"),
        (pooled_inside, r"'the_maxpool_0' \(MaxPool\) lies inside node 'the_if_\d' \(If\)"),
        (scattered_inside, r"'the_maxpool_0' \(MaxPool\): its indices are computed with in node 'the_reshape_4'"),
        (deeper, r"'the_maxpool_0' \(MaxPool\) lies inside node 'the_if_\d' \(If\)"),
    ],
)
def test_unpoolings_inside_an_if(tmp_path, inside, says):
    """Beside one in the main graph, which could be rewritten."""
    net = Net(1, 3, 6, 4)
    then, otherwise = net.inner(inside(net)), net.inner(lambda: net.Identity("x"))
    y = net.If(
        net.Greater(net.ReduceMax("x", keepdims=0), net.constant(np.float32(0))),
        then_branch=then,
        else_branch=otherwise,
    )
    pooled, indices = net.MaxPool(y, kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    source = net.save(tmp_path / "in.onnx", net.MaxUnpool(pooled, indices, kernel_shape=[2, 2], strides=[2, 2]))
    assert run(source, np.ones((1, 3, 6, 4), np.float32)).shape == (1, 3, 6, 4)
    with pytest.raises(ValueError, match=says):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["in.onnx"]


def test_sizes_that_the_file_does_not_run_at(tmp_path):
    net = Net(1, 3, "h", "w")
    y = net.Add("x", net.constant(np.ones((1, 3, 6, 4), np.float32)))
    pooled, indices = net.MaxPool(y, kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    source = net.save(tmp_path / "in.onnx", flat(net, pooled, indices, x=y))
    with pytest.raises(ValueError, match=r"does not run on inputs of shape \[\[1, 3, 5, 4\]\] .*; give a size that it"):
        rewrite_onnx(source, tmp_path / "out.onnx", size=(5, 4))
    assert rewrite_onnx(source, tmp_path / "out.onnx", size=(6, 4))["bit_comparisons"] == 3


def test_a_file_without_unpooling(tmp_path):
    net = Net(1, 3, 6, 4)
    source = net.save(tmp_path / "in.onnx", net.MaxPool("x", kernel_shape=[2, 2]))
    with pytest.raises(ValueError, match=r"in\.onnx holds no MaxUnpool.*nothing to rewrite"):
        rewrite_onnx(source, tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("shape", "options", "says"),
    [
        ((1, 3, 6, 4), {"size": (6, 4)}, r"size=\(6, 4\): in\.onnx leaves no size .* open: \{'x': \[1, 3, 6, 4\]\}"),
        (("n", 3, "h", "w"), {"size": (6,)}, r"size=\(6,\): expected 2, .* by 'x': \['n', 3, 'h', 'w'\]"),
        (("n", 3, "h", 4), {"size": (6, 4)}, r"size=\(6, 4\): expected 1, .* by 'x': \['n', 3, 'h', 4\]"),
        (("n", 3, "h", "w"), {"size": (6, 0)}, r"size=\(6, 0\): expected sizes of at least 1"),
        (("n", 3, "h", "w"), {"size": (6, 4), "example": []}, r"size=\(6, 4\): the arrays of example= have their own"),
        (
            ("n", 3, 6, 4),
            {"example": [np.zeros((0, 3, 6, 4), np.float32)]},
            r"map is empty on inputs of shape \[\[0, 3, 6, 4\]\]; give a size that it runs at",
        ),
    ],
)
def test_sizes_are_checked(tmp_path, shape, options, says):
    with pytest.raises(ValueError, match=says):
        rewrite_onnx(one(tmp_path / "in.onnx", shape), tmp_path / "out.onnx", **options)


@pytest.mark.parametrize(
    ("source", "path", "options", "says"),
    [
        ("in.onnx", "out.pb", {}, "ends in .onnx"),
        ("none.onnx", "out.onnx", {}, "no such file: .*none.onnx"),
        ("text.onnx", "out.onnx", {}, "text.onnx is not an ONNX file"),
        ("empty.onnx", "out.onnx", {}, "empty.onnx is not an ONNX file: it holds no graph"),
        ("in.onnx", "out.onnx", {"example": [np.zeros(2)] * 2}, "example: in.onnx takes a list of 1 arrays, of x"),
        ("in.onnx", "out.onnx", {"example": np.zeros(2)}, "example: in.onnx takes a list of 1 arrays, of x"),
        ("in.onnx", "out.onnx", {"target": "nvidia"}, "target='nvidia'"),
        ("in.onnx", "out.onnx", {"target": "ncnn"}, "in.onnx leaves sizes open, .*make_dynamic_shape_fixed"),
    ],
)
def test_options_are_checked(tmp_path, source, path, options, says):
    one(tmp_path / "in.onnx", ("n", 3, 8, 8))
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ValueError, match=says):
        rewrite_onnx(tmp_path / source, tmp_path / path, **options)


def test_weights_in_a_file_that_is_not_there(tmp_path):
    source = segnet(tmp_path / "in.onnx")
    onnx.save(onnx.load(str(source)), str(source), save_as_external_data=True, location="weights", size_threshold=0)
    rewrite_onnx(source, tmp_path / "out.onnx")
    (tmp_path / "weights").unlink()
    with pytest.raises(ValueError, match=r"in\.onnx has its weights in another file: put that next to it \("):
        rewrite_onnx(source, tmp_path / "out.onnx")


# --- failed checks leave nothing


def test_a_wrong_form_leaves_no_file(tmp_path, monkeypatch):
    from poolskip_zoo.export import onnx_forms

    # All equal maxima in place of the first one.
    monkeypatch.setattr(onnx_forms.Writer, "first", lambda self, is_max, pooled: is_max)
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


def test_flips_excuse_no_error_before_them(tmp_path, monkeypatch):
    """The new file runs on other inputs; its one output is positive, so that no class changes."""
    from poolskip_zoo.export import rewrite_file, verify

    net, good = Net(2, 3, 8, 12), verify.runner
    a = net.conv("x", 3, 4)
    pooled, indices = net.MaxPool(a, kernel_shape=[2, 2], strides=[2, 2], outputs=2)
    source = net.save(tmp_path / "in.onnx", net.Sigmoid(net.ReduceMin(flat(net, pooled, indices, x=a))))

    def wrong(model, runtime):
        return lambda arrays: good(model, runtime)([each + np.float32(0.1) * each[..., ::-1] for each in arrays])

    monkeypatch.setattr(rewrite_file.File, "check_blocks", lambda *args: 0)
    monkeypatch.setattr(rewrite_file, "_start", lambda model: (good(_bytes(model), "onnxruntime"), "onnxruntime"))
    monkeypatch.setattr(verify, "runner", wrong)
    with pytest.raises(RuntimeError, match=r"the first map with a window that flipped differs by \d\.\de-0[12] itself"):
        rewrite_onnx(source, tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["in.onnx"]


def _bytes(model):
    return model if isinstance(model, bytes) else model.SerializeToString()
