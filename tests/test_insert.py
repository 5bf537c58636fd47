"""The insertion engine on small networks: placements, refusals, and what a model with Pool Skip must survive."""

import copy
import io
import logging
import multiprocessing
import pickle

import pytest
import torch
from insert_nets import AUTO, IMAGE, Block, Net, net, net_with_pool_skip
from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from poolskip_zoo.layers import Rule, add_pool_skip, pool_skip_modules, register_placements, remove_pool_skip
from poolskip_zoo.layers.insert import reset_pool_skip
from poolskip_zoo.layers.placement import presets_of

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def names(*args, **options) -> list[str]:
    return [place.name for place in add_pool_skip(net(), *args, dry_run=True, **options)]


# Placements


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        (None, AUTO),
        ("auto", AUTO),
        ("blocks.*.conv1", AUTO[::2]),
        ("stem", ["stem"]),
        (["blocks.1.*", "stem"], ["stem", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.downsample.0"]),
        (Rule("*.conv?", parent="Block", exclude="blocks.0.*"), AUTO[2:]),
        ((Rule("*", exclude="*[mc0]"),), AUTO),
        (lambda name, module: getattr(module, "groups", 1) == 2, AUTO[1::2]),
    ],
)
def test_placements(placement, expected):
    assert names(placement) == expected


def test_the_first_matching_rule_wins():
    rules = (Rule("blocks.0.conv1", pool_size=4), Rule("blocks.*.conv1", pool_size=(2, 3), groups="depthwise"))
    places = add_pool_skip(net(), rules)
    assert [(p.name, p.pool_size, p.groups) for p in places] == [
        ("blocks.0.conv1", (4, 4), 1),
        ("blocks.1.conv1", (2, 3), 8),
    ]


@pytest.mark.parametrize(
    ("groups", "expected"), [(None, [1, 2]), ("auto", [1, 2]), ("depthwise", [8, 8]), (4, [4, 4]), (1, [1, 1])]
)
def test_groups(groups, expected):
    places = add_pool_skip(net(), "blocks.0.conv[12]", groups=groups)
    assert [place.groups for place in places] == expected
    assert [place.parameters for place in places] == [8 * 8 // g * 9 + 8 for g in expected]


def test_a_depthwise_convolution_that_widens_gets_one_filter_a_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4), nn.BatchNorm2d(12))
    assert add_pool_skip(model)[0].groups == 12


def test_an_ordinary_convolution_of_one_channel_is_no_depthwise_one():
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    assert add_pool_skip(model)[0].groups == 1


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    conv, norm = [(nn.Conv1d, nn.BatchNorm1d), (nn.Conv3d, nn.InstanceNorm3d)][dims == 3]
    model = nn.Sequential(conv(2, 4, 1), conv(4, 4, 3), norm(4))
    x = torch.randn(2, 2, *[7] * dims)
    expected = model(x)
    assert add_pool_skip(model, zero_init=True, pool_size=3)[0].pool_size == (3,) * dims
    assert torch.equal(model(x), expected)
    assert type(model[1].pool_skip).__name__ == f"PoolSkip{dims}d"


def test_a_family_of_ones_own():
    class Family(Net):
        pass

    register_placements(Family, {"default": (Rule("blocks.1.conv1", pool_size=4),), "stem": (Rule("stem"),)})
    assert [(p.name, p.pool_size) for p in add_pool_skip(Family())] == [("blocks.1.conv1", (4, 4))]
    assert [p.name for p in add_pool_skip(Family(), "stem")] == ["stem"]
    assert presets_of(Net()) == {}
    with pytest.raises(ValueError, match="unknown placement 'all': choose 'default', 'stem', 'auto', name patterns"):
        add_pool_skip(Family(), "all")


def test_a_rule_of_a_class_holds_for_its_subclasses():
    class Special(Block):
        pass

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Special())
    assert [p.name for p in add_pool_skip(model, Rule("*.conv1", parent="Block"))] == ["1.conv1"]


def test_dry_run_changes_nothing_and_tells_the_truth(caplog):
    model = net()
    before = (list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()], repr(model))
    with caplog.at_level(logging.INFO, "poolskip_zoo"):
        planned = add_pool_skip(model, pool_size=4, groups="depthwise", dry_run=True)
        assert not caplog.records
        assert (list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()], repr(model)) == before
        assert add_pool_skip(model, pool_size=4, groups="depthwise") == planned
    assert caplog.messages == ["Pool Skip added at 4 places of Net: 320 parameters"]
    assert sum(place.parameters for place in planned) == 320
    assert [list(p.shape) for p in model.blocks[0].conv1.pool_skip.parameters()] == [[8, 1, 3, 3], [8]]


def test_device_type_and_mode_follow_the_module():
    model = net().to("meta", torch.float16)
    add_pool_skip(model)
    layer = model.blocks[0].conv1.pool_skip
    assert (layer.conv.weight.device.type, layer.conv.weight.dtype, layer.training) == ("meta", torch.float16, False)


