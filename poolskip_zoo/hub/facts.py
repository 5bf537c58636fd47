"""Facts about registered models, for `poolskip info`, tables and cards."""

from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from timm.models import create_model, get_arch_pretrained_cfgs

from ..diagnostics.cost import count_macs, count_parameters, measure_latency
from ..layers import pool_skip_modules
from ..registry.catalogue import base_name, create_base, registered_models, warm_starts
from ..registry.checkpoint import SUFFIX, SegmentationCheckpoint, checkpoints, find

__all__ = ["describe"]


def describe(name: str, latency: bool = False) -> dict[str, Any]:
    """Size, cost, placement and weights of a registered model, with its base's size and cost.

    Both are built with the keywords that the tag's record carries; a name without tag stands for its first tag.

    Args:
        name: registered name, with or without a tag.
        latency: whether to measure the latency of both on this CPU.

    Returns:
        Plain data: `model`, `model_args`, `input_size`, `num_classes`, `parameters`, `macs`, `latency_ms` if measured,
        `places`, `checkpoints`, `warm_starts`, and `base` with the base's `name` and the same numbers.

    Raises:
        ValueError: if no model of this package has the name, or it is that of a segmentation checkpoint; the message
            lists similar ones.
    """
    arch, _, tag = name.partition(".")
    cfgs = get_arch_pretrained_cfgs(arch)
    own = registered_models(test=True)
    if isinstance(find(name), SegmentationCheckpoint):
        raise ValueError(f"{name} is a segmentation model, not a backbone: its card is hub_cards/{name}/README.md")
    if arch in own and tag and name not in cfgs:
        tags = ", ".join(cfg.tag for cfg in cfgs.values() if cfg.tag)
        raise ValueError(f"{arch} has no weights {tag!r}: {'choose ' + tags if tags else 'it has none'}")
    if arch not in own:
        close = get_close_matches(name, registered_models(), 5, 0.4)
        if arch + SUFFIX in own:  # timm's base
            close = [arch + SUFFIX]
        hint = f"similar: {', '.join(close)}" if close else "`poolskip list` prints all"
        raise ValueError(f"no model {name!r} in this package; {hint}")
    cfg = cfgs[name] if tag else next(iter(cfgs.values()))
    record = find(name)
    model_args = record.model_args if record else {}

    def build(**device: str) -> list[Any]:
        settings = {"num_classes": cfg.num_classes, **model_args, **device}
        return [make(arch, **settings) for make in (create_model, create_base)]

    models = build(device="meta")
    facts: list[dict[str, Any]] = [
        {"name": each, "parameters": count_parameters(model), "macs": count_macs(model, cfg.input_size)}
        for each, model in zip((arch, base_name(arch)), models, strict=True)
    ]
    if latency:
        x = torch.rand(1, *cfg.input_size)
        programs = [partial(model.eval(), x) for model in build()]
        for fact, milliseconds in zip(facts, measure_latency(programs), strict=True):
            fact["latency_ms"] = milliseconds
    variant, base = facts
    places = [
        {"name": place.rpartition(".")[0], "pool_size": list(layer.window), "groups": layer.conv.groups}
        for place, layer in pool_skip_modules(models[0]).items()
    ]
    return {
        "model": name,
        "model_args": model_args,
        "input_size": list(cfg.input_size),
        "num_classes": cfg.num_classes,
        **{key: value for key, value in variant.items() if key != "name"},
        "places": places,
        "checkpoints": [{"name": c.name, "metrics": c.metrics} for c in checkpoints() if c.arch == arch],
        "warm_starts": [start for start in warm_starts() if start.partition(".")[0] == arch],
        "base": base,
    }
