"""Recipes: everything that decides a training run, as one validated YAML file."""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..data.datasets import DATASETS, HOLD_OUT, SegmentationInfo

RECIPE_DIR = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """A training run. Where it runs (data folder, output folder, devices) is no part of it.

    Args:
        name: name of the checkpoint that it makes, `<model>.<tag>`.
        model: timm model name; for segmentation the name of smp's architecture, such as `unet`.
        model_args: keywords of `timm.create_model`, for segmentation of `smp.create_model` (`encoder_name` and
            `encoder_weights`, None where left out); the number of classes comes from the data set.
        init: weights to start from: name of a recipe whose run by the same seed has ended in the same output folder, of
            a checkpoint of the zoo, or path of a safetensors file; empty for fresh ones. Pool Skip that they lack
            starts at zero, a last layer for other classes fresh.
        dataset: one of `poolskip_zoo.data.DATASETS`; it decides whether images are classified or segmented.
        hold_out: training images held out to choose by, >= 0; 0 trains on all and measures nothing; -1 takes the
            validation images that a segmentation data set has of its own.
        train_images: images to train on, of those not held out as many of each class as possible and the same for every
            seed; 0 takes all.
        image_size: pixels, 8 to 1024, for segmentation of the shorter side, which keeps its proportion to the longer
            one; 0 takes the data set's own.
        sizes: pairs of an epoch, from 0, and the size in pixels, 8 to 1024, of training images from then on; empty for
            `image_size` throughout. Held-out images keep `image_size`.
        epochs: >= 1.
        batch_size: images per optimizer step over all processes and accumulation steps, >= 1.
        accumulation: forward passes per optimizer step, >= 1.
        optimizer: timm optimizer name.
        lr: peak learning rate, > 0.
        momentum: SGD momentum (beta1 in others is set by `optimizer_args`), 0 to 1.
        nesterov: Nesterov momentum; SGD alone.
        weight_decay: >= 0; biases, norms and what the model exempts have none, as in timm.
        optimizer_args: more keywords of the optimizer; with `filter_bias_and_bn: false`, timm's name for it, all
            parameters have weight decay, as where a torch optimizer is given `model.parameters()`.
        encoder_lr: factor on the learning rate of a segmentation model's encoder, > 0.
        scheduler: `cosine`, `linear`, `poly` (power 0.9; all down to `min_lr`) or `constant`; stepped at
            every update.
        warmup_epochs: linear warm-up from 0, in epochs, >= 0, may be a fraction.
        min_lr: last learning rate, >= 0.
        loss: of segmentation: `ce` (cross entropy), `dice`, or `ce+dice`.
        class_weights: of segmentation, in the cross entropy: `none`, or `balanced`: the median frequency over a
            class's own, as SegNet's.
        label_smoothing: 0 to 1.
        mixup: beta parameter of mixup, 0 for none.
        cutmix: beta parameter of CutMix, 0 for none; with both, each batch draws one of them.
        mix_prob: probability that a batch is mixed, 0 to 1.
        ema_decay: decay of the weights' moving average, 0 for none; with it the average is what is saved.
        ema_warmup: let the decay rise from 0 to `ema_decay` over the first updates.
        clip_grad: largest gradient norm, 0 for no clipping.
        crop_padding: pixels of zero padding before a random crop, 0 to 64.
        crop_size: height and width that are cut out at random. Of classification a square, before it is resized to
            `image_size` or `sizes`; empty for that of the images. Of segmentation multiples of 32.
        scale: of segmentation: least and greatest factor on the size before the crop.
        color_jitter: of segmentation: largest relative change of brightness, contrast and saturation, 0 to 1.
        window: of segmentation: height and width of evaluation's sliding window, empty for whole images.
        overlap: share of a window that its neighbours cover too, 0 to 0.9.
        flip: random left-right flip.
        rand_augment: timm RandAugment string, empty for none.
        random_erasing: probability of erasing a rectangle, 0 to 1.
        precision: `fp32`, `bf16` or `fp16` (autocast).
        channels_last: memory layout of the model.
        seed: >= 0; of weights, order, augmentation, dropout.
        sync_bn: BatchNorm statistics over all processes (GPU).
        compile: `torch.compile` the model.
        deterministic: refuse GPU operations that are not repeatable to the bit.
        save_dtype: `float16` or `float32`: of the saved weights.
    """

    name: str
    model: str
    dataset: str
    model_args: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    hold_out: int = HOLD_OUT
    train_images: int = 0
    image_size: int = 0
    sizes: list[list[int]] = field(default_factory=list)
    epochs: int = 20
    batch_size: int = 128
    accumulation: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    encoder_lr: float = 1.0
    scheduler: str = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    loss: str = "ce"
    class_weights: str = "none"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    ema_decay: float = 0.0
    ema_warmup: bool = True
    clip_grad: float = 0.0
    crop_padding: int = 0
    crop_size: list[int] = field(default_factory=list)
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    color_jitter: float = 0.0
    window: list[int] = field(default_factory=list)
    overlap: float = 0.5
    flip: bool = False
    rand_augment: str = ""
    random_erasing: float = 0.0
    precision: str = "fp32"
    channels_last: bool = False
    seed: int = 0
    sync_bn: bool = False
    compile: bool = False
    deterministic: bool = False
    save_dtype: str = "float16"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for key, kind in hints.items():
            value = _coerce(key, getattr(self, key), kind)
            _check_range(key, value)
            object.__setattr__(self, key, value)
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(f"recipe key warmup_epochs={self.warmup_epochs} must be below epochs={self.epochs}")
        if self.init == self.name:
            raise ValueError(f"recipe key init={self.init!r} is the run itself")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"recipe key batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}"
            )
        for key in sorted(_DECIDED & set(self.model_args)):
            raise ValueError(f"recipe key model_args must not hold {key}: the dataset decides it")
        _check_task(self)

    def to_yaml(self) -> str:
        """Write out every key, defaults included.

        Returns:
            YAML text that `Recipe` reads back equal.
        """
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)

    @property
    def segments(self) -> bool:
        """Whether its model gives every pixel a class."""
        return isinstance(DATASETS[self.dataset], SegmentationInfo)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, and so have soft labels."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


