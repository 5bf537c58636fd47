"""The layer: the composition of its parts, the paper's equations, and a graph without index operators."""

import copy
import itertools
import pickle

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from poolskip_zoo import PoolSkip1d, PoolSkip2d, PoolSkip3d, max_pool_unpool2d

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
LAYERS = {1: PoolSkip1d, 2: PoolSkip2d, 3: PoolSkip3d}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
UNPOOL = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}
INDEX_OPS = {"MaxUnpool", "ScatterND", "ScatterElements", "GatherND", "GatherElements"}
every_rank = pytest.mark.parametrize("dims", LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def composition(layer: nn.Module, x: torch.Tensor, e: int | tuple[int, ...]) -> torch.Tensor:
    """The layer in stock operators."""
    dims, conv = layer.dims, layer.conv
    pooled, indices = POOL[dims](x, e, e, ceil_mode=True, return_indices=True)
    u = UNPOOL[dims](pooled, indices, e, e, output_size=x.shape[-dims:])
    return x + CONV[dims](u, conv.weight, conv.bias, padding=1, groups=conv.groups)


@pytest.mark.parametrize("e", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@every_rank
def test_smoke(dims, dtype, e):
    layer = LAYERS[dims](4, e, dtype=dtype)
    x = torch.randn(2, 4, *[9, 7, 5][:dims], dtype=dtype)
    assert torch.equal(layer(x), composition(layer, x, e))


@pytest.mark.parametrize("shape", [(0, 4, 6, 6), (1, 4, 1, 1), (3, 4, 7, 5), (4, 7, 5)])
@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False), (4, True)])
def test_shapes_groups_and_bias(shape, groups, bias):
    layer = PoolSkip2d(4, (2, 3), groups=groups, bias=bias)
    assert layer.conv.weight.shape == (4, 4 // groups, 3, 3)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == shape
    assert torch.equal(y, composition(layer, x, (2, 3)))


def test_windows_of_one_slice():
    """Thick slices are pooled in their plane alone, as nnU-Net pools them."""
    layer = PoolSkip3d(4, (1, 2, 2))
    x = torch.randn(2, 4, 3, 7, 8, requires_grad=True)
    y, expected = layer(x), composition(layer, x, (1, 2, 2))
    assert torch.equal(y, expected)
    leaves = [x, *layer.parameters()]
    grads = (torch.autograd.grad(each.square().sum(), leaves) for each in (y, expected))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(layer)(x), y)


