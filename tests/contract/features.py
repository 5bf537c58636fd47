"""Feature maps: wrappers, intermediates, strides."""

from typing import Any

import timm
import torch
from torch import nn

from .common import alike, assert_same, contract, create, create_base, images, side


def _features(name: str, wrapper: str) -> bool:
    x = images(name)

    def use(model: nn.Module) -> Any:
        info = [(i["num_chs"], i["reduction"], i["module"]) for i in model.feature_info.info]
        maps = model.eval()(x)
        for (channels, reduction, _), feature in zip(info, maps, strict=False):
            assert feature.shape[1] == channels
            assert feature.shape[-1] == -(-side(name) // reduction)
        return maps, info

    if not alike(name, use, features_only=True, feature_cls=wrapper):
        return False
    variant = create(name, features_only=True, feature_cls=wrapper).eval()
    base = create_base(name, features_only=True, feature_cls=wrapper).eval()
    assert not torch.equal(variant(x)[-1], base(x)[-1])
    return True


@contract
def check_features_list(name: str) -> bool:
    return _features(name, "list")


@contract
def check_features_getter(name: str) -> bool:
    return _features(name, "getter")


@contract
def check_features_fx(name: str) -> bool:
    return _features(name, "fx")


@contract
def check_out_indices(name: str) -> None:
    x = images(name)
    for indices in ((0, 2), (1,), 2):
        assert alike(name, lambda model: model.eval()(x), features_only=True, out_indices=indices)
    assert not alike(name, lambda model: model.eval()(x), features_only=True, out_indices=(0, 99))
    assert len(create(name, features_only=True, out_indices=(0, 2))(x)) == 2


@contract
def check_output_stride(name: str) -> bool:
    reduction = timm.create_model(name).feature_info[-1]["reduction"]
    x = images(name)

    def use(model: nn.Module) -> Any:
        feature = model.eval().forward_features(x)
        assert feature.shape[-1] == side(name) // (reduction // 2)
        return feature, model(x)

    return alike(name, use, output_stride=reduction // 2)


@contract
def check_forward_intermediates(name: str) -> None:
    x = images(name)
    options: list[dict[str, Any]] = [
        {},
        {"indices": 2},
        {"indices": [0, -1], "stop_early": True},
        {"indices": [1], "stop_early": True, "intermediates_only": True},
    ]
    for option in options:
        assert alike(name, lambda model, option=option: model.eval().forward_intermediates(x, **option))
    model = create(name).eval()
    assert_same(model.forward_intermediates(x)[0], model.forward_features(x))


@contract
def check_prune_intermediate_layers(name: str) -> None:
    x = images(name)
    for indices in ([1], 1, [0]):

        def use(model: nn.Module, indices: Any = indices) -> Any:
            whole = sum(1 for _ in model.parameters())
            kept = model.eval().prune_intermediate_layers(indices)
            assert sum(1 for _ in model.parameters()) < whole
            return kept, model.forward_intermediates(x, kept, intermediates_only=True)

        assert alike(name, use)
    model = create(name).eval()
    expected = model.forward_intermediates(x, [1], intermediates_only=True)
    kept = model.prune_intermediate_layers([1])
    assert_same(model.forward_intermediates(x, kept, intermediates_only=True), expected)
