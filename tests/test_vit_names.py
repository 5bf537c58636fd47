"""ViT and DeiT names follow timm's, and take timm's weights."""

from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file

import poolskip_zoo  # noqa: F401  (registers the names)
from poolskip_zoo.registry.vit_poolskip import _BASES


@pytest.mark.parametrize("base", _BASES)
def test_registered_names_follow_timm(base):
    ours, timms = (timm.create_model(name, device="meta") for name in (base + "_poolskip", base))
    new = set(ours.state_dict()) - set(timms.state_dict())
    blocks = range(len(timms.blocks))
    assert new == {f"blocks.{i}.mlp.fc2.pool_skip.conv.{n}" for i in blocks for n in ("weight", "bias")}
    assert {k: v.shape for k, v in timms.state_dict().items()}.items() <= {
        k: v.shape for k, v in ours.state_dict().items()
    }.items()
    assert ours.patch_embed.img_size == timms.patch_embed.img_size
    assert ours.blocks[0].attn.num_heads == timms.blocks[0].attn.num_heads
    assert ours.pretrained_cfg["input_size"] == timms.pretrained_cfg["input_size"]
    assert ours.pretrained_cfg["classifier"] == timms.pretrained_cfg["classifier"]


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
