"""The window maxima: every form equals torch's pooling and unpooling."""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from poolskip_zoo import max_pool_unpool1d, max_pool_unpool2d, max_pool_unpool3d
from poolskip_zoo.layers.functional import capture_stock, keys_maxima, window_maxima

OPS = {1: max_pool_unpool1d, 2: max_pool_unpool2d, 3: max_pool_unpool3d}
POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
UNPOOL = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")
every_rank = pytest.mark.parametrize("dims", OPS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@contextlib.contextmanager
def deterministic_mode():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def stock(x: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    dims = len(window)
    x = x.contiguous() if dims == 3 else x  # for in channels_last_3d torch misplaces windows of -inf alone
    pooled, indices = POOL[dims](x, window, window, ceil_mode=True, return_indices=True)
    return UNPOOL[dims](pooled, indices, window, window, output_size=x.shape[-dims:])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.contiguous().view(BITS[got.dtype]), expected.contiguous().view(BITS[expected.dtype]))


def values(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Many ties, distinct values, or everything that IEEE 754 has to offer."""
    random = torch.Generator().manual_seed(seed)
    if kind == "distinct":
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    x = torch.randint(-2, 3, shape, generator=random).to(dtype)
    if kind == "special":
        for value in (float("nan"), float("inf"), -float("inf"), -0.0):
            x[torch.rand(shape, generator=random) < 0.15] = value
        # Whole windows of one value, with and without anything larger beside it.
        share = float(torch.rand((), generator=random)) + 0.3
        x[..., : shape[-1] // 2][torch.rand(shape, generator=random)[..., : shape[-1] // 2] < share] = -float("inf")
    return x


@st.composite
def inputs(draw, kinds=("ties", "distinct", "special")):
    dims = draw(st.integers(1, 3))
    window = tuple(draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))
    spatial = draw(st.lists(st.integers(1, 7), min_size=dims, max_size=dims))
    leading = draw(st.sampled_from([(2, 3), (1, 1), (0, 2), (3,)]))
    dtype = draw(st.sampled_from(list(BITS)))
    x = values((*leading, *spatial), draw(st.sampled_from(kinds)), dtype, draw(st.integers(0, 999)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    if layout == "channels_last" and len(leading) == 2 and dims > 1:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    elif layout == "strided":
        x = x.repeat_interleave(2, -1)[..., ::2]
    return x, window


def naive(x: torch.Tensor, e: int) -> torch.Tensor:
    """The definition, one window at a time: the first of the largest in row-major order, of several NaN the last."""
    u = torch.zeros_like(x)
    for channel, top, left in itertools.product(*map(range, (x.shape[0], x.shape[1], x.shape[2]))):
        if top % e or left % e:
            continue
        best = None
        for i, j in itertools.product(range(top, min(top + e, x.shape[1])), range(left, min(left + e, x.shape[2]))):
            value = x[channel, i, j]
            if best is None or value > x[best] or value.isnan():
                best = (channel, i, j)
        u[best] = x[best]
    return u


# Eager mode


@given(inputs())
def test_equals_stock_to_the_bit(drawn):
    x, window = drawn
    assert_same_bits(OPS[len(window)](x, window), stock(x, window))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, deterministic_mode])
def test_windows_of_minus_infinity_deep_in_a_volume_stay_there(layout, mode):
    x = torch.full((1, 2, 4, 2, 2), -float("inf"))
    x[:, :, 0, 0, 0], x[:, :, 1] = 5.0, 1.0
    expected = stock(x, (2, 2, 2))
    assert (expected == 5).sum() == 2
    x = x.contiguous(memory_format=layout).requires_grad_()
    with mode():
        assert_same_bits(max_pool_unpool3d(x.detach(), 2), expected)
        u = max_pool_unpool3d(x, 2)
        assert_same_bits(u.detach(), expected)
        u.backward(torch.ones_like(u))
    assert x.grad.nonzero().tolist() == [[0, c, depth, 0, 0] for c in (0, 1) for depth in (0, 2)]


@given(inputs())
def test_deterministic_mode_equals_stock_to_the_bit(drawn):
    x, window = drawn
    with deterministic_mode():
        got = OPS[len(window)](x, window)
    assert_same_bits(got, stock(x, window))


@given(inputs(kinds=("ties", "distinct")))
def test_keys_equal_stock_for_finite_values(drawn):
    x, window = drawn
    if x.dim() == len(window) + 1:
        x = x.unsqueeze(0)
    # Only the sign of a zero may differ.
    assert torch.equal(keys_maxima(x, list(window)), stock(x, window))


@pytest.mark.parametrize("e", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["ties", "special"])
def test_definition(e, kind):
    x = values((2, 7, 5), kind, torch.float32, 3)
    assert_same_bits(max_pool_unpool2d(x, e), naive(x, e))


@pytest.mark.parametrize("dtype", BITS)
@every_rank
def test_smoke(dims, dtype):
    x = torch.arange(2.0 * 5**dims).reshape(1, 2, *[5] * dims).to(dtype)
    u = OPS[dims](x, 2)
    assert u.dtype == dtype
    # One maximum, the last element, of each of the 3 windows along an axis.
    assert u.count_nonzero() == 2 * 3**dims
    assert u[0, -1][(-1,) * dims] == x.max()


@pytest.mark.parametrize("mode", ["eager", "deterministic"])
@every_rank
def test_memory_format_is_kept(dims, mode):
    x = torch.randn(2, 3, *[5, 6, 7][:dims])
    with deterministic_mode() if mode == "deterministic" else contextlib.nullcontext():
        assert OPS[dims](x, 2).stride() == x.stride()
        if dims > 1:
            memory_format = CHANNELS_LAST[x.dim()]
            assert OPS[dims](x.contiguous(memory_format=memory_format), 2).is_contiguous(memory_format=memory_format)


@every_rank
def test_an_int_is_the_same_window_along_every_axis(dims):
    x = torch.randn(2, 3, *[7] * dims)
    assert torch.equal(OPS[dims](x, 3), OPS[dims](x, (3,) * dims))
    assert torch.equal(OPS[dims](x, 3), OPS[dims](x, [3] * dims))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast_keeps_the_type_of_the_map(layout):
    x = torch.randn(2, 4, 6, 6).bfloat16().contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(max_pool_unpool2d(x, 2), stock(x.contiguous(), (2, 2)).bfloat16())


@every_rank
@pytest.mark.parametrize("pool_size", [0, -2, True, 2.0, "2", None, (), (2, 2, 2, 2), "a zero on one axis"])
def test_wrong_pool_size(dims, pool_size):
    if pool_size == "a zero on one axis":
        pool_size = (2,) * (dims - 1) + (0,)
    with pytest.raises(ValueError, match="pool_size=") as error:
        OPS[dims](torch.zeros(1, 1, *[4] * dims), pool_size)
    assert repr(pool_size) in str(error.value)


@every_rank
@pytest.mark.parametrize("extra", [-1, 2])
def test_wrong_rank(dims, extra):
    shape = [2] * (dims + 1 + extra)
    with pytest.raises(ValueError, match=f"expected {dims + 2} .batch, channels, {dims} spatial") as error:
        OPS[dims](torch.zeros(shape), 2)
    assert str(shape) in str(error.value)


# Keys


@pytest.mark.parametrize(
    ("dtype", "e"), [(torch.bfloat16, 16), (torch.bfloat16, 17), (torch.float16, 45), (torch.float16, 47)]
)
def test_windows_too_large_for_exact_keys(dtype, e):
    x = torch.randint(0, 2, (1, 2, e + 3, 2 * e)).to(dtype)
    assert torch.equal(keys_maxima(x, [e, e]), stock(x, (e, e)))
    assert torch.equal(keys_maxima(torch.ones_like(x), [e, e]), stock(torch.ones_like(x), (e, e)))


@pytest.mark.parametrize("e", [40, 41, 61, 122])  # 1 / 41 in float32 is such that 41 / 41 is below 1
def test_keys_of_long_windows(e):
    x = torch.randn(1, 2, 40 * e + 3)
    assert torch.equal(keys_maxima(x, [e]), stock(x, (e,)))


def test_keys_and_values_that_are_not_finite():
    """What the docstring promises where torch traces: other windows are right, and no wrong number appears."""
    x = torch.tensor([[[[float("nan"), 3.0, 5.0, 6.0], [2.0, 1.0, 8.0, 7.0], [float("inf"), 4.0, 1.0, 2.0]]]])
    u = keys_maxima(x, [2, 2])
    assert torch.equal(u[..., :2, 2:], stock(x, (2, 2))[..., :2, 2:])
    assert u[0, 0, 0, 0].isnan()
    assert u[0, 0, :2, :2].nansum() == 0
    assert u[0, 0, 2].tolist() == [float("inf"), 0, 0, 2]
    assert keys_maxima(-x, [2, 2])[0, 0, 2, 0].isnan()


# Derivatives


@pytest.mark.parametrize("mode", ["eager", "deterministic", "keys"])
@pytest.mark.parametrize("kind", ["ties", "distinct"])
@every_rank
def test_gradients_equal_stock(dims, mode, kind):
    x = values((2, 3, *[5, 7, 4][:dims]), kind, torch.float32, 1).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight = torch.randn(x.shape)
    window = (2,) * dims
    (expected,) = torch.autograd.grad((stock(x, window) * weight).sum(), x)
    with deterministic_mode() if mode == "deterministic" else contextlib.nullcontext():
        u = keys_maxima(y, list(window)) if mode == "keys" else window_maxima(y, list(window))
        (got,) = torch.autograd.grad((u * weight).sum(), y)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["eager", "deterministic", "keys"])
@every_rank
def test_gradcheck(dims, mode):
    size = [5, 4, 3][:dims]
    count = 2 * int(torch.tensor(size).prod())
    # Distinct values a step apart: no maximum changes within the finite difference.
    x = torch.randperm(count).double().reshape(1, 2, *size).requires_grad_()
    function = (lambda v: keys_maxima(v, [2] * dims)) if mode == "keys" else (lambda v: OPS[dims](v, 2))
    with deterministic_mode() if mode == "deterministic" else contextlib.nullcontext():
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(lambda v: function(v) ** 2, x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for max_unpool
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_rank
def test_vmap_and_per_sample_gradients(dims, layout):
    x = torch.randn(3, 2, 2, *[5] * dims)
    if layout == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    op = OPS[dims]
    assert torch.equal(torch.vmap(lambda v: op(v, 2))(x), torch.stack([op(v, 2) for v in x]))
    gradients = torch.vmap(torch.func.grad(lambda v: op(v, 2).square().sum()))(x)
    assert torch.equal(gradients, 2 * torch.stack([op(v, 2) for v in x]))


# Capture


class Operator(torch.nn.Module):
    def __init__(self, dims: int, e: int = 2) -> None:
        super().__init__()
        self.window = [e] * dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return window_maxima(x, self.window)


def other_sizes(dims: int) -> list[torch.Tensor]:
    return [torch.randint(-3, 4, (n, 2, *[s, s + 3, s + 1][:dims])).float() for n, s in [(1, 5), (3, 8), (2, 11)]]


@every_rank
def test_script_and_trace_at_other_sizes(dims):
    module = Operator(dims)
    for captured in (torch.jit.script(module), torch.jit.trace(module, torch.randn(2, 2, *[7] * dims))):
        for x in other_sizes(dims):
            assert torch.equal(captured(x), module(x))


def test_another_thread_s_export_leaves_a_trace_alone():
    x = torch.randn(2, 2, 7, 7)
    with capture_stock(), ThreadPoolExecutor() as pool:
        traced = pool.submit(torch.jit.trace, Operator(2), x).result()
    assert torch.equal(traced(x[:1, :, :5]), Operator(2)(x[:1, :, :5]))


@every_rank
def test_script_refuses_wrong_ranks(dims):
    with pytest.raises(torch.jit.Error, match="expected"):
        torch.jit.script(Operator(dims))(torch.zeros([2] * dims))


@pytest.mark.parametrize(("dims", "dim"), [(1, "AUTO"), (2, "AUTO"), (2, "DYNAMIC"), (3, "DYNAMIC")])
def test_export_with_dynamic_sizes(dims, dim):
    module = Operator(dims)
    dynamic = {axis: getattr(torch.export.Dim, dim) for axis in range(dims + 2) if axis != 1}
    exported = torch.export.export(module, (torch.randn(2, 2, *[13] * dims),), dynamic_shapes=(dynamic,))
    program = exported.module()
    for x in other_sizes(dims):
        assert torch.equal(program(x), module(x))
    # Inductor decides by the example, without a guard, whether partial windows are pooled.
    pools = [node for node in exported.graph.nodes if "max_pool" in str(node.target)]
    assert len(pools) == 2
    assert not any(node.args[5:] for node in pools)


def test_export_of_fixed_sizes_copies_no_edges():
    for size in (12, 13):
        exported = torch.export.export(Operator(2), (torch.randn(2, 2, size, size),), strict=False)
        assert "cat" not in str(exported.graph)


@pytest.mark.slow
@every_rank
def test_aot_inductor_whatever_the_example(dims, tmp_path):
    dynamic = {axis: torch.export.Dim.AUTO for axis in range(dims + 2) if axis != 1}
    for size in (12, 13):
        example = (torch.randn(2, 2, *[size] * dims),)
        program = torch.export.export(Operator(dims), example, dynamic_shapes=(dynamic,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / f"{size}.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for x in other_sizes(dims):
            assert torch.equal(package(x), Operator(dims)(x))


@pytest.mark.parametrize(
    ("dims", "dynamic"),
    [(2, False), (2, True), *(pytest.param(d, b, marks=pytest.mark.slow) for d in (1, 3) for b in (False, True))],
)
def test_compile(dims, dynamic):
    torch._dynamo.reset()
    function = torch.compile(OPS[dims], backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for x in other_sizes(dims)[:2]:
        y = x.clone().requires_grad_()
        u = function(y, 2)
        assert torch.equal(u, stock(x, (2,) * dims))
        (gradient,) = torch.autograd.grad(u.square().sum(), y)
        assert torch.equal(gradient, 2 * u.detach())


@pytest.mark.slow
@every_rank
def test_compile_to_machine_code(dims):
    torch._dynamo.reset()
    function = torch.compile(OPS[dims], fullgraph=True, dynamic=True)
    for x in other_sizes(dims):
        assert torch.equal(function(x, 2), stock(x, (2,) * dims))
