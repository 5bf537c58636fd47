"""The small-image base networks keep every habit of timm's models."""

import copy
import functools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, group_parameters
from timm.models._features_fx import FeatureGraphNet
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vgg import cfgs as vgg_cfgs
from torch import nn

from poolskip_zoo.models.cifar import CifarResNet, CifarVGG, PadShortcut, SmallStemResNet

TINY_VGG = [8, "M", 8, "M", 16, "M", 16, "M", 24, 24, "M"]
TINY = {
    "three": functools.partial(CifarResNet, (1, 2, 1), channels=(8, 16, 32)),
    "four": functools.partial(SmallStemResNet, BasicBlock, (1, 1, 2, 1), channels=(8, 8, 16, 24)),
    "vgg": functools.partial(CifarVGG, TINY_VGG, norm_layer=nn.BatchNorm2d),
}
REDUCTIONS = {"three": [1, 1, 2, 4], "four": [1, 1, 2, 4, 8], "vgg": [1, 2, 4, 8, 16, 32]}
CHANNELS = {"three": [8, 8, 16, 32], "four": [8, 8, 8, 16, 24], "vgg": [8, 8, 16, 16, 24, 24]}
every_class = pytest.mark.parametrize("kind", TINY)
resnets = pytest.mark.parametrize("kind", ["three", "four"])


def make(kind: str, **kwargs) -> nn.Module:
    """A tiny model in eval mode whose residual branches and norms all do something."""
    torch.manual_seed(0)
    model = TINY[kind](**kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@functools.cache
def shared(kind: str) -> nn.Module:
    """A model for tests that do not change it."""
    return make(kind)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        # He et al., table 6: 0.27, 0.46, 0.85 and 1.7 M.
        (lambda **k: CifarResNet((3, 3, 3), **k), 269_722),
        (lambda **k: CifarResNet((5, 5, 5), **k), 464_154),
        (lambda **k: CifarResNet((9, 9, 9), **k), 853_018),
        (lambda **k: CifarResNet((18, 18, 18), **k), 1_727_962),
        # The Pool Skip reference code's resnet18 and resnet34 at 10 classes.
        (lambda **k: SmallStemResNet(BasicBlock, (2, 2, 2, 2), **k), 11_173_962),
        (lambda **k: SmallStemResNet(BasicBlock, (3, 4, 6, 3), **k), 21_282_122),
        (lambda **k: CifarVGG(vgg_cfgs["vgg16"], norm_layer="batchnorm2d", **k), 14_728_266),
    ],
)
def test_parameter_counts(build, parameters):
    assert sum(p.numel() for p in build(device="meta").parameters()) == parameters


@pytest.mark.parametrize(("layers", "convolutions"), [((4, 36, 72, 4), 349), ((4, 44, 87, 4), 418)])
def test_deep_resnets_have_the_layers_of_their_names(layers, convolutions):
    model = SmallStemResNet(Bottleneck, layers, device="meta")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(names) == convolutions  # the classifier is the last layer


@pytest.mark.parametrize("size", [(32, 32), (33, 46)])
@pytest.mark.parametrize("stride", [1, 2])
def test_pad_shortcut_subsamples_and_appends_zeros(size, stride):
    x = torch.randn(2, 3, *size)
    y = PadShortcut(3, 5, stride)(x)
    assert y.shape == (2, 5, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert torch.equal(y[:, :3], x[:, :, ::stride, ::stride])
    assert not y[:, 3:].any()
    assert y.shape[2:] == nn.Conv2d(3, 5, 3, stride, 1)(x).shape[2:]


def test_three_stage_shortcuts_have_no_parameters():
    model = TINY["three"](zero_init_last=True)  # every residual branch starts at zero
    assert not any("downsample" in name for name in model.state_dict())
    x = torch.randn(1, 8, 9, 10)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8)).relu()
    assert torch.equal(model.eval().layer2(x), expected)


def test_no_channel_of_three_stages_is_born_dead():
    """Zero shortcut channels plus a zero last norm would be zero behind the sum, where the ReLU passes no gradient."""
    torch.manual_seed(0)
    model = TINY["three"]().train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.grad.abs().min() > 0, name
    dead = TINY["three"](zero_init_last=True).train()
    dead(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert not dead.layer2[0].bn2.weight.grad[8:].any()


def test_four_stage_is_the_reference_network():
    """The reference's forward (3×3 stem, four stages, mean, linear) written out with this model's weights."""
    model = shared("four")
    x = torch.randn(2, 3, 32, 32)

    def conv_bn(x, conv, bn):
        y = F.conv2d(x, conv.weight, stride=conv.stride, padding=conv.padding)
        return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)

    y = conv_bn(x, model.conv1, model.bn1).relu()
    assert y.shape[2:] == x.shape[2:]
    for i, stage in enumerate([model.layer1, model.layer2, model.layer3, model.layer4]):
        for j, block in enumerate(stage):
            assert block.conv1.stride == ((2, 2) if i > 0 and j == 0 else (1, 1))
            z = conv_bn(conv_bn(y, block.conv1, block.bn1).relu(), block.conv2, block.bn2)
            y = (z + (conv_bn(y, *block.downsample) if block.downsample is not None else y)).relu()
    torch.testing.assert_close(model(x), F.linear(y.mean((2, 3)), model.fc.weight, model.fc.bias))


