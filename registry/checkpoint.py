"""The record of a trained checkpoint, the one source of its metadata, and the configurations that timm registers."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from timm.models._hub import save_config_for_hf

from ..data import DATASETS

__all__ = [
    "CARRIED",
    "HUB_ORG",
    "SUFFIX",
    "WEIGHTS",
    "Checkpoint",
    "SegmentationCheckpoint",
    "add_checkpoints",
    "cfg_for_data",
    "checkpoints",
    "find",
    "pool_skip_cfgs",
    "retrained_cfg",
    "timm_config",
    "trained_cfgs",
]

# Organisation on the Hugging Face Hub that has the repositories of all checkpoints.
HUB_ORG = "poolskip-zoo"
# Turns the name of a base into that of its variant.
SUFFIX = "_poolskip"
# The file of weights in every folder of a model, as timm and the Hub name it.
WEIGHTS = "model.safetensors"
# Keywords of our classes that a record can carry: plain data, and in no entrypoint, whose own would win over them.
CARRIED = ("pool_skip", "stem_stride")
# What a configuration says of its own weights alone.
_OF_OTHER_WEIGHTS = (
    *("tag", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"),
    *("test_input_size", "test_crop_pct", "test_pool_size", "label_offset", "label_descriptions"),
    *("description", "origin_url", "notes", "license"),
)


def cfg_for_data(cfg: PretrainedCfg, dataset: str) -> PretrainedCfg:
    """An architecture's configuration, with the classes, the input and the preprocessing of a data set."""
    data = DATASETS[dataset]
    return dataclasses.replace(
        cfg,
        num_classes=data.num_classes,
        input_size=(3, data.image_size, data.image_size),
        crop_pct=1.0,
        interpolation="bilinear",
        mean=data.mean,
        std=data.std,
        label_names=data.labels,  # type: ignore[arg-type]  # timm means a tuple of any length
    )


def retrained_cfg(
    cfg: PretrainedCfg, dataset: str, image_size: int = 0, model_args: Mapping[str, Any] | None = None
) -> PretrainedCfg:
    """The configuration of a model that was trained on a data set, without what it said of any weights before.

    `image_size` is in pixels, 0 for the data set's own; `model_args` are what the model was made with.
    """
    nothing: dict[str, Any] = dict.fromkeys(_OF_OTHER_WEIGHTS)
    of_data = cfg_for_data(cfg, dataset)
    if image_size:
        of_data = dataclasses.replace(of_data, input_size=(3, image_size, image_size))
    pool_size = None  # the final map's; another stem changes it
    if cfg.pool_size and "stem_stride" not in (model_args or {}):
        sizes = zip(of_data.input_size[1:], cfg.pool_size, cfg.input_size[1:], strict=True)
        pool_size = tuple(math.ceil(side * pooled / own) for side, pooled, own in sizes)
    return dataclasses.replace(
        of_data,
        pool_size=pool_size,
        crop_mode="center",
        custom_load=False,
        **nothing,
    )


