"""Model cards: README.md, config.json and checksums of a checkpoint's folder, made from its record."""

import json
import tempfile
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import create_model
from timm.models._hub import save_config_for_hf
from torch import nn

from ..data import DATASETS
from ..diagnostics.cost import count_macs, count_parameters
from ..layers import pool_skip_modules
from ..registry.catalogue import base_name
from ..registry.checkpoint import SUFFIX, Checkpoint, find
from .verify import WEIGHTS, checkpoint_cfg, checksums, golden

__all__ = ["card_text", "check_front_matter", "config", "write_card"]

# The data sets' names on the Hub; the JPEG copies have none of their own.
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar10_jpeg": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet_jpeg": "zh-plus/tiny-imagenet",
}
# Our metrics: the Hub's type and a name for people.
_METRICS = {"top1": ("accuracy", "Top-1 accuracy, %"), "top5": ("accuracy", "Top-5 accuracy, %")}
# What our cards may say where the Hub takes only values that it knows; nothing offline checks them otherwise.
_ALLOWED = {
    "license": {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"},
    "library_name": {"timm"},
    "pipeline_tag": {"image-classification", "image-segmentation"},
}
_CITATION = """\
@inproceedings{sun2025beyond,
  title     = {Beyond Skip Connection: Pooling and Unpooling Design for Elimination Singularities},
  author    = {Sun, Chengkun and Pan, Jinqian and Jin, Zhuoli and Terry, Russell Stevens and Bian, Jiang and Xu, Jie},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2025},
  note      = {arXiv:2409.13154}
}"""
_BODY = """\
# {name}

{what}

## Use

```python
import poolskip_zoo  # registers the model with timm; without it timm says "Unknown model"
import timm
import torch

model = timm.create_model("{name}", pretrained=True).eval()
logits = model(torch.rand(1, {shape}))  # (1, {classes})
```

`timm.create_model("hf-hub:{repo}", pretrained=True)` loads it from the Hub,
`"local-dir:FOLDER"` from a copy of this folder; both need `import poolskip_zoo` too. Preprocessing is timm's, by
`timm.data.resolve_model_data_config(model)`. To ONNX, with any batch size:

```python
program = torch.onnx.export(model, (torch.rand(2, {shape}),), dynamic_shapes=({{0: "batch"}},), dynamo=True)
program.save("{name}.onnx")
```

## Results

{results}

Measured on the test set by `poolskip validate {name} --data-dir DATA`. Costs are of one {size} image.

## Training

Data: {data}. Terms of the data: {terms}.
One run, seed {seed}, {hours:.2f} hours on {hardware}{speed}.
The base model and the variant are trained by the same recipe.
`poolskip train {recipe_name} --data-dir DATA{seed_option}` repeats it:

```yaml
{recipe}
```

## Limits

{limits}

## Files

`model.safetensors` (the weights), `config.json` (for timm), `golden.safetensors` (an input and its output) and
`SHA256SUMS`. `poolskip hub verify {name}` checks them all.

## Citation

```bibtex
{citation}
```
"""


def card_text(record: Checkpoint) -> str:
    """Write a checkpoint's model card.

    Args:
        record: the checkpoint.

    Returns:
        The whole README.md, with its front matter.

    Raises:
        ValueError: if the record names no recipe of this package, or a value that the Hub does not know.
    """
    model, data = _on_meta(record), DATASETS[record.dataset]
    shape = checkpoint_cfg(record).input_size
    text = _BODY.format(
        name=record.name,
        repo=record.hub_id.partition("@")[0],
        what=_what(record),
        shape=", ".join(map(str, shape)),
        size="×".join(map(str, shape[1:])),
        classes=data.num_classes,
        results=_results(record),
        data=data.title,
        terms=data.licence,
        seed=record.seed,
        seed_option=f" --set seed={record.seed}",
        hours=record.hours,
        hardware=record.hardware,
        speed=_speed(record),
        recipe_name=record.recipe,
        recipe=_recipe(record),
        limits=_limits(record, model),
        citation=_CITATION,
    )
    # Dumped by yaml itself: the client's own dump differs between its versions.
    front = yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True, width=10_000)
    card = f"---\n{front}---\n\n{text}"
    check_front_matter(card)
    return card


