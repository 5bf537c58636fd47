"""ViT and DeiT with Pool Skip, registered with timm."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from ..models.vit import PoolSkipVisionTransformer, PoolSkipVisionTransformerDistilled
from .build import VIT_POOLING, create
from .checkpoint import pool_skip_cfgs

_BASES = (
    *("vit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_small_patch16_224", "vit_small_patch16_384"),
    *("vit_base_patch32_224", "vit_base_patch32_384", "vit_base_patch16_224", "vit_base_patch16_384"),
    *("vit_base_patch8_224", "vit_large_patch16_224", "vit_large_patch16_384"),
    *("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224", "deit_base_patch16_384"),
    *("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224"),
    *("deit_base_distilled_patch16_224", "deit_base_distilled_patch16_384", "test_vit"),
)

default_cfgs = generate_default_cfgs({**pool_skip_cfgs(_BASES)})

_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any], **model_args: Any) -> Any:
    """Build by the variant's own arguments; the caller's `kwargs` win over them."""
    model_class = PoolSkipVisionTransformerDistilled if "_distilled_" in variant else PoolSkipVisionTransformer
    out_indices = kwargs.pop("out_indices", 3)
    return create(
        model_class,
        variant,
        pretrained,
        optional=VIT_POOLING if "global_pool" in kwargs else (),
        # DeiT-III checkpoints name their layer scale otherwise.
        filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=variant.startswith("deit")),
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**model_args, **kwargs},
    )


@register_model
def vit_tiny_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Tiny/16 at 224 pixels with Pool Skip."""
    return _create("vit_tiny_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_TINY)


@register_model
def vit_tiny_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Tiny/16 at 384 pixels with Pool Skip."""
    return _create("vit_tiny_patch16_384_poolskip", pretrained, kwargs, patch_size=16, **_TINY)


@register_model
def vit_small_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Small/16 at 224 pixels with Pool Skip."""
    return _create("vit_small_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_SMALL)


@register_model
def vit_small_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Small/16 at 384 pixels with Pool Skip."""
    return _create("vit_small_patch16_384_poolskip", pretrained, kwargs, patch_size=16, **_SMALL)


@register_model
def vit_base_patch32_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/32 at 224 pixels with Pool Skip."""
    return _create("vit_base_patch32_224_poolskip", pretrained, kwargs, patch_size=32, **_BASE)


@register_model
def vit_base_patch32_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/32 at 384 pixels with Pool Skip."""
    return _create("vit_base_patch32_384_poolskip", pretrained, kwargs, patch_size=32, **_BASE)


@register_model
def vit_base_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/16 at 224 pixels with Pool Skip."""
    return _create("vit_base_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_BASE)


@register_model
def vit_base_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/16 at 384 pixels with Pool Skip."""
    return _create("vit_base_patch16_384_poolskip", pretrained, kwargs, patch_size=16, **_BASE)


@register_model
def vit_base_patch8_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Base/8 at 224 pixels with Pool Skip."""
    return _create("vit_base_patch8_224_poolskip", pretrained, kwargs, patch_size=8, **_BASE)


@register_model
def vit_large_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Large/16 at 224 pixels with Pool Skip."""
    return _create("vit_large_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_LARGE)


@register_model
def vit_large_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """ViT-Large/16 at 384 pixels with Pool Skip."""
    return _create("vit_large_patch16_384_poolskip", pretrained, kwargs, patch_size=16, **_LARGE)


@register_model
def deit_tiny_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Tiny/16 at 224 pixels with Pool Skip."""
    return _create("deit_tiny_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_TINY)


@register_model
def deit_small_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Small/16 at 224 pixels with Pool Skip."""
    return _create("deit_small_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_SMALL)


@register_model
def deit_base_patch16_224_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Base/16 at 224 pixels with Pool Skip."""
    return _create("deit_base_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_BASE)


@register_model
def deit_base_patch16_384_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """DeiT-Base/16 at 384 pixels with Pool Skip."""
    return _create("deit_base_patch16_384_poolskip", pretrained, kwargs, patch_size=16, **_BASE)


@register_model
def deit_tiny_distilled_patch16_224_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Tiny/16 at 224 pixels with Pool Skip."""
    return _create("deit_tiny_distilled_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_TINY)


@register_model
def deit_small_distilled_patch16_224_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Small/16 at 224 pixels with Pool Skip."""
    return _create("deit_small_distilled_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_SMALL)


@register_model
def deit_base_distilled_patch16_224_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Base/16 at 224 pixels with Pool Skip."""
    return _create("deit_base_distilled_patch16_224_poolskip", pretrained, kwargs, patch_size=16, **_BASE)


@register_model
def deit_base_distilled_patch16_384_poolskip(
    pretrained: bool = False, **kwargs: Any
) -> PoolSkipVisionTransformerDistilled:
    """Distilled DeiT-Base/16 at 384 pixels with Pool Skip."""
    return _create("deit_base_distilled_patch16_384_poolskip", pretrained, kwargs, patch_size=16, **_BASE)


@register_model
def test_vit_poolskip(pretrained: bool = False, **kwargs: Any) -> PoolSkipVisionTransformer:
    """Tiny ViT for tests, of any image size."""
    sizes = {"patch_size": 16, "embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 3}
    return _create("test_vit_poolskip", pretrained, kwargs, **sizes, dynamic_img_size=True)
