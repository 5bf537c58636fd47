"""Weights in: warm starts, folders, the Hub, and what is refused in one clear line."""

import dataclasses
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from contract import assert_same, create, images
from safetensors.torch import load_file, save_file
from timm.models import _registry as timm_registry
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf

from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.registry import checkpoint as checkpoint_module
from poolskip_zoo.registry import resolve
from poolskip_zoo.registry.catalogue import warm_starts
from poolskip_zoo.registry.checkpoint import Checkpoint

RESNET = "resnet18_poolskip.a1_in1k"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def save(model: torch.nn.Module, file: Path) -> dict[str, str]:
    """Write weights and return the overlay that loads them in place of timm's own file."""
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return {"file": str(file)}


def load(name: str, overlay: dict[str, str], **kwargs) -> torch.nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """timm's resnet18 with weights that are all alive, and the overlay of its file."""
    model = create("resnet18").eval()
    return model, save(model, tmp_path_factory.mktemp("weights") / "resnet18.safetensors")


# --- warm starts


def test_warm_start_computes_what_the_base_computes(resnet18, caplog):
    base, overlay = resnet18
    with caplog.at_level(logging.INFO, logger="poolskip_zoo"):
        model = load(RESNET, overlay)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("poolskip_zoo.registry")] == [
        f"{RESNET} is a warm start: the weights of the base model, Pool Skip at zero"
    ]
    x = images(RESNET)
    assert_same(model(x), base(x))
    assert not any(layer.conv.weight.any() or layer.conv.bias.any() for layer in pool_skip_modules(model).values())
    model.train()(x).square().mean().backward()
    assert all(layer.conv.weight.grad.any() for layer in pool_skip_modules(model).values())


def test_warm_start_for_other_classes_channels_and_features(resnet18):
    base, overlay = resnet18
    x = images(RESNET)
    model = load(RESNET, overlay, num_classes=7)
    assert model(x).shape == (2, 7)
    assert_same(model.forward_features(x), base.forward_features(x))
    assert_same(load(RESNET, overlay, num_classes=0)(x), base.forward_head(base.forward_features(x), pre_logits=True))
    features = load(RESNET, overlay, features_only=True)
    assert_same(features(x), base.forward_intermediates(x, intermediates_only=True))
    grey = load(RESNET, overlay, in_chans=1)
    same = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1).eval()
    assert_same(grey(x[:, :1]), same(x[:, :1]))


def test_without_a_trained_checkpoint_pretrained_means_the_first_warm_start(resnet18):
    base, overlay = resnet18
    model = load("resnet18_poolskip", overlay)
    assert model.pretrained_cfg["tag"] == get_pretrained_cfg("resnet18").tag
    assert_same(model(images(RESNET)), base(images(RESNET)))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vgg11_bn_poolskip.tv_in1k", {"mlp_ratio": 1 / 64}),
        ("vit_tiny_patch16_224_poolskip.augreg_in21k_ft_in1k", {"img_size": 96}),
        ("deit_tiny_distilled_patch16_224_poolskip.fb_in1k", {"img_size": 96}),
    ],
)
def test_warm_starts_of_the_other_families(name, kwargs, tmp_path):
    size = kwargs.pop("img_size", None)
    arch, _, tag = name.partition(".")
    base = create(arch.removesuffix("_poolskip"), num_classes=1000, **kwargs)
    overlay = save(base, tmp_path / "base.safetensors")
    for changed in ({}, {"num_classes": 3}):
        options = {**kwargs, **changed, **({"img_size": size} if size else {})}
        same = load(f"{arch.removesuffix('_poolskip')}.{tag}", overlay, **options)
        ours = load(name, overlay, **options)
        x = images(name, batch=1, size=(size or 64,) * 2)
        if changed:
            assert_same(ours.forward_features(x), same.forward_features(x))
        else:
            assert_same(ours(x), same(x))


# --- what does not fit


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_classes": 7}, {"features_only": True}], ids=["head", "classes", "features"]
)
def test_wrong_keys_are_refused(resnet18, tmp_path, kwargs):
    """timm itself accepts them silently in the last two cases."""
    state = resnet18[0].state_dict()
    renamed = {key.replace("layer3", "stage3"): value for key, value in state.items()}
    cut = {key: value for key, value in state.items() if not key.startswith("layer4.1.bn2")}
    for number, wrong in enumerate((renamed, cut, {**state, "more.weight": torch.zeros(1)})):
        file = tmp_path / f"{number}.safetensors"
        save_file(wrong, file)
        with pytest.raises(RuntimeError, match=rf"does not fit {RESNET}") as error:
            load(RESNET, {"file": str(file)}, **kwargs)
        message = str(error.value)
        assert "\n" not in message
        assert any(key in message for key in ("stage3", "layer4.1.bn2.weight", "more.weight"))
        assert "…" not in message or message.count(",") < 12


