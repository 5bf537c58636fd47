"""The one way every entrypoint builds its model: verified weights in, keys checked, timm's builder in between."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, get_arch_pretrained_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn

from .checkpoint import find
from .resolve import local_weights, require_timm_weights

__all__ = ["VIT_POOLING", "create", "shown"]

# Modules of timm's ViT that come and go with `global_pool`.
VIT_POOLING = ("norm", "fc_norm", "attn_pool")

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
ModelT = TypeVar("ModelT", bound=nn.Module)
FilterFn = Callable[[StateDict, nn.Module], StateDict]


def create(
    model_class: Callable[..., ModelT],
    variant: str,
    pretrained: bool = False,
    *,
    filter_fn: FilterFn | None = None,
    optional: tuple[str, ...] = (),
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_strict: bool = True,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> ModelT:
    """Build a registered model through timm's `build_model_with_cfg`.

    Arguments that the record of a trained checkpoint carries are applied where its tag is named, or is the one to load;
    the caller's own keywords win over them, entry by entry in `pool_skip`. Fresh weights come with the configuration of
    the first warm start, that of timm's model of the base's name, where there is one: a trained checkpoint may be of
    other data.

    Args:
        model_class: class to build.
        variant: registered name, without tag.
        pretrained: whether to load the weights of the configured tag.
        filter_fn: the base family's own checkpoint filter.
        optional: modules besides the classifier that a checkpoint may lack or have in excess.
        pretrained_cfg: tag or configuration, as timm passes it.
        pretrained_cfg_overlay: entries that override the configuration.
        pretrained_strict: whether to refuse a checkpoint whose keys are not the model's.
        cache_dir: folder of the Hub client's cache.
        kwargs: everything else timm's builder and the class take.

    Returns:
        The model, or timm's feature wrapper around it.

    Raises:
        RuntimeError: if weights were asked for and cannot be had, are not the recorded ones, or do not fit the model.
        ValueError: if a setting is unknown.
    """
    carried: dict[str, Any] = {}
    # Who names a trained checkpoint wants that one, and no base weights of a file in its place.
    named = isinstance(pretrained_cfg, str) and find(f"{variant}.{pretrained_cfg}") is not None
    if not (pretrained or pretrained_cfg):
        tags = [cfg.tag for cfg in get_arch_pretrained_cfgs(variant).values()]
        pretrained_cfg = next((tag for tag in tags if tag and find(f"{variant}.{tag}") is None), None)
    else:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
        checkpoint = find(f"{variant}.{cfg.tag}")
        # A folder has its own arguments, which timm passes on; its tag may be that of what it was trained from.
        if checkpoint is not None and not cfg.source:
            carried = {key: value for key, value in checkpoint.model_args.items() if key not in kwargs}
            kwargs = _merged(kwargs, checkpoint.model_args)
        else:
            kwargs = _merged(kwargs, kwargs.get("pretrained_model_args") or {})
        if not pretrained or cfg.source or cfg.file or cfg.state_dict:
            pass
        elif checkpoint is None:
            require_timm_weights(f"{variant}.{cfg.tag}", cfg, cache_dir)
        elif cfg.hf_hub_id == checkpoint.hub_id:
            path = local_weights(checkpoint, cache_dir)
            pretrained_cfg_overlay = {**(pretrained_cfg_overlay or {}), "file": str(path)}
    model: Any = build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        pretrained_strict=pretrained_strict,
        pretrained_filter_fn=partial(
            _fit, filter_fn=filter_fn, optional=optional, strict=pretrained_strict, warm=not named
        ),
        cache_dir=cache_dir,
        **carried,
        **kwargs,
    )
    if carried:
        # timm adds the caller's keywords to these, and writes all of them into config.json.
        model._model_args = carried
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    if names and len(names) != getattr(model, "num_classes", len(names)):  # timm's inference.py would print them
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "label_names": None}
    return model


def _merged(kwargs: dict[str, Any], of_source: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's keywords, with what their `pool_skip` leaves open as the source has it."""
    given, known = kwargs.get("pool_skip"), of_source.get("pool_skip")
    return {**kwargs, "pool_skip": {**known, **given}} if isinstance(given, dict) and known else kwargs


def _fit(
    state_dict: StateDict, model: Any, filter_fn: FilterFn | None, optional: tuple[str, ...], strict: bool, warm: bool
) -> StateDict:
    """Adapt a checkpoint to the model and refuse one that does not fit, which timm does not do in every case."""
    if filter_fn is not None:
        try:
            state_dict = filter_fn(state_dict, model)
        except TypeError as error:  # timm would call the filter again with one argument
            raise RuntimeError(f"cannot convert this checkpoint for {_name(model)}: {error}") from error
    own = model.state_dict()
    new = [key for key in own if ".pool_skip." in key]
    if new and not any(".pool_skip." in key for key in state_dict):
        if warm:
            state_dict = {**state_dict, **{key: torch.zeros_like(own[key]) for key in new}}
            _logger.info("%s is a warm start: the weights of the base model, Pool Skip at zero", _name(model))
        elif strict:
            raise RuntimeError(
                f"the checkpoint does not fit {_name(model)}: it has no Pool Skip, as those of base models. To start "
                f"from it with Pool Skip at zero, name no tag: {model.pretrained_cfg['architecture']!r}"
            )
    if strict:
        _check_keys(state_dict, own, model, optional)
    return state_dict


def _check_keys(state_dict: StateDict, own: StateDict, model: Any, optional: tuple[str, ...]) -> None:
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    free = tuple(f"{module}." for module in (*heads, *optional))
    missing = [key for key in own if key not in state_dict and not key.startswith(free)]
    excess = [key for key in state_dict if key not in own and not key.startswith(free)]
    if missing or excess:
        raise RuntimeError(
            f"the checkpoint does not fit {_name(model)}: it lacks {shown(missing)} and has {shown(excess)} in "
            f"excess. Is it of another model, of another pool_skip placement, or of other model arguments? "
            f"pretrained_strict=False loads what fits"
        )


def shown(keys: list[str]) -> str:
    """Number of keys and the first three, for a message."""
    return f"{len(keys)} keys ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})" if keys else "nothing"


def _name(model: Any) -> str:
    cfg = model.pretrained_cfg
    return ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
