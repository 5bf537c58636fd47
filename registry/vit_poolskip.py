"""ViT and DeiT with Pool Skip, registered with timm."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from ..models.vit import PoolSkipVisionTransformer, PoolSkipVisionTransformerDistilled
from .build import create
from .checkpoint import pool_skip_cfgs

_BASES = (
    "vit_tiny_patch16_224",
    "vit_tiny_patch16_384",
    "vit_small_patch16_224",
    "vit_small_patch16_384",
    "vit_base_patch32_224",
    "vit_base_patch32_384",
    "vit_base_patch16_224",
    "vit_base_patch16_384",
    "vit_base_patch8_224",
    "vit_large_patch16_224",
    "vit_large_patch16_384",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
    "test_vit",
)

default_cfgs = generate_default_cfgs({**pool_skip_cfgs(_BASES)})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PoolSkipVisionTransformer:
    out_indices = kwargs.pop("out_indices", 3)
    return create(
        PoolSkipVisionTransformer,
        variant,
        pretrained,
        # DeiT-III checkpoints name their layer scale otherwise.
        filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=variant.startswith("deit")),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _create_distilled(variant: str, pretrained: bool, **kwargs: Any) -> PoolSkipVisionTransformerDistilled:
    out_indices = kwargs.pop("out_indices", 3)
    return create(
        PoolSkipVisionTransformerDistilled,
        variant,
        pretrained,
        filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def vit_tiny_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Tiny/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("vit_tiny_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_tiny_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Tiny/16 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("vit_tiny_patch16_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_small_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Small/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("vit_small_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_small_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Small/16 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("vit_small_patch16_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch32_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/32 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_base_patch32_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch32_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/32 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_base_patch32_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_base_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/16 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_base_patch16_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_base_patch8_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/8 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 8, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("vit_base_patch8_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_large_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Large/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("vit_large_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def vit_large_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Large/16 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create("vit_large_patch16_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_tiny_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Tiny/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("deit_tiny_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_small_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Small/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("deit_small_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_base_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Base/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("deit_base_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_base_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Base/16 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("deit_base_patch16_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_tiny_distilled_patch16_224_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Tiny/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_distilled("deit_tiny_distilled_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_small_distilled_patch16_224_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Small/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_distilled("deit_small_distilled_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_base_distilled_patch16_224_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Base/16 at 224 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_distilled("deit_base_distilled_patch16_224_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def deit_base_distilled_patch16_384_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Base/16 at 384 pixels with Pool Skip."""
    model_args: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_distilled("deit_base_distilled_patch16_384_poolskip", pretrained, **{**model_args, **kwargs})


@register_model
def test_vit_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """Tiny ViT for tests, of any image size."""
    model_args: dict[str, Any] = {
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 6,
        "num_heads": 2,
        "mlp_ratio": 3,
        "dynamic_img_size": True,
    }
    return _create("test_vit_poolskip", pretrained, **{**model_args, **kwargs})
