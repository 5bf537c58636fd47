"""Our names in segmentation-models-pytorch (smp): encoders, their weights, and heads.

smp's `get_encoder` looks for weights on the Hub before the encoder sees anything, and drops the keywords of every
encoder but its own timm ones. So it is wrapped, as `get_preprocessing_params` is: our names are built here, every other
name is passed on. smp's table of encoders lists ours as well.

Importing smp takes time, so it is left alone until somebody else imports it.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, list_models

from .catalogue import registered_models
from .checkpoint import find

__all__ = ["encoder_names", "register_with_smp"]

_SMP = "segmentation_models_pytorch"


def encoder_names() -> list[str]:
    """Names that are encoders of smp: all, `test_*` too, but those for small images, whose maps are no pyramid."""
    small = set(list_models(module="cifar_poolskip"))
    return [name for name in registered_models(test=True) if name not in small]


def register_with_smp() -> None:
    """Register everything with smp: at once if it is imported, else when it is."""
    if _SMP in sys.modules:
        _register(sys.modules[_SMP])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers when smp has been imported, and is gone then; whoever only looks for smp finds it as ever."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _SMP:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # Set on this one loader: what else it can do, such as reading resources, stays.
            del loader.exec_module
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register(module)

        loader.exec_module = exec_module
        return spec


def _register(smp: ModuleType) -> None:
    from ..models.segmentation.deeplab import DeepLabV3PlusPoolSkip, DeepLabV3PoolSkip
    from ..models.segmentation.encoder import build_encoder
    from ..models.segmentation.segnet import SegNet
    from ..models.segmentation.unet import UnetPoolSkip

    for name in encoder_names():
        settings = {tag: _preprocessing(cfg) for tag, cfg in _weights(name).items()}
        smp.encoders.encoders[name] = {
            "encoder": build_encoder,
            "pretrained_settings": settings,
            "params": {"name": name},
        }
    for wrapped in (_get_encoder, _get_preprocessing_params):
        _wrap(getattr(smp.encoders, wrapped.__name__[1:]), wrapped)
    smp.base.SegmentationModel.generate_model_card = _card_with_import(smp.base.SegmentationModel.generate_model_card)
    heads: dict[str, type] = {
        "unet_poolskip": UnetPoolSkip,
        "deeplabv3_poolskip": DeepLabV3PoolSkip,
        "deeplabv3plus_poolskip": DeepLabV3PlusPoolSkip,
        "segnet": SegNet,
    }
    for name, head in heads.items():
        smp.MODEL_ARCHITECTURES_MAPPING[name] = head
        # Where smp.from_pretrained looks a class up.
        setattr(smp, head.__name__, head)


def _wrap(original: Callable[..., Any], wrapper: Callable[..., Any]) -> None:
    """Put the wrapper wherever the function is: every decoder of smp imports it by name, and others may have."""
    bound = functools.wraps(original)(functools.partial(wrapper, original))
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(original.__name__) is original:
            setattr(module, original.__name__, bound)


def _card_with_import(original: Callable[..., Any]) -> Callable[..., Any]:
    """smp's card, of models of ours with the import by which smp knows them."""
    from ..layers import pool_skip_modules
    from ..models.segmentation.head import PoolSkipHead

    @functools.wraps(original)
    def generate_model_card(self: Any, *args: Any, **kwargs: Any) -> Any:
        card = original(self, *args, **kwargs)
        if isinstance(self, PoolSkipHead) or pool_skip_modules(self):
            first = "import segmentation_models_pytorch as smp\n"
            card.text = card.text.replace(first, f"{first}\nimport poolskip_zoo  # registers the model with smp\n", 1)
            card.data.tags.append("pool-skip")
        return card

    return generate_model_card


def _get_encoder(
    original: Callable[..., Any],
    name: str,
    in_channels: int = 3,
    depth: int = 5,
    weights: str | None = None,
    output_stride: int = 32,
    **kwargs: Any,
) -> Any:
    arch, dot, tag = name.partition(".")
    if dot and arch in encoder_names():
        raise ValueError(
            f"the encoder {name!r} has a tag: give encoder_name={arch!r} with encoder_weights={tag!r}, or "
            f"encoder_name={'tu-' + name!r}"
        )
    plain = name.removeprefix("tu-")
    if weights == "imagenet" and name != plain and plain in encoder_names():
        # smp's default means the same by either name; without a tag timm would take a checkpoint of ours first.
        plain = f"{plain}.{_find_weights(plain, weights, optional=True).tag}"
        name = f"tu-{plain}"
    record = find(plain)
    small_stem = record is not None and "stem_stride" in record.model_args
    if small_stem:
        # Decoders need maps at 2, 4, … 32; the weights are the same at every stride.
        kwargs.setdefault("stem_stride", 4)
    # smp's own class for tu- looks at the maps of a model that it makes without the keywords.
    if name not in encoder_names() and not small_stem:
        try:
            return original(name, in_channels, depth, weights, output_stride, **kwargs)
        except AssertionError as error:
            if output_stride == 32:
                raise
            # How timm refuses an output stride, VGG's for one.
            raise ValueError(f"output_stride={output_stride} is not possible: {name} supports only 32") from error
    from ..models.segmentation.encoder import build_encoder

    if weights is not None and name == plain:
        name = f"{name}.{_find_weights(name, weights, optional=True).tag}"
    return build_encoder(name.removeprefix("tu-"), in_channels, depth, output_stride, weights is not None, **kwargs)


def _get_preprocessing_params(
    original: Callable[..., Any], encoder_name: str, pretrained: str = "imagenet"
) -> dict[str, Any]:
    if encoder_name not in encoder_names():
        return original(encoder_name, pretrained)
    if not _weights(encoder_name):
        raise ValueError(f"the encoder {encoder_name!r} has no weights, and so no preprocessing of its own")
    return _preprocessing(_find_weights(encoder_name, pretrained))


def _preprocessing(cfg: PretrainedCfg) -> dict[str, Any]:
    return {"input_space": "RGB", "input_range": [0, 1], "mean": list(cfg.mean), "std": list(cfg.std)}


def _weights(name: str) -> dict[str, PretrainedCfg]:
    """What `encoder_weights` can be: "imagenet" for the first warm start, and every tag that has weights."""
    cfgs = {cfg.tag: cfg for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights and cfg.tag}
    warm = [cfg for tag, cfg in cfgs.items() if find(f"{name}.{tag}") is None]
    return {**({"imagenet": warm[0]} if warm else {}), **cfgs}


def _find_weights(name: str, weights: str, optional: bool = False) -> PretrainedCfg:
    """The configuration of weights, which need not be given where they are optional."""
    known = _weights(name)
    if weights not in known:
        choices = [*known, None] if optional else known
        raise ValueError(f"no weights {weights!r} for the encoder {name!r}: choose {', '.join(map(repr, choices))}")
    return known[weights]