@every_class
@pytest.mark.parametrize("size", [(32, 32), (65, 96)])
def test_features_match_feature_info(kind, size):
    model = shared(kind)
    x = torch.randn(2, 3, *size)
    final, maps = model.forward_intermediates(x)
    assert [f["reduction"] for f in model.feature_info] == REDUCTIONS[kind]
    assert [f["num_chs"] for f in model.feature_info] == CHANNELS[kind]
    assert len(maps) == len(model.feature_info)
    round_up = math.floor if kind == "vgg" else math.ceil  # VGG's poolings drop an odd edge
    for info, y in zip(model.feature_info, maps, strict=True):
        assert y.shape == (2, info["num_chs"], *(round_up(s / info["reduction"]) for s in size))
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(maps[-1], final)
    assert final.shape[1] == model.num_features


@every_class
def test_intermediates_by_index(kind):
    model = shared(kind)
    x = torch.randn(1, 3, 32, 32)
    _, maps = model.forward_intermediates(x)
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(last_two, maps[-2:], strict=True))
    early, (stem, last) = model.forward_intermediates(x, indices=[0, -2], stop_early=True)
    assert torch.equal(stem, maps[0])
    assert torch.equal(last, maps[-2])
    assert torch.equal(early, maps[-2])
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[len(maps)])
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@every_class
def test_prune(kind):
    x = torch.randn(1, 3, 32, 32)
    maps = shared(kind).forward_intermediates(x, intermediates_only=True)
    model = make(kind)
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], maps[1])
    assert torch.equal(model(x), maps[1])  # no head, no later stage
    assert model.num_features == maps[1].shape[1]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in shared(kind).parameters()) / 2

    model = make(kind)
    last = len(maps) - 1
    assert model.prune_intermediate_layers(1, prune_head=False) == [last]
    assert torch.equal(model(x), shared(kind)(x))
    model.prune_intermediate_layers(1)
    assert model.num_classes == 0
    assert torch.equal(model(x), maps[-1])


@every_class
def test_classifier_can_be_reset(kind):
    model = make(kind, num_classes=7, drop_rate=0.5)
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    width = model.num_features
    assert model(x).shape == (2, 7)
    assert model.get_classifier().weight.shape == (7, width)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(4, "catavgmax")
    assert model(x).shape == (2, 4)
    assert model.head_hidden_size == 2 * width == model.forward_head(features, pre_logits=True).shape[1]
    bare = TINY[kind](num_classes=0, global_pool="").eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "fc." not in k})
    assert torch.equal(bare(x), features)


@every_class
def test_head_dropout_follows_drop_rate(kind):
    model = make(kind, num_classes=0, drop_rate=0.5)
    features = torch.ones(4, model.num_features, 1, 1)
    assert torch.equal(model.forward_head(features), torch.ones(4, model.num_features))
    dropped = model.train().forward_head(features)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


