"""The ResNet stem for small images, and checkpoints whose record carries model arguments."""

import json
import re

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from contract import assert_same, create, images
from hub_records import make_record
from safetensors.torch import load_file
from timm.models import _registry as timm_registry
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from poolskip_zoo.cli import main
from poolskip_zoo.diagnostics.cost import count_macs
from poolskip_zoo.hub.add import record_source
from poolskip_zoo.hub.card import card_text, config, write_card
from poolskip_zoo.hub.facts import describe
from poolskip_zoo.hub.verify import verify_folder
from poolskip_zoo.layers import pool_skip_modules
from poolskip_zoo.models.resnet import StemResNet
from poolskip_zoo.registry import resolve
from poolskip_zoo.registry.catalogue import create_base
from poolskip_zoo.registry.checkpoint import Checkpoint
from poolskip_zoo.training.build import make_model
from poolskip_zoo.training.recipe import load_recipe, make_recipe
from poolskip_zoo.training.state import save_weights

pytest_plugins = ["hub_fixtures"]

ARCH = "test_resnet_poolskip"
NAME = f"{ARCH}.small"
ARGS = {"stem_stride": 2, "pool_skip": {"pool_size": 3}}
REDUCTIONS = {4: [2, 4, 8, 16, 32], 2: [2, 2, 4, 8, 16], 1: [1, 1, 2, 4, 8]}


# --- the stem


@pytest.mark.parametrize("stem_stride", REDUCTIONS)
def test_maps_have_the_stated_reductions(stem_stride):
    x = images(ARCH, channels=1)
    features = create(ARCH, stem_stride=stem_stride, features_only=True, in_chans=1).eval()
    assert features.feature_info.reduction() == REDUCTIONS[stem_stride]
    assert [64 // map.shape[-1] for map in features(x)] == REDUCTIONS[stem_stride]
    whole = create(ARCH, stem_stride=stem_stride, in_chans=1).eval()
    assert_same(features(x), whole.forward_intermediates(x, intermediates_only=True))
    assert_same(whole.forward_features(x), features(x)[-1])
    pruned = create(ARCH, stem_stride=stem_stride, in_chans=1, features_only=True, out_indices=(0, 2)).eval()
    assert_same(pruned(x), [features(x)[0], features(x)[2]])


@pytest.mark.parametrize("stem_stride", [1, 2])
@pytest.mark.parametrize("kwargs", [{}, {"stem_type": "deep", "stem_width": 4}, {"block": Bottleneck}])
def test_it_computes_what_timm_computes_after_the_change_by_hand(stem_stride, kwargs):
    """timm's weights fit at every stride, and only strides and the pooling differ."""
    settings = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "num_classes": 5, **kwargs}
    base = timm.models.ResNet(**settings).eval()
    model = StemResNet(**settings, stem_stride=stem_stride).eval()
    model.load_state_dict(base.state_dict())
    base.maxpool = nn.Identity()
    if stem_stride == 1:
        (base.conv1[0] if "stem_type" in kwargs else base.conv1).stride = (1, 1)
    x = torch.randn(2, 3, 40, 33)
    assert_same(model(x), base(x))
    assert_same(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize(("stem_stride", "output_stride"), [(4, 8), (2, 4), (2, 8), (2, 16), (1, 2), (1, 8)])
def test_output_stride_counts_from_the_image(stem_stride, output_stride):
    model = create(ARCH, stem_stride=stem_stride, output_stride=output_stride)
    assert model.forward_features(images(ARCH)).shape[-1] == 64 // output_stride
    assert model.feature_info[-1]["reduction"] == output_stride


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"stem_stride": 3}, r"stem_stride=3 is not possible, choose one of 4 \(timm's own\), 2, 1"),
        ({"stem_stride": 2, "output_stride": 32}, "output_stride=32 is not possible at stem_stride=2: 4, 8, 16"),
        ({"stem_stride": 1, "replace_stem_pool": True}, "replace_stem_pool=True has no meaning at stem_stride=1"),
    ],
)
def test_impossible_stems_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        timm.create_model(ARCH, **kwargs)


def test_small_image_bases_have_no_stem_to_choose():
    with pytest.raises(TypeError, match="stem_stride"):
        timm.create_model("resnet18_cifar_poolskip", stem_stride=2, device="meta")


