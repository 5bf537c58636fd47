"""The model itself: weights, head, input, precision, layout, copies and settings."""

import copy
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import save_for_hf
from torch import nn

from poolskip_zoo.layers import pool_skip_modules

from .common import alike, assert_same, contract, create, gradients, images, pair


@contract
def check_zero_init_is_the_base(name: str) -> None:
    base, variant = pair(name)
    x = images(name)
    assert_same(variant.eval()(x), base.eval()(x))
    base_gradients, variant_gradients = gradients(base.train(), x), gradients(variant.train(), x)
    names = [n for n, _ in variant.named_parameters()]
    kept = [g for n, g in zip(names, variant_gradients, strict=True) if ".pool_skip." not in n]
    assert_same(kept, base_gradients)


@contract
def check_every_pool_skip_works_and_learns(name: str) -> None:
    """On the feature maps: a head that reads the class token alone never sees the last block's patches."""
    model = create(name).eval()
    x = images(name)
    expected = model.forward_features(x)
    expected.square().mean().backward()
    layers = pool_skip_modules(model)
    assert layers
    for place, layer in layers.items():
        weight = layer.conv.weight
        assert weight.grad is not None, f"{place} gets no gradient"
        assert weight.grad.any(), f"{place} gets a zero gradient"
        with torch.no_grad():
            before = weight.clone()
            weight.zero_()
            assert not torch.equal(model.forward_features(x), expected), f"{place} changes nothing"
            weight.copy_(before)


@contract
def check_names_in_the_configuration(name: str) -> None:
    model = timm.create_model(name)
    for entry in ("first_conv", "classifier"):
        names = model.pretrained_cfg[entry]
        for module in (names,) if isinstance(names, str) else names:
            assert isinstance(model.get_submodule(module), (nn.Conv2d, nn.Linear))
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    assert first in model.pretrained_cfg["first_conv"]


@contract
def check_num_classes(name: str) -> None:
    x = images(name)
    for classes in (0, 7):
        assert alike(name, lambda model: model.eval()(x), num_classes=classes)
    model = create(name, num_classes=0).eval()
    assert model(x).shape == (2, model.head_hidden_size)
    assert create(name, num_classes=7)(x).shape == (2, 7)


@contract
def check_reset_classifier(name: str) -> None:
    x = images(name)

    def reset(*args: Any) -> Callable[[nn.Module], Any]:
        def use(model: nn.Module) -> Any:
            model.reset_classifier(*args)
            return model.eval()(x), model.num_classes

        return use

    assert alike(name, reset(5))
    assert alike(name, reset(0))
    alike(name, reset(0, ""))
    assert alike(name, lambda model: model.forward_head(model.eval().forward_features(x), pre_logits=True))


@contract
def check_in_chans(name: str) -> None:
    for channels in (1, 4):
        x = images(name, channels=channels)
        assert alike(name, lambda model, x=x: model.eval()(x), in_chans=channels)


@contract
def check_global_pool(name: str) -> None:
    x = images(name)
    pools = ("avg", "max", "avgmax", "catavgmax", "token", "map", "")
    done = [alike(name, lambda model: model.eval()(x), global_pool=pool) for pool in pools]
    assert sum(done) >= 3


@contract
def check_drop_path(name: str) -> bool:
    def use(model: nn.Module) -> Any:
        assert any(isinstance(module, DropPath) for module in model.modules())
        return model.train()(images(name, batch=8))

    return alike(name, use, drop_path_rate=0.5)


@contract
def check_grad_checkpointing(name: str) -> bool:
    def use(model: nn.Module) -> Any:
        model.set_grad_checkpointing()
        return model.train()(images(name))

    if not alike(name, use):
        return False
    model = create(name).train()
    expected = gradients(model, images(name))
    model.set_grad_checkpointing()
    assert_same(gradients(model, images(name)), expected)
    return True


@contract
def check_bfloat16_autocast(name: str) -> None:
    model = create(name).train()
    x = images(name)
    expected = model.eval()(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.99
    for layer in pool_skip_modules(model).values():
        assert layer.conv.weight.grad.dtype == torch.float32
        assert layer.conv.weight.grad.isfinite().all()


@contract
def check_channels_last(name: str) -> None:
    model = create(name).eval()
    x = images(name)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    layouts = []
    for layer in pool_skip_modules(model).values():
        layer.register_forward_hook(
            # A map with one channel or one pixel is in both layouts.
            lambda _, inputs, y: layouts.append(
                y.dim() != 4 or y.is_contiguous(memory_format=torch.channels_last) or inputs[0].is_contiguous()
            )
        )
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-4)
    assert layouts
    assert all(layouts)


@contract
def check_device_and_dtype(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    model = create(name, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model(images(name).bfloat16()).dtype == torch.bfloat16


@contract
def check_copies(name: str) -> None:
    model = create(name).eval()
    x = images(name)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(twin(x), expected)
        assert list(twin.state_dict()) == list(model.state_dict())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(twin(x), expected)
    assert_same(model(x), expected)


@contract
def check_settings_are_refused(name: str) -> None:
    refused: dict[str, Any] = {
        "unknown placement 'nowhere'": {"placement": "nowhere"},
        "placement ['layerz.*'] matches nothing": {"placement": "layerz.*"},
        "pool_size=1": {"pool_size": 1},
        "pool_size=2.5": {"pool_size": 2.5},
        "groups=997": {"groups": 997},
        "unknown pool_skip setting e:": {"e": 2},
        "expected a dict": "default",
    }
    for word, settings in refused.items():
        with pytest.raises(ValueError, match=re.escape(word)) as error:
            timm.create_model(name, pool_skip=settings)
        assert "\n" not in str(error.value)
    assert not alike(name, lambda model: model, no_such_keyword=1)


@contract
def check_settings_travel(name: str) -> None:
    """Saved in timm's way and created from the folder: same places, windows and outputs."""
    settings = {"pool_size": 3}
    model = create(name, pool_skip=settings, in_chans=1, num_classes=7).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, safe_serialization=True)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["config.json", "model.safetensors"]
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(again) is type(model)
    assert {tuple(layer.window) for layer in pool_skip_modules(again).values()} == {(3, 3)}
    x = images(name, channels=1)
    assert_same(again(x), model(x))