def config(record: Checkpoint) -> dict[str, Any]:
    """timm's config.json of a checkpoint, with its own licence and tag.

    Args:
        record: the checkpoint.

    Returns:
        Plain data.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(_on_meta(record), str(path), {"label_names": DATASETS[record.dataset].labels})
        return json.loads(path.read_text(encoding="utf-8"))


def write_card(record: Checkpoint, folder: Path) -> None:
    """Write README.md, config.json and SHA256SUMS into a folder with weights, and the golden output where missing.

    Args:
        record: the checkpoint.
        folder: folder with `model.safetensors`.

    Raises:
        ValueError: as `card_text`.
        RuntimeError: if there are no weights or they do not fit.
    """
    if not (folder / WEIGHTS).is_file():
        raise RuntimeError(f"{folder} has no {WEIGHTS}: `poolskip hub add RUN_FOLDER` puts it there")
    contents = {
        "README.md": card_text(record).encode(),
        "config.json": (json.dumps(config(record), indent=2) + "\n").encode(),
    }
    if not (folder / "golden.safetensors").is_file():
        contents["golden.safetensors"] = golden(record, folder / WEIGHTS)
    for name, content in contents.items():
        _write(folder / name, content)
    _write(folder / "SHA256SUMS", checksums(folder).encode())


def check_front_matter(card: str) -> None:
    """Check a card's front matter without the Hub.

    Args:
        card: text of a README.md.

    Raises:
        ValueError: if it has none, or lacks an entry, or has one that the Hub does not take.
    """
    parsed = ModelCard(card)
    data = parsed.data.to_dict()
    for key, allowed in _ALLOWED.items():
        if data.get(key) not in allowed:
            raise ValueError(f"front matter: {key} is {data.get(key)!r}, not one of {', '.join(sorted(allowed))}")
    unknown = set(data.get("datasets") or []) - set(_HUB_DATASETS.values())
    if unknown or not data.get("datasets"):
        raise ValueError(f"front matter: datasets {sorted(unknown)} are not among {sorted(_HUB_DATASETS.values())}")
    results = getattr(parsed.data, "eval_results", None) or []
    if not results or not all(0 <= result.metric_value <= 100 for result in results):
        raise ValueError("front matter: model-index must have metrics between 0 and 100")


def _front_matter(record: Checkpoint) -> dict[str, Any]:
    data = DATASETS[record.dataset]
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=_HUB_DATASETS[record.dataset],
            dataset_name=data.title,
            dataset_split="test",
            metric_type=_METRICS[key][0],
            metric_name=_METRICS[key][1],
            metric_value=value,
        )
        for key, value in record.metrics.items()
    ]
    # No base_model: on the Hub it means a model that this one was made from, and none was.
    card = ModelCardData(
        license=record.licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["pool-skip"] if record.arch.endswith(SUFFIX) else [])],
        datasets=[_HUB_DATASETS[record.dataset]],
        model_name=record.name,
        eval_results=results,
    )
    order = ("license", "library_name", "pipeline_tag", "tags", "datasets", "model-index")
    entries = card.to_dict()
    return {key: entries[key] for key in order}


def _on_meta(record: Checkpoint) -> nn.Module:
    return create_model(record.arch, pretrained_cfg=checkpoint_cfg(record), device="meta")


def _twin(record: Checkpoint) -> tuple[str, Checkpoint | None]:
    """Architecture of the base of a variant, or of the variant of a base, and its checkpoint by the same tag."""
    base = base_name(record.arch)
    arch = base if record.arch != base else base + SUFFIX
    return arch, find(f"{arch}.{record.tag}")


def _what(record: Checkpoint) -> str:
    data = DATASETS[record.dataset].title
    if not record.arch.endswith(SUFFIX):
        return _wrapped(
            f"`{record.arch}` of poolskip-zoo, trained from scratch on {data}: the base model, without Pool Skip, "
            f"beside which `{_twin(record)[0]}.{record.tag}` is measured."
        )
    return _wrapped(
        f"`{base_name(record.arch)}` with [Pool Skip](https://arxiv.org/abs/2409.13154), trained from "
        f"scratch on {data}. Pool Skip adds to a convolution's output a 3×3 convolution of its window maxima: "
        "y = x + conv(max_unpool(max_pool(x))). This is an independent implementation, not the authors' weights."
    )


def _results(record: Checkpoint) -> str:
    """A table of the checkpoint and its twin, the base first."""
    arch, twin = _twin(record)
    cfg = checkpoint_cfg(record)
    lines = [
        "| model | top-1, % | top-5, % | parameters, M | GMACs | hours | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for name, one in ((record.arch, record), (arch, twin)):
        model = create_model(name, device="meta", num_classes=cfg.num_classes)
        known = (one.metrics if one else {}, one and one.hours, one and one.images_per_second)
        cells = (
            f"`{name}.{record.tag}`" if one else f"`{name}`, not trained",
            *(f"{known[0][key]:.2f}" if key in known[0] else "–" for key in _METRICS),
            f"{count_parameters(model) / 1e6:.2f}",
            f"{count_macs(model, cfg.input_size) / 1e9:.3g}",
            "–" if known[1] is None else f"{known[1]:.2f}",
            "–" if known[2] is None else f"{known[2]:.0f}",
        )
        rows.append((name, "| " + " | ".join(cells) + " |"))
    return "\n".join([*lines, *(row for _, row in sorted(rows, key=lambda each: each[0].endswith(SUFFIX)))])


def _speed(record: Checkpoint) -> str:
    known = (
        f"{record.images_per_second:.0f} images/s" if record.images_per_second else "",
        f"torch {record.torch}" if record.torch else "",
    )
    return "".join(f", {each}" for each in known if each)


def _recipe(record: Checkpoint) -> str:
    path = files("poolskip_zoo") / "recipes" / f"{record.recipe}.yaml"
    if not path.is_file():
        raise ValueError(f"{record.name}: there is no recipe {record.recipe!r} in poolskip_zoo/recipes/")
    return path.read_text(encoding="utf-8").strip()


def _limits(record: Checkpoint, model: nn.Module) -> str:
    points = ["One run with one seed: a difference of a few tenths of a per cent means nothing."]
    places: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for name, layer in pool_skip_modules(model).items():
        places.setdefault((tuple(layer.window), layer.conv.groups), []).append(f"`{name.rpartition('.')[0]}`")
    if places:
        where = "; ".join(
            f"{len(names)} layers with windows of {'×'.join(map(str, window))} and convolutions of "
            f"{groups} {'group' if groups == 1 else 'groups'}, after {' … '.join(dict.fromkeys((names[0], names[-1])))}"
            for (window, groups), names in places.items()
        )
        points.append(f"The numbers speak for this placement of Pool Skip, not for the paper: {where}.")
    size = "×".join(map(str, checkpoint_cfg(record).input_size[1:]))
    points.append(f"Trained on {size} images of {DATASETS[record.dataset].num_classes} classes; it knows no others.")
    if record.dataset.endswith("_jpeg"):
        points.append("Its data are a JPEG copy: results on the original images may differ a little.")
    return "\n".join(_wrapped(f"- {point}", "  ") for point in points)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)
