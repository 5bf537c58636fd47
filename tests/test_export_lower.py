"""The graph pass: equal to torch's pair to the bit, at every size, and clear where it cannot be."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from contract.common import Function, enliven
from export_nets import PairNet, SegNet
from torch import nn
from torch.export import Dim

import poolskip_zoo
from poolskip_zoo import max_pool_unpool2d
from poolskip_zoo.export import blocks_of, lower_unpooling
from poolskip_zoo.layers import PoolSkip2d, PoolSkip3d, pool_skip_modules

SIZES = ([11, 9, 7], [8, 6, 4], [5, 4, 13])


def ties(*shape):
    """Few distinct numbers, so that most windows hold their maximum several times."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(0)).float()


def targets_of(module):
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("lowering", ["keys", "arith", "scatter"])
@pytest.mark.parametrize(("ceil_mode", "others"), [(False, True), (True, False)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_torch_to_the_bit(dims, ceil_mode, others, lowering):
    model = PairNet(dims, ceil_mode, others).eval()
    lowered = lower_unpooling(model, ties(2, 4, *SIZES[0][:dims]), lowering=lowering)
    assert [(block.lowering, block.own) for block in blocks_of(lowered)] == [(lowering, not others)]
    assert any("with_indices" in name for name in targets_of(lowered)) == (lowering == "scatter")
    for size in SIZES:
        random = torch.randn(1, 4, *size[:dims])
        for x in (ties(3, 4, *size[:dims]), random, 1e-30 * random):
            assert torch.equal(lowered(x), model(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_exports_again_with_open_sizes(dims):
    model = PairNet(dims).eval()
    x = ties(2, 4, *SIZES[0][:dims])
    lowered = lower_unpooling(model, x)
    axes = (dict.fromkeys((0, *range(2, dims + 2)), Dim.AUTO),)
    program = torch.export.export(lowered, (x,), dynamic_shapes=axes, strict=False)
    assert not [name for name in targets_of(program) if "with_indices" in name or "unpool" in name]
    for size in SIZES:
        x = ties(3, 4, *size[:dims])
        assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 1, "padding": 1}, {"ceil_mode": True}, {"dilation": (2,)}], ids=str
)
def test_sequences_stay_open_where_a_pooling_has_no_unpooling(settings):
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.MaxPool1d(3, **settings), PairNet(1)).eval()
    lowered = lower_unpooling(model, torch.randn(2, 2, 40))
    for x in (torch.randn(3, 2, 51), torch.randn(1, 2, 19), torch.randn(2, 2, 40)):
        assert torch.equal(lowered(x), model(x))


