"""Packs of data sets as their public homes have them, in folders."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..contexts import kept
from .packs import is_image

__all__ = ["SOURCES", "make_packs"]

# Data sets that are packed, and where their folders come from.
SOURCES = {
    "cifar10_jpeg": "CIFAR-10-images of github.com/YoongiKim",
    "tiny_imagenet_jpeg": "tiny-imagenet-200, unpacked from cs231n.stanford.edu/tiny-imagenet-200.zip",
}


def make_packs(name: str, source: Path, data_dir: Path) -> list[Path]:
    """Write the packs of a data set, a key of `SOURCES`, that `load_split` reads; return the files. `data_dir` is made.

    Raises ValueError if the name is unknown, FileNotFoundError if the source lacks something.
    """
    if name not in SOURCES:
        raise ValueError(f"{name!r} is not packed: one of {', '.join(SOURCES)}")
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: expected {SOURCES[name]}")
    data_dir.mkdir(parents=True, exist_ok=True)
    return _MAKERS[name](source, data_dir)


def _write(
    path: Path, parts: Mapping[str, tuple[Sequence[Path], Sequence[int]]], classes: list[str], names: Sequence[str] = ()
) -> Path:
    """Write the files of each part end to end, as `read_pack` describes it."""
    arrays = {"classes": np.array(classes), **({"names": np.array(names)} if names else {})}
    for part, (files, labels) in parts.items():
        data = [file.read_bytes() for file in files]
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(data), np.uint8)
        arrays[f"{part}_offset"] = np.cumsum([0, *map(len, data)], dtype=np.int64)
        arrays[f"{part}_label"] = np.array(labels, np.uint8)
    with kept(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return path


def _by_class(folder: Path, classes: Sequence[str], inside: str = "") -> tuple[list[Path], list[int]]:
    """Image files of a folder a class, in order, and their labels."""
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = sorted(each for each in (folder / name / inside).glob("*") if is_image(each.name))
        if not of_class:
            raise FileNotFoundError(f"{folder / name / inside} has no images")
        files += of_class
        labels += [label] * len(of_class)
    return files, labels


def _pack_cifar10(source: Path, data_dir: Path) -> list[Path]:
    if not (source / "train").is_dir():
        raise FileNotFoundError(f"{source} has no folder train: expected {SOURCES['cifar10_jpeg']}")
    classes = sorted(each.name for each in (source / "train").glob("[!.]*") if each.is_dir())
    parts = {part: _by_class(source / part, classes) for part in ("train", "test")}
    return [_write(data_dir / "cifar10_jpeg.npz", parts, classes)]


def _pack_tiny_imagenet(source: Path, data_dir: Path) -> list[Path]:
    try:
        classes = (source / "wnids.txt").read_text(encoding="utf-8").split()
        words = dict(line.split("\t", 1) for line in (source / "words.txt").read_text(encoding="utf-8").splitlines())
        told = (source / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FileNotFoundError(f"{error.filename} is missing: expected {SOURCES['tiny_imagenet_jpeg']}") from error
    names = [words.get(each, each) for each in classes]
    files, labels = _by_class(source / "train", classes, "images")
    made = []
    within = np.concatenate([np.arange(count) for count in np.bincount(labels)])  # number of an image in its class
    for place, part in enumerate("abc"):  # every third image of each class: each file is a balanced third
        chosen = np.flatnonzero(within % 3 == place)
        third = [files[i] for i in chosen], [labels[i] for i in chosen]
        made.append(_write(data_dir / f"tiny_imagenet_train_{part}.npz", {"train": third}, classes, names))
    held = [line.split("\t")[:2] for line in told]
    val = [source / "val" / "images" / file for file, _ in held], [classes.index(name) for _, name in held]
    return [*made, _write(data_dir / "tiny_imagenet_val.npz", {"val": val}, classes, names)]


_MAKERS: dict[str, Callable[[Path, Path], list[Path]]] = {
    "cifar10_jpeg": _pack_cifar10,
    "tiny_imagenet_jpeg": _pack_tiny_imagenet,
}
