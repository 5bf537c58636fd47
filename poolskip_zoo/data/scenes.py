"""Segmentation data sets: images with a label for each pixel; small sets in memory, large ones read when needed."""

import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zipfile import Path as ZipPath

import numpy as np
import torch

from .datasets import DATASETS, check_splits, data_folder, spread_choice
from .packs import data_file, is_image

Item = tuple[torch.Tensor, torch.Tensor]
OWN_VAL = -1  # of hold_out: the data set's own validation images


@dataclass(frozen=True, eq=False)  # of tensors == tells no truth value
class Scenes:
    """Images of one split with their labels.

    Args:
        items: pairs of an image (3, H, W) and its labels (H, W), both uint8; a list where they are held in memory,
            otherwise a sequence that reads a pair when asked for it.
        classes: class names, by label.
    """

    items: Sequence[Item]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Scenes({len(self)} images of {len(self.classes)} classes)"

    def count_labels(self) -> Iterator[np.ndarray]:
        """Count the pixels of each label, image by image: (256,) int64."""
        with ThreadPoolExecutor() as pool:
            yield from pool.map(
                lambda place: np.bincount(self.items[place][1].flatten(), minlength=256), range(len(self))
            )


def load_scenes(
    name: str,
    splits: Sequence[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    hold_out: int = OWN_VAL,
    download: bool = False,
) -> list[Scenes]:
    """Open splits of a segmentation data set.

    CamVid has training, validation and test images; it is the file `camvid.zip`, or the folder that this unpacks to.
    Of Cityscapes (`cityscapes/leftImg8bit` and `cityscapes/gtFine`) and Pascal VOC (`VOCdevkit/VOC2012`) the own
    validation images are `test`, since their test labels are not public.

    Args:
        name: `camvid`, `cityscapes` or `voc2012`.
        splits: any of `train`, `val` and `test`.
        data_dir: the data folder; None takes `POOLSKIP_DATA_DIR`.
        hold_out: training images held out as `val`, the same for every seed; `OWN_VAL`, of CamVid alone, takes the
            data set's own and trains on all training images.
        download: let torchvision fetch Pascal VOC where missing; the others cannot be fetched.

    Returns:
        The splits, each in the order of its file names.

    Raises:
        ValueError: if the name, the split, or `hold_out` is unknown or impossible, or no folder is named.
        FileNotFoundError: if the folder or a file is missing.
        RuntimeError: if a file is damaged.
    """
    check_splits(name, splits, _READERS)
    if download and name != "voc2012":
        raise ValueError(f"{name} cannot be downloaded: put it into the data folder")
    if hold_out < OWN_VAL or ("val" in splits and not hold_out):
        raise ValueError(f"no val split with hold_out={hold_out}: it is made of held-out training images")
    if hold_out == OWN_VAL and name != "camvid":
        raise ValueError(f"{name} has no validation images apart from its test set: give hold_out, training images")
    folder, opened = data_folder(data_dir), {}
    classes = list(DATASETS[name].labels or ())
    for split in splits:
        part = "train" if split == "val" and hold_out > 0 else split
        if part not in opened:
            opened[part] = _READERS[name](folder, part, download)
    return [Scenes(_choose(split, hold_out, opened), classes) for split in splits]


def _choose(split: str, hold_out: int, opened: dict[str, Sequence[Item]]) -> Sequence[Item]:
    """Take the images of one split out of the data set's own parts."""
    if split == "test" or hold_out <= 0:
        return opened[split]
    items = opened["train"]
    held = spread_choice(np.zeros(len(items), np.int64), hold_out)
    chosen = np.flatnonzero(held if split == "val" else ~held).tolist()
    return [items[place] for place in chosen] if isinstance(items, list) else _Lazy(items, chosen)


class _Lazy(Sequence[Item]):
    """Some items of a sequence, read when asked for."""

    def __init__(self, items: Any, chosen: Sequence[int], labels: np.ndarray | None = None) -> None:
        self.items, self.chosen, self.labels = items, chosen, labels

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: Any) -> Any:
        table, at = self.labels, self.chosen[place]
        if table is None:
            return self.items[at]
        return _read(f"{self.items.images[at]} or its labels", lambda: self.items[at], table)


