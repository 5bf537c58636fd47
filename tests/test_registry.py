"""Every registered name: its module, configurations, size, and the base model inside it."""

import dataclasses
import importlib
import logging
import pkgutil
from collections import defaultdict

import pytest
import timm
import torch
from contract import assert_same, images, load_base
from timm.models import get_arch_pretrained_cfgs
from timm.models._registry import _model_to_module

from poolskip_zoo import registry
from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.models.mixin import PoolSkipModel
from poolskip_zoo.registry.catalogue import base_name, registered_models, warm_starts
from poolskip_zoo.registry.checkpoint import SUFFIX, Checkpoint, cfg_for_data, find, pool_skip_cfgs, retrained_cfg

NAMES = registered_models(test=True)
VARIANTS = [name for name in NAMES if name.endswith(SUFFIX)]
MODULES = {
    module.name: importlib.import_module(f"{registry.__name__}.{module.name}")
    for module in pkgutil.iter_modules(registry.__path__)
    if module.name.endswith(SUFFIX)
}
# timm has no tiny VGG.
WITHOUT_BASE = {"test_vgg_poolskip"}

MILLIONS = {
    "resnet18_poolskip": 24.2,
    "resnet34_poolskip": 44.4,
    "resnet50_poolskip": 36.9,
    "resnext50_32x4d_poolskip": 26.5,
    "wide_resnet50_2_poolskip": 114.2,
    "resnet20_cifar": 0.33,
    "vit_base_patch16_224_poolskip": 86.7,
}


def count(name: str, **kwargs) -> int:
    model = timm.create_model(name, device="meta", num_classes=1000, **kwargs)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_families_are_here():
    assert set(MODULES) >= {"resnet_poolskip", "vgg_poolskip", "vit_poolskip", "cifar_poolskip"}
    assert len(VARIANTS) > 50
    promised = """resnet18 resnet18d resnet26 resnet26d resnet34 resnet34d resnet50 resnet50d resnet101 resnet101d
        resnet152 resnet152d resnet200 resnet200d resnext50_32x4d resnext101_32x8d wide_resnet50_2 seresnet50
        vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_tiny_patch16_224 vit_tiny_patch16_384
        vit_small_patch16_224 vit_small_patch16_384 vit_base_patch16_224 vit_base_patch16_384 vit_large_patch16_224
        vit_large_patch16_384 vit_base_patch8_224 vit_base_patch32_224 vit_base_patch32_384 deit_tiny_patch16_224
        deit_small_patch16_224 deit_base_patch16_224 deit_base_patch16_384 deit_tiny_distilled_patch16_224
        deit_small_distilled_patch16_224 deit_base_distilled_patch16_224 deit_base_distilled_patch16_384
        resnet18_cifar resnet20_cifar resnet32_cifar resnet34_cifar resnet38_cifar resnet56_cifar resnet110_cifar
        resnet350_cifar resnet420_cifar vgg11_bn_cifar vgg16_bn_cifar vit_tiny_patch4_32 vit_tiny_patch8_64 test_resnet
        test_vgg test_vit test_resnet_cifar"""
    assert {base_name(name) for name in VARIANTS} >= set(promised.split())


@pytest.mark.parametrize("name", NAMES)
def test_name_module_and_configurations(name):
    module = MODULES[_model_to_module[name]]
    cfgs = get_arch_pretrained_cfgs(name)
    assert cfgs, "timm pairs configurations with the entrypoints of the same module alone"
    assert {key.partition(".")[0] for key in cfgs} == {name}
    assert getattr(module, name).__doc__.strip().endswith(".")
    if name.endswith(SUFFIX) and name not in WITHOUT_BASE:
        assert timm.is_model(base_name(name))
    if name.startswith("test_"):
        assert not any(cfg.has_weights for cfg in cfgs.values()), "tests must not go to the Hub"
    trained = [find(key) is not None for key in cfgs]
    assert trained == sorted(trained, reverse=True), "trained checkpoints come first"