@every_rank
def test_state_dict(dims):
    assert list(LAYERS[dims](4).state_dict()) == ["conv.weight", "conv.bias"]
    assert list(LAYERS[dims](4, bias=False).state_dict()) == ["conv.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4, "groups": 3}, "channels=4 must be a positive multiple of groups=3"),
        ({"channels": 0}, "channels=0"),
        ({"channels": 4, "groups": 0}, "groups=0"),
        ({"channels": 4, "pool_size": 1}, "pool_size=1: expected an int >= 2 or a tuple of 2 of them"),
        ({"channels": 4, "pool_size": (2, 2, 2)}, r"pool_size=\(2, 2, 2\)"),
        ({"channels": 4, "pool_size": (1, 1)}, r"pool_size=\(1, 1\): expected .* \(1 along axes that are not pooled\)"),
        ({"channels": 4, "pool_size": (0, 2)}, r"pool_size=\(0, 2\)"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PoolSkip2d(**options)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="size"):
        PoolSkip2d(4, size=4)


@every_rank
def test_wrong_rank(dims):
    with pytest.raises(ValueError, match=f"expected {dims + 2}"):
        LAYERS[dims](4)(torch.zeros([4] * (dims + 3)))


@pytest.mark.parametrize("groups", [1, 4])
@every_rank
def test_zero_init_changes_nothing(dims, groups):
    x = torch.randn(2, 4, *[7] * dims)
    assert torch.equal(LAYERS[dims](4, groups=groups, zero_init=True)(x), x)


def test_default_init_is_that_of_a_convolution_and_reset_repeats_it():
    layer, conv = PoolSkip2d(4), nn.Conv2d(4, 4, 3, padding=1)
    torch.manual_seed(5)
    conv.reset_parameters()
    torch.manual_seed(5)
    layer.reset_parameters()
    assert torch.equal(layer.conv.weight, conv.weight)
    assert torch.equal(layer.conv.bias, conv.bias)
    torch.manual_seed(5)
    assert torch.equal(PoolSkip2d(4).conv.weight, conv.weight)


def test_reset_honours_zero_init():
    layer = PoolSkip2d(4, zero_init=True)
    nn.init.ones_(layer.conv.weight)
    nn.init.ones_(layer.conv.bias)
    layer.reset_parameters()
    assert not layer.conv.weight.any()
    assert not layer.conv.bias.any()


@every_rank
def test_copies(dims):
    layer, x = LAYERS[dims](4, 3), torch.randn(2, 4, *[7] * dims)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.conv.weight is not layer.conv.weight
        assert torch.equal(clone(x), layer(x))


def test_repr_tells_the_window():
    assert "pool_size=(2, 4), zero_init=True" in repr(PoolSkip2d(4, (2, 4), zero_init=True))


def test_device_and_dtype():
    layer = PoolSkip2d(4, device="meta", dtype=torch.float16)
    assert (layer.conv.weight.device.type, layer.conv.weight.dtype) == ("meta", torch.float16)
    assert layer(torch.empty(1, 4, 5, 5, device="meta", dtype=torch.float16)).shape == (1, 4, 5, 5)


@pytest.mark.parametrize(("dims", "memory_format"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_memory_format_is_kept(dims, memory_format):
    x = torch.randn(2, 4, *[6] * dims).contiguous(memory_format=memory_format)
    layer = LAYERS[dims](4).to(memory_format=memory_format)
    assert layer(x).is_contiguous(memory_format=memory_format)
    # It is that of x, also where the weights have another.
    assert layer(x.contiguous()).is_contiguous()


def test_autocast():
    layer, x = PoolSkip2d(4), torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = x + F.conv2d(max_pool_unpool2d(x, 2), layer.conv.weight, layer.conv.bias, padding=1)
    # The sum stays in the type of x; only the convolution runs in bfloat16.
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)
    assert not torch.equal(y, layer(x))
    y.sum().backward()
    assert layer.conv.weight.grad.dtype == torch.float32


@every_rank
def test_gradcheck(dims):
    layer = LAYERS[dims](2, dtype=torch.float64)
    size = [4, 3, 2][:dims]
    x = torch.randperm(2 * int(torch.tensor(size).prod())).double().reshape(1, 2, *size).requires_grad_()
    weights = [layer.conv.weight, layer.conv.bias]
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x, *weights))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_trains_deterministically(deterministic, memory_format):
    x = torch.randn(2, 4, 9, 9).to(memory_format=memory_format)
    gradients = []
    for _ in range(2):
        layer = PoolSkip2d(4)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(0.1)
        layer(x.requires_grad_()).square().sum().backward()
        gradients.append(layer.conv.weight.grad)
    assert torch.equal(*gradients)


# The paper's equations 13 to 15


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_equations_13_to_15(kernel):
    """Pool Skip after a convolution is, on every linear piece, one larger convolution that differs from place to place.

    Let y[p] = Σ_m w[m]·x[p+m] be the convolution that Pool Skip follows, w̃ the 3×3 kernel and P the places of the
    window maxima. Of its nine neighbours p+s only those in P reach the output: y_out[p] = Σ_{s: p+s∈P} w̃[s]·y[p+s],
    and each of these is itself a sum over x (13). So (14)

        o[p] = Σ_m (1 + w̃[0]·[p∈P])·w[m]·x[p+m]               affine compensation: the pixels that y[p] sees already
             + Σ_{s≠0: p+s∈P} Σ_m w̃[s]·w[m]·x[p+s+m]          dimensional compensation: an input one pixel larger

    and o[p] = y[p] where no neighbour is in P (15). The gradient of o[p] for x is the kernel that acts at p.
    """
    e, size = 4, 8
    reach, middle = kernel + 2, 1
    x = torch.randn(size + kernel - 1, size + kernel - 1, dtype=torch.float64, requires_grad=True)
    w = torch.randn(kernel, kernel, dtype=torch.float64)
    layer = PoolSkip2d(1, e, bias=False, dtype=torch.float64)
    w_tilde = layer.conv.weight.detach()[0, 0]

    y = F.conv2d(x[None, None], w[None, None])
    o = layer(y)[0, 0]
    y = y[0, 0]
    maxima = set()
    for top, left in itertools.product(range(0, size, e), repeat=2):
        row, column = divmod(int(y[top : top + e, left : left + e].argmax()), e)
        maxima.add((top + row, left + column))

    seen = {"unchanged": 0, "affine": 0, "both": 0}
    for i, j in itertools.product(range(size), repeat=2):
        # Kernel over the (M+2)×(M+2) pixels around p; those y[p] sees lie one pixel inside.
        effective = F.pad(w, [1, 1, 1, 1])
        neighbours = [s for s in itertools.product(range(3), repeat=2) if (i + s[0] - 1, j + s[1] - 1) in maxima]
        for s, t in neighbours:
            effective[s : s + kernel, t : t + kernel] += w_tilde[s, t] * w
        (gradient,) = torch.autograd.grad(o[i, j], x, retain_graph=True)
        torch.testing.assert_close(F.pad(gradient, [1, 1, 1, 1])[i : i + reach, j : j + reach], effective)
        patch = F.pad(x.detach(), [1, 1, 1, 1])[i : i + reach, j : j + reach]
        torch.testing.assert_close(o[i, j].detach(), (effective * patch).sum())
        if not neighbours:
            seen["unchanged"] += 1
            assert o[i, j] == y[i, j]
        elif neighbours == [(middle, middle)]:
            seen["affine"] += 1
            torch.testing.assert_close(o[i, j], (1 + w_tilde[middle, middle]) * y[i, j])
        else:
            seen["both"] += 1
    assert all(seen.values()), seen


