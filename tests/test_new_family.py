"""A new family is two files: written here for timm's ConvNeXt, it passes the whole contract, and is found by itself."""

import copy
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from contract import CHECKS, assert_same, create, images
from safetensors.torch import save_file
from timm.models import _registry as timm_registry

import poolskip_zoo
from poolskip_zoo.layers import placement, pool_skip_modules
from poolskip_zoo.registry.catalogue import registered_models, warm_starts

MODELS = '''
"""ConvNeXt with Pool Skip: timm's class plus its placement."""

from timm.models.convnext import ConvNeXt

from ..layers.placement import Rule, register_placements
from .mixin import PoolSkipModel

register_placements(ConvNeXt, {"default": (Rule("stages.*.conv_dw", pool_size=2, groups="depthwise"),)})


class PoolSkipConvNeXt(PoolSkipModel, ConvNeXt):
    """timm's ConvNeXt with Pool Skip after the depthwise convolution of each block."""
'''

REGISTRY = '''
"""ConvNeXt with Pool Skip, registered with timm."""

from timm.models import generate_default_cfgs, register_model
from timm.models.convnext import checkpoint_filter_fn

from ..models.convnext import PoolSkipConvNeXt
from .build import create
from .checkpoint import pool_skip_cfgs

default_cfgs = generate_default_cfgs(pool_skip_cfgs(("convnext_atto", "test_convnext")))


def _create(variant, pretrained, **kwargs):
    feature_cfg = {"out_indices": (0, 1, 2, 3), "flatten_sequential": True}
    return create(
        PoolSkipConvNeXt, variant, pretrained, filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def convnext_atto_poolskip(pretrained=False, **kwargs):
    """ConvNeXt-Atto with Pool Skip."""
    model_args = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "conv_mlp": True}
    return _create("convnext_atto_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def test_convnext_poolskip(pretrained=False, **kwargs):
    """Tiny ConvNeXt for tests."""
    model_args = {"depths": (1, 2, 4, 2), "dims": (24, 32, 48, 64), "norm_eps": 1e-5, "act_layer": "gelu_tanh"}
    return _create("test_convnext_poolskip", pretrained, **{**model_args, **kwargs})
'''

NAME = "test_convnext_poolskip"
FILES = {"models/convnext.py": MODELS, "registry/convnext_poolskip.py": REGISTRY}


@pytest.fixture(scope="module", autouse=True)
def family(tmp_path_factory):
    """The two files beside the package's own, imported; afterwards timm and this package forget them."""
    folder = tmp_path_factory.mktemp("family")
    state = {
        k: copy.copy(v) for k, v in vars(timm_registry).items() if k.startswith("_") and isinstance(v, (dict, set))
    }
    presets = dict(placement._PRESETS)
    for file, text in FILES.items():
        package = importlib.import_module(f"poolskip_zoo.{Path(file).parent}")
        path = folder / file
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        package.__path__.append(str(path.parent))
    importlib.invalidate_caches()
    yield importlib.import_module("poolskip_zoo.registry.convnext_poolskip")
    for name, value in state.items():
        current = getattr(timm_registry, name)
        current.clear()
        current.update(value)
    placement._PRESETS.clear()
    placement._PRESETS.update(presets)
    for file in FILES:
        importlib.import_module(f"poolskip_zoo.{Path(file).parent}").__path__.remove(str(folder / Path(file).parent))
        sys.modules.pop(f"poolskip_zoo.{file.removesuffix('.py').replace('/', '.')}")


# The longest three take 25 s: pytest -m slow tests/test_new_family.py
SLOW = ("compile", "export", "onnx")


@pytest.mark.parametrize("check", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CHECKS])
def test_contract(check):
    assert CHECKS[check](NAME) is not False


def test_it_is_listed_with_its_warm_starts():
    assert "convnext_atto_poolskip" in registered_models()
    assert NAME in registered_models(test=True)
    assert "convnext_atto_poolskip.d2_in1k" in warm_starts()
    assert len(pool_skip_modules(timm.create_model(NAME))) == 9


def test_its_warm_start_loads(tmp_path):
    base = create("convnext_atto").eval()
    file = tmp_path / "base.safetensors"
    save_file(base.state_dict(), file)
    overlay = {"file": str(file)}
    model = timm.create_model("convnext_atto_poolskip.d2_in1k", pretrained=True, pretrained_cfg_overlay=overlay)
    assert_same(model.eval()(images(NAME)), base(images(NAME)))


def test_the_package_finds_it_by_itself(tmp_path):
    """In a checkout with the two files and no other change."""
    package = Path(poolskip_zoo.__file__).parent
    shutil.copytree(package, tmp_path / "poolskip_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    registry = Path(poolskip_zoo.registry.__file__).parent
    shutil.copytree(registry, tmp_path / "registry", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "poolskip_zoo/models/convnext.py").write_text(MODELS)
    (tmp_path / "registry/convnext_poolskip.py").write_text(REGISTRY)
    code = (
        "import poolskip_zoo, timm; from poolskip_zoo.registry.catalogue import registered_models; "
        f"print(poolskip_zoo.__file__, type(timm.create_model({NAME!r})).__name__, registered_models(test=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "PoolSkipConvNeXt" in done.stdout
    assert repr(NAME) in done.stdout
