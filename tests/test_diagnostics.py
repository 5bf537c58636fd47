"""The diagnosis of a model: planted facts are found, on models of every library."""

import json
import math
from functools import partial

import pytest
import timm
import torch
from contract.common import Function
from timm.layers import StdConv2d
from torch import nn

from poolskip_zoo.diagnostics import diagnose, draw, table
from poolskip_zoo.layers import PoolSkip2d, add_pool_skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def by_name(found):
    return {layer.name: layer for layer in found.layers}


# --- models


def orthogonal_net():
    """Plain, with grouped and depthwise convolutions, all filters orthogonal."""
    layers = []
    for inputs, outputs, size, groups in ((3, 16, 3, 1), (16, 16, 3, 16), (16, 32, 1, 1), (32, 32, 3, 4)):
        layers += [nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups), nn.BatchNorm2d(outputs)]
        layers.append(nn.ReLU())
        nn.init.orthogonal_(layers[-3].weight)
    return nn.Sequential(*layers)


def test_a_random_orthogonal_net_has_nothing_inert():
    found = diagnose(orthogonal_net(), [torch.randn(8, 3, 16, 16)])
    assert [layer.inert for layer in found.layers] == [[]] * 4
    assert [layer.dead for layer in found.layers] == [[]] * 4
    assert found.summary() == {"base": {"convolutions": 4, "filters": 96, "inert": 0, "watched": 96, "dead": 0}}
    assert repr(found) == f"Diagnosis(images={found.images}, summary={found.summary()})"
    first, depthwise, pointwise, grouped = found.layers
    assert first.orthogonality == pytest.approx(1, abs=1e-5)
    assert grouped.orthogonality == pytest.approx(1, abs=1e-5)
    assert depthwise.orthogonality is None
    assert (pointwise.variance_entropy, pointwise.sparsity, pointwise.orthogonality) == (None, None, None)


def test_ten_planted_dead_filters_of_ten():
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    planted = {
        "conv1": {5: 0.0},
        "layer1.0.conv1": {0: 0.0, 63: 1e-3},
        "layer2.0.conv2": {7: 0.005},
        "layer3.1.conv1": {100: 0.0, 101: 0.0, 255: 1e-6},
    }
    with torch.no_grad():
        for name, filters in planted.items():
            for index, factor in filters.items():
                model.get_submodule(name).weight[index] *= factor
        model.layer4[0].bn1.weight[3] = 0
        model.layer4[1].bn2.weight[[4, 5]] = torch.tensor([0.01, -0.009])
        model.layer4[1].bn1.weight[6] = 0.02  # near, but above
    found = {name: layer.inert for name, layer in by_name(diagnose(model)).items() if layer.inert}
    expected = {name: sorted(filters) for name, filters in planted.items()}
    assert found == {**expected, "layer4.0.conv1": [3], "layer4.1.conv2": [4, 5]}
    assert sum(map(len, found.values())) == 10


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, partial(nn.BatchNorm2d, track_running_stats=False), nn.InstanceNorm2d, None]
)
def test_a_small_filter_that_its_norm_makes_up_for_is_not_inert(norm):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), *([norm(8, affine=True)] if norm else []), nn.ReLU())
    with torch.no_grad():
        net[0].weight *= 10
        net[0].weight[1] *= 0.005
        net[0].weight[2] = 0
        for _ in range(300):
            net(torch.randn(8, 3, 16, 16))
    (layer,) = diagnose(net, [torch.randn(8, 3, 16, 16)]).layers
    assert layer.inert == ([2] if norm else [1, 2])
    assert 0.4 < layer.zero_share[1] < 0.6


def test_a_convolution_that_standardises_its_weights_has_no_small_filters():
    net = nn.Sequential(StdConv2d(3, 8, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight[1] *= 0.001
    assert diagnose(net).layers[0].inert == []


def test_a_scale_below_zero_is_not_small():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.constant_(net[1].weight[1:2], -1.0)
    assert diagnose(net).layers[0].inert == []


def test_a_norm_of_other_channels_is_not_the_convolution_s():
    layers = diagnose(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(8))).layers
    assert layers[0].norm is None


def test_pool_skip_is_told_from_the_base():
    model = timm.create_model("test_resnet_cifar_poolskip")
    twin = by_name(diagnose(timm.create_model("test_resnet_cifar")))
    found = by_name(diagnose(model))
    kinds = {name: layer.kind for name, layer in found.items()}
    assert {name for name, kind in kinds.items() if kind == "base"} == set(twin)
    assert kinds["layer1.0.conv1.pool_skip.conv"] == "pool_skip"
    assert {name: found[name].depth for name in twin} == {name: twin[name].depth for name in twin}
    place = found["layer2.0.conv1"]
    added = found["layer2.0.conv1.pool_skip.conv"]
    assert (place.depth, place.norm) == (added.depth, added.norm) == (4, "layer2.0.bn1")


def test_pool_skip_on_tokens_and_by_itself():
    layers = diagnose(timm.create_model("test_vit_poolskip")).layers
    assert [layer.kind for layer in layers] == ["base"] + ["pool_skip"] * (len(layers) - 1)
    assert [layer.depth for layer in layers] == list(range(1, len(layers) + 1))
    (layer,) = diagnose(nn.Sequential(PoolSkip2d(4), nn.BatchNorm2d(4))).layers
    assert (layer.kind, layer.norm) == ("pool_skip", "1")


def vgg16():
    from torchvision.models import vgg16

    with torch.device("meta"):
        model = vgg16()
    # The classifier's 124 million weights have no convolution.
    model.classifier = nn.Flatten()
    model.features.to_empty(device="cpu")
    for module in model.features.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return model


def unet_of_smp():
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, classes=4)