def test_a_checkpoint_of_another_placement_is_refused(tmp_path):
    for saved, wanted in (("all", "default"), ("default", "all")):
        model = timm.create_model("test_resnet_poolskip", pool_skip={"placement": saved})
        overlay = save(model, tmp_path / f"{saved}.safetensors")
        for kwargs in ({}, {"num_classes": 7}, {"features_only": True}):
            with pytest.raises(RuntimeError, match=r"layer3\.0\.conv[23]\.pool_skip.*placement"):
                load("test_resnet_poolskip", overlay, pool_skip={"placement": wanted}, **kwargs)


def test_another_placement_loads_where_the_caller_says_so(tmp_path):
    saved = create("test_resnet_poolskip", pool_skip={"placement": "all"})
    overlay = save(saved, tmp_path / "all.safetensors")
    for key, value in load("test_resnet_poolskip", overlay, pretrained_strict=False).state_dict().items():
        assert torch.equal(value, saved.state_dict()[key])


@pytest.mark.parametrize("name", ["resnet20_cifar_poolskip", "test_resnet_poolskip"])
def test_a_file_of_the_base_is_a_warm_start_of_any_variant(name, tmp_path):
    base = create(name.removesuffix("_poolskip")).eval()
    overlay = save(base, tmp_path / "base.safetensors")
    cfg = {**overlay, "num_classes": base.num_classes, "first_conv": "conv1", "classifier": "fc"}
    model = timm.create_model(name, pretrained=True, pretrained_cfg=cfg).eval()
    assert_same(model(images(name)), base(images(name)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["resnet20_cifar_poolskip", "test_resnet_poolskip"])
def test_weights_of_the_base_are_a_warm_start_under_the_plain_name(name, strict):
    base = create(name.removesuffix("_poolskip")).eval()
    overlay = {"state_dict": base.state_dict(), "num_classes": base.num_classes}
    model = timm.create_model(name, pretrained=True, pretrained_strict=strict, pretrained_cfg_overlay=overlay).eval()
    assert_same(model(images(name)), base(images(name)))


def test_fresh_models_have_the_configuration_of_timms_base():
    fresh, base = (timm.create_model(name, device="meta") for name in ("resnet50_poolskip", "resnet50"))
    assert fresh.num_classes == base.num_classes == 1000
    for key in ("input_size", "crop_pct", "interpolation", "mean", "std", "tag"):
        assert fresh.pretrained_cfg[key] == base.pretrained_cfg[key]
    overlaid = timm.create_model("resnet50_poolskip", pretrained_cfg_overlay={"crop_pct": 0.5}, device="meta")
    assert (overlaid.num_classes, overlaid.pretrained_cfg["crop_pct"]) == (1000, 0.5)
    assert timm.create_model("resnet50_poolskip.tin200_r64_cpu", device="meta").num_classes == 200
    # Of a base that timm does not have, all tags are ours.
    assert timm.create_model("resnet20_cifar_poolskip", device="meta").pretrained_cfg["tag"] == "c10_e60"


def test_what_pool_skip_leaves_open_is_as_saved(tmp_path):
    saved = create("test_resnet_poolskip", pool_skip={"pool_size": 3})
    save_for_hf(saved, tmp_path, safe_serialization=True)
    for given, window in (({"groups": 1}, [3, 3]), ({"pool_size": 2}, [2, 2])):
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, pool_skip=given)
        assert {tuple(layer.window) for layer in pool_skip_modules(model).values()} == {tuple(window)}


@pytest.mark.parametrize(
    ("name", "options", "tokens"),
    [
        ("vit_tiny_patch4_32_poolskip", {"img_size": 48}, 145),
        ("vit_tiny_patch4_32_poolskip", {"patch_size": 8}, 17),
        ("vit_tiny_patch4_32_poolskip", {"img_size": 48, "features_only": True}, 145),
        ("vit_tiny_patch4_32", {"img_size": 48}, 145),
        ("test_vit_poolskip", {"img_size": 96}, 37),
    ],
)
def test_vit_weights_load_at_other_sizes(name, options, tokens, tmp_path):
    size = {"depth": 4, "embed_dim": 32, "num_heads": 2}
    overlay = save(create(name, **size), tmp_path / "vit.safetensors")
    model = load(name, overlay, **size, **options)
    assert getattr(model, "model", model).pos_embed.shape == (1, tokens, 32)