# Capture


class Net(nn.Module):
    """A convolution, Pool Skip, and a stride: sizes are expressions in the graph, not inputs."""

    def __init__(self, dims: int, e: int) -> None:
        super().__init__()
        self.conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 3, stride=2, padding=1)
        self.pool_skip = LAYERS[dims](4, e)

    def forward(self, x):
        return self.pool_skip(self.conv(x))


def images(dims: int) -> list[torch.Tensor]:
    return [torch.randn(n, 3, *[h, h + 2, h + 7][:dims]) for n, h in [(1, 13), (2, 16), (3, 21), (1, 24)]]


@every_rank
def test_script_and_trace_at_other_sizes(dims, assert_close):
    net = Net(dims, 2)
    with torch.no_grad():
        for captured in (torch.jit.script(net), torch.jit.trace(net, torch.randn(2, 3, *[17] * dims))):
            for x in images(dims):
                assert_close(captured(x), net(x))


@every_rank
def test_fx(dims):
    net = Net(dims, 2)
    graph = torch.fx.symbolic_trace(net)
    for x in images(dims):
        assert torch.equal(graph(x), net(x))


@pytest.mark.parametrize(("dim", "size"), [("AUTO", (33, 35)), ("AUTO", (32, 64)), ("DYNAMIC", (63, 48))])
def test_export_with_dynamic_sizes(dim, size, assert_close):
    """From examples that the window divides and others, at sizes that it divides and others."""
    net = Net(2, 4)
    dynamic = dict.fromkeys((0, 2, 3), getattr(torch.export.Dim, dim))
    program = torch.export.export(net, (torch.randn(2, 3, *size),), dynamic_shapes=(dynamic,)).module()
    for x in images(2):
        assert_close(program(x), net(x))


def check_onnx(path, net: nn.Module, inputs: list[torch.Tensor], assert_close) -> None:
    graph = onnx.load(path).graph
    operators = {node.op_type for node in graph.node}
    assert "MaxPool" in operators
    assert not operators & INDEX_OPS
    # torch 2.6 writes MaxPool's second output, the indices; nobody may read them.
    indices = {name for node in graph.node if node.op_type == "MaxPool" for name in node.output[1:]}
    assert not indices & {name for node in graph.node for name in node.input}
    assert not indices & {output.name for output in graph.output}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in inputs:
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert_close(torch.from_numpy(got), net(x).detach())


@pytest.mark.parametrize(
    ("dims", "e"), [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 4), (1, 2), (3, 2)])]
)
def test_onnx(dims, e, tmp_path, assert_close):
    net = Net(dims, e).eval()
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in range(dims + 2) if axis != 1}
    path = str(tmp_path / "net.onnx")
    example = (torch.randn(2, 3, *[31] * dims),)
    torch.onnx.export(net, example, path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    check_onnx(path, net, images(dims), assert_close)


@every_rank
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_without_dynamo(dims, tmp_path, assert_close):
    net = Net(dims, 2).eval()
    dynamic = {"x": {axis: f"size{axis}" for axis in range(dims + 2) if axis != 1}}
    path = str(tmp_path / "net.onnx")
    example = (torch.randn(2, 3, *[31] * dims),)
    torch.onnx.export(net, example, path, dynamo=False, input_names=["x"], dynamic_axes=dynamic)
    check_onnx(path, net, images(dims), assert_close)