def test_a_warm_start_loads_at_another_stride(tmp_path):
    base = create("resnet18", num_classes=1000).eval()
    file = tmp_path / "base.safetensors"
    save_weights(file, base, torch.float32)
    overlay = {"file": str(file)}
    name = "resnet18_poolskip.a1_in1k"
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, stem_stride=2).eval()
    base.maxpool = nn.Identity()
    assert_same(model(images(name)), base(images(name)))


# --- the base with the same stem


def test_the_base_has_the_same_stem_and_timms_parameters():
    base = create_base(ARCH, stem_stride=2, pool_skip={"pool_size": 3}).eval()
    assert not pool_skip_modules(base)
    assert {k: v.shape for k, v in base.state_dict().items()} == {
        k: v.shape for k, v in timm.create_model("test_resnet").state_dict().items()
    }
    variant = timm.create_model(ARCH, stem_stride=2, pool_skip={"zero_init": True}).eval()
    variant.load_state_dict(base.state_dict(), strict=False)
    assert_same(base(images(ARCH)), variant(images(ARCH)))
    assert type(create_base(ARCH)) is timm.models.ResNet
    assert type(create_base("resnet20_cifar_poolskip")).__name__ == "CifarResNet"


def test_recipes_give_base_and_variant_one_stem():
    values = {"name": "a.b", "dataset": "cifar10", "model_args": {"stem_stride": 2}}
    models = [make_model(make_recipe({**values, "model": name})) for name in ("test_resnet", ARCH)]
    assert [len(pool_skip_modules(model)) > 0 for model in models] == [False, True]
    assert [model.feature_info[-1]["reduction"] for model in models] == [16, 16]
    for name in ("test_vit", "convnext_atto"):
        with pytest.raises(ValueError, match="does not take model_args="):
            make_model(make_recipe({**values, "model": name}))


def test_tiny_imagenet_recipes_build():
    for base in ("resnet50", "resnet18", "vit_tiny_patch8_64"):
        assert load_recipe(f"{base}_poolskip.tin200_r64").dataset == "tiny_imagenet_jpeg"
    vit = make_model(load_recipe("vit_tiny_patch8_64_poolskip.tin200_r64"))
    assert vit(torch.zeros(1, 3, 64, 64)).shape == (1, 200)
    assert vit.patch_embed.grid_size == (8, 8)


# --- a record that carries arguments


@pytest.fixture
def made(tmp_path):
    """Weights in a hub_cards/ of their own, their record, not registered yet, and their model."""
    torch.manual_seed(0)
    model = create(ARCH, num_classes=10, **ARGS).eval()
    file = tmp_path / "hub_cards" / NAME / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_weights(file, model, torch.float32)
    return make_record(file, NAME, model_args=ARGS), model, file.parent


@pytest.fixture
def trained(made, monkeypatch, register):
    """The same, registered as the default tag of its architecture."""
    record, _, folder = made
    monkeypatch.setattr(resolve, "hub_cards_dir", lambda: folder.parent)
    register(record)
    monkeypatch.setitem(timm_registry._model_pretrained_cfgs, ARCH, get_pretrained_cfg(NAME))
    monkeypatch.setitem(timm_registry._model_with_tags, ARCH, [NAME])
    return made


def stride(model):
    return model.feature_info[-1]["reduction"]


def test_loading_the_tag_rebuilds_the_trained_form(trained):
    _, model, _ = trained
    x = images(ARCH)
    for name in (NAME, ARCH):
        assert_same(timm.create_model(name, pretrained=True).eval()(x), model(x))
        features = timm.create_model(name, pretrained=True, features_only=True).eval()
        assert features.feature_info.reduction() == REDUCTIONS[2]
        assert_same(features(x), model.forward_intermediates(x, intermediates_only=True))
        other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1).eval()
        assert other(x[:, :1]).shape == (2, 3)
        assert other.forward_features(x[:, :1]).shape[-1] == 4
    assert_same(timm.create_model(ARCH, pretrained=True, pretrained_cfg="small").eval()(x), model(x))


def test_only_the_tag_has_its_arguments(trained, monkeypatch, register):
    record, _, folder = trained
    assert stride(timm.create_model(ARCH)) == 32, "the bare name is timm's stem"
    assert stride(timm.create_model(NAME)) == 16, "the tag is its form, with random weights too"
    plain = register(make_record(folder / "model.safetensors", f"{ARCH}.plain"))
    assert stride(timm.create_model(plain.name)) == 32
    own = {"num_classes": 10, "input_size": (3, 32, 32), "architecture": ARCH}
    assert stride(timm.create_model(ARCH, pretrained_cfg=own)) == 32
    assert record.model_args == ARGS


