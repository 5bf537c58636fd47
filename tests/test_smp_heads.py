"""U-Net and DeepLab with Pool Skip as models of segmentation-models-pytorch."""

import inspect
import json

import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
from contract import assert_same
from contract.common import enliven

from poolskip_zoo import remove_pool_skip
from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.registry.segmentation import smp_config

pytest_plugins = ["hub_fixtures"]

BASES = {
    "unet_poolskip": smp.Unet,
    "deeplabv3_poolskip": smp.DeepLabV3,
    "deeplabv3plus_poolskip": smp.DeepLabV3Plus,
}
HEADS = list(BASES)
ENCODER = "test_resnet_poolskip"


def images(height=64, width=64, channels=3, batch=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def make(head, encoder=ENCODER, **kwargs):
    torch.manual_seed(0)
    if "deeplab" in head:
        kwargs = {"decoder_channels": 16, **kwargs}
    return enliven(smp.create_model(head, encoder, encoder_weights=None, **kwargs)).eval()


def base_of(head, **kwargs):
    torch.manual_seed(0)
    if "deeplab" in head:
        kwargs = {"decoder_channels": 16, **kwargs}
    return BASES[head](ENCODER, encoder_weights=None, **kwargs).eval()


# --- encoders


@pytest.mark.parametrize(
    ("head", "encoder"), [*((head, "resnet50_poolskip") for head in HEADS), ("segnet", "vgg11_bn_poolskip")]
)
def test_wrong_encoder_weights_list_the_options(head, encoder):
    with pytest.raises(ValueError, match=rf"no weights 'cs' for the encoder '{encoder}': choose 'imagenet', "):
        smp.create_model(head, encoder, encoder_weights="cs")


# --- where Pool Skip is


@pytest.mark.parametrize("head", HEADS)
def test_it_is_smps_model_with_pool_skip_in_the_decoder(head):
    base, model = base_of(head), make(head, pool_skip={"zero_init": True})
    layers = pool_skip_modules(model.decoder)
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert len(result.missing_keys) == 2 * len(layers)
    x = images()
    assert_same(model(x), base(x))
    torch.nn.init.normal_(next(iter(layers.values())).conv.weight)
    assert not torch.equal(model(x), base(x))
    remove_pool_skip(model.decoder)
    assert set(model.state_dict()) == set(base.state_dict())


PLACES = {
    "unet_poolskip": {f"blocks.{i}.conv{j}.0" for i in range(5) for j in (1, 2)},
    "deeplabv3_poolskip": {*(f"aspp.convs.{i}.0" for i in range(4)), "aspp.project.0", "conv"},
    "deeplabv3plus_poolskip": {
        "aspp.0.convs.0.0",
        *(f"aspp.0.convs.{i}.0.1" for i in (1, 2, 3)),
        "aspp.0.project.0",
        "aspp.1.1",
        "block1.0",
        "block2.0.1",
    },
}


@pytest.mark.parametrize("head", HEADS)
def test_default_places(head):
    layers = pool_skip_modules(make(head).decoder)
    assert {name.removesuffix(".pool_skip") for name in layers} == PLACES[head]
    assert {(*layer.window, layer.conv.groups) for layer in layers.values()} == {(2, 2, 1)}


def test_places_of_the_other_forms():
    names = pool_skip_modules(make("deeplabv3_poolskip", decoder_aspp_separable=True).decoder)
    assert {"aspp.convs.0.0.pool_skip", "aspp.convs.1.0.1.pool_skip"} <= set(names)
    assert len(names) == 6
    names = pool_skip_modules(make("deeplabv3plus_poolskip", decoder_aspp_separable=False).decoder)
    assert {"aspp.0.convs.1.0.pool_skip", "aspp.1.1.pool_skip"} <= set(names)
    assert len(names) == 8
    # smp gives a U-Net on VGG two more convolutions in the centre.
    names = pool_skip_modules(make("unet_poolskip", "vgg11_bn_poolskip", mlp_ratio=1 / 64).decoder)
    assert {"center.0.0.pool_skip", "center.1.0.pool_skip"} <= set(names)
    assert len(names) == 12


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    model = make(head).train()
    model(images(batch=2)).square().mean().backward()
    missing = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    # DeepLab reads the encoder's last map alone, DeepLabV3+ also the third: none is left out on the way there.
    assert not missing
    assert all(layer.conv.weight.grad.any() for layer in pool_skip_modules(model.decoder).values())


# --- settings


INSTANCE = {"type": "instancenorm", "affine": True}
SETTINGS = {"placement": ["*.conv1.0"], "pool_size": [2, 4], "groups": "depthwise"}


@pytest.mark.parametrize(("encoder", "ours"), [("test_vgg_poolskip", True), ("tu-test_resnet", False)])
def test_cards_of_smps_own_heads_name_the_import_where_it_is_needed(encoder, ours, tmp_path):
    smp.FPN(encoder, encoder_weights=None).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("import poolskip_zoo" in card) == ("- pool-skip\n" in card) == ours


@pytest.mark.parametrize(
    ("head", "kwargs"),
    [
        ("unet_poolskip", {"pool_skip": SETTINGS, "encoder_depth": 3, "decoder_attention_type": "scse"}),
        ("unet_poolskip", {"decoder_channels": [24, 16, 8, 8], "encoder_depth": 4, "decoder_use_norm": INSTANCE}),
        ("deeplabv3_poolskip", {"pool_skip": {"pool_size": 4}, "encoder_output_stride": 16}),
        ("deeplabv3plus_poolskip", {"decoder_atrous_rates": [2, 3, 4], "encoder_depth": 4, "in_channels": 1}),
    ],
)
def test_saved_and_loaded(head, kwargs, tmp_path):
    kwargs = {**kwargs, "classes": 4, "aux_params": {"classes": 3, "dropout": 0.5}}
    model = make(head, **kwargs)
    model.save_pretrained(tmp_path, dataset="roads", metrics={"mIoU": 0.5})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "roads" in card
    assert "import segmentation_models_pytorch as smp\n\nimport poolskip_zoo" in card
    assert "- pool-skip\n" in card
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["_model_class"] == type(model).__name__
    assert {key: config[key] for key in kwargs} == kwargs
    model.config["encoder_weights"] = "imagenet"
    assert smp_config(model)["encoder_weights"] is None
    # As after training from pretrained weights: these are not fetched again.
    config["encoder_weights"] = "imagenet"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = smp.from_pretrained(str(tmp_path))
    assert type(again) is type(model)
    assert not again.training
    x = images(channels=kwargs.get("in_channels", 3))
    with torch.no_grad():
        masks, labels = model(x)
        assert (masks.shape, labels.shape) == ((1, 4, 64, 64), (1, 3))
        assert_same(again(x), (masks, labels))
    layers = pool_skip_modules(again.decoder)
    if kwargs.get("pool_skip") == SETTINGS:
        assert {(name.split(".")[-3], *layer.window) for name, layer in layers.items()} == {("conv1", 2, 4)}
        assert all(layer.conv.groups == layer.conv.in_channels for layer in layers.values())


def test_pushed_and_loaded(hub):
    model = make("unet_poolskip", encoder_depth=3)
    model.push_to_hub("acme/roads")
    again = smp.from_pretrained("acme/roads")
    assert_same(again(images()), model(images()))


@pytest.mark.parametrize("head", HEADS)
def test_signatures_are_smps_and_pool_skip(head):
    ours = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[head]).parameters
    theirs = inspect.signature(BASES[head]).parameters
    assert [name for name in ours if name != "pool_skip"] == list(theirs)
    different = {name for name in theirs if ours[name].default != theirs[name].default}
    assert different == ({"decoder_channels"} if head == "unet_poolskip" else set())


