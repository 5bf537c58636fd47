"""Classify and segment images with a model's own preprocessing and class names."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Classifier", "Segmenter", "draw_segments", "load_model", "read_image", "segment"]

# Largest stride of smp's encoders, which the size of their input must be a multiple of.
_STRIDE = 32


def read_image(path: str | os.PathLike[str]) -> "Image":
    """Read an image file as RGB, upright as its EXIF orientation says.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        The image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            # As in the predictor beside exported files, which stands by itself: 16 bits are scaled to eight, where
            # Pillow would cut off at 255; a PNG of 16 bits is one of 32 to older Pillow.
            if image.mode.startswith("I"):
                values = np.asarray(image)
                if values.dtype.itemsize == 2 or values.max(initial=0) > 255:
                    image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {path}") from None
    except (OSError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise ValueError(f"{path} is not a readable image: {error}") from error


def load_model(
    name: str, pretrained: bool = True, way_out: str = "`poolskip list --pretrained` prints those that have"
) -> Any:
    """Make a timm model, ours or not, or say in one line why there is none.

    Args:
        name: name that `timm.create_model` takes, `local-dir:FOLDER` included, or such a folder.
        pretrained: whether with weights.
        way_out: what to do where there are none, for the message.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: if the name or its tag is unknown or has no weights, or the folder no configuration of timm.
        RuntimeError: if the weights cannot be had, are not the recorded ones, or do not fit.
    """
    from timm.models import get_arch_pretrained_cfgs, is_model, is_model_pretrained

    from . import create_model
    from .registry.catalogue import is_name, registered_models
    from .registry.resolve import require_timm_weights

    if Path(name, "config.json").is_file() and not is_name(name):
        name = f"local-dir:{name}"
    if name.startswith("local-dir:"):
        _check_config(Path(name.removeprefix("local-dir:"), "config.json"))
    elif ":" not in name:
        arch, _, tag = name.partition(".")
        if not is_model(arch):
            raise ValueError(f"unknown model {name!r}; `poolskip list` prints the names")
        cfgs = get_arch_pretrained_cfgs(arch)
        if tag and name not in cfgs:
            tags = ", ".join(cfg.tag for cfg in cfgs.values() if cfg.tag)
            raise ValueError(f"{arch} has no weights {tag!r}: {'choose ' + tags if tags else 'it has none'}")
        if pretrained and not is_model_pretrained(name):
            raise ValueError(f"{name} has no weights; {way_out}")
        if pretrained and arch not in registered_models(test=True):  # ours check it themselves
            require_timm_weights(name, cfgs[name] if tag else next(iter(cfgs.values())))
    return create_model(name, pretrained=pretrained).eval()


def _check_config(path: Path) -> None:
    """Refuse what timm would read without a look."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{path} is not a timm configuration: it names no architecture")


class Classifier:
    """A model with the transform and the class names of its configuration.

    Args:
        model: a timm model with a classifier.

    Raises:
        ValueError: if it is no model of timm's kind, has no classifier, or its configuration is of no RGB images.
    """

    def __init__(self, model: Any) -> None:
        from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

        if not hasattr(model, "pretrained_cfg"):
            raise ValueError(f"{type(model).__name__} is not a timm classifier: it does not say what images it takes")
        if not model.num_classes:
            raise ValueError(f"{type(model).__name__} has no classifier: num_classes is 0")
        config = resolve_model_data_config(model)
        if config["input_size"][0] != 3:
            raise ValueError(f"{type(model).__name__} takes {config['input_size'][0]} channels: images are read as RGB")
        self.model = model.eval()
        self.transform = create_transform(**config)
        labels: Sequence[str] = model.pretrained_cfg.get("label_names") or ()
        subset = infer_imagenet_subset(model)
        if len(labels) == model.num_classes:
            self.labels = list(labels)
        elif subset:
            describe = ImageNetInfo(subset).index_to_description
            self.labels = [describe(index) for index in range(model.num_classes)]
        else:  # a head of the user's own
            self.labels = list(map(str, range(model.num_classes)))

    @classmethod
    def from_pretrained(cls, name: str) -> "Classifier":
        """Load a registered model with its weights.

        Args:
            name: name that `timm.create_model` takes.

        Returns:
            The classifier.

        Raises:
            ValueError: as `load_model`.
            RuntimeError: if the weights cannot be had or are not the recorded ones.
        """
        return cls(load_model(name))

    def preprocess(self, images: Iterable["Image"]) -> Tensor:
        """Resize, crop and normalise as at the checkpoint's evaluation.

        Args:
            images: RGB images of any size.

        Returns:
            Tensor (N, 3, H, W).
        """
        return torch.stack([self.transform(image) for image in images])

    @torch.inference_mode()
    def __call__(self, images: Iterable["Image"]) -> list[list[tuple[str, float]]]:
        """Rank the classes of each image.

        Args:
            images: RGB images of any size.

        Returns:
            For each image its (label, probability) pairs, the most likely first.
        """
        parameter = next(self.model.parameters())
        logits = self.model(self.preprocess(images).to(parameter.device, parameter.dtype))
        probabilities = logits.float().softmax(-1).cpu()
        ranked = []
        for row in probabilities:
            values, indices = row.sort(descending=True)
            ranked.append([(self.labels[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)])
        return ranked


def segment(
    model: nn.Module, images: Tensor, size: Sequence[int], window: Sequence[int] = (), overlap: float = 0.5
) -> Tensor:
    """Give every pixel its logits.

    Args:
        model: segmentation model; its input is padded at the right and bottom to a multiple of 32.
        images: (B, C, h, w), normalised.
        size: height and width of the result, reached by bilinear interpolation.
        window: height and width of a sliding window in pixels of `images`; empty for whole images.
        overlap: share of a window that its neighbours cover too, 0 to 0.9; there logits are averaged.

    Returns:
        Logits (B, classes, H, W), float32.

    Raises:
        ValueError: if `overlap` or `window` is out of range.

    Example:
        >>> segment(nn.Conv2d(3, 7, 1), torch.rand(1, 3, 50, 70), (100, 140), window=(32, 32)).shape
        torch.Size([1, 7, 100, 140])
    """
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"overlap={overlap}: expected 0 to 0.9")
    if window and (len(window) != 2 or min(window) < 1):
        raise ValueError(f"window={tuple(window)}: expected height and width in pixels, at least 1, or ()")
    height, width = images.shape[2:]
    tall, wide = (min(pair) for pair in zip(window or (height, width), (height, width), strict=True))
    logits, times = images.new_zeros(0), torch.zeros(height, width, device=images.device)
    for top in _starts(height, tall, overlap):
        for left in _starts(width, wide, overlap):
            part = images[:, :, top : top + tall, left : left + wide]
            found = model(F.pad(part, (0, -wide % _STRIDE, 0, -tall % _STRIDE)))
            # With smp's aux_params the logits of a classifier come second.
            found = (found[0] if isinstance(found, tuple) else found)[:, :, :tall, :wide].float()
            if not logits.numel():
                logits = found.new_zeros(*found.shape[:2], height, width)
            logits[:, :, top : top + tall, left : left + wide] += found
            times[top : top + tall, left : left + wide] += 1
    return F.interpolate(logits / times, tuple(size), mode="bilinear", align_corners=False)


def _starts(length: int, window: int, overlap: float) -> Iterator[int]:
    """Yield where windows start, evenly spaced from edge to edge."""
    steps = math.ceil(round((length - window) / (window * (1 - overlap)), 6))  # 1 - 0.9 is less than 0.1
    yield from (round(place * (length - window) / max(steps, 1)) for place in range(steps + 1))


class Segmenter:
    """A segmentation model with the preprocessing, the class names and the colours of its data set.

    Args:
        model: model of smp.
        dataset: name of the segmentation data set that it was trained on.
        image_size: shorter side in pixels that images are resized to; 0 leaves them as they are.
        window: height and width of a sliding window, empty for whole images.
        overlap: share of a window that its neighbours cover too.

    Raises:
        ValueError: if it is no segmentation data set.
    """

    def __init__(
        self, model: nn.Module, dataset: str, image_size: int = 0, window: Sequence[int] = (), overlap: float = 0.5
    ) -> None:
        from .data.datasets import DATASETS, SegmentationInfo

        info = DATASETS.get(dataset)
        if not isinstance(info, SegmentationInfo):
            names = ", ".join(name for name, each in DATASETS.items() if isinstance(each, SegmentationInfo))
            raise ValueError(f"{dataset!r} is not a segmentation data set: expected one of {names}")
        self.model, self.info, self.image_size = model.eval(), info, image_size
        self.window, self.overlap = window, overlap
        self.labels = list(info.labels or ())

    @classmethod
    def from_pretrained(cls, name: str) -> "Segmenter":
        """Load a recorded checkpoint.

        Args:
            name: its name, such as `deeplabv3plus_resnet18_poolskip.camvid_r180`.

        Returns:
            The segmenter.

        Raises:
            ValueError: if there is no segmentation checkpoint of this name.
            RuntimeError: if the weights cannot be had or are not the recorded ones.
        """
        from .registry.checkpoint import SegmentationCheckpoint, find
        from .registry.resolve import local_weights
        from .registry.segmentation import build_recorded, load_weights

        record = find(name)
        if not isinstance(record, SegmentationCheckpoint):
            raise ValueError(f"{name} is not a segmentation checkpoint; `poolskip list --pretrained` prints them")
        model = load_weights(build_recorded(record), local_weights(record))
        return cls(model, record.dataset, record.image_size, record.window, record.overlap)

    @torch.inference_mode()
    def __call__(self, images: Sequence["Image"]) -> list[Tensor]:
        """Give every pixel of each image its label.

        Args:
            images: RGB images of any size.

        Returns:
            For each image its labels (H, W), uint8, at the image's own size.

        Raises:
            ValueError: if the model has not as many classes as the data set.
        """
        import numpy as np

        from .data.scene_loader import SceneEvalLoader
        from .data.scenes import Scenes

        # Labels only tell the size; so preprocessing is that of an evaluation.
        items = [
            (torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.zeros(image.height, image.width).byte())
            for image in images
        ]
        parameter = next(self.model.parameters())
        settings: dict[str, Any] = {"mean": self.info.mean, "std": self.info.std, "device": parameter.device}
        loader = SceneEvalLoader(Scenes(items, self.labels), image_size=self.image_size, batch_size=1, **settings)
        found = []
        for batch, labels in loader:
            logits = segment(self.model, batch.to(parameter.dtype), labels.shape[1:], self.window, self.overlap)
            if logits.shape[1] != self.info.num_classes:
                raise ValueError(
                    f"the model has {logits.shape[1]} classes, {self.info.title} has {self.info.num_classes}"
                )
            found.append(logits.argmax(1)[0].byte().cpu())
        return found


def draw_segments(image: "Image", labels: Sequence[Tensor], names: Sequence[str], palette: Sequence[Any]) -> "Image":
    """Lay labels over an image, with a legend of those that occur.

    Args:
        image: RGB image.
        labels: one or more label maps (H, W) uint8 of the image's size, such as a prediction and the ground truth;
            each makes a panel. Labels beyond the names are void and left uncoloured.
        names: class names, by label.
        palette: RGB colours, 0 to 255, by label.

    Returns:
        The panels and the legend side by side.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    colours = np.array([*palette, *[(0, 0, 0)] * (256 - len(palette))], np.uint8)
    panels = []
    for each in labels:
        place = each.numpy()
        cover = Image.fromarray(np.where(place < len(names), 150, 0).astype(np.uint8))
        panels.append(Image.composite(Image.fromarray(colours[place]), image, cover))
    counts = torch.stack([torch.bincount(each.flatten(), minlength=256) for each in labels]).sum(0)
    shown = [label for label in counts[: len(names)].argsort(descending=True).tolist() if counts[label]]
    line = max(12, image.height // 20)
    font = ImageFont.load_default(0.7 * line)
    width = round(max((font.getlength(names[label]) for label in shown), default=0)) + 2 * line
    picture = Image.new("RGB", (image.width * len(panels) + width, max(image.height, line * len(shown))), "white")
    for column, panel in enumerate(panels):
        picture.paste(panel, (column * image.width, 0))
    draw, left = ImageDraw.Draw(picture), image.width * len(panels)
    for row, label in enumerate(shown):
        top = row * line
        box = (left + line // 4, top + line // 5, left + line, top + line - line // 5)
        draw.rectangle(box, fill=tuple(palette[label]), outline="black")
        draw.text((left + line * 5 // 4, top + line // 2), names[label], "black", font, anchor="lm")
    return picture
