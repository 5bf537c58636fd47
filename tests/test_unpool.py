"""The drop-in pooling pair equals torch's, and its mask survives every runtime."""

import pickle

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import poolskip_zoo

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
POOL = {d: getattr(poolskip_zoo, f"MaxPool{d}d") for d in (1, 2, 3)}
UNPOOL = {d: getattr(poolskip_zoo, f"MaxUnpool{d}d") for d in (1, 2, 3)}
TORCH_POOL = {d: getattr(nn, f"MaxPool{d}d") for d in (1, 2, 3)}
TORCH_UNPOOL = {d: getattr(nn, f"MaxUnpool{d}d") for d in (1, 2, 3)}
every_rank = pytest.mark.parametrize("dims", POOL)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    window = tuple(draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))
    # At least one whole window: floor mode has no output for less, and torch raises.
    spatial = [draw(st.integers(e, 9)) for e in window]
    leading = draw(st.sampled_from([(2, 3), (1, 1), (3,)]))
    x = torch.randint(-3, 4, (*leading, *spatial), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return dims, window, x.float(), draw(st.booleans())


@given(cases())
def test_values_gradients_and_sizes_equal_torch(case):
    dims, window, x, ceil_mode = case
    results = []
    for pool, unpool in ((TORCH_POOL[dims], TORCH_UNPOOL[dims]), (POOL[dims], UNPOOL[dims])):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        pooled, indices = pool(window, return_indices=True, ceil_mode=ceil_mode)(leaf)
        # As in a decoder: other values come back than went in.
        decoded = torch.randn(pooled.shape, requires_grad=True)
        u = unpool(window)(pooled * decoded, indices, output_size=x.shape[-dims:])
        gradients = torch.autograd.grad((u * torch.randn(u.shape)).sum(), (leaf, decoded))
        results.append((pooled, u, *gradients))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_a_long_window():
    x = torch.randn(1, 2, 41 * 40)
    (values, indices), (_, mask) = TORCH_POOL[1](41, return_indices=True)(x), POOL[1](41)(x)
    assert torch.equal(UNPOOL[1](41)(values, mask), TORCH_UNPOOL[1](41)(values, indices))


@pytest.mark.parametrize("ceil_mode", [False, True])
@every_rank
def test_without_output_size(dims, ceil_mode):
    x = torch.randn(2, 3, *[6, 4, 8][:dims])
    pooled, indices = TORCH_POOL[dims](2, return_indices=True)(x)
    mine, mask = POOL[dims](2, ceil_mode=ceil_mode)(x)
    assert mask.dtype == torch.bool
    assert mask.shape == x.shape
    assert torch.equal(UNPOOL[dims](2)(mine, mask), TORCH_UNPOOL[dims](2)(pooled, indices))
    # The whole shape of the input is a valid output_size in torch, too.
    assert torch.equal(UNPOOL[dims](2)(mine, mask, x.shape), TORCH_UNPOOL[dims](2)(pooled, indices, x.shape))


@pytest.mark.parametrize("ceil_mode", [False, True])
@every_rank
def test_without_output_size_where_the_window_does_not_divide(dims, ceil_mode):
    """The size is torch's; the values keep their rows and columns, where torch misreads its flat indices."""
    x = torch.randn(2, 3, *[7, 5, 9][:dims])
    pooled, mask = POOL[dims](2, ceil_mode=ceil_mode)(x)
    u = UNPOOL[dims](2)(pooled, mask)
    assert list(u.shape[2:]) == [2 * size for size in pooled.shape[2:]]
    shared = tuple(slice(0, min(a, b)) for a, b in zip(u.shape, x.shape, strict=True))
    full = UNPOOL[dims](2)(pooled, mask, x.shape)
    assert torch.equal(u[shared], full[shared])
    assert u.count_nonzero() == full.count_nonzero() == pooled.numel()


def test_nan_and_infinity_equal_torch():
    x = torch.randint(-2, 3, (2, 3, 9, 8)).float()
    for value in (float("nan"), float("inf"), -float("inf")):
        x[torch.rand(x.shape) < 0.1] = value
    pooled, indices = nn.MaxPool2d(2, return_indices=True)(x)
    mine, mask = poolskip_zoo.MaxPool2d(2)(x)
    assert torch.equal(mine.nan_to_num(99), pooled.nan_to_num(99))
    places = nn.MaxUnpool2d(2)(torch.ones_like(pooled), indices, output_size=x.shape)
    assert torch.equal(mask, places.bool())
    # Of other values, NaN and infinity among them, too; to the sign of zero.
    values = pooled.flip(-1)
    theirs = nn.MaxUnpool2d(2)(values, indices, output_size=x.shape)
    u = poolskip_zoo.MaxUnpool2d(2)(values, mask, output_size=x.shape)
    assert torch.equal(u.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 1}, r"stride=\[1, 1\]: only stride=\[2, 2\] is supported; torch.nn.MaxPool2d"),
        ({"padding": 1}, r"padding=\[1, 1\]"),
        ({"dilation": 2}, r"dilation=\[2, 2\]"),
        ({"return_indices": False}, "return_indices=False"),
        ({"kernel_size": 0}, "pool_size=0"),
        ({"kernel_size": (2, 2, 2)}, "pool_size="),
    ],
)
def test_wrong_pool_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        poolskip_zoo.MaxPool2d(**{"kernel_size": 2, **options})