@pytest.mark.parametrize("lowering", ["keys", "scatter"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unbatched(dims, lowering):
    model, x = PairNet(dims).eval(), ties(4, *SIZES[0][:dims])
    lowered = lower_unpooling(model, x, lowering=lowering, dynamic_shapes=None)
    assert [block.lowering for block in blocks_of(lowered)] == [lowering]
    assert torch.equal(lowered(x), model(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_unbatched_maps_export_again_with_open_sizes(dims):
    model, x = PairNet(dims, ceil_mode=True).eval(), ties(4, *SIZES[0][:dims])
    axes = (dict.fromkeys(range(1, dims + 1), Dim.AUTO),)
    lowered = lower_unpooling(model, x, dynamic_shapes=axes)
    program = torch.export.export(lowered, (x,), dynamic_shapes=axes, strict=False)
    for size in SIZES:
        x = ties(4, *size[:dims])
        assert torch.equal(program.module()(x), model(x))


class InPlace(nn.Module):
    """Both the pooled map and the pooled values are overwritten before they are unpooled."""

    def forward(self, x):
        x = x * 2
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        skip = x.relu_()
        y.add_(5)
        return F.max_unpool2d(y, indices, 2, output_size=x.shape[-2:]) + skip


@pytest.mark.parametrize("captured", [False, True])
def test_maps_that_are_changed_after_their_pooling(captured):
    model, x = InPlace().eval(), ties(2, 4, 8, 6)
    lowered = lower_unpooling(torch.export.export(model, (x,)) if captured else model, None if captured else x)
    assert [block.lowering for block in blocks_of(lowered)] == ["keys"]
    assert torch.equal(lowered(x), model(x))


def pool(x, size=2):
    return F.max_pool2d(x, size, return_indices=True)


def unpool(values, indices, like, size=2):
    return F.max_unpool2d(values, indices, size, output_size=like.shape[2:])


def stacked(x):
    y, i = pool(x)
    z, j = pool(y)
    return unpool(unpool(z, j, y), i, x)


def one_after_the_other(x):
    y, i = pool(x)
    u = unpool(y, i, x)
    z, j = pool(u, 3)
    return unpool(z, j, u, 3)


def pooled_twice(x):
    y, _ = pool(x)
    z, j = pool(y)
    return unpool(z, j, y)


def pooled_with_overlap_before(x):
    """Whose indices nobody reads."""
    y, _ = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    z, j = pool(y)
    return unpool(z, j, y)


def maxima_of_another_map(x):
    return unpool(pool(-x)[0], pool(x)[1], x)


def one_of_two_changed(x):
    y, i = pool(x)
    u, v = unpool(y, i, x), unpool(y, i, x)
    u.mul_(2.0)
    return u + v


def batched_in_between(x):
    y, i = pool(x[0])
    return unpool(y.unsqueeze(0), i.unsqueeze(0), x)


def planes_as_a_volume(x):
    y, i = pool(x)
    return F.max_unpool3d(y[..., None], i[..., None], (2, 2, 1), output_size=(*x.shape[2:], 1))


@pytest.mark.parametrize("lowering", ["keys", "arith", "scatter"])
@pytest.mark.parametrize(
    "function",
    [
        stacked,
        one_after_the_other,
        pooled_twice,
        pooled_with_overlap_before,
        maxima_of_another_map,
        one_of_two_changed,
        batched_in_between,
        planes_as_a_volume,
        lambda x: max_pool_unpool2d(max_pool_unpool2d(x, 2), 3),
    ],
)
def test_pairs_that_meet(function, lowering):
    model = Function(function).eval()
    lowered = lower_unpooling(model, ties(2, 3, 19, 23), lowering=lowering)
    x = ties(2, 3, 14, 33)
    got, expected = lowered(x), model(x)
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


def test_values_that_a_view_changes_between_two_unpoolings_by_given_indices():
    values, indices = pool(torch.randn(2, 3, 8, 6))

    def twice(x):
        x = x * 2
        first = F.max_unpool2d(x, indices, 2)
        x.view(-1).add_(1)
        return first + F.max_unpool2d(x, indices, 2)

    lowered = lower_unpooling(Function(twice).eval(), values, lowering="scatter", dynamic_shapes=None)
    assert torch.equal(lowered(values), twice(values))


def test_unpoolings_of_one_pooling_to_two_sizes():
    def two_sizes(x):
        y, i = pool(x)
        return F.max_unpool2d(y, i, 2, output_size=(9, 8)), F.max_unpool2d(y, i, 2, output_size=(8, 8))

    model, x = Function(two_sizes).eval(), ties(2, 3, 9, 8)
    for got, expected in zip(lower_unpooling(model, x, dynamic_shapes=None)(x), model(x), strict=True):
        assert torch.equal(got, expected)


def test_what_is_captured_afterwards_is_as_before():
    """Only while it lowers are the layers captured with torch's own pair."""
    net, x = PoolSkip2d(4).eval(), torch.randn(1, 4, 8, 8)
    assert len(blocks_of(lower_unpooling(net, x))) == 1
    assert "unpool" not in str(torch.export.export(net, (x,), strict=False).graph)


def test_branches_of_the_graph_are_not_passed_over():
    class Branch(nn.Module):
        def forward(self, x):
            return torch.cond(x.mean() > 0, PairNet(2, others=False), lambda a: a.clone(), (x,))

    model, x = Branch().eval(), torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"lies inside torch.cond .*torch.where; lowering='scatter' leaves it as is"):
        lower_unpooling(model, x)
    assert torch.equal(lower_unpooling(model, x, lowering="scatter")(x), model(x))


def test_keys_of_bfloat16_are_exact_or_not_taken(caplog):
    model, x = PairNet(2, kernel_size=12, others=False).eval(), ties(1, 4, 24, 24).bfloat16()
    lowered = lower_unpooling(model, x)
    assert blocks_of(lowered)[0].reason == "a window of 144 cells has more than 128"
    assert torch.equal(lowered(x), model(x))
    assert [block.lowering for block in blocks_of(lower_unpooling(model, x.float()))] == ["keys"]


def test_crossing_pairs_and_a_program():
    model = SegNet().eval()
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    program = torch.export.export(model, (torch.randn(2, 3, 41, 33),), dynamic_shapes=shapes, strict=False)
    lowered = lower_unpooling(program)
    assert [(block.window, block.ceil_mode, block.own) for block in blocks_of(lowered)] == [
        ((3, 3), True, False),
        ((2, 2), False, False),
    ]
    assert "output_size=b.shape[2:]" in blocks_of(lowered)[0].source
    assert "export_nets.py" in blocks_of(lowered)[0].source
    for size in ((41, 33), (24, 36), (29, 30)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(lowered(x), model(x))


@pytest.mark.parametrize("name", ["test_resnet_poolskip", "test_vit_poolskip"])
def test_every_pool_skip_is_a_pair(name):
    model = enliven(timm.create_model(name)).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    lowered = lower_unpooling(model, x, dynamic_shapes=None)
    blocks = blocks_of(lowered)
    assert len(blocks) == len(pool_skip_modules(model)) > 1
    assert all(block.own and block.ceil_mode and block.lowering == "keys" for block in blocks)
    torch.testing.assert_close(lowered(x), model(x))


def test_deterministic_mode_is_lowered_too(deterministic):
    model = enliven(timm.create_model("test_resnet_poolskip")).eval()
    lowered = lower_unpooling(model, torch.randn(2, 3, 64, 64), dynamic_shapes=None)
    assert len(blocks_of(lowered)) == len(pool_skip_modules(model))
    assert torch.are_deterministic_algorithms_enabled()


# --- what has no keys


class NoSize(nn.Module):
    def forward(self, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (PairNet(2, kernel_size=3, stride=2), "stride [2, 2] differs from the window [3, 3]"),
        (PairNet(2, kernel_size=2, padding=1), "padding [1, 1]"),
        (PairNet(2, kernel_size=17), "a window of 289 cells has more than 256"),
        (PairNet(3, kernel_size=3, stride=2), "stride [2, 2, 2] differs"),
        (NoSize(), "output_size=x.shape[-2:]"),
    ],
    ids=["overlap", "padding", "large", "3d", "no output_size"],
)
def test_an_index_tensor_where_keys_do_not_fit(model, reason, caplog):
    # Without output_size torch itself fails where the window does not divide the width.
    sizes = [36, 38] if isinstance(model, NoSize) else [35, 37, 19][: model.dims]
    with caplog.at_level(logging.WARNING, "poolskip_zoo"):
        lowered = lower_unpooling(model.eval(), torch.randn(2, 4, *sizes))
    (block,) = blocks_of(lowered)
    assert block.lowering == "scatter"
    assert reason in block.reason
    assert "scatter in place of keys" in caplog.text
    assert reason in caplog.text
    for change in (0, 2):
        x = torch.randn(3, 4, *(size + change for size in sizes))
        assert torch.equal(lowered(x), model(x))


def test_dilation_takes_an_index_tensor():
    class Dilated(nn.Module):
        def forward(self, x):
            y, indices = F.max_pool2d(x, 2, 2, dilation=2, return_indices=True)
            return F.max_unpool2d(y, indices, 2, output_size=x.shape[2:])

    x = torch.randn(1, 2, 9, 9)
    lowered = lower_unpooling(Dilated().eval(), x, dynamic_shapes=None)
    assert blocks_of(lowered)[0].reason == "dilation [2, 2]"
    assert torch.equal(lowered(x), Dilated()(x))


def test_keys_without_output_size_where_the_window_divides():
    x = torch.randn(2, 3, 8, 6)
    lowered = lower_unpooling(NoSize().eval(), x, dynamic_shapes=None)
    assert blocks_of(lowered)[0].lowering == "keys"
    assert torch.equal(lowered(x), NoSize()(x))


# --- what cannot be


class Leaves(nn.Module):
    def forward(self, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2, output_size=x.shape[2:]), indices


class Computed(nn.Module):
    def forward(self, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2, output_size=x.shape[2:]) + (indices % 2).sum()


class ComputedOfACopy(nn.Module):
    def forward(self, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices, 2, output_size=x.shape[2:]) + (indices.clone() % 2).sum()


class Elsewhere(nn.Module):
    def forward(self, x):
        y, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(y, indices.flip(1), 2, output_size=x.shape[2:])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Leaves(), "leave the model"),
        (Computed(), "are computed with"),
        (ComputedOfACopy(), "are computed with"),
        (Elsewhere(), "come from"),
    ],
)
def test_indices_that_are_needed(model, says):
    x = torch.randn(2, 3, 9, 7)
    with pytest.raises(ValueError, match=says) as caught:
        lower_unpooling(model.eval(), x)
    text = str(caught.value)
    assert "\n" not in text
    assert "node 'max_unpool2d'" in text
    assert "test_export_lower.py:" in text
    assert "lowering='scatter'" in text
    lowered = lower_unpooling(model, x, lowering="scatter")
    for got, expected in zip(lowered(x), model(x), strict=True):
        assert torch.equal(got, expected)