@pytest.mark.parametrize(("conv", "last"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)])
def test_memory_format_follows_the_model(conv, last):
    for memory_format in (last, torch.contiguous_format):
        # What is inserted follows a 1×1 convolution, whose weights are contiguous in both.
        model = nn.Sequential(conv(4, 4, 3), conv(4, 4, 1)).to(memory_format=memory_format)
        add_pool_skip(model, ["1"])
        assert model[1].pool_skip.conv.weight.is_contiguous(memory_format=memory_format)


# Refusals


class Mergeable(Block):
    def fuse(self):
        """Merge the convolution and its norm."""


class Reparameterizable(Block):
    def reparameterize(self):
        """The same, as timm's FastViT calls it."""


class WithFuseChild(Block):
    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Identity()


@pytest.mark.parametrize(
    ("placement", "options", "message"),
    [
        ("everywhere", {}, "unknown placement 'everywhere': choose 'auto', name patterns"),
        ("head.*", {}, r"'head\.\*'\] matches nothing in Net: its convolutions are stem, blocks\.0\.conv1, "),
        (["blocks.0.*", "blocks.7.*"], {}, r"placement 'blocks\.7\.\*' matches nothing in Net"),
        (lambda name, module: False, {}, "'predicate' matches nothing"),
        (lambda name, module: name == "norm", {}, "module 'norm' is a BatchNorm2d: only Conv1d/2d/3d and Linear"),
        ("blocks.*.conv1", {"groups": 3}, r"groups=3 at 'blocks\.0\.conv1': expected .* a divisor of 8"),
        ("blocks.*.conv1", {"groups": "channels"}, "groups='channels'"),
        ("blocks.*.conv1", {"groups": True}, "groups=True"),
        ("blocks.*.conv1", {"pool_size": 1}, "pool_size=1: expected an int >= 2"),
        ("blocks.*.conv1", {"pool_size": (2, 2, 2)}, r"pool_size=\(2, 2, 2\)"),
        (["fc"], {}, "Net has no timm patch grid"),
        (["blocks.*.conv1", "fc"], {}, "Net has no timm patch grid"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_refusals_leave_the_model_unchanged(placement, options, message, dry_run):
    model = net()
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        add_pool_skip(model, placement, dry_run=dry_run, **options)
    assert repr(model) == before
    assert not any(m._forward_hooks for m in model.modules())


def test_unknown_keyword():
    with pytest.raises(TypeError, match="window"):
        add_pool_skip(net(), window=4)


@pytest.mark.parametrize("placement", ["auto", "blocks.*.conv1"])
def test_refuses_a_second_time(placement):
    model = net_with_pool_skip()
    before = repr(model)
    with pytest.raises(ValueError, match=r"'blocks\.0\.conv1' has Pool Skip already: remove_pool_skip\(model\) first"):
        add_pool_skip(model, placement)
    with pytest.raises(ValueError, match="belongs to a Pool Skip"):
        add_pool_skip(model, "*.pool_skip.*")
    assert repr(model) == before


def test_refuses_weights_that_are_not_floating_point_and_changes_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight = nn.Parameter(net[1].weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"module '1' has weights of torch.int8: only those of floating-point ones"):
        add_pool_skip(net, "*")
    assert not pool_skip_modules(net)


def test_auto_takes_no_subnet_for_a_norm():
    class SubNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    convs = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match="no"):
        add_pool_skip(nn.Sequential(*convs, SubNet()))
    assert len(add_pool_skip(nn.Sequential(*convs, nn.BatchNorm2d(4)))) == 1


def test_auto_takes_a_norm_whose_numbers_are_frozen():
    """They are buffers alone, and beside them it holds its activation."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), FrozenBatchNormAct2d(4))
    assert [place.name for place in add_pool_skip(model)] == ["1"]


def test_auto_takes_a_gate_s_convolution_that_looks_around():
    """What weighs channels is 1×1."""

    class Attention(nn.Sequential):
        pass

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Attention(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    assert [place.name for place in add_pool_skip(model)] == ["1.0"]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Attention(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"matches nothing in Sequential.*norm directly follows.*: give name patterns"):
        add_pool_skip(model)


def test_refuses_lazy_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="module '1' is lazy and has no channels yet: run the model once first"):
        add_pool_skip(model)
    model(torch.zeros(2, 3, 8, 8))
    assert [place.name for place in add_pool_skip(model)] == ["1"]


def test_refuses_transposed_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="matches nothing in Sequential: its convolutions are 0"):
        add_pool_skip(model, ["1"])
    with pytest.raises(ValueError, match="module '1' is a ConvTranspose2d: only"):
        add_pool_skip(model, lambda name, module: name == "1")


def test_refuses_what_reparameterisation_would_drop():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Mergeable(), Block(), WithFuseChild(), Reparameterizable())
    assert [place.name for place in add_pool_skip(model, "auto", dry_run=True)] == [
        "2.conv1",
        "2.conv2",
        "3.conv1",
        "3.conv2",
    ]
    for place, lies in (("1.conv1", "Mergeable"), ("4.conv2", "Reparameterizable")):
        with pytest.raises(ValueError, match=rf"module '{place}' lies in {lies}, whose re-parameterisation would drop"):
            add_pool_skip(model, place)


# What a model with Pool Skip must survive


@torch.no_grad()
def test_removal_restores_the_model():
    model, seen = net(), []
    x = torch.randn(IMAGE)
    model.blocks[0].conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    before = (model(x), list(model.state_dict()), repr(model), [len(m._forward_hooks) for m in model.modules()])
    add_pool_skip(model)
    assert not torch.equal(model(x), before[0])
    assert remove_pool_skip(model) is model
    assert torch.equal(model(x), before[0])
    assert (list(model.state_dict()), repr(model), [len(m._forward_hooks) for m in model.modules()]) == before[1:]
    # The user's own hook is still there, and removing twice does no harm.
    assert len(seen) == 3
    assert repr(remove_pool_skip(model)) == before[2]
    add_pool_skip(model)


def test_zero_init_and_reset():
    model, x = net(), torch.randn(IMAGE)
    expected = model(x)
    add_pool_skip(model, zero_init=True)
    assert torch.equal(model(x), expected)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
    reset_pool_skip(model)
    assert not any(layer.conv.weight.any() for layer in pool_skip_modules(model).values())
    assert model.stem.weight.all()


def test_a_convolution_of_two_names_gets_one_hook():
    model = net()
    model.blocks[1].conv1 = model.blocks[0].conv1
    places = add_pool_skip(model)
    assert [place.name for place in places] == ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv2"]
    assert len(model.blocks[1].conv1._forward_hooks) == 1
    assert not any(m._forward_hooks for m in remove_pool_skip(model).modules())


def test_copies_agree(tmp_path):
    model, x = net_with_pool_skip(), torch.randn(IMAGE)
    torch.save(model, tmp_path / "model.pt")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for clone in copies:
        assert torch.equal(clone(x), model(x))
        assert not any("pool_skip" in name for name, _ in remove_pool_skip(clone).named_modules())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = net_with_pool_skip(zero_init=True)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("capture", ["script", "trace", "export", "compile"])
def test_capture_at_another_size(capture, assert_close):
    model, x = net(), torch.randn(2, 3, 31, 27)
    model.blocks = model.blocks[:1]
    add_pool_skip(model)
    if capture == "script":
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        captured = torch.jit.load(file)
    elif capture == "trace":
        captured = torch.jit.trace(model, x)
    elif capture == "export":
        dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        captured = torch.export.export(model, (x,), dynamic_shapes=(dynamic,)).module()
    else:
        torch._dynamo.reset()
        captured = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for other in (x, torch.randn(1, 3, 24, 33), torch.randn(3, 3, 17, 18)):
            assert_close(captured(other), model(other))


def test_subclass_of_a_convolution_scripts(assert_close):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Conv2dSame(4, 4, 3, stride=2), BatchNormAct2d(4)).eval()
    assert [place.name for place in add_pool_skip(model)] == ["1"]
    scripted = torch.jit.script(model)
    for size in (8, 11):
        x = torch.randn(1, 3, size, size + 3)
        assert_close(scripted(x), model(x))


def test_functional_call():
    model, x = net_with_pool_skip(), torch.randn(IMAGE)
    zero = {name: torch.zeros_like(p) if "pool_skip" in name else p for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, zero, x), remove_pool_skip(copy.deepcopy(model))(x))


@pytest.mark.parametrize("before", [True, False])
def test_parametrised_weights(before):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, x = net(), torch.randn(IMAGE)

    def parametrise():
        parametrize.register_parametrization(model.blocks[0].conv1, "weight", Double())
        weight_norm(model.blocks[1].conv1)

    if before:
        parametrise()
    add_pool_skip(model, zero_init=True)
    if not before:
        parametrise()
    assert len(pool_skip_modules(model)) == 4
    y = model(x)
    y.sum().backward()
    assert model.blocks[0].conv1.pool_skip.conv.weight.grad.any()
    assert torch.equal(remove_pool_skip(model)(x), y)
    assert parametrize.is_parametrized(model.blocks[0].conv1)


def _run(model: nn.Module, x: torch.Tensor, results) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put(model(x).tolist())


@pytest.mark.slow
def test_spawned_process():
    model, x = net_with_pool_skip(), torch.randn(IMAGE)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(model, x, results))
    process.start()
    got = results.get(timeout=120)
    process.join(30)
    torch.testing.assert_close(torch.tensor(got), model(x).detach())


def _train(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(net_with_pool_skip())
    torch.manual_seed(1)
    x = torch.randn(4, *IMAGE[1:])[2 * rank :][:2]
    # Raises at the second step if a parameter had no part in the first.
    for _ in range(2):
        model.zero_grad()
        model(x).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{path}/gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model = net_with_pool_skip()
    torch.manual_seed(1)
    model(torch.randn(4, *IMAGE[1:])).square().mean().backward()
    for name, gradient in torch.load(tmp_path / "gradients.pt").items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3).to(torch.float8_e4m3fn))
    with pytest.raises(RuntimeError, match="Float8"):  # torch cannot initialise such weights
        add_pool_skip(model, ["0", "1"])
    assert not pool_skip_modules(model)
    assert not model[0]._forward_hooks