def unet_of_monai():
    nets = pytest.importorskip("monai.networks.nets")
    return nets.UNet(
        spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), norm=("batch", {})
    )


@pytest.mark.parametrize(
    ("make", "shape", "convolutions", "with_norm", "with_relu"),
    [
        (lambda: timm.create_model("resnet50"), (3, 64, 64), 53, 53, 53),
        (vgg16, (3, 32, 32), 13, 0, 13),
        (unet_of_smp, (3, 32, 32), 31, 30, 30),
        # MONAI's activation is PReLU; its last convolution has no norm.
        (unet_of_monai, (1, 16, 16, 16), 5, 4, 0),
    ],
    ids=["timm resnet50", "torchvision vgg16", "smp U-Net", "MONAI UNet"],
)
def test_models_of_all_libraries(make, shape, convolutions, with_norm, with_relu):
    model = make()
    found = diagnose(model, [torch.randn(1, *shape)])
    assert not found.left_out
    assert len(found.layers) == convolutions
    assert sum(layer.norm is not None for layer in found.layers) == with_norm
    assert sum(layer.zero_share is not None for layer in found.layers) == with_relu
    json.dumps(found.to_dict(), allow_nan=False)
    for layer in found.layers:
        assert len(layer.zero_share or [0] * layer.filters) == layer.filters
        assert (layer.sparsity is None) == (layer.kernel_size != (3, 3))


# --- with images