def test_sizes_that_depend_on_values():
    class Dependent(nn.Module):
        def forward(self, x):
            y, indices = F.max_pool2d(x, 2, return_indices=True)
            size = int(x.argmax().item())
            return F.max_unpool2d(y, indices, 2, output_size=(size, 8))

    with pytest.raises(ValueError, match=r"depends on values.*output_size=x\.shape"):
        lower_unpooling(Dependent().eval(), torch.randn(1, 1, 8, 8), dynamic_shapes=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "phone"}, "target='phone': expected one of onnxruntime"),
        ({"lowering": "keyss"}, "lowering='keyss': expected one of keys, native"),
        ({"target": "openvino", "lowering": "native"}, "OpenVINO has no MaxUnpool"),
        ({"dynamic_shapes": "all"}, "dynamic_shapes='all'"),
        ({"example": None}, "example=None"),
    ],
)
def test_options_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        lower_unpooling(PairNet(2).eval(), **{"example": torch.randn(2, 4, 9, 9), **options})


def test_our_own_pair_is_captured_as_keys():
    model = nn.Sequential(poolskip_zoo.MaxPool2d(2))
    with pytest.raises(ValueError, match=r"poolskip_zoo's MaxPool2d.*'arith' is wanted: take torch\.nn\.MaxPool2d"):
        lower_unpooling(model.eval(), torch.randn(2, 4, 9, 9), "ncnn")


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval"):
        lower_unpooling(PairNet(2), torch.randn(2, 4, 9, 9))


def test_not_a_number_and_infinity_are_as_documented():
    """docs/export.md: keys keep NaN in its cell, and what is infinite and not kept becomes NaN; scatter is torch's."""
    model = PairNet(2, others=False).eval()
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 2, 2], x[0, 1, 0, 0] = torch.nan, torch.inf, -torch.inf
    keys, scatter = (lower_unpooling(model, x, lowering=each, dynamic_shapes=None)(x) for each in ("keys", "scatter"))
    assert torch.equal(scatter.nan_to_num(99), model(x).nan_to_num(99))
    assert keys[0, 0, 0, 0].isnan()
    assert not keys[0, 0, :2, :2].flatten()[1:].any()
    assert keys[0, 0, 2, 2] == torch.inf
    assert keys[0, 1, 0, 0].isnan()
    keys[0, :, :2, :2] = 0
    scatter[0, :, :2, :2] = 0
    assert torch.equal(keys, scatter)


def test_windows_of_one_slice():
    model, x = PoolSkip3d(2, (1, 2, 2)).eval(), ties(1, 2, 3, 5, 6)
    lowered = lower_unpooling(model, x)
    assert blocks_of(lowered)[0].lowering == "keys"
    torch.testing.assert_close(lowered(x), model(x))