@pytest.mark.parametrize("module", MODULES)
def test_every_configuration_has_its_entrypoint(module):
    entrypoints = {name for name in NAMES if _model_to_module[name] == module}
    assert set(MODULES[module].default_cfgs) == entrypoints
    assert all(name in MODULES[module].__all__ for name in entrypoints)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_base_and_pool_skip(name):
    """Class, parameter names, shapes, order and configuration of the base; only `*.pool_skip.conv.*` is new."""
    variant = timm.create_model(name, device="meta")
    assert isinstance(variant, PoolSkipModel)
    places = pool_skip_modules(variant)
    assert f"{variant.pretrained_cfg['first_conv']}.pool_skip" not in places
    assert not [place for place in places if any(word in place for word in ("downsample", ".se.", "head", "fc."))]
    if name in WITHOUT_BASE:
        return
    # A trained checkpoint that comes first has the classes of its data.
    base = timm.create_model(base_name(name), num_classes=variant.num_classes, device="meta")
    assert isinstance(variant, type(base))
    kept = [(k, v.shape, v.dtype) for k, v in variant.state_dict().items() if ".pool_skip." not in k]
    assert kept == [(k, v.shape, v.dtype) for k, v in base.state_dict().items()]
    new = {k for k in variant.state_dict() if ".pool_skip." in k}
    assert new == {f"{place}.conv.{k}" for place in places for k in ("weight", "bias")}
    assert variant.feature_info == base.feature_info
    if hasattr(base, "patch_embed"):
        assert set(places) == {f"blocks.{i}.mlp.fc2.pool_skip" for i in range(len(base.blocks))}
        assert variant.patch_embed.img_size == base.patch_embed.img_size
        assert variant.blocks[0].attn.num_heads == base.blocks[0].attn.num_heads
    own = {"architecture", "hf_hub_id", "url", "tag", "custom_load", "paper_ids"}
    key = warm_or_first(name)
    if find(key) is not None:  # weights of ours, whose base may have none
        own |= {"hf_hub_filename", "license"}
    first = {k: v for k, v in get_arch_pretrained_cfgs(name)[key].to_dict().items() if k not in own}
    theirs = next(iter(get_arch_pretrained_cfgs(base_name(name)).values())).to_dict()
    assert first == {k: v for k, v in theirs.items() if k not in own}


def warm_or_first(name: str) -> str:
    keys = list(get_arch_pretrained_cfgs(name))
    return next((key for key in keys if find(key) is None), keys[0])


def test_warm_starts_are_the_bases_tags():
    names = warm_starts()
    assert len(names) == len(set(names)) > 100
    by_arch = defaultdict(list)
    for name in names:
        by_arch[name.partition(".")[0]].append(name.partition(".")[2])
    for arch, tags in by_arch.items():
        theirs = get_arch_pretrained_cfgs(base_name(arch))
        assert tags == [key.partition(".")[2] for key, cfg in theirs.items() if cfg.has_weights]
        for tag in tags:
            ours, base = get_arch_pretrained_cfgs(arch)[f"{arch}.{tag}"], theirs[f"{base_name(arch)}.{tag}"]
            # timm completes a repository that ends in "/" with the architecture, which would be ours.
            assert ours.hf_hub_id == base.hf_hub_id
            assert not (ours.hf_hub_id or "").endswith("/")
            assert (ours.num_classes, ours.input_size, ours.mean) == (base.num_classes, base.input_size, base.mean)


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts(name, millions):
    assert count(name) / 1e6 == pytest.approx(millions, abs=0.005 if millions < 1 else 0.05)


def test_parameter_count_of_the_reference_placement():
    assert count("resnet50_poolskip", pool_skip={"placement": "all"}) / 1e6 == pytest.approx(229.3, abs=0.05)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("resnet50_poolskip", 65, {}),
        ("resnext50_32x4d_poolskip", 64, {}),
        ("seresnet50_poolskip", 64, {}),
        ("vgg11_bn_poolskip", 33, {"mlp_ratio": 1 / 64}),
        ("vit_tiny_patch16_224_poolskip", 96, {"img_size": 96}),
        ("deit_tiny_distilled_patch16_224_poolskip", 96, {"img_size": 96}),
        ("resnet20_cifar_poolskip", 32, {}),
        ("vgg11_bn_cifar_poolskip", 32, {}),
        ("resnet18_cifar_poolskip", 32, {}),
    ],
)
def test_real_architectures_start_at_their_base(name, size, kwargs):
    base = timm.create_model(base_name(name), **kwargs).eval()
    kwargs = {**kwargs, "num_classes": base.num_classes}
    variant = load_base(timm.create_model(name, pool_skip={"zero_init": True}, **kwargs).eval(), base)
    x = images(name, batch=1, size=(size, size))
    with torch.inference_mode():
        assert_same(variant(x), base(x))


def test_resnext_groups_and_window_sizes():
    layers = pool_skip_modules(timm.create_model("resnext50_32x4d_poolskip", device="meta")).values()
    assert {(layer.conv.groups, *layer.window) for layer in layers} == {(32, 4, 4)}
    dense = timm.create_model("resnext50_32x4d_poolskip", device="meta", pool_skip={"groups": 1})
    assert {layer.conv.groups for layer in pool_skip_modules(dense).values()} == {1}
    mixed = pool_skip_modules(timm.create_model("test_resnet_poolskip", device="meta"))
    assert {name: tuple(layer.window) for name, layer in mixed.items()} == {
        "layer1.0.conv1.pool_skip": (2, 2),
        "layer1.0.conv2.pool_skip": (2, 2),
        "layer2.0.conv1.pool_skip": (2, 2),
        "layer2.0.conv2.pool_skip": (2, 2),
        "layer3.0.conv1.pool_skip": (4, 4),
        "layer4.0.conv1.pool_skip": (2, 2),
        "layer4.0.conv2.pool_skip": (2, 2),
    }