@pytest.mark.parametrize(("options", "message"), [({"stride": 3}, r"stride=\[3, 3\]"), ({"padding": 1}, "padding=")])
def test_wrong_unpool_arguments(options, message):
    with pytest.raises(ValueError, match=message + ".*torch.nn.MaxUnpool2d"):
        poolskip_zoo.MaxUnpool2d(2, **options)


@pytest.mark.parametrize("size", [(4, 4), (8, 4), (6, 9), (6,), ()])
def test_wrong_output_size(size):
    pooled, mask = poolskip_zoo.MaxPool2d(2)(torch.randn(1, 1, 6, 6))
    with pytest.raises(ValueError, match="output_size="):
        poolskip_zoo.MaxUnpool2d(2)(pooled, mask, size)


@pytest.mark.parametrize("size", [(7, 11), (11, 8), (11, 11)])
def test_an_output_larger_than_the_map_is_zero_beyond_it(size):
    """Of three windows of 3 torch takes any size from 7 to 11."""
    x = torch.randn(1, 2, 7, 7)
    pooled, mask = poolskip_zoo.MaxPool2d(3, ceil_mode=True)(x)
    unpool = poolskip_zoo.MaxUnpool2d(3)
    u = unpool(pooled, mask, size)
    assert u.shape == (1, 2, *size)
    assert torch.equal(u[..., :7, :7], unpool(pooled, mask, x.shape))
    assert u.count_nonzero() == pooled.numel()


def test_mask_of_another_map():
    pooled, _ = poolskip_zoo.MaxPool2d(2)(torch.randn(1, 1, 6, 6))
    with pytest.raises(ValueError, match=r"a mask of \[12, 6\]"):
        poolskip_zoo.MaxUnpool2d(2)(pooled, torch.ones(1, 1, 12, 6, dtype=torch.bool))


def test_indices_in_place_of_the_mask():
    pooled, indices = nn.MaxPool2d(2, return_indices=True)(torch.randn(1, 1, 6, 6))
    for size in (None, (6, 6)):
        with pytest.raises(ValueError, match=r"mask is torch\.int64: expected the bool mask of .*MaxPool2d"):
            poolskip_zoo.MaxUnpool2d(2)(pooled, indices, size)


@every_rank
def test_wrong_rank(dims):
    with pytest.raises(ValueError, match=f"expected {dims + 2}"):
        POOL[dims](2)(torch.zeros([4] * (dims + 3)))
    with pytest.raises(ValueError, match=f"expected {dims + 2}"):
        UNPOOL[dims](2)(torch.zeros([4] * (dims + 3)), torch.zeros([4] * (dims + 3), dtype=torch.bool))


def test_deterministic_mode(deterministic):
    """torch's own unpooling raises here."""
    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    u = poolskip_zoo.MaxUnpool2d(2)(*poolskip_zoo.MaxPool2d(2)(x), x.shape)
    u.sum().backward()
    assert torch.equal(x.grad, (u != 0).float())


@every_rank
def test_gradcheck(dims):
    x = torch.randperm(2 * 4**dims).double().reshape(1, 2, *[4] * dims).requires_grad_()
    values = torch.randn(1, 2, *[2] * dims, dtype=torch.float64, requires_grad=True)
    pool, unpool = POOL[dims](2), UNPOOL[dims](2)

    def pair(x, values):
        pooled, mask = pool(x)
        return unpool(pooled * values, mask)

    assert torch.autograd.gradcheck(pair, (x, values))


