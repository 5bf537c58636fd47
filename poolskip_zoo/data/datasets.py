"""What is known of each data set; small-image ones are decoded once and kept in memory as one uint8 tensor."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import Cityscapes

from .packs import data_file, read_pack

SPLITS = ("train", "val", "test")
DATA_DIR_VARIABLE = "POOLSKIP_DATA_DIR"
HOLD_OUT = 5000  # training images held out, unless a recipe says otherwise
HOLD_OUT_SEED = 20240913  # of the held-out images: the same for every recipe and every training seed
_Arrays = tuple[np.ndarray, np.ndarray, list[str]]


@dataclass(frozen=True, eq=False)  # of tensors == tells no truth value
class Split:
    """Images and labels of one split.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        classes: class names, by label.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {len(self.classes)} classes)"

    def part(self, count: int) -> "Split":
        """Choose images, as many of each class as possible, by a fixed seed.

        Args:
            count: how many, at most all.

        Returns:
            A split of them, in the same order.

        Raises:
            ValueError: if there are fewer.
        """
        if count == len(self):
            return self
        if not 0 < count < len(self):
            raise ValueError(f"train_images={count} must be at most the {len(self)} images that there are")
        chosen = torch.from_numpy(spread_choice(self.labels.numpy(), count))
        return Split(self.images[chosen], self.labels[chosen], self.classes)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is read.

    Args:
        title: its name in words, for cards and messages.
        num_classes: number of classes.
        image_size: height and width in pixels.
        mean: channel means that training normalises by, 0 to 1.
        std: channel standard deviations that training normalises by, 0 to 1.
        licence: terms of the data.
        labels: class names, by label; None for CIFAR-100.
        tested_on: its publisher's name of our `test` images: `validation` where test labels are not public.
    """

    title: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    licence: str
    labels: tuple[str, ...] | None = None
    tested_on: str = "test"


@dataclass(frozen=True, kw_only=True)
class SegmentationInfo(DatasetInfo):
    """What is known of a segmentation data set before it is read; `image_size` is the shorter side, 0 if they differ.

    Args:
        void: label of the pixels that neither the loss nor a score counts.
        palette: red, green and blue, 0 to 255, by label.
    """

    void: int
    palette: tuple[tuple[int, int, int], ...]


# Statistics of the training images, as commonly used with each set; of the packs: the originals'.
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR_TERMS = "no formal licence; research use"
_TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# First WordNet names of its classes, by label.
_TINY_IMAGENET = (
    "Egyptian cat; reel; volleyball; rocking chair; lemon; bullfrog; basketball; cliff; espresso; plunger; "
    "parking meter; German shepherd; dining table; monarch; brown bear; school bus; pizza; guinea pig; umbrella; "
    "organ; oboe; maypole; goldfish; potpie; hourglass; seashore; computer keyboard; Arabian camel; ice cream; "
    "nail; space heater; cardigan; baboon; snail; coral reef; albatross; spider web; sea cucumber; backpack; "
    "Labrador retriever; pretzel; king penguin; sulphur butterfly; tarantula; lesser panda; pop bottle; banana; "
    "sock; cockroach; projectile; beer bottle; mantis; freight car; guacamole; remote control; "
    "European fire salamander; lakeside; chimpanzee; pay-phone; fur coat; alp; lampshade; torch; abacus; "
    "moving van; barrel; tabby; goose; koala; bullet train; CD player; teapot; birdhouse; gazelle; "
    "academic gown; tractor; ladybug; miniskirt; golden retriever; triumphal arch; cannon; neck brace; sombrero; "
    "gasmask; candle; desk; frying pan; bee; dam; spiny lobster; police van; iPod; punching bag; beacon; "
    "jellyfish; wok; potter's wheel; sandal; pill bottle; butcher shop; slug; hog; cougar; crane; vestment; "
    "dragonfly; cash machine; mushroom; jinrikisha; water tower; chest; snorkel; sunglasses; fly; limousine; "
    "black stork; dugong; sports car; water jug; suspension bridge; ox; ice lolly; turnstile; "
    "Christmas stocking; broom; scorpion; wooden spoon; picket fence; rugby ball; sewing machine; "
    "steel arch bridge; Persian cat; refrigerator; barn; apron; Yorkshire terrier; swimming trunks; stopwatch; "
    "lawn mower; thatch; fountain; black widow; bikini; plate; teddy; barbershop; confectionery; beach wagon; "
    "scoreboard; orange; flagpole; American lobster; trolleybus; drumstick; dumbbell; brass; bow tie; "
    "convertible; bighorn; orangutan; American alligator; centipede; syringe; go-kart; brain coral; sea slug; "
    "cliff dwelling; mashed potato; viaduct; military uniform; pomegranate; chain; kimono; comic book; "
    "trilobite; bison; pole; boa constrictor; poncho; bathtub; grasshopper; walking stick; Chihuahua; "
    "tailed frog; lion; altar; obelisk; beaker; bell pepper; bannister; bucket; magnetic compass; meat loaf; "
    "gondola; standard poodle; acorn; lifeboat; binoculars; cauliflower; African elephant"
)
# The 11 classes of SegNet's split of CamVid, and its colours.
_CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}
_CITYSCAPES = {entry.name: entry.color for entry in Cityscapes.classes if 0 <= entry.train_id < 19}
_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _voc_colour(label: int) -> tuple[int, int, int]:
    """Return the colour of Pascal VOC's own label images: bits 0, 3, … of a label make red's bits from the top down."""
    red, green, blue = (sum((label >> 3 * i + shift & 1) << 7 - i for i in range(3)) for shift in range(3))
    return red, green, blue


DATASETS: dict[str, DatasetInfo] = {
    "cifar10": DatasetInfo("CIFAR-10", 10, 32, *_CIFAR10, _CIFAR_TERMS, _TEN),
    "cifar100": DatasetInfo("CIFAR-100", 100, 32, *_CIFAR100, _CIFAR_TERMS),
    "cifar10_jpeg": DatasetInfo("CIFAR-10 (JPEG copy)", 10, 32, *_CIFAR10, _CIFAR_TERMS, _TEN),
    "tiny_imagenet_jpeg": DatasetInfo(
        *("Tiny ImageNet", 200, 64, *_IMAGENET, "ImageNet terms; research use", tuple(_TINY_IMAGENET.split("; "))),
        tested_on="validation",
    ),
    "camvid": SegmentationInfo(
        *("CamVid (SegNet's split)", 11, 360, *_IMAGENET, "research use", tuple(_CAMVID)),
        void=11,
        palette=tuple(_CAMVID.values()),
    ),
    "cityscapes": SegmentationInfo(
        *("Cityscapes", 19, 1024, *_IMAGENET, "Cityscapes terms; non-commercial use", tuple(_CITYSCAPES)),
        tested_on="validation",
        void=255,
        palette=tuple(_CITYSCAPES.values()),
    ),
    "voc2012": SegmentationInfo(
        *("Pascal VOC 2012", 21, 0, *_IMAGENET, "flickr terms; research use", _VOC),
        tested_on="validation",
        void=255,
        palette=tuple(map(_voc_colour, range(21))),
    ),
}


def data_folder(data_dir: str | os.PathLike[str] | None) -> Path:
    """Resolve the data folder: the argument, else the environment variable `POOLSKIP_DATA_DIR`.

    Raises ValueError if neither is given, FileNotFoundError if the folder does not exist.
    """
    value = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        raise ValueError(f"no data folder: give data_dir (--data-dir) or set {DATA_DIR_VARIABLE}")
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist")
    return folder


def load_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    hold_out: int = HOLD_OUT,
    download: bool = False,
) -> "Split":
    """Read one split of a data set into memory; arguments and errors as for `load_splits`.

    Example:
        >>> load_split("cifar10", "dev", ".")
        Traceback (most recent call last):
        ...
        ValueError: unknown split 'dev': one of train, val, test
    """
    return load_splits(name, (split,), data_dir, hold_out=hold_out, download=download)[0]


def load_splits(
    name: str,
    splits: Sequence[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    hold_out: int = HOLD_OUT,
    download: bool = False,
) -> list[Split]:
    """Read splits of a data set into memory, each file once.

    `val` is a class-balanced choice of `hold_out` training images, the same for every seed; `train` is the rest;
    `test` is the data set's own test set (Tiny ImageNet: its labelled validation images).

    Args:
        name: one of `DATASETS`.
        splits: any of `train`, `val` and `test`.
        data_dir: the data folder; None takes `POOLSKIP_DATA_DIR`.
        hold_out: training images held out as `val`, >= 0 and fewer than there are.
        download: let torchvision fetch CIFAR-10 or CIFAR-100 where missing; the packs cannot be fetched.

    Returns:
        The splits, each in the data set's own order: shuffle it.

    Raises:
        ValueError: if the name, the split, or `hold_out` is unknown or impossible, or no folder is named.
        FileNotFoundError: if the folder or a file is missing, or a file of CIFAR-10 or CIFAR-100 is damaged.
        RuntimeError: if a pack is damaged, or its classes are not as many as the data set's.
    """
    check_splits(name, splits, _READERS)
    if download and name.endswith("_jpeg"):
        other = "; cifar10 can, --dataset or --set dataset= name it" if name == "cifar10_jpeg" else ""
        raise ValueError(f"{name} cannot be downloaded: put its packs into the data folder (docs/training.md){other}")
    if "val" in splits and hold_out < 1:
        raise ValueError(f"no val split with hold_out={hold_out}: it is made of held-out training images")
    folder = data_folder(data_dir)
    parts = {test: _READERS[name](folder, test, download) for test in {split == "test" for split in splits}}
    for _, _, classes in parts.values():
        if len(classes) != DATASETS[name].num_classes:
            raise RuntimeError(
                f"the files of {name} in {folder} have {len(classes)} classes, not {DATASETS[name].num_classes}"
            )
    return [_choose(split, hold_out, *parts[split == "test"]) for split in splits]


def check_splits(name: str, splits: Sequence[str], names: Iterable[str]) -> None:
    """Raise ValueError if a data set is none of `names`, or a split none of `SPLITS`."""
    if name not in names:
        raise ValueError(f"unknown dataset {name!r}: one of {', '.join(names)}")
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")


def _choose(split: str, hold_out: int, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> "Split":
    """Take the images of one split out of the data set's own training or test images."""
    if split != "test" and hold_out:
        held = spread_choice(labels, hold_out)
        chosen = held if split == "val" else ~held
        images, labels = images[chosen], labels[chosen]
    return Split(torch.from_numpy(images), torch.from_numpy(labels), classes)