# Inclusive bounds; None is open. Strictly positive values have a smallest one that no one would ask for.
_RANGES: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys(("epochs", "batch_size", "accumulation"), (1, None)),
    **dict.fromkeys(("label_smoothing", "mix_prob", "random_erasing", "momentum"), (0, 1)),
    **dict.fromkeys(("weight_decay", "warmup_epochs", "min_lr", "mixup", "cutmix", "clip_grad"), (0, None)),
    **dict.fromkeys(("lr", "encoder_lr"), (1e-12, None)),
    "hold_out": (-1, None),
    "color_jitter": (0, 1),
    "overlap": (0, 0.9),
    "ema_decay": (0, 1 - 1e-9),
    "crop_padding": (0, 64),
    "image_size": (0, 1024),
    "train_images": (0, None),
    "seed": (0, 2**62),
}
_CHOICES: dict[str, Sequence[str]] = {
    "dataset": tuple(DATASETS),
    "scheduler": ("cosine", "linear", "poly", "constant"),
    "loss": ("ce", "dice", "ce+dice"),
    "class_weights": ("none", "balanced"),
    "precision": ("fp32", "bf16", "fp16"),
    "save_dtype": ("float16", "float32"),
}
# Keys of one task, which the other refuses unless they have their default.
_SEGMENTATION_KEYS = ("encoder_lr", "loss", "class_weights", "scale", "color_jitter", "window", "overlap")
_CLASSIFICATION_KEYS = (
    *("train_images", "sizes", "mixup", "cutmix", "crop_padding", "rand_augment", "random_erasing"),
)
# Of model_args: what the data set decides; aux_params would add a classifier, for which it has no labels.
_DECIDED = {"num_classes", "classes", "in_chans", "in_channels", "aux_params"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-3, without a point, for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:
    """Read YAML in which 1e-3 is a number.

    Args:
        text: one document.

    Returns:
        Plain data.

    Raises:
        yaml.YAMLError: if it is none.

    Example:
        >>> read_yaml("{eps: 1e-8, name: c10_e60}")
        {'eps': 1e-08, 'name': 'c10_e60'}
    """
    return yaml.load(text, _Loader)  # a safe loader


def read_file(path: Path) -> Any:
    """Read a YAML file as `read_yaml` does; ValueError if it is no YAML."""
    try:
        return read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of bytes that are no text, and a date that is none
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def load_recipe(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: path of a YAML file, or the name of a shipped recipe.
        overrides: `key=value` strings, the value in YAML; `model_args.key=value` reaches into a mapping.

    Returns:
        The recipe.

    Raises:
        FileNotFoundError: if there is neither such a file nor such a shipped recipe.
        ValueError: if it is no YAML mapping, or a key or value is unknown or out of range.

    Example:
        >>> load_recipe("resnet20_cifar.c10", ["epochs=5", "seed=1"]).epochs
        5
    """
    path = _find(os.fspath(source))
    values = read_file(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of recipe keys, not {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    try:
        return make_recipe(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Validate a mapping of recipe keys.

    Args:
        values: keys and values as in YAML.

    Returns:
        The recipe.

    Raises:
        ValueError: if a key is unknown or missing, or a value is of the wrong type or out of range.

    Example:
        >>> make_recipe({"name": "a.b", "model": "a", "dataset": "cifar10", "epoch": 3})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: unknown recipe key 'epoch' (did you mean 'epochs'?): known are name, model, dataset, ...
    """
    fields = dataclasses.fields(Recipe)
    names = [entry.name for entry in fields]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown recipe key {key!r}{hint}: known are {', '.join(names)}")
    required = [e.name for e in fields if e.default is dataclasses.MISSING and e.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"recipe lacks {', '.join(missing)}")
    return Recipe(**values)


def recipe_names() -> list[str]:
    """List the shipped recipes.

    Returns:
        Their names, sorted.
    """
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def _find(source: str) -> Path:
    """Resolve a path or the name of a shipped recipe."""
    shipped = RECIPE_DIR / f"{source}.yaml"
    for path in (Path(source), shipped):
        if path.is_file():
            return path
    close = difflib.get_close_matches(source, recipe_names(), 3)
    options = ", ".join(close or recipe_names()) or "none"
    raise FileNotFoundError(f"no recipe file {source!r} and no shipped recipe of that name; shipped: {options}")


def _override(values: dict[str, Any], text: str) -> None:
    """Apply one `key=value`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"override {text!r} is not of the form key=value")
    target, parts = values, key.split(".")
    for part in parts[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ValueError(f"override {text!r}: {part} is not a mapping")
    try:
        target[parts[-1]] = read_yaml(value) if value else ""
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML") from error


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """Check a value's type; YAML reads 1 as an integer, which floats accept."""
    origin = typing.get_origin(kind) or kind
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if origin is list and isinstance(value, list | tuple):
        return [_coerce(key, each, typing.get_args(kind)[0]) for each in value]
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return dict(value) if origin is dict else value
    raise ValueError(f"recipe key {key}={value!r} must be of type {origin.__name__}")


def _check_range(key: str, value: Any) -> None:
    """Check a value against `_CHOICES` and `_RANGES`."""
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ValueError(f"recipe key {key}={value!r} must be one of {', '.join(_CHOICES[key])}")
    low, high = _RANGES.get(key, (None, None))
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"recipe key {key}={value!r} must be {bounds}")
    if isinstance(value, float) and value == float("inf"):
        raise ValueError(f"recipe key {key}={value!r} must be finite")
    if key == "image_size" and 0 < value < 8:
        raise ValueError(f"recipe key image_size={value!r} must be 0 or at least 8")
    if key == "name" and (not value or value.startswith(".") or re.search(r'[<>:"/\\|?*\x00-\x1f]', value)):
        raise ValueError(f"recipe key name={value!r} must be a plain file name such as resnet20_cifar.c10")


def _check_task(recipe: Recipe) -> None:
    """Check the keys of segmentation, and refuse those of the task that the data set is not for."""
    foreign = _CLASSIFICATION_KEYS if recipe.segments else _SEGMENTATION_KEYS
    for entry in dataclasses.fields(Recipe):
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        if entry.name in foreign and getattr(recipe, entry.name) != default:
            task = "segmentation" if recipe.segments else "classification"
            raise ValueError(f"recipe key {entry.name} does not apply to {recipe.dataset}, a data set for {task}")
    if not recipe.segments:
        if recipe.hold_out < 0:
            raise ValueError(f"recipe key hold_out={recipe.hold_out}: {recipe.dataset} has no validation images")
        _check_sizes(recipe)
        if recipe.crop_size and (
            len(recipe.crop_size) != 2 or len(set(recipe.crop_size)) > 1 or recipe.crop_size[0] < 8
        ):
            raise ValueError(f"recipe key crop_size={recipe.crop_size} must be empty or a square of at least 8 pixels")
        return
    if len(recipe.crop_size) != 2 or any(size < 32 or size % 32 for size in recipe.crop_size):
        raise ValueError(f"recipe key crop_size={recipe.crop_size} must be height and width, multiples of 32")
    if recipe.window and (len(recipe.window) != 2 or any(size < 32 or size % 32 for size in recipe.window)):
        raise ValueError(f"recipe key window={recipe.window} must be empty or height and width, multiples of 32")
    if recipe.loss == "dice" and (recipe.label_smoothing or recipe.class_weights != "none"):
        raise ValueError("recipe keys label_smoothing and class_weights have no meaning for loss='dice' alone")
    if len(recipe.scale) != 2 or not 0 < recipe.scale[0] <= recipe.scale[1] < float("inf"):
        raise ValueError(f"recipe key scale={recipe.scale} must be a least and a greatest factor, above 0")


def _check_sizes(recipe: Recipe) -> None:
    """Check that `sizes` says for every epoch how large its images are."""
    low, high = 8, 1024
    pairs = all(len(pair) == 2 and low <= pair[1] <= high for pair in recipe.sizes)
    epochs = [pair[0] for pair in recipe.sizes if pair]
    rising = epochs == sorted(set(epochs)) and epochs[:1] in ([], [0])
    if not pairs or not rising or epochs[-1:] >= [recipe.epochs]:
        raise ValueError(
            f"recipe key sizes={recipe.sizes} must be pairs of an epoch and a size of {low} to {high}: the first epoch "
            f"0, the others rising and below epochs={recipe.epochs}"
        )