@pytest.mark.parametrize("ceil_mode", [False, True])
@every_rank
def test_the_scripted_mask_equals_the_eager_one(dims, ceil_mode):
    pool = POOL[dims](3, ceil_mode=ceil_mode)
    # Zeros and ties, also in the rows and columns that floor mode leaves out.
    x = torch.randint(-1, 2, (2, 3, *[8, 7, 10][:dims])).float()
    for got, expected in zip(torch.jit.script(pool)(x), pool(x), strict=True):
        assert torch.equal(got, expected)


class SegNet(nn.Module):
    """Two pooling pairs that cross: what the encoder notes first the decoder needs last."""

    def __init__(self, dims: int = 2, with_size: bool = True) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.down1, self.down2 = conv(3, 4, 3, padding=1), conv(4, 4, 3, padding=1)
        self.up2, self.up1 = conv(4, 4, 3, padding=1), conv(4, 4, 3, padding=1)
        self.pool1, self.pool2 = POOL[dims](2), POOL[dims](3, ceil_mode=True)
        self.unpool2, self.unpool1 = UNPOOL[dims](3), UNPOOL[dims](2)
        self.with_size = with_size

    def forward(self, x):
        a, mask1 = self.pool1(self.down1(x).relu())
        b, mask2 = self.pool2(self.down2(a).relu())
        if self.with_size:
            c = self.unpool2(self.up2(b).relu(), mask2, a.shape)
            return self.unpool1(self.up1(c), mask1, x.shape)
        return self.unpool1(self.up1(self.unpool2(self.up2(b).relu(), mask2)), mask1)


def images(dims: int, with_size: bool) -> list[torch.Tensor]:
    # Without sizes the windows must divide the map: only then do two nested pairs come back to it.
    sizes = [(13, 16, 19), (17, 22, 15), (20, 31, 24)] if with_size else [(12, 18, 24), (24, 12, 18), (36, 12, 12)]
    return [torch.randn(n + 1, 3, *size[:dims]) for n, size in enumerate(sizes)]


def test_segnet_equals_torch(assert_close):
    net, theirs = SegNet(), SegNet()
    theirs.load_state_dict(net.state_dict())
    theirs.pool1 = nn.MaxPool2d(2, return_indices=True)
    theirs.pool2 = nn.MaxPool2d(3, return_indices=True, ceil_mode=True)
    theirs.unpool1, theirs.unpool2 = nn.MaxUnpool2d(2), nn.MaxUnpool2d(3)
    for x in images(2, True):
        assert_close(net(x), theirs(x))


@pytest.mark.parametrize("with_size", [True, False])
@every_rank
def test_script_and_trace_at_other_sizes(dims, with_size, assert_close):
    net = SegNet(dims, with_size)
    example = torch.randn(2, 3, *[30] * dims)
    with torch.no_grad():
        for captured in (torch.jit.script(net), torch.jit.trace(net, example)):
            for x in images(dims, with_size):
                assert_close(captured(x), net(x))


@pytest.mark.parametrize(
    ("dims", "with_size"),
    [(2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, False), (1, True), (3, True)))],
)
def test_export_and_onnx(dims, with_size, tmp_path, assert_close):
    net = SegNet(dims, with_size).eval()
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in range(dims + 2) if axis != 1}
    example = (torch.randn(2, 3, *[30] * dims),)
    program = torch.export.export(net, example, dynamic_shapes=(dynamic,))
    for x in images(dims, with_size):
        assert_close(program.module()(x), net(x))

    path = str(tmp_path / "net.onnx")
    torch.onnx.export(net, example, path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    nodes = onnx.load(path).graph.node
    assert not {node.op_type for node in nodes} & {"MaxUnpool", "ScatterND", "ScatterElements", "GatherND"}
    # torch 2.6 writes MaxPool's second output, the indices; nobody may read them.
    indices = {name for node in nodes if node.op_type == "MaxPool" for name in node.output[1:]}
    assert not indices & {name for node in nodes for name in node.input}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in images(dims, with_size):
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert_close(torch.from_numpy(got), net(x).detach())


def test_compile(assert_close):
    torch._dynamo.reset()
    net = SegNet()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for x in images(2, True)[:2]:
        assert_close(compiled(x), net(x))


def test_pickle_and_repr():
    pool = pickle.loads(pickle.dumps(poolskip_zoo.MaxPool2d((2, 3), ceil_mode=True)))
    assert repr(pool) == "MaxPool2d(kernel_size=(2, 3), ceil_mode=True)"
    assert repr(poolskip_zoo.MaxUnpool2d(2)) == "MaxUnpool2d(kernel_size=(2, 2))"
    assert pool(torch.zeros(1, 1, 3, 3))[0].shape == (1, 1, 2, 1)