def test_a_file_of_the_base_is_no_trained_checkpoint(tmp_path):
    overlay = save(timm.create_model("resnet20_cifar"), tmp_path / "base.safetensors")
    with pytest.raises(RuntimeError, match=r"\.c10: it has no Pool Skip.* name no tag: 'resnet20_cifar_poolskip'"):
        load("resnet20_cifar_poolskip.c10", overlay)


@pytest.mark.parametrize("pool", ["avg", "map"])
@pytest.mark.parametrize("name", ["test_vit_poolskip", "vit_tiny_patch4_32_poolskip"])
def test_a_vit_is_pooled_otherwise_as_in_timm(name, pool, tmp_path):
    size = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    trained = create(name, **size).eval()
    overlay = save(trained, tmp_path / "vit.safetensors")
    model = load(name, overlay, global_pool=pool, num_classes=5, **size)
    x = images(name)
    assert_same(*(net.forward_intermediates(x, norm=False, intermediates_only=True) for net in (model, trained)))
    with pytest.raises(RuntimeError, match="does not fit"):
        load(name, overlay, init_values=1.0, num_classes=5, **size)


def test_shapes_that_differ_are_refused(tmp_path):
    model = timm.create_model("test_resnet_poolskip", pool_skip={"groups": "depthwise"})
    with pytest.raises(RuntimeError, match=r"size mismatch for layer1\.0\.conv1\.pool_skip"):
        load("test_resnet_poolskip", save(model, tmp_path / "depthwise.safetensors"))


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_are_never_offered_and_never_run(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"conv1.weight": _Evil()}))
    with pytest.raises(RuntimeError):
        load("test_resnet_poolskip", {"file": str(file)})
    for name in warm_starts():
        cfg = get_pretrained_cfg(name)
        assert cfg.hf_hub_id or cfg.url.endswith((".npz", ".safetensors")), f"{name} would be read from {cfg.url}"


# --- folders and the Hub


SETTINGS = {"placement": "all", "pool_size": 3}


@pytest.fixture
def folder(tmp_path):
    """A saved model with every keyword that must travel."""
    model = create("test_resnet_poolskip", pool_skip=SETTINGS, in_chans=1, num_classes=7, output_stride=16).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    return model, tmp_path


def assert_travelled(model, again):
    again.eval()
    assert set(pool_skip_modules(again)) == set(pool_skip_modules(model))
    assert {tuple(layer.window) for layer in pool_skip_modules(again).values()} == {(3, 3)}
    x = images("test_resnet_poolskip", channels=1)
    assert again.forward_features(x).shape[-1] == 4
    assert_same(again(x), model(x))


def test_local_dir(folder):
    model, path = folder
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    assert config["architecture"] == "test_resnet_poolskip"
    assert config["model_args"]["pool_skip"] == SETTINGS
    assert_travelled(model, timm.create_model(f"local-dir:{path}", pretrained=True))


def test_local_dir_with_other_settings(folder):
    _, path = folder
    again = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=3)
    assert again(images("test_resnet_poolskip", channels=1)).shape == (2, 3)
    with pytest.raises(RuntimeError, match="placement"):
        timm.create_model(f"local-dir:{path}", pretrained=True, pool_skip={"placement": "layer1.*"})


def test_hf_hub(folder, monkeypatch):
    model, path = folder
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename, kwargs.get("revision")))
        return str(path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    assert_travelled(model, timm.create_model("hf-hub:someone/model@v1", pretrained=True))
    assert asked == [("someone/model", "config.json", "v1"), ("someone/model", "model.safetensors", "v1")]


# --- trained checkpoints


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A registered checkpoint with its file in a temporary hub_cards/: the record, its model and the file's path."""
    name = "test_resnet_poolskip.trained"
    model = create("test_resnet_poolskip", num_classes=10).eval()
    file = tmp_path / name / "model.safetensors"
    file.parent.mkdir()
    save(model, file)
    record = Checkpoint(name, "cifar10_jpeg", resolve.sha256_of(file), {"top1": 1.0}, "r", 0, "CPU", 0.1, "v1")
    cfg = record.pretrained_cfg(get_pretrained_cfg("test_resnet_poolskip"))
    cfg = dataclasses.replace(cfg, tag="trained", architecture="test_resnet_poolskip")
    monkeypatch.setitem(checkpoint_module._CHECKPOINTS, name, record)
    monkeypatch.setitem(timm_registry._model_pretrained_cfgs, name, cfg)
    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: tmp_path)
    return record, model, file


