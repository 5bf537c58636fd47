"""ONNX files with max-unpooling as exporters write them, node by node."""

import numpy as np
import pytest

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

    def inner(self, make):
        """A graph for an If, of what `make` adds to this one."""
        number = len(self.nodes)
        output = make()
        nodes, self.nodes[number:] = self.nodes[number:], []
        return helper.make_graph(nodes, "inner", [], [onnx.ValueInfoProto(name=output)])

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
