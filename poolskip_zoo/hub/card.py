"""Model cards: README.md, config.json and checksums of a checkpoint's folder, made from its record."""

import dataclasses
import json
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import create_model
from torch import nn

from ..contexts import write_atomic
from ..data import DATASETS
from ..diagnostics.cost import count_macs, count_parameters
from ..layers import pool_skip_modules
from ..registry.catalogue import base_name, create_base
from ..registry.checkpoint import SUFFIX, WEIGHTS, Checkpoint, SegmentationCheckpoint, find, timm_config
from ..registry.segmentation import build_recorded, smp_config
from . import segmentation
from .template import BODY, CITATION, FILES_SECTION, TRAIN_FIRST, USE
from .verify import checkpoint_cfg, checksums, golden

__all__ = ["card_text", "check_front_matter", "config", "result_rows", "write_card"]

# The data sets' names on the Hub; the JPEG copies have none of their own.
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar10_jpeg": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "tiny_imagenet_jpeg": "zh-plus/tiny-imagenet",
    # The Hub has no home of these; it takes a plain name.
    **{name: name for name in ("camvid", "cityscapes", "voc2012")},
}
# Our metrics: the Hub's type, a name for people, and one for a column.
_METRICS = {
    "top1": ("accuracy", "Top-1 accuracy, %", "top-1, %"),
    "top5": ("accuracy", "Top-5 accuracy, %", "top-5, %"),
    "miou": ("mean_iou", "Mean IoU, %", "mIoU, %"),
    "pixel_accuracy": ("accuracy", "Pixel accuracy, %", "pixel accuracy, %"),
}
# What our cards may say where the Hub takes only values that it knows; nothing offline checks them otherwise.
_ALLOWED = {
    "license": {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0"},
    "library_name": {"timm", "segmentation-models-pytorch"},
    "pipeline_tag": {"image-classification", "image-segmentation"},
}
# What docs/study.md and its later lists say, to whose runs tests hold it.
_VERDICT = (
    "Does Pool Skip help? The project's own study (`docs/study.md`: ResNet-20 on CIFAR-10, 1,000 steps, 3 seeds) "
    "compares it (B) with a convolution of x itself in the same places (C) and with a deeper base of equal cost (F): "
    "it is not shown that Pool Skip helps (B − C = -0.88 [-3.47, +1.71], B − F = +0.90 [-0.86, +2.66]; test accuracy "
    "in points, 95 % intervals). Its mechanism, fewer inert filters, is not supported, nor was it put to the test: no "
    "run of the study has any. Later runs: after 2,109 steps the deeper base is better, -1.90 [-2.81, -0.98] "
    "(`docs/study_longer.md`). Under a strong weight decay of all parameters, which kills filters, Pool Skip has fewer "
    "inert filters than C at one of two decays, -15.2 [-29.5, -1.0] of 688 (`docs/study_decay.md`), and in a "
    "repetition, -7.8 [-13.5, -2.0] (`docs/study_decay_again.md`), but no better accuracy than the base of half the "
    "cost; on a net without shortcuts no difference in inert filters is told, -26.0 [-91.9, +39.9] "
    "(`docs/study_decay_plain.md`)."
)


def card_text(record: Checkpoint) -> str:
    """Write a checkpoint's model card, the whole README.md with its front matter.

    Raises ValueError if the record names no recipe of this package, or a value that the Hub does not know.
    """
    model, data = _on_meta(record), DATASETS[record.dataset]
    library = "smp" if isinstance(record, SegmentationCheckpoint) else "timm"
    text = BODY.format(
        name=record.name,
        what=_what(record),
        use=_use(record) if record.sha256 else _not_kept(record, model),
        split=data.tested_on,
        measured=record.name
        if record.sha256
        else f"{record.recipe} --checkpoint runs/{record.recipe}-s{record.seed}/{WEIGHTS}",
        files=FILES_SECTION.format(name=record.name, library=library) if record.sha256 else "",
        size="×".join(map(str, _input_size(record)[1:])),
        results=_results(record),
        data=data.title,
        terms=data.licence,
        seed=record.seed,
        hours=record.hours,
        hardware=record.hardware,
        speed=_speed(record),
        recipe_name=record.recipe,
        recipe=_recipe(record),
        pair=_pair(record),
        limits=_limits(record, model),
        citation=CITATION,
    )
    # Dumped by yaml itself: the client's own dump differs between its versions.
    front = yaml.safe_dump(_front_matter(record), sort_keys=False, allow_unicode=True, width=10_000)
    card = f"---\n{front}---\n\n{text}"
    check_front_matter(card)
    return card


def config(record: Checkpoint) -> dict[str, Any]:
    """config.json of a checkpoint as plain data: timm's, with the checkpoint's own licence and tag, or smp's."""
    if isinstance(record, SegmentationCheckpoint):
        return smp_config(_on_meta(record))
    return timm_config(_on_meta(record), record.dataset)


def write_card(record: Checkpoint, folder: Path) -> None:
    """Write README.md, config.json and SHA256SUMS into a folder with weights, and the golden output where missing.

    README.md alone of weights not kept. ValueError as `card_text`; RuntimeError if weights are missing or do not fit.
    """
    if not record.sha256:
        write_atomic(folder / "README.md", card_text(record).encode())
        return
    if not (folder / WEIGHTS).is_file():
        raise RuntimeError(f"{folder} has no {WEIGHTS}: `poolskip hub add RUN_FOLDER` puts it there")
    contents = {
        "README.md": card_text(record).encode(),
        "config.json": (json.dumps(config(record), indent=2) + "\n").encode(),
    }
    if not (folder / "golden.safetensors").is_file():
        contents["golden.safetensors"] = golden(record, folder / WEIGHTS)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    write_atomic(folder / "SHA256SUMS", checksums(folder).encode())


def check_front_matter(card: str) -> None:
    """Raise ValueError if a card's front matter lacks an entry or has one that the Hub, not asked here, refuses."""
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
    task, title, library = "image-classification", "Image classification", "timm"
    if isinstance(record, SegmentationCheckpoint):
        task, title, library = "image-segmentation", "Semantic segmentation", "segmentation-models-pytorch"
    results = [
        EvalResult(
            task_type=task,
            task_name=title,
            dataset_type=_HUB_DATASETS[record.dataset],
            dataset_name=data.title,
            dataset_split=data.tested_on,
            metric_type=_METRICS[key][0],
            metric_name=_METRICS[key][1],
            metric_value=value,
        )
        for key, value in record.metrics.items()
    ]
    # No base_model: on the Hub it means a model that this one was made from, and none was.
    card = ModelCardData(
        license=record.licence,
        library_name=library,
        pipeline_tag=task,
        tags=[task, library, *(["pool-skip"] if record.arch.endswith(SUFFIX) else [])],
        datasets=[_HUB_DATASETS[record.dataset]],
        model_name=record.name,
        eval_results=results,
    )
    order = ("license", "library_name", "pipeline_tag", "tags", "datasets", "model-index")
    entries = card.to_dict()
    return {key: entries[key] for key in order}


def _on_meta(record: Checkpoint) -> nn.Module:
    if isinstance(record, SegmentationCheckpoint):
        return build_recorded(record, "meta")
    # The keywords are named, for a record that is about to be added is not registered yet; config.json has them then.
    return create_model(record.arch, pretrained_cfg=checkpoint_cfg(record), device="meta", **record.model_args)


def _input_size(record: Checkpoint) -> tuple[int, ...]:
    return segmentation.COST_SIZE if isinstance(record, SegmentationCheckpoint) else checkpoint_cfg(record).input_size


def _use(record: Checkpoint) -> str:
    if isinstance(record, SegmentationCheckpoint):
        return segmentation.use(record)
    shape, repo = ", ".join(map(str, _input_size(record))), record.hub_id.partition("@")[0]
    return USE.format(name=record.name, repo=repo, shape=shape, classes=DATASETS[record.dataset].num_classes)


def _not_kept(record: Checkpoint, model: nn.Module) -> str:
    size = sum(tensor.numel() for tensor in model.state_dict().values()) * 2 / 1e6  # float16
    return TRAIN_FIRST.format(size=size, name=record.recipe, seed=record.seed)


def _twin(record: Checkpoint) -> tuple[str, Checkpoint | None]:
    """Architecture of the base of a variant, or of the variant of a base, and its checkpoint by the same tag."""
    base = base_name(record.arch)
    arch = base if record.arch != base else base + SUFFIX
    return arch, find(f"{arch}.{record.tag}")


def _what(record: Checkpoint) -> str:
    data = DATASETS[record.dataset].title
    if isinstance(record, SegmentationCheckpoint):
        about = "It adds to a convolution's output a 3×3 convolution of its window maxima. This is an independent "
        about += "implementation, not the authors' weights."
        kind = (
            f"with [Pool Skip](https://arxiv.org/abs/2409.13154). {about}"
            if record.arch.endswith(SUFFIX)
            else f"without Pool Skip: the base to which `{_twin(record)[0]}.{record.tag}` is compared."
        )
        return _wrapped(f"Semantic segmentation, trained on {data}, {kind} {segmentation.what(record)}")
    if not record.arch.endswith(SUFFIX):
        return _wrapped(
            f"`{record.arch}` of poolskip-zoo, trained{_origin(record)} on {data}. It is the base model, without "
            f"Pool Skip, to which `{_twin(record)[0]}.{record.tag}` is compared."
        )
    return _wrapped(
        f"`{base_name(record.arch)}` with [Pool Skip](https://arxiv.org/abs/2409.13154), trained{_origin(record)} on "
        f"{data}. Pool Skip adds to a convolution's output a 3×3 convolution of its window maxima: y = x + "
        "conv(max_unpool(max_pool(x))). This is an independent implementation, not the authors' weights."
    )


def result_rows(record: Checkpoint) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of a checkpoint and of its twin by the same recipe, the base first; "–" is not known."""
    arch, twin = _twin(record)
    columns = ["model", *(_METRICS[key][2] for key in record.metrics), "parameters, M", "GMACs", "hours", "images/s"]
    rows = []
    for name, one in ((record.arch, record), (arch, twin)):
        model = _model_of_row(record, name, one)
        known: dict[str, Any] = {} if name.endswith(SUFFIX) else record.base_scores
        if one:
            known = {**one.metrics, "hours": one.hours, "images_per_second": one.images_per_second}
        cells = [
            f"`{name}.{record.tag}`{'' if one.sha256 else ', weights not kept'}"
            if one
            else f"`{name}`, {'weights not published' if known else 'not trained'}",
            *(f"{known[key]:.2f}" if key in known else "–" for key in record.metrics),
            "–" if model is None else f"{count_parameters(model) / 1e6:.2f}",
            "–" if model is None else f"{count_macs(model, _input_size(record)) / 1e9:.3g}",
            "–" if known.get("hours") is None else f"{known['hours']:.2f}",
            "–" if known.get("images_per_second") is None else f"{known['images_per_second']:.0f}",
        ]
        rows.append((name, cells))
    return columns, [cells for _, cells in sorted(rows, key=lambda each: each[0].endswith(SUFFIX))]


def _results(record: Checkpoint) -> str:
    """A table of the checkpoint and its twin; of segmentation also of its classes."""
    columns, rows = result_rows(record)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    table = table.replace("\n", "\n" + "|---" * len(columns) + "|\n", 1)
    return f"{table}\n\n{segmentation.class_table(record)}" if isinstance(record, SegmentationCheckpoint) else table


def _model_of_row(record: Checkpoint, name: str, one: Checkpoint | None) -> nn.Module | None:
    """A model on the meta device; None of a segmentation model that only its record could make.

    Segmentation models differ from their base in the encoder alone.
    """
    if one is not None:
        return _on_meta(one)
    if isinstance(record, SegmentationCheckpoint):
        encoder = record.model_args.get("encoder_name", "").removeprefix("tu-")
        if name.endswith(SUFFIX) or not encoder.endswith(SUFFIX):
            return None
        args = {**record.model_args, "encoder_name": f"tu-{base_name(encoder)}"}
        return _on_meta(dataclasses.replace(record, model_args=args))
    make = create_model if name.endswith(SUFFIX) else create_base
    return make(name, device="meta", num_classes=checkpoint_cfg(record).num_classes, **record.model_args)


def _speed(record: Checkpoint) -> str:
    known = (
        f"{record.images_per_second:.0f} images/s" if record.images_per_second else "",
        f"torch {record.torch}" if record.torch else "",
    )
    return "".join(f", {each}" for each in known if each)


def _recipe_file(name: str) -> Any:
    return files("poolskip_zoo") / "recipes" / f"{name}.yaml"


def _recipe(record: Checkpoint) -> str:
    path = _recipe_file(record.recipe)
    if not path.is_file():
        raise ValueError(f"{record.name}: there is no recipe {record.recipe!r} in poolskip_zoo/recipes/")
    return path.read_text(encoding="utf-8").strip()


def _init(record: Checkpoint) -> str:
    return yaml.safe_load(_recipe(record)).get("init", "")


def _origin(record: Checkpoint) -> str:
    return f" from the weights of `{init}`" if (init := _init(record)) else " from scratch"


def _pair(record: Checkpoint) -> str:
    """What base and variant have in common."""
    apart = f", except that {record.base_note}" if record.base_note else ""
    text = _wrapped(f"The base model and the variant were trained by the same recipe{apart}.")
    if record.arch.endswith(SUFFIX) and not (record.base_scores or _twin(record)[1]):
        text = "The base model has not been trained by this recipe yet."
    if init := _init(record):
        first, here = [init], "with the same seed and `--output`"
        while (path := _recipe_file(first[0])).is_file():
            earlier = yaml.safe_load(path.read_text(encoding="utf-8")).get("init")
            if not earlier:
                break
            first.insert(0, earlier)
        steps = ", then ".join(f"`poolskip train {each}`" for each in first)
        begun = f"{steps} come first, {here}, and count" if _recipe_file(init).is_file() else "its training counts"
        text += "\n" + _wrapped(f"Training starts from the weights of `{init}`: {begun} in the hours.")
    return text


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
        points.append(f"The numbers apply to this placement of Pool Skip, not to the paper: {where}.")
    if isinstance(record, SegmentationCheckpoint):
        points.append(segmentation.limit(record))
    else:
        if record.model_args:
            given = ", ".join(f"`{key}={value!r}`" for key, value in record.model_args.items())
            points.append(
                f"It is built with {given}, which `create_model` applies when this tag is loaded; other tags of "
                f"`{record.arch}` are built without it."
            )
        size, classes = "×".join(map(str, checkpoint_cfg(record).input_size[1:])), DATASETS[record.dataset].num_classes
        points.append(f"It was measured on {size} images, and knows only the {classes} classes of its data set.")
    if record.dataset == "cifar10_jpeg":
        points.append("The data are a JPEG copy: results on the original images may differ a little.")
    points.append(_VERDICT)
    return "\n".join(_wrapped(f"- {point}", "  ") for point in points)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