def test_trained_checkpoints_come_before_warm_starts():
    record = Checkpoint("resnet18_poolskip.c10", "cifar10_jpeg", "0" * 64, {"top1": 90.0}, "r", 0, "CPU", 1.0, "abc")
    cfgs = pool_skip_cfgs(["resnet18"], [])
    try:
        cfgs = pool_skip_cfgs(["resnet18"], [record])
        assert next(iter(cfgs)) == record.name
        assert list(cfgs)[1:] == [key for key in get_arch_pretrained_cfgs("resnet18_poolskip") if find(key) is None]
        assert find("resnet18_poolskip") is find(record.name) is record
        assert find("resnet18_poolskip.a1_in1k") is None
    finally:
        importlib.import_module(f"{registry.__name__}.checkpoint")._CHECKPOINTS.pop(record.name)
    cfg = cfgs[record.name]
    assert (cfg.hf_hub_id, cfg.hf_hub_filename) == ("poolskip-zoo/resnet18_poolskip.c10@abc", "model.safetensors")
    assert (cfg.num_classes, cfg.input_size, cfg.crop_pct) == (10, (3, 32, 32), 1.0)
    assert (cfg.first_conv, cfg.classifier, cfg.url, cfg.custom_load) == ("conv1", "fc", None, False)
    assert len(cfg.label_names) == 10
    assert cfg.license == "apache-2.0"


def test_configuration_for_a_data_set_keeps_what_the_architecture_decides():
    cfg = get_arch_pretrained_cfgs("resnet50_poolskip")["resnet50_poolskip.a1_in1k"]
    changed = cfg_for_data(cfg, "cifar10_jpeg")
    assert dataclasses.replace(cfg, input_size=(3, 32, 32)).input_size == changed.input_size
    assert (changed.first_conv, changed.classifier) == (cfg.first_conv, cfg.classifier)


def test_configuration_of_a_retrained_model_has_nothing_of_how_the_first_weights_were_read():
    """Neither how their images were cut, nor a loader of their own format."""
    cfg = get_arch_pretrained_cfgs("resnet18_poolskip")["resnet18_poolskip.a1_in1k"]
    changed = retrained_cfg(dataclasses.replace(cfg, crop_mode="squash", custom_load=True), "cifar10")
    assert (changed.crop_mode, changed.custom_load) == ("center", False)


@pytest.mark.parametrize(
    ("size", "model_args", "pool_size"), [(0, {}, (2, 2)), (96, {}, (3, 3)), (96, {"stem_stride": 2}, None)]
)
def test_configuration_of_a_retrained_model_has_the_size_of_its_last_map(size, model_args, pool_size):
    cfg = get_arch_pretrained_cfgs("resnet18_poolskip")["resnet18_poolskip.a1_in1k"]
    changed = retrained_cfg(cfg, "tiny_imagenet_jpeg", size, model_args)
    assert (changed.input_size, changed.pool_size) == ((3, size or 64, size or 64), pool_size)
    if pool_size:
        features = timm.create_model("resnet18_poolskip").forward_features(torch.zeros(1, *changed.input_size))
        assert features.shape[2:] == pool_size


def test_unknown_names_and_keywords_are_refused():
    with pytest.raises(RuntimeError, match="resnet51_poolskip"):
        timm.create_model("resnet51_poolskip")
    with pytest.raises(RuntimeError, match="nosuchtag"):
        timm.create_model("resnet50_poolskip.nosuchtag")
    with pytest.raises(TypeError, match="pool_skp"):
        timm.create_model("test_resnet_poolskip", pool_skp={})
    # No weights at all: the tiny ones.
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_resnet_poolskip"):
        timm.create_model("test_resnet_poolskip", pretrained=True)


def test_creating_a_model_logs_one_line(caplog):
    with caplog.at_level(logging.INFO):
        model = timm.create_model("test_resnet_poolskip")
    added = sum(p.numel() for n, p in model.named_parameters() if ".pool_skip." in n)
    assert [record.getMessage() for record in caplog.records if "Pool Skip" in record.getMessage()] == [
        f"Pool Skip added at 7 places of PoolSkipResNet: {added:,} parameters"
    ]


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet20_cifar_poolskip.c10"])
def test_names_of_classes_are_none_of_another_number(name):
    """By them timm's `inference.py` prints what it finds."""
    assert len(timm.create_model(name).pretrained_cfg["label_names"]) == 10
    model = timm.create_model(name, num_classes=3)
    assert not model.pretrained_cfg["label_names"]
    assert not model.default_cfg["label_names"]
