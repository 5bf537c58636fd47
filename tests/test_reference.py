"""Checkpoints of the Pool Skip reference code compute the same here."""

import pytest
import timm
import torch
from torch import nn

import poolskip_zoo  # noqa: F401  (registers)
from poolskip_zoo.models.reference import convert_reference_state_dict


class Maxima(nn.Module):
    """The reference's Pool Skip: floor-mode pooling, so that even sizes alone work."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        pooled, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
        return x + self.conv(nn.functional.max_unpool2d(pooled, indices, 2))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        layers = []
        for i, channels in enumerate((inputs, outputs)):
            conv = nn.Conv2d(channels, outputs, 3, stride=1 if i else stride, padding=1, bias=False)
            layers += [conv, Maxima(outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.residual_function = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride > 1:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        return (self.residual_function(x) + self.shortcut(x)).relu()


class Reference(nn.Module):
    """The module names and the function of the reference code's ResNet-18 and 34."""

    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        width = 64
        for stage, depth in enumerate(depths):
            blocks = [Block(width, 64 * 2**stage, 2 if stage else 1)]
            width = 64 * 2**stage
            blocks += [Block(width, width, 1) for _ in range(depth - 1)]
            self.add_module(f"conv{stage + 2}_x", nn.Sequential(*blocks))
        self.fc = nn.Linear(512, 100)

    def forward(self, x):
        for stage in (self.conv1, self.conv2_x, self.conv3_x, self.conv4_x, self.conv5_x):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def resnet18() -> Reference:
    return random_reference((2, 2, 2, 2))


def random_reference(depths: tuple[int, ...]) -> Reference:
    torch.manual_seed(0)
    model = Reference(depths).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.2, 0.2)
    return model


def check(name: str, reference: Reference, state_dict: dict[str, torch.Tensor]) -> None:
    model = timm.create_model(name, num_classes=100).eval()
    model.load_state_dict(convert_reference_state_dict(state_dict), strict=True)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-4)


def test_resnet18(resnet18):
    check("resnet18_cifar_poolskip", resnet18, resnet18.state_dict())


def test_resnet34_saved_by_data_parallel():
    reference = random_reference((3, 4, 6, 3))
    wrapped = {f"module.{key}": value for key, value in reference.state_dict().items()}
    check("resnet34_cifar_poolskip", reference, wrapped)


def test_the_conversion_copies_nothing_and_leaves_its_input_alone(resnet18):
    before = resnet18.state_dict()
    keys = list(before)
    after = convert_reference_state_dict(before)
    assert list(before) == keys
    assert len(after) == len(keys)
    for old, new in zip(before.values(), after.values(), strict=True):
        assert new.data_ptr() == old.data_ptr()


@pytest.mark.parametrize(
    "key",
    [
        "conv6_x.0.residual_function.0.weight",
        "conv2_x.0.residual_function.3.weight",
        "conv2_x.0.residual_function.0.conv.weight",
        "conv2_x.0.shortcut.1.conv.weight",
        "conv1.2.weight",
        "layer1.0.conv1.weight",
        "fc.scale",
    ],
)
def test_unknown_names(key, resnet18):
    with pytest.raises(ValueError, match="is not a name of the reference code's resnet18 or resnet34") as error:
        convert_reference_state_dict({**resnet18.state_dict(), key: torch.zeros(1)})
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("key", ["conv2_x.0.residual_function.8.weight", "conv3_x.1.residual_function.9.conv.bias"])
def test_bottlenecks(key, resnet18):
    with pytest.raises(ValueError, match=r"bottleneck network .ResNet-50 or deeper.*only its resnet18 and resnet34"):
        convert_reference_state_dict({**resnet18.state_dict(), key: torch.zeros(1)})