def test_a_trained_checkpoint_loads(trained):
    record, model, _ = trained
    x = images(record.arch)
    assert_same(timm.create_model(record.name, pretrained=True).eval()(x), model(x))
    features = timm.create_model(record.name, pretrained=True, features_only=True).eval()
    assert_same(features(x), model.forward_intermediates(x, intermediates_only=True))
    assert timm.create_model(record.name, pretrained=True, num_classes=3)(x).shape == (2, 3)


@pytest.mark.parametrize("damage", ["cut", "html", "lfs", "flipped", "empty"])
def test_a_damaged_file_is_refused_by_its_sha256(trained, damage):
    record, _, file = trained
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes(
        {"cut": whole[:-100], "html": b"<!doctype html>", "lfs": LFS_POINTER, "flipped": flipped, "empty": b""}[damage]
    )
    for kwargs in ({}, {"num_classes": 3}, {"features_only": True}):
        with pytest.raises(RuntimeError, match="sha256") as error:
            timm.create_model(record.name, pretrained=True, **kwargs)
        assert all(part in str(error.value) for part in (str(file), record.name, record.sha256))
        assert "\n" not in str(error.value)


def test_a_users_own_file_is_not_checked_against_the_record(trained, tmp_path):
    record, _, _ = trained
    own = create(record.arch, num_classes=10, pool_skip={"pool_size": 2}).eval()
    overlay = save(own, tmp_path / "own.safetensors")
    assert_same(load(record.name, overlay, pool_skip={"pool_size": 2})(images(record.arch)), own(images(record.arch)))


def test_an_unreachable_hub_is_one_line(trained, monkeypatch):
    record, _, file = trained
    file.unlink()
    asked = []

    def download(repo, filename, **kwargs):
        asked.append((repo, filename, kwargs))
        raise OSError("offline\nwith a second line")

    monkeypatch.setattr(resolve, "_connect", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RuntimeError, match="cannot get the weights") as error:
        timm.create_model(record.name, pretrained=True, cache_dir="somewhere")
    message = str(error.value)
    assert all(part in message for part in (record.name, "model.safetensors", "poolskip-zoo/", "hub_cards/", "file"))
    assert "\n" not in message
    assert asked == [(f"poolskip-zoo/{record.name}", "model.safetensors", {"revision": "v1", "cache_dir": "somewhere"})]


def test_a_file_from_the_hub_is_checked_too(trained, monkeypatch, tmp_path):
    record, model, file = trained
    cached = tmp_path / "cache" / "model.safetensors"
    cached.parent.mkdir()
    shutil.move(file, cached)
    monkeypatch.setattr(resolve, "_connect", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(cached))
    x = images(record.arch)
    assert_same(timm.create_model(record.name, pretrained=True).eval()(x), model(x))
    cached.write_bytes(LFS_POINTER)
    with pytest.raises(RuntimeError, match="sha256"):
        timm.create_model(record.name, pretrained=True)


def test_an_installed_weights_package_is_used(trained, monkeypatch, tmp_path):
    record, model, file = trained
    package = tmp_path / "site" / "poolskip_zoo_weights"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.move(file.parent, package / record.name)
    monkeypatch.syspath_prepend(package.parent)
    x = images(record.arch)
    assert_same(timm.create_model(record.name, pretrained=True).eval()(x), model(x))


def test_every_recorded_file_in_hub_cards_loads():
    folder = resolve.hub_cards_dir()
    if folder is None:
        pytest.skip("an installation has no hub_cards/")
    for record in checkpoint_module.checkpoints():
        if isinstance(record, checkpoint_module.SegmentationCheckpoint):
            model = smp.from_pretrained(str(folder / record.name))
        else:
            model = timm.create_model(record.name, pretrained=True)
        saved, loaded = load_file(folder / record.name / "model.safetensors"), model.state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(value.to(loaded[key].dtype), loaded[key]) for key, value in saved.items())
    assert not [path for suffix in ("bin", "pth", "pt", "pkl") for path in folder.rglob(f"*.{suffix}")]


def test_base_weights_by_checkpoint_path_name_the_way_out(tmp_path):
    path = tmp_path / "base.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(RuntimeError, match=r"Missing key.*\n.*no Pool Skip.*pretrained_cfg_overlay=\{'file': PATH\}"):
        timm.create_model("test_resnet_poolskip", checkpoint_path=str(path))
    model = timm.create_model("test_resnet_poolskip")
    state = model.state_dict()
    del state["fc.weight"]
    with pytest.raises(RuntimeError, match="Missing key") as refused:
        model.load_state_dict(state)
    assert "Pool Skip" not in str(refused.value)
    assert model.load_state_dict(state, strict=False).missing_keys == ["fc.weight"]
