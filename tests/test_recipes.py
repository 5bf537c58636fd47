"""Recipes: what is shipped, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from poolskip_zoo.training.recipe import RECIPE_DIR, Recipe, load_recipe, make_recipe, recipe_names

SEGMENTS = {"dataset": "camvid", "model": "unet", "crop_size": [32, 64]}
MINIMAL = {"name": "a.b", "model": "test_resnet", "dataset": "cifar10"}


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe(name: str) -> None:
    import timm

    import poolskip_zoo  # noqa: F401

    recipe = load_recipe(name)
    assert recipe.name == name
    if recipe.segments:
        encoder = recipe.model_args["encoder_name"].removeprefix("tu-")
        assert name.startswith(f"{recipe.model}_{encoder}.")
        assert timm.is_model(encoder)
        assert recipe.hold_out == (-1 if recipe.dataset == "camvid" else 0)
        return
    assert name.startswith(recipe.model + ".")
    assert timm.is_model(recipe.model)
    # Chosen on held-out training images, by these runs or by others that its comment names.
    assert recipe.hold_out == 5000 or (
        recipe.hold_out in (0, 2000) and "held-out" in (RECIPE_DIR / f"{name}.yaml").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", [name for name in recipe_names() if "_poolskip." in name])
def test_pool_skip_and_base_share_one_recipe(name: str) -> None:
    variant, base = load_recipe(name), load_recipe(name.replace("_poolskip", ""))
    twin = dataclasses.replace(variant, name=base.name, model=base.model)
    if base.segments:
        names = [recipe.model_args["encoder_name"].removeprefix("tu-") for recipe in (variant, base)]
        assert names[0] == f"{names[1]}_poolskip"
        # Of smp's tu- encoders the weights are True, of ours a name.
        given = [bool(recipe.model_args.get("encoder_weights")) for recipe in (variant, base)]
        assert given[0] == given[1]
        twin = dataclasses.replace(twin, model_args=base.model_args)
    assert twin == base


def test_there_are_recipes() -> None:
    assert {"resnet20_cifar.c10", "resnet20_cifar_poolskip.c10"} <= set(recipe_names())


def test_written_recipe_holds_every_key_and_reads_back_equal() -> None:
    recipe = make_recipe({**MINIMAL, "model_args": {"drop_rate": 0.1}, "lr": 1e-3, "warmup_epochs": 1})
    values = yaml.safe_load(recipe.to_yaml())
    assert set(values) == {field.name for field in dataclasses.fields(Recipe)}
    assert make_recipe(values) == recipe
    assert recipe.lr == 1e-3
    assert isinstance(recipe.warmup_epochs, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 3}, r"unknown recipe key 'epoch' \(did you mean 'epochs'\?\): known are name, model"),
        ({"epochs": "many"}, "recipe key epochs='many' must be of type int"),
        ({"epochs": True}, "recipe key epochs=True must be of type int"),
        ({"epochs": 2.5}, "recipe key epochs=2.5 must be of type int"),
        ({"flip": 1}, "recipe key flip=1 must be of type bool"),
        ({"lr": "fast"}, "recipe key lr='fast' must be of type float"),
        ({"lr": 0}, "recipe key lr=0.0 must be at least 1e-12"),
        ({"lr": ".nan"}, "recipe key lr='.nan' must be of type float"),
        ({"lr": float("nan")}, "recipe key lr=nan must be at least"),
        ({"lr": float("inf")}, "recipe key lr=inf must be finite"),
        ({"epochs": 0}, "recipe key epochs=0 must be at least 1"),
        ({"label_smoothing": 1.5}, "recipe key label_smoothing=1.5 must be from 0 to 1"),
        ({"precision": "fp8"}, "recipe key precision='fp8' must be one of fp32, bf16, fp16"),
        ({"dataset": "mnist"}, "recipe key dataset='mnist' must be one of cifar10"),
        ({"model_args": [1]}, r"recipe key model_args=\[1\] must be of type dict"),
        ({"model_args": {"num_classes": 3}}, "must not hold num_classes"),
        ({"model_args": {"in_chans": 1}}, "must not hold in_chans"),
        ({"name": "../a"}, "recipe key name='../a' must be a plain file name"),
        ({"name": "a:b"}, "recipe key name='a:b' must be a plain file name"),
        ({"warmup_epochs": 30}, "warmup_epochs=30.0 must be below epochs=20"),
        ({"accumulation": 3}, "batch_size=128 is not divisible by accumulation=3"),
        ({"crop_size": [32, 24]}, r"recipe key crop_size=\[32, 24\] must be empty or a square of at least 8 pixels"),
        ({"crop_size": [4, 4]}, "must be empty or a square of at least 8 pixels"),
        ({"window": [32, 32]}, "recipe key window does not apply to cifar10, a data set for classification"),
        ({"sizes": [[1, 32]]}, r"recipe key sizes=\[\[1, 32\]\] must be pairs of an epoch and a size of 8 to 1024"),
        ({"sizes": [[0, 32], [0, 64]]}, "the first epoch 0, the others rising and below epochs=20"),
        ({"sizes": [[0, 32], [20, 64]]}, "the first epoch 0, the others rising and below epochs=20"),
        ({"sizes": [[0, 4]]}, "must be pairs of an epoch and a size of 8 to 1024"),
        ({"sizes": [[0]]}, "must be pairs of an epoch and a size of 8 to 1024"),
        ({"sizes": [[0, 32.5]]}, "recipe key sizes=32.5 must be of type int"),
        ({**SEGMENTS, "sizes": [[0, 32]]}, "recipe key sizes does not apply to camvid"),
        ({"hold_out": -1}, "hold_out=-1: cifar10 has no validation images"),
        ({"hold_out": -2}, "recipe key hold_out=-2 must be at least -1"),
        ({**SEGMENTS, "mixup": 0.2}, "recipe key mixup does not apply to camvid, a data set for segmentation"),
        ({**SEGMENTS, "crop_size": []}, r"recipe key crop_size=\[\] must be height and width, multiples of 32"),
        ({**SEGMENTS, "crop_size": [32, 40]}, r"recipe key crop_size=\[32, 40\] must be"),
        ({**SEGMENTS, "crop_size": [32.5, 32]}, "recipe key crop_size=32.5 must be of type int"),
        ({**SEGMENTS, "window": [32]}, r"recipe key window=\[32\] must be empty or height and width"),
        ({**SEGMENTS, "scale": [2.0, 1.0]}, r"recipe key scale=\[2.0, 1.0\] must be a least and a greatest"),
        ({**SEGMENTS, "loss": "focal"}, r"recipe key loss='focal' must be one of ce, dice, ce\+dice"),
        ({**SEGMENTS, "model_args": {"classes": 3}}, "must not hold classes"),
        ({**SEGMENTS, "loss": "dice", "label_smoothing": 0.1}, "have no meaning for loss='dice' alone"),
        ({**SEGMENTS, "loss": "dice", "class_weights": "balanced"}, "have no meaning for loss='dice' alone"),
        ({"image_size": 3}, "recipe key image_size=3 must be 0 or at least 8"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe({**MINIMAL, **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match="recipe lacks model, dataset"):
        make_recipe({"name": "a.b"})


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    recipe = load_recipe(path, ["lr=1e-2", "flip=true", "model_args.pool_skip.pool_size=4", "rand_augment="])
    assert (recipe.lr, recipe.flip, recipe.rand_augment) == (0.01, True, "")
    assert recipe.model_args == {"pool_skip": {"pool_size": 4}}
    path.write_text("{" + yaml.safe_dump(MINIMAL, default_flow_style=True).strip()[1:-1] + ", lr: 2e-3}")
    recipe = load_recipe(path, ["optimizer_args.eps=1e-8"])
    assert (recipe.lr, recipe.optimizer_args) == (2e-3, {"eps": 1e-8})
    for text in ("lr", "=3", "name.x=3", "lr=[1"):
        with pytest.raises(ValueError, match="override"):
            load_recipe(path, [text])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe file 'resnet20_cifr\.c10' .*shipped: resnet20_cifar\.c10"):
        load_recipe("resnet20_cifr.c10")
    path = tmp_path / "r.yaml"
    for text, message in (("a: [", "is not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(path)
