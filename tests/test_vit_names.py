"""ViT and DeiT names take the weights of timm's."""

from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file

import poolskip_zoo  # noqa: F401  (registers the names)


@pytest.mark.parametrize(
    "base", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "deit_tiny_distilled_patch16_224.fb_in1k"]
)
def test_warm_start_through_timms_filter(base, tmp_path):
    arch, _, tag = base.partition(".")
    small = {"depth": 2, "embed_dim": 48}
    source = timm.create_model(arch, **small)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors")}, **small}
    for change in ({}, {"img_size": (96, 128)}, {"num_classes": 0}):
        create = partial(timm.create_model, **options, **change)
        x = torch.randn(1, 3, *change.get("img_size", (224, 224)))
        assert torch.equal(create(f"{arch}_poolskip.{tag}").eval()(x), create(base).eval()(x))
