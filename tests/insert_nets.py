"""Small networks for tests of insertion."""

from timm.layers import BatchNormAct2d
from torch import nn

from poolskip_zoo.layers import add_pool_skip


class Block(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2, bias=bias)
        self.bn2 = BatchNormAct2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=bias), nn.BatchNorm2d(8))

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)


class Net(nn.Module):
    """A stem, two residual blocks and a classifier."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(bias), Block(bias))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


AUTO = ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"]
IMAGE = (2, 3, 13, 10)


def net(bias: bool = False) -> nn.Module:
    model = Net(bias)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def net_with_pool_skip(placement="auto", bias: bool = False, **options) -> nn.Module:
    model = net(bias)
    add_pool_skip(model, placement, **options)
    return model