def _tensors(image: Any, labels: Any, table: np.ndarray) -> Item:
    """Turn two PIL images into an item, file values into labels by a table of 256."""
    pixels, values = np.asarray(image.convert("RGB")).transpose(2, 0, 1), np.asarray(labels)
    if values.size and values.max() > 255:
        raise RuntimeError(f"the labels go up to {values.max()}, and 255 is the largest that a class can have")
    # Of one bit per pixel they are truth values, by which NumPy would choose.
    labels = table[values.astype(np.uint8)]
    if labels.ndim != 2:
        raise RuntimeError("the labels are no picture of one channel")
    if labels.shape != pixels.shape[1:]:
        raise RuntimeError(f"they differ in size: {pixels.shape[1:]} and {labels.shape}")
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels)


def _read(what: str, read: Callable[[], Any], table: np.ndarray) -> Item:
    """Read two PIL images and make them an item, with an error that names it."""
    from PIL import Image

    of_pil = (OSError, SyntaxError, Image.DecompressionBombError)
    try:
        image, labels = read()
        return _tensors(image, labels, table)
    # Of what a zip lacks: KeyError; of values that are no labels: RuntimeError.
    except (*of_pil, KeyError, RuntimeError, BadZipFile, zlib.error) as error:
        raise RuntimeError(f"{what} cannot be read: {error}") from error


def _table(name: str, label_of: dict[int, int] | None = None) -> np.ndarray:
    """Make a table from the 256 values that a label file may have to labels; all others are void."""
    info: Any = DATASETS[name]
    table = np.full(256, info.void, np.uint8)
    for value, label in (label_of or {label: label for label in range(info.num_classes)}).items():
        table[value] = label
    return table


def _read_camvid(folder: Path, split: str, download: bool) -> list[Item]:
    """Decode a split of the pack, or of the folder that it unpacks to, into memory."""
    from PIL import Image

    table, root = _table("camvid"), folder / "camvid"
    place = root if root.is_dir() else data_file(folder, "camvid.zip")

    def decode(file: Any) -> Item:
        annotation = file.parent.parent / f"{split}annot" / f"{Path(file.name).stem}.png"
        what = f"{place}: {split}/{file.name} or its labels"
        return _read(what, lambda: [Image.open(io.BytesIO(each.read_bytes())) for each in (file, annotation)], table)

    try:
        files: Any = (root if root.is_dir() else ZipPath(place, "camvid/")) / split
        found = (file for file in files.iterdir() if is_image(file.name)) if files.is_dir() else ()
        ordered = sorted(found, key=lambda file: file.name)
    except (BadZipFile, OSError) as error:
        raise RuntimeError(f"{place} is not a readable zip file: {error}") from error
    if not ordered:
        raise RuntimeError(f"{place} has no {split} images")
    with ThreadPoolExecutor() as pool:  # the decoders release the interpreter lock
        return list(pool.map(decode, ordered))


def _open_cityscapes(folder: Path, split: str, download: bool) -> Sequence[Item]:
    """Open a split in the layout of the Cityscapes downloads."""
    from torchvision.datasets import Cityscapes

    root = folder / "cityscapes"
    try:
        data = Cityscapes(str(root), "val" if split == "test" else split, "fine", "semantic")
    except RuntimeError as error:
        raise FileNotFoundError(f"Cityscapes is not in {root} (looked for leftImg8bit and gtFine there)") from error
    data.images.sort()  # torchvision leaves them in the order of the disk
    data.targets.sort()
    label_of = {entry.id: entry.train_id for entry in Cityscapes.classes if 0 <= entry.train_id < 19}
    return _Lazy(data, range(len(data)), _table("cityscapes", label_of))


def _open_voc(folder: Path, split: str, download: bool) -> Sequence[Item]:
    """Open a split in the layout of Pascal VOC's development kit."""
    from torchvision.datasets import VOCSegmentation

    part = "val" if split == "test" else split
    try:
        data = VOCSegmentation(str(folder), "2012", part, download)
    except (RuntimeError, FileNotFoundError) as error:
        where = folder / "VOCdevkit" / "VOC2012"
        raise FileNotFoundError(
            f"Pascal VOC 2012 is not in {where}; `poolskip train` and `validate` fetch it with --download"
        ) from error
    return _Lazy(data, range(len(data)), _table("voc2012"))


_READERS: dict[str, Callable[[Path, str, bool], Sequence[Item]]] = {
    "camvid": _read_camvid,
    "cityscapes": _open_cityscapes,
    "voc2012": _open_voc,
}