@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("unknown pool_skip setting size", {"pool_skip": {"size": 2}}),
        ("expected a dict", {"pool_skip": "default"}),
        (r"cannot be saved in config\.json", {"pool_skip": {"placement": lambda name, module: True}}),
        (
            r"matches nothing in UnetDecoder: its convolutions are blocks\.0\.conv1\.0",
            {"pool_skip": {"placement": "x.*"}},
        ),
        (
            "unknown keyword decoder_chanels: the encoder 'resnet18' takes none",
            {"decoder_chanels": [1], "encoder": "resnet18"},
        ),
    ],
)
def test_wrong_settings_are_refused(match, settings):
    with pytest.raises(ValueError, match=match):
        make("unet_poolskip", **{"encoder_depth": 3, **settings})


@pytest.mark.filterwarnings("ignore:The usage of decoder_use_batchnorm")
@pytest.mark.parametrize("encoder", ["resnet18", "test_resnet_poolskip"])
def test_smps_old_name_of_a_keyword_is_taken(encoder):
    net = smp.create_model("unet_poolskip", encoder, None, decoder_use_batchnorm=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in net.decoder.modules())


def test_an_unknown_keyword_is_refused_by_timm():
    with pytest.raises(TypeError, match="decoder_chanels"):
        make("unet_poolskip", decoder_chanels=[1])


def test_the_encoder_takes_keywords_of_its_own():
    model = make("unet_poolskip", "tu-test_resnet_poolskip", encoder_depth=3, drop_path_rate=0.1)
    assert any(getattr(module, "drop_prob", 0) for module in model.encoder.modules())


# --- graphs


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_scripts_and_traces(head, assert_close):
    model = make(head)
    x = images(96, 64, batch=2)
    expected = model(x).detach()
    for graph in (torch.jit.script(model), torch.jit.trace(model, images())):
        torch.testing.assert_close(graph(x).detach(), expected, rtol=1e-3, atol=1e-4)


# SegNet's runs by default; these: pytest -m slow tests/test_smp_heads.py
@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_onnx(head, tmp_path):
    model = make(head)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (images(),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images()
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-3, atol=1e-4)