@every_class
def test_every_parameter_learns(kind):
    model = make(kind, in_chans=1, num_classes=5).train()
    model(torch.randn(2, 1, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@resnets
def test_gradient_checkpointing_changes_nothing(kind):
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model = make(kind)
        model.set_grad_checkpointing(enable)
        final, maps = model.forward_intermediates(x)
        (model(x).square().mean() + final.mean() + maps[1].mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@resnets
def test_drop_path_rises_with_depth(kind):
    model = TINY[kind](drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)
    assert len(rates) == sum(isinstance(m, BasicBlock) for m in model.modules()) - 1  # the first block keeps its path


@pytest.mark.parametrize(("kind", "stride"), [("three", 2), ("four", 4), ("four", 2)])
def test_output_stride_dilates(kind, stride):
    model = make(kind, output_stride=stride)
    x = torch.randn(1, 3, 32, 48)
    assert [f["reduction"] for f in model.feature_info] == [min(r, stride) for r in REDUCTIONS[kind]]
    assert model.forward_features(x).shape[2:] == (32 // stride, 48 // stride)
    model.load_state_dict(shared(kind).state_dict())  # the same parameters


@every_class
def test_activation_and_norm_by_name(kind):
    model = TINY[kind](act_layer="gelu", norm_layer="groupnorm1")
    kinds = {type(m).__name__ for m in model.modules()}
    assert {"GroupNorm1", "GELU"} <= kinds
    assert not {"BatchNorm2d", "ReLU"} & kinds


@resnets
def test_resnet_initialisation(kind):
    model = TINY[kind](zero_init_last=True)
    assert all(not b.bn2.weight.any() for b in model.modules() if isinstance(b, BasicBlock))
    model = TINY[kind](zero_init_last=False)
    assert all(b.bn2.weight.all() for b in model.modules() if isinstance(b, BasicBlock))
    for conv in (model.conv1, model.layer3[0].conv1):  # the replaced stem as all others: He, fan out
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * conv.out_channels)), rel=0.2)
    before = model.conv1.weight.clone()
    model.init_weights()
    assert not torch.equal(model.conv1.weight, before)


def test_vgg_head_is_small():
    model = CifarVGG(vgg_cfgs["vgg11"], num_classes=100)
    assert sum(p.numel() for p in model.head.parameters()) == 100 * 512 + 100
    assert not list(model.pre_logits.parameters())
    assert model.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.head.fc.bias.any()


@every_class
def test_device_and_dtype(kind):
    model = TINY[kind](device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


@every_class
@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_has_a_group(kind, coarse):
    model = shared(kind)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    first, last = groups[min(groups)], groups[max(groups)]
    assert {"conv1.weight", "features.0.weight"} & set(first)
    assert all(name.startswith(("fc", "head.fc")) for name in last)


@every_class
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_only(kind, feature_cls):
    x = torch.randn(1, 3, 32, 32)
    taps = tuple(range(len(REDUCTIONS[kind])))
    build = {"three": CifarResNet, "four": SmallStemResNet, "vgg": CifarVGG}[kind]
    kwargs = dict(TINY[kind].keywords)
    kwargs |= {
        "three": {"layers": (1, 2, 1)},
        "four": {"block": BasicBlock, "layers": (1, 1, 2, 1)},
        "vgg": {"cfg": TINY_VGG},
    }[kind]
    model = build_model_with_cfg(
        build,
        "tiny",
        False,
        pretrained_cfg={"num_classes": 10, "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"},
        feature_cfg={"out_indices": taps, "flatten_sequential": kind == "vgg", "feature_cls": feature_cls},
        features_only=True,
        **kwargs,
    ).eval()
    assert model.feature_info.reduction() == REDUCTIONS[kind]
    maps = model(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert [y.shape[1] for y in maps] == CHANNELS[kind]
    assert [y.shape[2] for y in maps] == [32 // r for r in REDUCTIONS[kind]]


@every_class
def test_scripts_and_traces_at_other_sizes(kind):
    model = shared(kind)
    x, other = torch.randn(1, 3, 32, 32), torch.randn(3, 3, 65, 70)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of TorchScript
        for compiled in (torch.jit.script(model), torch.jit.trace(model, x)):
            torch.testing.assert_close(compiled(other), model(other))


@every_class
def test_exports_with_dynamic_sizes(kind):
    model = shared(kind)
    auto = torch.export.Dim.AUTO
    # VGG's last map is larger than 1×1 here: torch.export freezes sizes of 1.
    example = torch.randn(2, 3, 97, 161)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    for shape in [(1, 3, 64, 64), (5, 3, 97, 120)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x))


@resnets
def test_symbolic_tracing(kind):
    model = shared(kind)
    x = torch.randn(1, 3, 33, 40)
    (y,) = FeatureGraphNet(copy.deepcopy(model), out_indices=(-1,))(x)
    assert torch.equal(y, model.forward_features(x))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@every_class
def test_copies(kind):
    model = shared(kind)
    x = torch.randn(1, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    twin = make(kind).to(memory_format=torch.channels_last)
    y = twin.forward_features(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, model.forward_features(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CifarResNet((1, 1)), ValueError, r"3 stages, got layers=\(1, 1\)"),
        (lambda: CifarResNet((1, 1, 1), channels=(8, 16)), ValueError, r"3 stages, .*channels=\(8, 16\)"),
        (lambda: SmallStemResNet(BasicBlock, (1, 1, 1)), ValueError, "SmallStemResNet has 4 stages"),
        (lambda: CifarResNet((1, 1, 1), channels=(7, 14, 28)), ValueError, "even"),
        (lambda: CifarResNet((1, 1, 1), output_stride=8), ValueError, r"output_stride=8 .*\[2, 4\]"),
        (
            lambda: SmallStemResNet(BasicBlock, (1,) * 4, output_stride=32),
            ValueError,
            r"output_stride=32 .*\[2, 4, 8\]",
        ),
        (lambda: CifarVGG(TINY_VGG, output_stride=16), ValueError, "output_stride=16"),
        (lambda: PadShortcut(4, 2), ValueError, "in_chs=4, out_chs=2"),
        (lambda: CifarResNet((1, 1, 1), drop_path_rat=0.1), TypeError, "drop_path_rat"),
        (lambda: CifarResNet((1, 1, 1), avg_down=True), TypeError, "avg_down"),
        (lambda: SmallStemResNet(BasicBlock, (1,) * 4, stem_type="deep"), TypeError, "stem_type"),
        (lambda: CifarVGG(TINY_VGG, drop_path_rate=0.1), TypeError, "drop_path_rate"),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message):
        build()
