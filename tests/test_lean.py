"""The lean backward: what it computes, what it keeps, and when it steps aside."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.autograd.functional import hessian, jacobian
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from poolskip_zoo.layers import PoolSkip1d, PoolSkip2d, PoolSkip3d, lean, max_pool_unpool2d
from poolskip_zoo.layers.functional import window_maxima
from poolskip_zoo.layers.tokens import Grid, TokenPoolSkip2d

POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
UNPOOL = (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
LAYER = (PoolSkip1d, PoolSkip2d, PoolSkip3d)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def stock(layer: nn.Module, x: Tensor) -> Tensor:
    """The reference's composition, by torch alone."""
    place, e = layer.dims - 1, layer.window
    values, indices = POOL[place](x, e, e, ceil_mode=True, return_indices=True)
    return x + layer.conv(UNPOOL[place](values, indices, e, e, output_size=x.shape[2:]))


def gradients(function, layer, x, weights):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = function(x)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.fixture
def lean_runs(monkeypatch):
    """Counts the calls of the lean path."""
    calls = []
    apply = lean._Pool.apply
    monkeypatch.setattr(lean._Pool, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


@given(
    dims=st.integers(1, 3),
    e=st.sampled_from([2, 3, 4]),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    last=st.booleans(),
    values=st.sampled_from(["normal", "ties", "nan", "inf"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_equal_to_the_bit(dims, e, sizes, last, values, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 4, *sizes[:dims])
    if values == "ties":
        x = x.round()
    elif values != "normal":
        x[torch.rand_like(x) < 0.2] = float(values)
    x = x.to(dtype)
    layer = LAYER[dims - 1](4, e).to(dtype)
    if last and dims > 1:
        x = x.to(memory_format=LAST[dims + 2])
    weights = torch.randn_like(x)
    expected = gradients(lambda x: stock(layer, x), layer, x, weights)
    got = gradients(layer, layer, x, weights)
    finite = values in ("normal", "ties")
    for one, other in zip(got[:2] if finite else got[:1], expected, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    if finite:  # sums over places, whose order is the convolution's own
        scale = 1e-12 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 2e-2
        for one, other in zip(got[2:], expected[2:], strict=True):
            torch.testing.assert_close(one, other, rtol=scale, atol=scale * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("width", [254, 255, 32766, 32767])  # the largest offset is the width + 1
def test_offsets_fit_their_type(width):
    x = torch.zeros(1, 1, 2, width)
    x[..., 1, -2:] = 1
    layer, weights = PoolSkip2d(1), torch.randn(1, 1, 2, width)
    for one, other in zip(
        gradients(layer, layer, x, weights)[:2], gradients(lambda x: stock(layer, x), layer, x, weights), strict=False
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("e", [2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_first_and_second_derivatives(e, layout, lean_runs):
    torch.manual_seed(0)
    layer = PoolSkip2d(2, e, groups=2).double()
    x = torch.randn(1, 2, 7, 9, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if layout == "channels_last" else x).requires_grad_()
    parameters = tuple(layer.conv.parameters())

    def call(x, weight, bias):
        layer.conv.weight, layer.conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        return functional_call(layer, {"conv.weight": weight, "conv.bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(call, (x, *parameters))
    assert torch.autograd.gradgradcheck(lambda x: max_pool_unpool2d(x, e) ** 2, (x,))
    assert lean_runs


def saved(function, x, layer):
    """Bytes kept for the backward of one element of x, storages counted once and weights not at all."""
    storages = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    leaf = x * 1  # no leaf, so that saving x counts

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(leaf)
    assert y.requires_grad
    return sum(size for place, size in storages.items() if place not in own) / x.numel()


@pytest.mark.parametrize(
    ("e", "most", "stock_bytes"),
    [(2, 1.5, 10.0), (4, 0.375, 8.5)],
)
@pytest.mark.parametrize("width", [32, 96])
def test_saved_bytes(e, most, stock_bytes, width):
    layer = PoolSkip2d(8, e, groups=8)
    x = torch.randn(2, 8, 32, width, requires_grad=True)
    assert saved(layer, x, layer) <= most
    assert saved(lambda x: stock(layer, x), x, layer) == pytest.approx(stock_bytes, rel=0.01)
    grid = Grid(prefix=0, fixed=True)
    grid.resize(32, width)
    tokens = TokenPoolSkip2d(8, grid, pool_size=e, groups=8)
    assert saved(tokens, x.detach().flatten(2).mT.contiguous().requires_grad_(), tokens) <= most


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("part", ["all", "frozen", "alone"])
def test_several_gradients_at_once(dims, layout, part):
    layer, x = LAYER[dims - 1](4), torch.randn(2, 4, *(9, 7, 5)[:dims])
    x = (x.to(memory_format=LAST[x.dim()]) if layout == "channels_last" and dims > 1 else x).requires_grad_()
    layer.requires_grad_(part == "all")
    y = window_maxima(x, [2] * dims) if part == "alone" else layer(x)
    inputs = [x, *(each for each in layer.parameters() if each.requires_grad)]
    weights = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, inputs, weights, is_grads_batched=True, retain_graph=True)
    for place, each in enumerate(weights):
        for one, other in zip(together, torch.autograd.grad(y, inputs, each, retain_graph=True), strict=True):
            torch.testing.assert_close(one[place], other)


def test_vectorised_jacobians_and_hessians():
    layer, x = PoolSkip2d(2), torch.randn(1, 2, 4, 4)
    orders = {jacobian: layer, hessian: lambda x: layer(x).square().sum()}
    for order, function in orders.items():
        torch.testing.assert_close(order(function, x, vectorize=True), order(function, x))


def test_autocast_takes_the_types_of_the_stock_composition(lean_runs):
    layer = PoolSkip2d(4)
    x = torch.randn(2, 4, 6, 6)
    for kind in (torch.float32, torch.bfloat16):  # also with the backward inside the context
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(layer, layer, x.to(kind), torch.ones_like(x))
            expected = gradients(lambda x: stock(layer, x), layer, x.to(kind), torch.ones_like(x))
        assert [one.dtype for one in got] == [one.dtype for one in expected]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        double = gradients(layer.double(), layer, x.double(), torch.ones_like(x).double())
    assert {one.dtype for one in double} == {torch.float64}
    assert len(lean_runs) == 3


def test_checkpointing_copies_and_frozen_parts(lean_runs):
    layer = PoolSkip2d(4)
    x = torch.randn(2, 4, 6, 6)
    weights = torch.randn_like(x)
    expected = gradients(layer, layer, x, weights)
    for function in (
        lambda x: checkpoint(layer, x, use_reentrant=False),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        own = function if isinstance(function, nn.Module) else layer
        for one, other in zip(gradients(function, own, x, weights), expected, strict=True):
            assert torch.equal(one, other)
    layer.conv.weight.requires_grad_(False)
    y, of_x, of_weight, of_bias = gradients(layer, layer, x, weights)
    assert of_weight is None
    assert all(map(torch.equal, (y, of_x, of_bias), (expected[0], expected[1], expected[3])))
    layer.requires_grad_(False)
    assert torch.equal(gradients(layer, layer, x, weights)[1], expected[1])
    layer.requires_grad_(True)
    layer(x).sum().backward()  # an input without gradient
    assert layer.conv.weight.grad is not None
    assert len(lean_runs) >= 6


def test_transforms_and_forward_mode_take_the_stock_pair(lean_runs):
    torch.manual_seed(0)
    layer = PoolSkip2d(2).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x.unsqueeze(0),)).pow(2).sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for name in parameters:
        for sample in range(3):
            assert torch.allclose(per_sample[name][sample], grad(loss)(parameters, x[sample])[name])
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        along = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert torch.allclose(along, jvp(layer, (x,), (tangent,))[1])
    step = 1e-6
    assert torch.allclose(along, (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step), atol=1e-6)
    with torch.no_grad():
        layer(x)
    assert len(lean_runs) == 2  # the two of the finite difference


def test_selective_checkpointing_and_per_sample_gradients_see_the_stock_pair(lean_runs):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), PoolSkip2d(4))
    x = torch.randn(2, 3, 9, 9)
    net(x).pow(2).sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    assert len(lean_runs) == 1
    net.zero_grad()
    keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    checkpoint(net, x, use_reentrant=False, context_fn=keep).pow(2).sum().backward()
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    net.zero_grad()
    call_for_per_sample_grads(net)(x).pow(2).sum().backward()
    for parameter, wanted in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad_sample.sum(0), wanted, rtol=1e-4, atol=1e-4)


def test_distributed_tensors_train(lean_runs, tmp_path):
    layer, x = PoolSkip2d(4), torch.randn(2, 4, 7, 6)
    expected = gradients(layer, layer, x, torch.ones_like(x))
    lean_runs.clear()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parted = distribute_module(copy.deepcopy(layer), mesh)
        parted_x = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
        try:
            F.max_pool2d(parted_x, 2, return_indices=True)
        except NotImplementedError:
            pytest.skip("torch 2.6 does not pool distributed tensors")
        y = parted(parted_x)
        y.sum().backward()
        got = [y.to_local(), *(parameter.grad.to_local() for parameter in parted.parameters())]
    finally:
        distributed.destroy_process_group()
    assert not lean_runs
    for one, other in zip(got, (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(one, other)


def test_it_steps_aside_for_hooks_and_other_convolutions(lean_runs):
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    layer = PoolSkip2d(4)
    seen = []
    handle = layer.conv.register_forward_hook(lambda *args: seen.append(1))
    layer(x)
    handle.remove()
    torch.nn.utils.parametrizations.weight_norm(layer.conv)
    y = layer(x)
    assert torch.allclose(y, stock(layer, x))
    assert seen
    assert layer.conv.parametrizations.weight.original0.requires_grad
    y.sum().backward()
    assert layer.conv.parametrizations.weight.original0.grad is not None


@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_every_hook_of_the_convolution_is_called(register):
    layer, seen = PoolSkip2d(4), []
    getattr(layer.conv, register)(lambda *args: seen.append(1))
    layer(torch.randn(1, 4, 6, 6, requires_grad=True)).sum().backward()
    assert seen


def pad_circularly(conv):
    conv.padding_mode = "circular"


def offload(conv):
    cpu_offload(conv, execution_device=torch.device("cpu"))


def patch(conv):
    convolve = conv._conv_forward
    conv._conv_forward = lambda x, weight, bias: 2 * convolve(x, weight, bias)


@pytest.mark.parametrize("change", [pad_circularly, offload, patch])
def test_training_computes_what_a_changed_convolution_does(change):
    layer, x = PoolSkip2d(4), torch.randn(1, 4, 6, 6)
    change(layer.conv)
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)


def test_a_hook_on_all_modules_sees_the_convolution():
    layer, seen = PoolSkip2d(4), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    layer(torch.randn(1, 4, 6, 6))
    handle.remove()
    assert seen == [layer.conv, layer]


def test_a_parametrised_weight_is_computed_once():
    class Counted(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight

    layer, calls = PoolSkip2d(4), []
    nn.utils.parametrize.register_parametrization(layer.conv, "weight", Counted())
    calls.clear()
    layer(torch.randn(1, 4, 6, 6))
    assert len(calls) == 1


def test_compile_takes_one_graph_forward_and_backward():
    torch._dynamo.reset()
    layer = PoolSkip2d(4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((6, 6), (9, 7)):
        x = torch.randn(2, 4, *size)
        weights = torch.randn_like(x)
        for one, other in zip(gradients(compiled, layer, x, weights), gradients(layer, layer, x, weights), strict=True):
            torch.testing.assert_close(one, other)


class Labelled(Tensor):
    """A subclass without dispatch of its own, as MONAI's MetaTensor."""


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_subclasses_of_tensor_train_as_torch_does(dims) -> None:
    layer, x = LAYER[dims - 1](3), torch.randn(2, 3, 7, 6, 5)[(..., *[0] * (3 - dims))]
    expected = gradients(lambda x: stock(layer, x), layer, x, x)
    got = gradients(layer, layer, x.as_subclass(Labelled), x.as_subclass(Labelled))
    assert type(got[0]) is Labelled
    assert all(torch.equal(a.as_subclass(Tensor), b) for a, b in zip(got, expected, strict=True))
    assert saved(layer, x.as_subclass(Labelled), layer) == saved(layer, x, layer)
    assert layer(x.as_subclass(Labelled)).relu_().requires_grad
    x = torch.randn(2, 3, 7, 6)
    assert max_pool_unpool2d(x.as_subclass(Labelled).requires_grad_() * 1, 2).relu_().requires_grad