def spread_choice(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose held-out images, as many of each class as possible, by a fixed seed.

    Args:
        labels: (N,) integers.
        count: how many to hold out, 0 <= count < N.

    Returns:
        (N,) bool, True where held out.

    Raises:
        ValueError: if `count` is out of range.

    Example:
        >>> spread_choice(np.array([0, 0, 0, 1, 1, 1]), 2).reshape(2, 3).sum(1)
        array([1, 1])
    """
    if not 0 <= count < len(labels):
        raise ValueError(f"hold_out={count} must be at least 0 and below the {len(labels)} training images")
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.arange(len(labels)) - starts  # place of an image within its class
    mask = np.zeros(len(labels), bool)
    mask[by_class[np.lexsort((labels[by_class], rank))[:count]]] = True
    return mask


def _read_cifar10_jpeg(folder: Path, test: bool, download: bool) -> _Arrays:
    return read_pack(data_file(folder, "cifar10_jpeg.npz"), "test" if test else "train")


def _read_tiny_imagenet(folder: Path, test: bool, download: bool) -> _Arrays:
    if test:
        return read_pack(data_file(folder, "tiny_imagenet_val.npz"), "val")
    paths = [data_file(folder, f"tiny_imagenet_train_{part}.npz") for part in "abc"]
    parts = [read_pack(path, "train") for path in paths]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), parts[0][2]


def _torchvision(class_name: str, subfolder: str) -> Callable[[Path, bool, bool], _Arrays]:
    """Make a reader of a CIFAR data set in torchvision's own layout."""

    def read(folder: Path, test: bool, download: bool) -> _Arrays:
        from torchvision import datasets

        try:
            data = getattr(datasets, class_name)(str(folder), train=not test, download=download)
        except RuntimeError as error:  # torchvision: missing and damaged files alike
            raise FileNotFoundError(
                f"{class_name} is missing or damaged in data folder {folder} (looked for {folder / subfolder}); "
                "`poolskip train` and `validate` fetch it with --download"
            ) from error
        return np.asarray(data.data), np.asarray(data.targets, np.int64), list(data.classes)

    return read


_READERS: dict[str, Callable[[Path, bool, bool], _Arrays]] = {
    "cifar10": _torchvision("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _torchvision("CIFAR100", "cifar-100-python"),
    "cifar10_jpeg": _read_cifar10_jpeg,
    "tiny_imagenet_jpeg": _read_tiny_imagenet,
}