def test_own_keywords_win_and_what_does_not_fit_is_refused(trained):
    _, model, _ = trained
    x = images(ARCH)
    coarse = timm.create_model(NAME, pretrained=True, stem_stride=4).eval()
    assert stride(coarse) == 32
    assert_same(coarse.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    assert stride(timm.create_model(NAME, pretrained=True, stem_stride=1)) == 8
    smaller = timm.create_model(NAME, pretrained=True, pool_skip={"pool_size": 2}).eval()
    assert {tuple(layer.window) for layer in pool_skip_modules(smaller).values()} == {(2, 2)}
    assert not torch.equal(smaller(x), model(x))
    with pytest.raises(RuntimeError, match="of another pool_skip placement"):
        timm.create_model(NAME, pretrained=True, pool_skip={"placement": "all"})


@pytest.mark.parametrize("kwargs", [{}, {"stem_stride": 4}])
def test_arguments_travel_in_config_json(trained, tmp_path, monkeypatch, kwargs):
    model = timm.create_model(NAME, pretrained=True, **kwargs).eval()
    to = tmp_path / "saved"
    save_for_hf(model, to, safe_serialization=True)
    assert (
        json.loads((to / "config.json").read_text(encoding="utf-8"))["model_args"].items() >= {**ARGS, **kwargs}.items()
    )
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(to / filename))
    for name in (f"local-dir:{to}", "hf-hub:someone/model"):
        assert_same(timm.create_model(name, pretrained=True).eval()(images(ARCH)), model(images(ARCH)))


def test_a_folder_made_from_the_bare_name_keeps_timms_stem(trained, tmp_path):
    """Its tag in config.json is the default one, its arguments are not."""
    model = create(ARCH).eval()
    save_for_hf(model, tmp_path / "own", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True).eval()
    assert stride(again) == 32
    assert_same(again(images(ARCH)), model(images(ARCH)))


