"""Insertion into models of other libraries: timm, torchvision, MONAI, and our own registered variants."""

import copy
import functools
import io
import pickle

import pytest
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import poolskip_zoo  # noqa: F401  (registers)
from poolskip_zoo.layers import Rule, add_pool_skip, pool_skip_modules, remove_pool_skip
from poolskip_zoo.layers.placement import resolve_placement

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore:`isinstance", "ignore::torch.jit.TracerWarning")


def from_timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=5, **options)


def from_monai(name: str, *args, **options) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("einops")  # which MONAI's transformers want
    return getattr(nets, name)(*args, **options)


# name: how to build it, where Pool Skip goes, how many places that are, an input
MODELS = {
    "convnext_tiny": (
        functools.partial(from_timm, "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
        "auto",
        4,
        (2, 3, 64, 48),
    ),
    "tf_efficientnet_b0": (functools.partial(from_timm, "tf_efficientnet_b0"), ("*.conv_dw",), 16, (2, 3, 33, 40)),
    "regnetx_002": (functools.partial(from_timm, "regnetx_002"), ("s[12].*.conv[12].conv",), 4, (2, 3, 33, 40)),
    "nfnet_l0": (
        functools.partial(from_timm, "nfnet_l0", depths=(1, 1, 1, 1), channels=(32, 64, 64, 64), group_size=8),
        (Rule("stages.*.conv[12]", pool_size=4, groups="depthwise"),),
        8,
        (2, 3, 33, 40),
    ),
    "resnetv2_50": (
        functools.partial(from_timm, "resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64)),
        "auto",
        8,
        (2, 3, 33, 40),
    ),
    "test_resnet": (functools.partial(from_timm, "test_resnet"), "default", 7, (2, 3, 65, 48)),
    "torchvision resnet18": (
        functools.partial(torchvision.models.resnet18, num_classes=5),
        ("layer1.*.conv[12]", "layer2.0.conv1"),
        5,
        (2, 3, 33, 40),
    ),
    "monai UNet": (
        functools.partial(
            from_monai, "UNet", 3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1
        ),
        "auto",
        3,
        (2, 1, 12, 16, 12),
    ),
    "monai DynUNet": (
        functools.partial(
            from_monai, "DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 16]
        ),
        ("*.conv[12].conv",),
        10,
        (2, 1, 12, 16, 12),
    ),
    "monai SwinUNETR": (
        functools.partial(
            from_monai,
            "SwinUNETR",
            in_channels=1,
            out_channels=2,
            feature_size=12,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
        ),
        ("*.conv[12].conv",),
        20,
        (1, 1, 64, 32, 32),
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        # Many models start their residual branches at zero or near it: nothing in them would matter.
        if parameter.abs().max() < 1e-3:
            nn.init.uniform_(parameter, 0.2, 0.5)
    return model


def example(name: str) -> torch.Tensor:
    return torch.randn(MODELS[name][3], generator=torch.Generator().manual_seed(1))


def with_pool_skip(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = copy.deepcopy(base(name))
    add_pool_skip(model, MODELS[name][1], **options)
    return model


@every_model
@torch.no_grad()
def test_zero_init_then_removal_gives_the_model_back(name):
    model, x = copy.deepcopy(base(name)), example(name)
    expected = model(x)
    keys, names, places = list(model.state_dict()), dict(model.named_modules()).keys(), MODELS[name][2]
    hooks = {n: len(m._forward_hooks) for n, m in model.named_modules()}

    planned = add_pool_skip(model, MODELS[name][1], zero_init=True, dry_run=True)
    assert list(model.state_dict()) == keys
    assert add_pool_skip(model, MODELS[name][1], zero_init=True) == planned
    assert len(planned) == len(pool_skip_modules(model)) == places
    new = [key for key in model.state_dict() if key not in keys]
    assert all(key.endswith((".pool_skip.conv.weight", ".pool_skip.conv.bias")) for key in new)
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base(name).parameters())
    assert count == sum(place.parameters for place in planned)
    assert torch.equal(model(x), expected)

    for layer in pool_skip_modules(model).values():
        nn.init.normal_(layer.conv.weight, std=0.1)
    assert not torch.allclose(model(x), expected)
    assert remove_pool_skip(model) is model
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()).keys() == names
    assert {n: len(m._forward_hooks) for n, m in model.named_modules()} == hooks
    assert torch.equal(model(x), expected)


@every_model
def test_every_pool_skip_gets_a_gradient_and_copies_agree(name):
    model, x = with_pool_skip(name), example(name)
    y = model(x)
    y.float().square().mean().backward()
    for layer in pool_skip_modules(model).values():
        assert layer.conv.weight.grad.any()
        assert layer.conv.bias.grad is not None
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    # A copy is removed from without touching the original.
    remove_pool_skip(clone)
    assert len(pool_skip_modules(model)) == MODELS[name][2]
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    "name", [pytest.param("tf_efficientnet_b0", marks=pytest.mark.slow), "nfnet_l0", "test_resnet"]
)
@torch.no_grad()
def test_script_saves_and_loads(name, assert_close):
    model, x = with_pool_skip(name), example(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert_close(loaded(x), model(x))
    assert_close(loaded(x[:1, :, :-7]), model(x[:1, :, :-7]))


@pytest.mark.parametrize("name", ["convnext_tiny", "resnetv2_50", "test_resnet"])
@torch.no_grad()
def test_trace_at_another_size(name, assert_close):
    model, x = with_pool_skip(name), example(name)
    traced = torch.jit.trace(model, x)
    smaller = x[:1, :, :-2, :-9]
    assert_close(traced(smaller), model(smaller))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnetv2_50", "regnetx_002", "test_resnet"])
def test_export_with_dynamic_sizes(name, assert_close):
    model, x = with_pool_skip(name), example(name).repeat(1, 1, 3, 3)
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,)).module()
    for smaller in (x[:1, :, :-7], x[..., :-10, :-31]):
        assert_close(program(smaller), model(smaller))


def test_torchvision_feature_extractor():
    model, x = with_pool_skip("torchvision resnet18"), example("torchvision resnet18")
    extract = create_feature_extractor(model, ["layer1.0.conv1", "layer2", "fc"])
    features = extract(x)
    assert torch.equal(features["fc"], model(x))
    # The feature of a module that Pool Skip follows is the module's output with Pool Skip.
    stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    assert torch.equal(features["layer1.0.conv1"], model.layer1[0].conv1(stem))
    assert not torch.equal(features["layer1.0.conv1"], base("torchvision resnet18").layer1[0].conv1(stem))


def test_timm_features():
    for name in ("test_resnet", "convnext_tiny"):
        model = timm.create_model(name, features_only=True).eval()
        x = example(name)
        expected = model(x)
        add_pool_skip(model, MODELS[name][1] if name != "test_resnet" else "auto", zero_init=True)
        assert all(map(torch.equal, model(x), expected))
        assert model.feature_info.channels() == [y.shape[1] for y in expected]


def test_gradient_checkpointing():
    model, x = with_pool_skip("test_resnet").train(), example("test_resnet")
    gradients = []
    for enabled in (False, True):
        clone = copy.deepcopy(model)
        clone.set_grad_checkpointing(enabled)
        clone(x).square().sum().backward()
        gradients.append([p.grad for p in clone.parameters()])
    assert all(map(torch.equal, *gradients))


def test_sync_batchnorm_conversion():
    model, x = with_pool_skip("test_resnet"), example("test_resnet")
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert len(pool_skip_modules(converted)) == 7
    assert torch.equal(converted(x), expected)


def test_exponential_moving_average():
    model = with_pool_skip("test_resnet")
    ema = ModelEmaV3(model, decay=0.5)
    before = {name: layer.conv.weight.clone() for name, layer in pool_skip_modules(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update(model)
    for name, layer in pool_skip_modules(ema.module).items():
        torch.testing.assert_close(layer.conv.weight, before[name] + 0.5)


# auto


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]),
        ("convnext_tiny", ["stages.0.blocks.0.conv_dw", "stages.0.blocks.1.conv_dw", "stages.0.blocks.2.conv_dw"]),
        ("efficientnet_b0", ["blocks.0.0.conv_dw", "blocks.0.0.conv_pw", "blocks.1.0.conv_dw"]),
        ("regnety_002", ["s1.b1.conv1.conv", "s1.b1.conv2.conv", "s1.b1.conv3.conv"]),
        ("seresnet50", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"]),
        ("rexnet_100", ["features.0.conv_dw.conv", "features.0.conv_pwl.conv", "features.1.conv_dw.conv"]),
        ("skresnet18", None),
        ("legacy_xception", ["conv2"]),
        ("dla34", None),
        ("resnest14d", None),
    ],
)
def test_auto_leaves_out_the_first_convolution_shortcuts_and_gates(name, expected):
    model = timm.create_model(name, device="meta")
    places = add_pool_skip(model, "auto", dry_run=True)
    names = [place.name for place in places]
    if expected:
        assert names[: len(expected)] == expected
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert first not in names
    for place in names:
        parts = place.split(".")
        assert not {"downsample", "shortcut", "skip", "project", "se", "attn"} & set(parts)
        parent = type(model.get_submodule(place.rpartition(".")[0])).__name__
        assert not (parent == "SplitAttn" and parts[-1].startswith("fc"))


def test_auto_follows_the_groups_of_the_convolution():
    model = timm.create_model("efficientnet_b0", device="meta")
    groups = {place.name: (place.groups, place.channels) for place in add_pool_skip(model, "auto", dry_run=True)}
    assert groups["blocks.1.0.conv_dw"] == (96, 96)
    assert groups["blocks.0.0.conv_pw"] == (1, 16)
    assert "blocks.1.0.conv_pw" not in groups  # widens, 16 to 96


def test_auto_skips_what_reparameterisation_would_drop():
    model = timm.create_model("repvit_m1", device="meta")
    with pytest.raises(ValueError, match=r"'auto' matches nothing in RepVit: its convolutions are stem\.conv1\.c, "):
        add_pool_skip(model, "auto")
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith("stages"))
    with pytest.raises(ValueError, match=rf"module '{name}' lies in \w+, whose re-parameterisation would drop"):
        add_pool_skip(model, [name])


@pytest.mark.parametrize(
    "name",
    # The largest say no more about names than their families.
    timm.list_models("*_poolskip", exclude_filters=["resnet350*", "resnet420*", "resnet200*", "*large*", "resnet152*"]),
)
def test_presets_never_hit_the_first_convolution_shortcuts_gates_or_the_classifier(name):
    model = timm.create_model(name, device="meta")
    placements = [[layer.rpartition(".")[0] for layer in pool_skip_modules(model)]]
    if isinstance(model, timm.models.ResNet):
        placements.append(list(resolve_placement(model, "all")))
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    for names in placements:
        assert names
        assert first not in names
        for place in names:
            assert not {"downsample", "shortcut", "se", "fc", "head", "pre_logits"} & set(place.split("."))


def test_a_convolution_that_returns_more_than_a_map_is_named():
    class Counted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x.shape[0]

    net = nn.Sequential(Counted(3, 4, 3))
    add_pool_skip(net, "0")
    with pytest.raises(TypeError, match="Counted returns a tuple: Pool Skip can only follow what returns one tensor"):
        net(torch.zeros(1, 3, 8, 8))
