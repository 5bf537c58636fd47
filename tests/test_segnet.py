"""SegNet on the VGGs of this package, of timm and of smp."""

import json

import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from contract import assert_same
from contract.common import enliven
from torch import nn

from poolskip_zoo import remove_pool_skip
from poolskip_zoo.layers import pool_skip_modules

TINY = "test_vgg_poolskip"
SIZES = ((64, 64), (67, 71), (33, 50))


def images(height=64, width=64, channels=3, batch=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def make(encoder=TINY, **kwargs):
    torch.manual_seed(0)
    return enliven(smp.create_model("segnet", encoder, encoder_weights=None, **kwargs)).eval()


def by_hand(model, x):
    """The same network with torch's own pooling indices, handed from the encoder's poolings to the decoder."""
    indices, shapes = [], []
    for layer in model.encoder.model.values():
        if isinstance(layer, nn.MaxPool2d):
            shapes.append(x.shape)
            x, places = F.max_pool2d(x, 2, return_indices=True)
            indices.append(places)
        else:
            x = layer(x)
    for stage in model.decoder.stages:
        x = stage(F.max_unpool2d(x, indices.pop(), 2, output_size=shapes.pop()))
    return model.segmentation_head(x)


@pytest.mark.parametrize("pool_skip", [None, {}], ids=["plain", "pool_skip"])
def test_it_unpools_with_the_encoders_own_indices(pool_skip):
    model = make(classes=5, pool_skip=pool_skip)
    assert len(pool_skip_modules(model.decoder)) == (0 if pool_skip is None else 5)
    with torch.no_grad():
        for size in SIZES:
            x = images(*size, batch=2)
            got = model(x)
            assert got.shape == (2, 5, *size)
            assert torch.equal(got, by_hand(model, x))


def test_the_decoder_mirrors_the_encoder():
    """Of VGG-16, as in the paper: convolutions by stage, and channels."""
    with torch.device("meta"):
        models = [make_on_meta(name) for name in ("vgg16_bn", "tu-vgg16_bn", "vgg16_bn_poolskip", "vgg16")]
        shallow = make_on_meta("vgg16_bn", encoder_depth=3)
    for model in models:
        assert model(torch.empty(1, 3, 70, 90, device="meta")).shape == (1, 1, 70, 90)
        stages = [[layer[0].out_channels for layer in stage] for stage in model.decoder.stages]
        assert stages == [[512] * 3, [512, 512, 256], [256, 256, 128], [128, 64], [64, 64]]
        assert [layer[0].in_channels for stage in model.decoder.stages for layer in stage[:1]] == [
            512,
            512,
            256,
            128,
            64,
        ]
    stages = [[layer[0].out_channels for layer in stage] for stage in shallow.decoder.stages]
    assert stages == [[512, 512, 256], [256, 256, 128], [128, 64], [64, 64]]


def make_on_meta(encoder, **kwargs):
    return smp.create_model("segnet", encoder, encoder_weights=None, **kwargs)


@pytest.mark.parametrize(
    ("encoder", "kwargs"),
    [(TINY, {"encoder_depth": 3}), (TINY, {"encoder_depth": 4}), ("tu-test_vgg_poolskip", {})],
)
def test_depths_and_other_encoders(encoder, kwargs):
    model = make(encoder, in_channels=1, classes=2, **kwargs)
    with torch.no_grad():
        assert model(images(35, 50, channels=1)).shape == (1, 2, 35, 50)


@pytest.mark.parametrize("depth", [3, 5])
def test_every_parameter_gets_a_gradient(depth):
    model = make(encoder_depth=depth, pool_skip={}, aux_params={"classes": 2}).train()
    masks, labels = model(images(batch=2))
    (masks.square().mean() + labels.square().mean()).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert all(layer.conv.weight.grad.any() for layer in pool_skip_modules(model).values())


def test_pool_skip_at_zero_changes_nothing():
    plain, model = make(), make(pool_skip={"zero_init": True})
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(".pool_skip." in key for key in result.missing_keys)
    assert_same(model(images()), plain(images()))
    remove_pool_skip(model.decoder)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_saved_and_loaded(tmp_path):
    kwargs = {"pool_skip": {"pool_size": 4}, "classes": 3, "decoder_use_norm": False, "aux_params": {"classes": 2}}
    model = make(**kwargs)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert {key: config[key] for key in kwargs} == kwargs
    again = smp.from_pretrained(str(tmp_path))
    assert isinstance(again, smp.SegNet)
    assert_same(again(images(50, 70)), model(images(50, 70)))


@pytest.mark.parametrize("encoder", ["resnet18", "test_resnet_poolskip", "test_vit_poolskip"])
def test_other_families_are_refused(encoder):
    with pytest.raises(ValueError, match=rf"the encoder '{encoder}' has \d max poolings of 2×2.*choose a VGG"):
        make(encoder)


@pytest.mark.parametrize("pool_skip", [None, {}], ids=["plain", "pool_skip"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_scripts_and_traces(pool_skip):
    model = make(pool_skip=pool_skip)
    for graph in (torch.jit.script(model), torch.jit.trace(model, images())):
        for size in SIZES:
            x = images(*size)
            torch.testing.assert_close(graph(x).detach(), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path):
    model = make(pool_skip={})
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (images(67, 71),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(67, 71)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-3, atol=1e-4)
