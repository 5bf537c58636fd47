"""Registered models as encoders of segmentation-models-pytorch: maps, strides, weights, and what is refused."""

import dataclasses
import subprocess
import sys

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from contract import assert_same, create
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import get_encoder
from timm.models import _registry as timm_registry
from timm.models import get_pretrained_cfg

from poolskip_zoo.models.segmentation.encoder import build_encoder
from poolskip_zoo.registry import checkpoint as checkpoint_module
from poolskip_zoo.registry import resolve
from poolskip_zoo.registry.catalogue import registered_models
from poolskip_zoo.registry.checkpoint import Checkpoint
from poolskip_zoo.registry.smp import _get_encoder, encoder_names, register_with_smp

TINY = [name for name in encoder_names() if name.startswith("test_")]
# Smaller where the model has a size to choose, for timm's VGG head alone has 119 million parameters.
LARGER = {
    "resnet50_poolskip": {},
    "vgg11_bn_poolskip": {"mlp_ratio": 1 / 64},
    "deit_tiny_distilled_patch16_224_poolskip": {},
}


def images(height=64, width=96, channels=3, batch=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def sizes(features):
    return [tuple(feature.shape[2:]) for feature in features]


def check_maps(encoder, x, strides):
    features = encoder(x)
    assert sizes(features) == [(x.shape[2] // s, x.shape[3] // s) for s in strides]
    assert [feature.shape[1] for feature in features] == list(encoder.out_channels)
    assert encoder.output_stride == strides[-1]
    return features


# --- names


def test_every_name_but_those_for_small_images_is_an_encoder():
    names = registered_models(test=True)
    ours = set(smp.encoders.get_encoder_names()) & set(names)
    assert ours == set(encoder_names())
    assert {name for name in names if name not in ours} == set(timm.list_models(module="cifar_poolskip"))
    assert {"resnet50_poolskip", "vgg16_bn_poolskip", "vit_base_patch16_224_poolskip", *TINY} <= ours
    assert len(TINY) == 3
    weights = smp.encoders.encoders["resnet50_poolskip"]["pretrained_settings"]
    assert list(weights)[:3] == ["imagenet", "tin200_r64_cpu", "a1_in1k"]


def test_models_for_small_images_are_no_encoders():
    with pytest.raises(ValueError, match=r"resnet20_cifar_poolskip cannot be an encoder: .* 1, 1, 2, 4"):
        build_encoder("resnet20_cifar_poolskip")


def test_a_tag_in_the_name_is_told_where_it_belongs():
    said = r"give encoder_name='resnet18_poolskip' with encoder_weights='a1_in1k', or encoder_name='tu-"
    with pytest.raises(ValueError, match=said):
        smp.Unet("resnet18_poolskip.a1_in1k")


def test_imagenet_is_the_warm_start_by_smps_other_name_too():
    def passed_on(*args):
        return _get_encoder(lambda name, *rest: name, *args)

    assert passed_on("tu-resnet50_poolskip", 3, 5, "imagenet") == "tu-resnet50_poolskip.a1_in1k"
    for weights in (True, None):
        assert passed_on("tu-resnet50_poolskip", 3, 5, weights) == "tu-resnet50_poolskip"
    with pytest.raises(ValueError, match="no weights 'imagenet' for the encoder 'test_resnet_poolskip': choose None"):
        passed_on("tu-test_resnet_poolskip", 3, 5, "imagenet")


def test_other_encoders_stay_smps_own():
    encoder = get_encoder("resnet18", in_channels=1, depth=4, weights=None)
    assert type(encoder).__module__.startswith("segmentation_models_pytorch")
    assert type(get_encoder("tu-test_resnet_poolskip")).__name__ == "TimmUniversalEncoder"
    with pytest.raises(KeyError, match="Wrong encoder name"):
        get_encoder("resnet18_poolskipp")


def test_registration_when_a_head_is_imported_first():
    """The head asks for smp while it is imported itself, and registration for the head."""
    code = """
import importlib.util, sys
import poolskip_zoo
assert "segmentation_models_pytorch" not in sys.modules
assert importlib.util.find_spec("segmentation_models_pytorch").origin.endswith(".py")
finders = len(sys.meta_path)
from poolskip_zoo.models.segmentation.unet import UnetPoolSkip
assert len(sys.meta_path) == finders - 1
import segmentation_models_pytorch as smp
assert smp.create_model("unet_poolskip", "test_resnet_poolskip", encoder_weights=None).__class__ is UnetPoolSkip
assert smp.FPN("test_vit_poolskip", encoder_weights=None).encoder.__class__.__name__ == "TokenEncoder"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_registration_when_smp_is_imported_already(monkeypatch):
    finders = list(sys.meta_path)
    segnet = smp.SegNet
    monkeypatch.delattr(smp, "SegNet")
    monkeypatch.setattr(smp, "MODEL_ARCHITECTURES_MAPPING", {})
    monkeypatch.setattr(smp.encoders, "encoders", {})
    register_with_smp()
    assert smp.SegNet is smp.MODEL_ARCHITECTURES_MAPPING["segnet"] is segnet
    assert list(smp.encoders.encoders) == encoder_names()
    assert sys.meta_path == finders


def test_functions_imported_before_registration_are_wrapped_too():
    code = """
from segmentation_models_pytorch.encoders import get_encoder, get_preprocessing_params
import poolskip_zoo
from poolskip_zoo.layers import pool_skip_modules
encoder = get_encoder("test_resnet_poolskip", pool_skip={"pool_size": 3})
assert {tuple(layer.window) for layer in pool_skip_modules(encoder).values()} == {(3, 3)}
assert get_preprocessing_params("resnet50_poolskip", "tin200_r64_cpu")["input_range"] == [0, 1]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- maps


@pytest.mark.parametrize("name", TINY)
def test_depths_and_channels(name):
    for depth, channels in ((1, 3), (3, 1), (4, 5), (5, 3)):
        encoder = get_encoder(name, in_channels=channels, depth=depth).eval()
        features = check_maps(encoder, images(channels=channels), [2**i for i in range(depth + 1)])
        assert len(encoder.out_channels) == depth + 1
        if "vgg" not in name:
            assert torch.equal(features[0], images(channels=channels))


@pytest.mark.parametrize("name", LARGER)
def test_larger_models(name):
    encoder = get_encoder(name, **LARGER[name]).eval()
    check_maps(encoder, images(64, 64), [1, 2, 4, 8, 16, 32])


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_gradient(name):
    encoder = get_encoder(name)
    sum(feature.square().mean() for feature in encoder(images(batch=2))).backward()
    assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_is_timms_own(output_stride):
    """smp's make_dilated would dilate Pool Skip's convolutions too."""
    name = "test_resnet_poolskip"
    torch.manual_seed(0)
    expected = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    torch.manual_seed(0)
    encoder = get_encoder(name, output_stride=output_stride).eval()
    before = repr(encoder)
    encoder.make_dilated(output_stride)
    assert repr(encoder) == before
    strides = [min(2**i, output_stride) for i in range(6)]
    assert_same(check_maps(encoder, images(), strides)[1:], expected(images()))
    assert get_encoder(name, depth=3, output_stride=output_stride).output_stride == 8


def test_vgg_has_no_output_stride():
    with pytest.raises(ValueError, match="output_stride=16 is not possible: test_vgg_poolskip supports only 32"):
        get_encoder("test_vgg_poolskip", output_stride=16)
    with pytest.raises(ValueError, match="output_stride=8 is not possible: tu-test_vgg_poolskip supports only 32"):
        smp.DeepLabV3("tu-test_vgg_poolskip", encoder_weights=None)


@pytest.mark.parametrize(("output_stride", "patch"), [(32, 16), (16, 16), (8, 16), (32, 8), (16, 32)])
def test_vit_pyramid(output_stride, patch):
    encoder = get_encoder("test_vit_poolskip", output_stride=output_stride, patch_size=patch).eval()
    strides = [min(2**i, output_stride) for i in range(6)]
    features = check_maps(encoder, images(), strides)
    assert encoder.out_channels == [3, *(64 // max(patch // s, 1) for s in strides[1:])]
    blocks = [0, 1, 2, 3, 5]  # of six
    tokens = encoder.model.model.forward_intermediates(images(), indices=blocks, intermediates_only=True)
    for feature, stride, grid in zip(features[1:], strides[1:], tokens, strict=True):
        if stride == patch:
            assert torch.equal(feature, grid)
        elif stride == 2 * patch:
            assert torch.equal(feature, torch.nn.functional.max_pool2d(grid, 2, ceil_mode=True))


def test_vit_takes_any_size():
    encoder = get_encoder("test_vit_poolskip").eval()
    for height, width in ((48, 80), (67, 71), (16, 16)):
        expected = [(-(-height // s), -(-width // s)) for s in (1, 2, 4, 8, 16, 32)]
        assert sizes(encoder(images(height, width))) == expected


def test_a_program_of_a_vit_pools_alike_whatever_the_example():
    """For AOTInductor, which pools partial windows or not, as the example has them."""
    encoder, auto = get_encoder("test_vit_poolskip").eval(), torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    program = torch.export.export(encoder, (images(160, 224, batch=2),), dynamic_shapes=shapes, strict=False)
    pools = [node for node in program.graph.nodes if "max_pool" in str(node.target)]
    assert len(pools) > 1
    assert not any(node.args[5:] for node in pools)
    x = images(144, 112, batch=3)
    assert_same(program.module()(x), encoder(x))


def test_a_family_without_a_map_at_half_size():
    """As smp's own adapter for timm has it: a map of no channels."""
    torch.manual_seed(0)
    ours = build_encoder("test_convnext", depth=4).eval()
    torch.manual_seed(0)
    theirs = get_encoder("tu-test_convnext", depth=4).eval()
    assert ours.out_channels == list(theirs.out_channels)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours(images()), theirs(images()))


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "DeepLabV3Plus"])
def test_decoders_take_a_vit(decoder):
    model = getattr(smp, decoder)("test_vit_poolskip", encoder_weights=None, classes=3).eval()
    with torch.no_grad():
        assert model(images(64, 96)).shape == (1, 3, 64, 96)


# --- graphs


@pytest.mark.parametrize("name", TINY)
def test_a_trace_holds_at_other_sizes(name, assert_close):
    model = smp.Unet(name, encoder_weights=None, classes=3).eval()
    traced = torch.jit.trace(model, images(96, 128))
    for size in ((128, 96), (64, 192), (160, 64)):  # the first two of as many pixels
        assert_close(traced(images(*size, batch=2)), model(images(*size, batch=2)))


@pytest.mark.parametrize("name", TINY)
def test_capability_flags(name, assert_close):
    encoder = get_encoder(name).eval()
    if encoder._is_torch_scriptable:
        scripted = torch.jit.script(encoder)
        for x in (images(), images(33, 50)):
            for got, expected in zip(scripted(x), encoder(x), strict=True):
                assert_close(got, expected)
    else:
        with pytest.raises(RuntimeError):
            torch.jit.script(encoder)
    assert encoder._is_torch_exportable
    assert encoder._is_torch_compilable
    # strict: captured by torch.compile's own front end.
    program = torch.export.export(encoder, (images(),), strict=True).module()
    for got, expected in zip(program(images()), encoder(images()), strict=True):
        assert_close(got, expected)


# --- weights


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("smp asked the Hub")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", refuse)


def test_imagenet_is_the_warm_start(tmp_path, no_hub):
    base = create("resnet18").eval()
    save_file(base.state_dict(), tmp_path / "resnet18.safetensors")
    overlay = {"file": str(tmp_path / "resnet18.safetensors")}
    for weights in ("imagenet", "tv_in1k"):
        model = smp.Unet("resnet18_poolskip", encoder_weights=weights, pretrained_cfg_overlay=overlay).eval()
        assert_same(model.encoder(images())[1:], base.forward_intermediates(images(), intermediates_only=True))
    cfg = get_pretrained_cfg("resnet18_poolskip.a1_in1k")
    params = smp.encoders.get_preprocessing_params("resnet18_poolskip")
    assert params == {"input_space": "RGB", "input_range": [0, 1], "mean": list(cfg.mean), "std": list(cfg.std)}
    assert smp.encoders.get_preprocessing_fn("resnet18_poolskip", "tv_in1k").keywords == params


@pytest.fixture
def trained(tmp_path, monkeypatch, no_hub):
    """A registered checkpoint with its file in a temporary hub_cards/: a function that records it, and the file."""
    name = "test_resnet_poolskip.trained"
    file = tmp_path / name / "model.safetensors"
    file.parent.mkdir()

    def record(state_dict):
        save_file(state_dict, file)
        made = Checkpoint(name, "cifar10_jpeg", resolve.sha256_of(file), {"top1": 1.0}, "r", 0, "CPU", 0.1, "v1")
        cfg = made.pretrained_cfg(get_pretrained_cfg(made.arch))
        cfg = dataclasses.replace(cfg, tag="trained", architecture=made.arch)
        monkeypatch.setitem(checkpoint_module._CHECKPOINTS, name, made)
        monkeypatch.setitem(timm_registry._model_pretrained_cfgs, name, cfg)
        tags = [name, *(tag for tag in timm_registry._model_with_tags[made.arch] if tag != name)]
        monkeypatch.setitem(timm_registry._model_with_tags, made.arch, tags)

    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: tmp_path)
    return record, file


def test_a_trained_checkpoint_loads_by_its_tag(trained):
    model = create("test_resnet_poolskip", num_classes=10).eval()
    trained[0](model.state_dict())
    expected = model.forward_intermediates(images(), intermediates_only=True)
    for name, weights in (("test_resnet_poolskip", "trained"), ("tu-test_resnet_poolskip.trained", True)):
        unet = smp.Unet(name, encoder_weights=weights).eval()
        assert_same(unet.encoder(images())[1:], expected)
    shallow = get_encoder("test_resnet_poolskip", depth=3, weights="trained", output_stride=16).eval()
    assert_same(shallow(images())[1:], expected[:3])
    grey = get_encoder("test_resnet_poolskip", in_channels=1, weights="trained").eval()
    same = timm.create_model("test_resnet_poolskip.trained", pretrained=True, in_chans=1, features_only=True).eval()
    assert_same(grey(images(channels=1))[1:], same(images(channels=1)))
    assert smp.encoders.get_preprocessing_params("test_resnet_poolskip", "trained")["mean"] == list(
        get_pretrained_cfg("test_resnet_poolskip.trained").mean
    )


@pytest.mark.parametrize(
    ("name", "weights"), [("test_resnet_poolskip", "trained"), ("tu-test_resnet_poolskip.trained", True)]
)
def test_what_is_not_the_checkpoint_is_refused(trained, name, weights):
    record, file = trained
    record(create("test_resnet_poolskip", num_classes=10).state_dict())
    file.write_bytes(file.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(RuntimeError, match=r"is not the recorded file of test_resnet_poolskip\.trained.*sha256"):
        smp.Unet(name, encoder_weights=weights)
    record(create("test_resnet_poolskip", num_classes=10, pool_skip={"placement": "all"}).state_dict())
    with pytest.raises(RuntimeError, match=r"does not fit test_resnet_poolskip\.trained"):
        smp.Unet(name, encoder_weights=weights)


# --- settings


def test_keywords_reach_the_model():
    encoder = get_encoder("test_resnet_poolskip", pool_skip={"pool_size": 3}, drop_path_rate=None)
    assert {tuple(m.window) for m in encoder.modules() if hasattr(m, "window")} == {(3, 3)}
    for dynamic in (True, False):
        encoder = get_encoder("test_vit_poolskip", weights=None, dynamic_img_size=dynamic)
        assert encoder.model.model.dynamic_img_size == dynamic


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (TypeError, "drop_path_rat", {"drop_path_rat": 0.3}),
        (ValueError, "unknown pool_skip setting size", {"pool_skip": {"size": 2}}),
        (
            ValueError,
            r"no weights 'imagenet' for the encoder 'test_resnet_poolskip': choose None",
            {"weights": "imagenet"},
        ),
        (ValueError, "encoder_depth=6: expected 1 to 5", {"depth": 6}),
        (ValueError, "encoder_depth=0: expected 1 to 5", {"depth": 0}),
        (ValueError, "output_stride=4: expected 8, 16 or 32", {"output_stride": 4}),
    ],
)
def test_wrong_settings_are_refused(error, match, settings):
    with pytest.raises(error, match=match):
        get_encoder("test_resnet_poolskip", **settings)


def test_wrong_weights_list_the_options():
    with pytest.raises(ValueError, match=r"no weights 'cs'.*choose 'imagenet', 'tin200_r64_cpu', 'a1_in1k'.*None"):
        smp.Unet("resnet50_poolskip", encoder_weights="cs")
    with pytest.raises(ValueError, match=r"no weights None .*choose 'imagenet', 'tin200_r64_cpu'[^N]*$"):
        smp.encoders.get_preprocessing_params("resnet50_poolskip", None)
    with pytest.raises(ValueError, match="'test_resnet_poolskip' has no weights, and so no preprocessing of its own"):
        smp.encoders.get_preprocessing_params("test_resnet_poolskip")