@pytest.mark.parametrize("kwargs", [
    {"encoder_name": ARCH, "encoder_weights": "small"},
    {"encoder_name": f"tu-{NAME}", "encoder_weights": True},
])  # fmt: skip
@pytest.mark.usefixtures("trained")
def test_encoders_of_smp_have_the_pyramid_that_decoders_need(kwargs):
    model = smp.create_model("unet", **kwargs).eval()
    assert [64 // map.shape[-1] for map in model.encoder(images(ARCH))] == [1, 2, 4, 8, 16, 32]
    assert model(images(ARCH)).shape == (2, 1, 64, 64)


# --- cards and runs


def test_a_folder_is_made_before_its_record_is_registered(made, register):
    record, model, folder = made
    write_card(record, folder)
    verify_folder(record, folder)
    assert config(record)["model_args"].items() >= ARGS.items()
    stored = load_file(folder / "golden.safetensors")
    torch.testing.assert_close(model(stored["input"].float()), stored["output"], rtol=1e-4, atol=1e-4)
    before = card_text(record)
    assert "`stem_stride=2`" in before.replace("\n  ", " ")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same(again(images(ARCH)), model(images(ARCH)))
    assert card_text(register(record)) == before
    (copy,) = eval(f"({record_source(record)})", {"Checkpoint": Checkpoint})
    assert copy.model_args == ARGS


def test_facts_and_cards_compare_with_the_base_of_the_same_stem(trained, capsys):
    record, _, _ = trained
    facts = describe(NAME)
    assert facts["model_args"] == ARGS
    assert {tuple(place["pool_size"]) for place in facts["places"]} == {(3, 3)}
    assert describe(ARCH)["macs"] == facts["macs"], "a name without tag stands for its first"
    assert describe("test_vit_poolskip")["model_args"] == {}
    # Without pooling in the stem every convolution after it has four times the positions.
    coarse = count_macs(timm.create_model("test_resnet", num_classes=10, device="meta"), facts["input_size"])
    assert 1.5 < facts["base"]["macs"] / coarse < 4
    assert 1 < facts["macs"] / facts["base"]["macs"] < 4
    row = next(line for line in card_text(record).splitlines() if line.startswith("| `test_resnet`, not trained"))
    assert f"| {facts['base']['macs'] / 1e9:.3g} |" in row
    assert main(["info", NAME, "--no-latency"]) == 0
    assert '"stem_stride": 2' in capsys.readouterr().out


RECIPE = """
name: {model}.small
model: {model}
dataset: cifar10_jpeg
model_args: {args}
"""


@pytest.fixture
def finish(tmp_path, monkeypatch):
    """A function that leaves a finished run of a shipped recipe, measured; it returns the folder and the model."""
    monkeypatch.setattr("poolskip_zoo.training.recipe.RECIPE_DIR", tmp_path)
    monkeypatch.setattr("poolskip_zoo.hub.card._recipe", lambda record: "name: its recipe")

    def make(model, args):
        run = tmp_path / f"run-{model}"
        run.mkdir()
        (tmp_path / f"{model}.small.yaml").write_text(RECIPE.format(model=model, args=json.dumps(args)))
        recipe = load_recipe(f"{model}.small")
        net = make_model(recipe)
        save_weights(run / "model.safetensors", net, torch.float16)
        (run / "recipe.yaml").write_text(recipe.to_yaml())
        metrics = {
            "name": recipe.name, "model": model, "model_args": args, "dataset": "cifar10_jpeg", "seed": 0,
            "hardware": "a", "seconds": 1800, "images_per_second": 51.0, "versions": {"torch": "2.9.0"},
        }  # fmt: skip
        (run / "metrics.json").write_text(json.dumps(metrics))
        scores = {"name": model, "dataset": "cifar10_jpeg", "top1": 41.5, "top5": 90.0}
        (run / "scores.json").write_text(json.dumps(scores))
        return run, net

    return make


def add(run, cards, *arguments):
    return main(["hub", "add", str(run), "--scores", str(run / "scores.json"), "--cards", str(cards), *arguments])


def test_a_run_whose_arguments_a_record_carries_is_added_beside_its_base(finish, tmp_path, capsys):
    run, net = finish(ARCH, {**ARGS, "drop_path_rate": 0.1})
    base, _ = finish("test_resnet", {"stem_stride": 2})
    cards = tmp_path / "cards"
    assert add(run, cards, "--base", str(base)) == 0
    source = "\n".join(line for line in capsys.readouterr().out.splitlines() if not line.startswith("#"))
    (record,) = eval(f"({source})", {"Checkpoint": Checkpoint})
    assert record.model_args == ARGS
    assert record.base_scores == {"top1": 41.5, "top5": 90.0, "hours": 0.5, "images_per_second": 51.0}
    card = (cards / NAME / "README.md").read_text(encoding="utf-8")
    assert "| `test_resnet`, weights not published | 41.50 | 90.00 |" in card
    assert card_text(record) == card
    again = timm.create_model(f"local-dir:{cards / NAME}", pretrained=True).eval()
    x = images(ARCH, size=(32, 32))
    assert_same(again(x), net.half().float().eval()(x))
    text = (base / "recipe.yaml").read_text(encoding="utf-8")
    (base / "recipe.yaml").write_text(text.replace("epochs: 20", "epochs: 40"))
    assert add(run, cards, "--base", str(base)) == 2
    assert "epochs differ" in capsys.readouterr().err
    (base / "recipe.yaml").write_text(text)
    (base / "scores.json").unlink()
    assert add(run, cards, "--base", str(base)) == 2
    assert "is not a finished run of test_resnet.small, measured by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        (ARCH, {**ARGS, "act_layer": "silu"}, "record carries pool_skip, stem_stride, but .* act_layer too"),
        ("test_resnet", {"stem_stride": 2}, "is of test_resnet, a model of timm's"),
    ],
)
def test_runs_that_would_not_load_by_their_name_are_refused(finish, tmp_path, capsys, model, args, said):
    run, _ = finish(model, args)
    assert add(run, tmp_path / "cards") == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "cards").exists()


def test_a_run_of_the_base_is_measured_with_its_stem(finish):
    """As `poolskip validate resnet50 --checkpoint …` builds it."""
    from poolskip_zoo.cli.subject import load

    run, net = finish("test_resnet", {"stem_stride": 2})
    x = images(ARCH, size=(32, 32))
    expected = net.half().float().eval()(x)
    for named in (("test_resnet", str(run / "model.safetensors")), (str(run),)):
        assert_same(load(*named).model(x), expected)
