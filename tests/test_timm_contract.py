"""The tiny variants keep every habit of their bases; `contract/` says what that is."""

import pytest
import timm
from contract import CHECKS

import poolskip_zoo  # noqa: F401

# What timm's base cannot do, and the variant refuses alike.
REFUSES = {
    "test_resnet_poolskip": set(),
    "test_resnet_cifar_poolskip": set(),
    "test_vgg_poolskip": {"output_stride", "drop_path", "grad_checkpointing"},
    "test_vit_poolskip": {"output_stride", "features_list", "features_fx"},
}
# Under torch 2.6 torch.fx cannot trace the base's attention; where it can, the variant is traced too.
EITHER = {("test_vit_poolskip", "fx")}
# Made of the blocks of test_resnet_poolskip, whose graphs are tested always.
SLOW = {("test_resnet_cifar_poolskip", check) for check in ("compile", "export", "onnx", "script")}
CASES = [
    pytest.param(name, check, marks=[pytest.mark.slow] if (name, check) in SLOW else [])
    for name in REFUSES
    for check in CHECKS
]


def test_every_tiny_variant_is_tested():
    assert sorted(REFUSES) == sorted(timm.list_models("test_*_poolskip"))


@pytest.mark.parametrize(("name", "check"), CASES)
def test_contract(name, check):
    possible = CHECKS[check](name) is not False
    assert possible == (check not in REFUSES[name]) or (name, check) in EITHER