class Functional(nn.Module):
    """conv → norm → ReLU called as functions, in place, one module twice, a sum, and a GELU."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.norm(self.first(x)))
        x = torch.relu(x + self.norm(self.second(x)))
        return nn.functional.gelu(self.third(x)).relu()


def test_zero_share_is_that_of_the_relu_output():
    model = Functional()
    batches = [torch.randn(3, 4, 8, 8), torch.randn(2, 4, 8, 8)]
    found = by_name(diagnose(model, batches))
    model.eval()
    x = torch.cat(batches)
    first = torch.relu(model.norm(model.first(x)))
    second = torch.relu(first + model.norm(model.second(first)))
    for name, output in (("first", first), ("second", second)):
        expected = (output == 0).float().mean((0, 2, 3)).tolist()
        assert found[name].zero_share == pytest.approx(expected)
    assert found["third"].zero_share is None


def test_dead_only_if_zero_on_all_images():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU6())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, -5.0, -1.0]))
    images = torch.zeros(4, 1, 2, 2)
    images[2, 0, 1, 1] = 6
    (layer,) = diagnose(model, images.split(1)).layers
    assert layer.dead == [2]
    assert layer.zero_share == [15 / 16, 15 / 16, 1]
    assert layer.inert == [2]


def test_zeros_are_counted_behind_pool_skip():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU())
    add_pool_skip(model, lambda name, module: name == "0")
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].pool_skip.conv.bias.copy_(torch.tensor([1.0, -1.0]))
    base, added = diagnose(model, [torch.randn(2, 1, 4, 4)]).layers
    # The base's filters are inert, but Pool Skip fills the first channel.
    assert (base.inert, base.dead) == ([0, 1], [1])
    assert (added.kind, added.dead) == ("pool_skip", [1])


@pytest.mark.parametrize(
    "between",
    [
        nn.Dropout2d(),
        nn.FeatureAlphaDropout(),
        nn.LocalResponseNorm(2),
        Function(lambda x: x.to(torch.float64)),
        Function(lambda x: x.to(torch.bfloat16).float()),
        Function(lambda x: x.contiguous(memory_format=torch.channels_last)),
    ],
)
def test_the_way_to_the_relu(between):
    (layer,) = diagnose(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.ReLU()), [torch.randn(2, 3, 8, 8)]).layers
    assert layer.dead is not None
    assert layer.read_elsewhere is False


@pytest.mark.parametrize("last", [nn.Hardtanh(), Function(lambda y: torch.relu(torch.randn(2, 4, 6, 6) + y))])
def test_what_is_no_zero_of_the_channel_is_not_counted(last):
    """Hardtanh ends at -1, and to a map of several cells a channel of one is but a shift."""
    (layer,) = diagnose(nn.Sequential(nn.Conv2d(3, 4, 8), last), [torch.randn(2, 3, 8, 8)]).layers
    assert layer.zero_share is None


def test_parametrised_weights_have_no_gradient():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 8)), nn.ReLU(), nn.Flatten())
    (layer,) = diagnose(net, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))]).layers
    assert layer.gradient is None


def test_gradient_is_that_of_the_mean_loss():
    model = timm.create_model("test_resnet_cifar_poolskip")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    model.conv1.weight.requires_grad_(False)
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    found = by_name(diagnose(model, [(x[:4], labels[:4]), (x[4:], labels[4:])]))
    assert not model.conv1.weight.requires_grad
    model.conv1.weight.requires_grad_(True)
    nn.functional.cross_entropy(model.eval()(x), labels).backward()
    for name, layer in found.items():
        expected = model.get_submodule(name).weight.grad.flatten(1).norm(dim=1)
        assert expected.any()
        torch.testing.assert_close(torch.tensor(layer.gradient), expected, rtol=1e-4, atol=1e-7)


def test_a_loss_of_ones_own():
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    found = diagnose(
        model, [(torch.ones(1, 2, 1, 1), torch.ones(1))], loss=lambda outputs, weight: weight * outputs.sum()
    )
    assert found.layers[0].gradient == pytest.approx([math.sqrt(2)] * 2)


def test_the_model_is_left_as_it_was():
    model = timm.create_model("test_resnet_cifar_poolskip").train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    diagnose(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    assert not model.bn1.training
    assert model.layer1.training
    assert model.training
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- what is refused


def test_lazy_convolutions_are_left_out():
    found = diagnose(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyConv2d(4, 3)))
    assert [layer.name for layer in found.layers] == ["0"]
    assert "run the model once" in found.left_out["1"]


def test_mistakes_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    images = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="no images"):
        diagnose(model, [])
    with pytest.raises(ValueError, match="1 of 2 images have labels"):
        diagnose(model, [(images, torch.zeros(1)), images], loss=lambda outputs, labels: outputs.sum())
    with pytest.raises(ValueError, match="gradient of 0 is not finite"):
        diagnose(model, [(images, torch.zeros(1))], loss=lambda outputs, labels: outputs.sum() / 0)
    with pytest.raises(ValueError, match="Linear holds no convolutions"):
        diagnose(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 is on the meta device"):
        diagnose(nn.Sequential(nn.Conv2d(3, 4, 1, device="meta")))
    with pytest.raises(ValueError, match="the model is on the meta device"):
        diagnose(nn.Conv2d(3, 4, 1, device="meta"))
    with pytest.raises(ValueError, match="ReLU behind 0 is not finite"):
        diagnose(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), [images * math.nan])
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.weight[1:2], math.nan)
    with pytest.raises(ValueError, match="1 has a scale that is not finite"):
        diagnose(nn.Sequential(nn.Conv2d(3, 4, 1), norm))
    nn.init.constant_(model[0].weight, math.inf)
    with pytest.raises(ValueError, match="0 has weights that are not finite"):
        diagnose(model)


# --- tables, pictures, the command


def test_table_puts_models_beside_each_other():
    base = diagnose(timm.create_model("test_resnet_cifar", zero_init_last=False))
    variant = diagnose(timm.create_model("test_resnet_cifar_poolskip", zero_init_last=False))
    lines = table(base, variant).splitlines()
    assert lines[0].split() == ["convolution", "filters", "l2/l1", "inert", "sparse", "entropy", "orthog."]
    assert lines[1].split()[:4] == ["conv1", "8", "/", "8"]
    assert lines[3].split()[:4] == ["layer1.0.conv1.pool_skip.conv", "-", "/", "8"]
    assert lines[-2] == "base: 7 / 7 convolutions, 120 / 120 filters, 0 / 0 inert"
    assert lines[-1] == "pool_skip: - / 6 convolutions, - / 112 filters, - / 0 inert"


def test_one_picture_for_each_measure(tmp_path):
    pytest.importorskip("matplotlib")
    model = timm.create_model("test_resnet_cifar_poolskip")
    found = diagnose(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    names = {"l2_l1", "inert", "sparsity", "variance_entropy", "orthogonality"}
    paths = draw(tmp_path / "new", {"one": found, "other": diagnose(timm.create_model("test_resnet_cifar"))})
    assert {path.stem for path in paths} == {*names, "zero_share", "dead", "gradient"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
    paths = draw(tmp_path, {"no 3×3": diagnose(nn.Sequential(nn.Conv2d(3, 4, 1)))})
    assert {path.stem for path in paths} == {"l2_l1", "inert"}