@dataclass(frozen=True)
class Checkpoint:
    """A trained model: everything that its configuration and card say.

    Attributes:
        name: `<arch>.<tag>`.
        dataset: name of the data in `poolskip_zoo.data` that it was trained on.
        sha256: of `model.safetensors`; empty where the weights are not kept, for their size: such a checkpoint has a
            card, but timm knows no tag of its name.
        metrics: name to value on the test set, in percent.
        recipe: name of the recipe in `poolskip_zoo/recipes/`.
        seed: seed of the run.
        hardware: machine that trained it.
        hours: training time.
        revision: commit or tag of the Hub repository; None until it is published.
        licence: of the weights, as an identifier that the Hub knows.
        images_per_second: speed of training, if it was measured.
        torch: version of torch that trained it, if recorded.
        model_args: keywords of the model class that it was trained with, of `CARRIED`; `create_model` applies them
            when this checkpoint is loaded.
        base_scores: of a run of the base by the same recipe whose weights are not published: `metrics`, `hours` and
            `images_per_second` by name.
        base_note: how that run departs from the recipe, a clause after "except that"; empty where it does not.
    """

    name: str
    dataset: str
    sha256: str
    metrics: dict[str, float]
    recipe: str
    seed: int
    hardware: str
    hours: float
    revision: str | None = None
    licence: str = "apache-2.0"
    images_per_second: float | None = None
    torch: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    base_scores: dict[str, float] = field(default_factory=dict)
    base_note: str = ""

    @property
    def arch(self) -> str:
        """Registered model name, without tag."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """Name of this set of weights."""
        return self.name.partition(".")[2]

    @property
    def dataset_title(self) -> str:
        """Name of the data for people."""
        return DATASETS[self.dataset].title

    @property
    def hub_id(self) -> str:
        """Repository on the Hub, with the pinned revision if there is one."""
        return f"{HUB_ORG}/{self.name}" + (f"@{self.revision}" if self.revision else "")

    def pretrained_cfg(self, cfg: PretrainedCfg) -> PretrainedCfg:
        """timm's configuration of this checkpoint.

        Args:
            cfg: what the architecture alone decides.

        Returns:
            A copy with the data's and the checkpoint's own entries.
        """
        return dataclasses.replace(
            retrained_cfg(cfg, self.dataset, model_args=self.model_args),
            hf_hub_id=self.hub_id,
            # Named, so that an unreachable Hub is asked once and not again for a pickle.
            hf_hub_filename=WEIGHTS,
            architecture=None,
            license=self.licence,
            paper_ids="arXiv:2409.13154" if self.arch.endswith(SUFFIX) else cfg.paper_ids,
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationCheckpoint(Checkpoint):
    """A trained segmentation model of smp; its folder is what smp's `save_pretrained` writes.

    Attributes:
        model: name of smp's architecture.
        model_args: keywords of `smp.create_model`.
        image_size: shorter side in pixels that images are resized to; 0 leaves them as they are.
        window: height and width of evaluation's sliding window, empty for whole images.
        overlap: share of a window that its neighbours cover too.
        class_iou: intersection over union on the test set, in percent, by label; None for a class that is not in it.
    """

    model: str
    model_args: dict[str, Any]
    image_size: int
    window: tuple[int, ...] = ()
    overlap: float = 0.5
    class_iou: tuple[float | None, ...]


def timm_config(model: Any, dataset: str) -> dict[str, Any]:
    """The config.json by which timm loads a folder of weights, with the names of the data set's classes; plain data."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), {"label_names": DATASETS[dataset].labels})
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    made["model_args"].pop("num_classes", None)  # it stands above too, and HF transformers would pass both
    return made


_CHECKPOINTS: dict[str, Checkpoint] = {}
_NOT_KEPT: dict[str, Checkpoint] = {}


def find(name: str) -> Checkpoint | None:
    """The record of `<arch>.<tag>`, or of `<arch>`'s first; None if we have none, or its weights are not kept."""
    if "." in name:
        return _CHECKPOINTS.get(name)
    return next((c for c in _CHECKPOINTS.values() if c.arch == name), None)


def checkpoints(not_kept: bool = False) -> tuple[Checkpoint, ...]:
    """All trained checkpoints.

    Args:
        not_kept: those too whose weights are not kept.

    Returns:
        Their records in the order of registration, those without weights last.
    """
    return (*_CHECKPOINTS.values(), *(_NOT_KEPT.values() if not_kept else ()))


def add_checkpoints(trained: Iterable[Checkpoint]) -> None:
    """Make `find` and `checkpoints` know trained checkpoints."""
    for checkpoint in trained:
        (_CHECKPOINTS if checkpoint.sha256 else _NOT_KEPT)[checkpoint.name] = checkpoint


def trained_cfgs(trained: Iterable[Checkpoint], cfgs: Mapping[str, PretrainedCfg]) -> dict[str, PretrainedCfg]:
    """Make `find` know trained checkpoints; return `<arch>.<tag>` to configuration of those whose weights are kept.

    `cfgs`: architecture name to what the architecture alone decides.
    """
    trained = tuple(trained)
    add_checkpoints(trained)
    return {each.name: each.pretrained_cfg(cfgs[each.arch]) for each in trained if each.sha256}


def pool_skip_cfgs(bases: Iterable[str], trained: Iterable[Checkpoint] = ()) -> dict[str, PretrainedCfg]:
    """Configurations of the Pool Skip variants of timm models: trained checkpoints first, then the warm starts.

    By `<arch>.<tag>`, for timm's `generate_default_cfgs`; `bases` are timm's names, `trained` records of variants.
    """
    of_bases = {base: get_arch_pretrained_cfgs(base) for base in bases}
    archs = {base + SUFFIX: next(iter(cfgs.values())) for base, cfgs in of_bases.items()}
    result = trained_cfgs(trained, archs)
    for base, cfgs in of_bases.items():
        for name, cfg in cfgs.items():
            key = base + SUFFIX + name.removeprefix(base)
            cfg = dataclasses.replace(cfg, architecture=None, custom_load=False, tag=None)
            if base.startswith("test_"):
                # The tiny architectures get no weights: tests must not go to the Hub.
                key, cfg = base + SUFFIX, dataclasses.replace(cfg, hf_hub_id=None, url=None)
            result.setdefault(key, cfg)
    return result
