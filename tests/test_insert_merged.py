"""What changes the convolution under Pool Skip: BatchNorm folding, quantisation and low-rank updates."""

import copy

import pytest
import timm
import torch
from insert_nets import IMAGE, net, net_with_pool_skip
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.nn.utils import fusion

import poolskip_zoo  # noqa: F401  (registers)
from poolskip_zoo.layers import add_pool_skip, remove_pool_skip

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def fold(model: nn.Module, how: str) -> nn.Module:
    if how == "fuse_conv_bn_eval":
        for block in model.blocks:
            block.conv1, block.bn1 = fusion.fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
        return model
    if how == "fx":
        from torch.fx.experimental import optimization

        return optimization.fuse(model)
    return torch.ao.quantization.fuse_modules(model, [[f"blocks.{i}.conv1", f"blocks.{i}.bn1"] for i in (0, 1)])


every_fold = pytest.mark.parametrize("how", ["fuse_conv_bn_eval", "fx", "fuse_modules"])


@every_fold
@torch.no_grad()
def test_batchnorm_folding_is_noticed(how):
    plain, model, x = net(), net_with_pool_skip("blocks.*.conv1"), torch.randn(IMAGE)
    # Without Pool Skip the folding is right: what is refused below is Pool Skip's part of it.
    torch.testing.assert_close(fold(copy.deepcopy(plain), how)(x), plain(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="had no bias when Pool Skip was added and has one now: folding BatchNorm"):
        fold(model, how)(x)


@every_fold
@torch.no_grad()
def test_batchnorm_folding_into_a_convolution_with_bias_cannot_be_noticed(how):
    """Such a convolution looks the same after folding: the output is wrong without an error, as documented."""
    model, x = net_with_pool_skip("blocks.*.conv1", bias=True), torch.randn(IMAGE)
    expected = model(x)
    assert (fold(model, how)(x) - expected).abs().max() > 1e-3


def test_quantisation_that_replaces_modules_is_noticed():
    model = timm.create_model("test_vit_poolskip").eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(RuntimeError, match=r"replaced one with Pool Skip.*quantise the exported file"):
        model(torch.randn(1, 3, 64, 64))
    assert remove_pool_skip(model)(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize("behind", [[nn.ReLU()], [nn.BatchNorm2d(8)], [nn.BatchNorm2d(8), nn.ReLU()]])
def test_quantisation_of_a_convolution_with_bias_cannot_be_noticed(behind):
    """Fused with what follows it is replaced without its hooks: Pool Skip is gone without an error, as documented."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), *behind).eval()
    plain, x = copy.deepcopy(model), torch.randn(IMAGE)
    add_pool_skip(model, ["1"])
    model = quantize_fx.prepare_fx(model, torch.ao.quantization.get_default_qconfig_mapping(), (x,))
    assert not torch.allclose(model(x), plain(x), atol=0.1)
    model = quantize_fx.convert_fx(model)
    torch.testing.assert_close(model(x), plain(x), atol=0.1, rtol=0)


class LowRank(nn.Module):
    """A low-rank update beside a convolution, as in LoRA."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, padding=conv.padding, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))

    def merge(self) -> nn.Conv2d:
        update = torch.einsum("or,rikl->oikl", self.up.weight[:, :, 0, 0], self.down.weight)
        self.conv.weight += update
        return self.conv


@pytest.mark.parametrize("pool_skip", [False, True])
@torch.no_grad()
def test_merging_a_low_rank_update_moves_it_before_pool_skip(pool_skip):
    """The unmerged update is added after Pool Skip and the merged one passes through it: documented, not noticed."""
    model, x = net(), torch.randn(IMAGE)
    if pool_skip:
        add_pool_skip(model, "blocks.0.conv1")
    model.blocks[0].conv1 = LowRank(model.blocks[0].conv1)
    expected = model(x)
    model.blocks[0].conv1 = model.blocks[0].conv1.merge()
    same = torch.allclose(model(x), expected, atol=1e-5)
    assert same != pool_skip
