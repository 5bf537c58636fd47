"""Packs made of the folders that data sets come in."""

from pathlib import Path

import numpy as np
import pytest
from test_data import encode

from poolskip_zoo.cli import main
from poolskip_zoo.data import load_split, load_splits
from poolskip_zoo.data.make_packs import make_packs

RNG = np.random.default_rng(0)


def image(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(RNG.integers(0, 256, (8, 8, 3), np.uint8)))
    return path.read_bytes()


def test_cifar10_is_packed_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"class{i}" for i in range(10)]
    written = [
        image(tmp_path / "from" / part / name / f"{i}.jpg")
        for part in ("train", "test")
        for name in names
        for i in (1, 0)
    ]
    (tmp_path / "from" / "train" / ".ipynb_checkpoints").mkdir()  # what file managers leave is no class and no image
    for name in (".DS_Store", "Thumbs.db", "._0.jpg"):
        (tmp_path / "from" / "train" / names[0] / name).write_bytes(b"Bud1")
    assert main(["pack", "cifar10_jpeg", str(tmp_path / "from"), str(tmp_path / "to")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "to" / "cifar10_jpeg.npz")
    train, test = load_splits("cifar10_jpeg", ("train", "test"), tmp_path / "to", hold_out=0)
    assert train.classes == names
    assert train.labels.tolist() == test.labels.tolist() == [label for label in range(10) for _ in range(2)]
    with np.load(tmp_path / "to" / "cifar10_jpeg.npz") as pack:
        assert pack["train_jpeg"][: pack["train_offset"][1]].tobytes() == written[1]  # 0.jpg, the second written


def test_tiny_imagenet_is_packed_in_balanced_thirds(tmp_path: Path) -> None:
    source = tmp_path / "from"
    wnids = [f"n{9999 - i:08}" for i in range(200)]  # not in alphabetical order
    for wnid in wnids:
        for i in range(3):
            image(source / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    held = {f"val_{i}.JPEG": image(source / "val" / "images" / f"val_{i}.JPEG") for i in range(4)}
    (source / "wnids.txt").write_text("\n".join(wnids))
    (source / "words.txt").write_text("\n".join(f"{wnid}\tword of {wnid}" for wnid in wnids) + "\n")
    (source / "val" / "val_annotations.txt").write_text(
        "".join(f"{name}\t{wnids[7 * i]}\t0\t0\t9\t9\n" for i, name in enumerate(held))
    )
    made = make_packs("tiny_imagenet_jpeg", source, tmp_path / "to")
    parts = [f"tiny_imagenet_{part}.npz" for part in ("train_a", "train_b", "train_c", "val")]
    assert [path.name for path in made] == parts
    train, val = load_splits("tiny_imagenet_jpeg", ("train", "test"), tmp_path / "to", hold_out=0)
    assert (train.classes[1], val.labels.tolist()) == (f"word of {wnids[1]}", [0, 7, 14, 21])
    assert np.bincount(train.labels).tolist() == [3] * 200
    with np.load(made[1]) as pack:
        assert pack["train_label"].tolist() == list(range(200))
        first = (source / "train" / wnids[0] / "images" / f"{wnids[0]}_1.JPEG").read_bytes()
        assert pack["train_jpeg"][: pack["train_offset"][1]].tobytes() == first


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "from" / "train" / "cat").mkdir(parents=True)
    mistakes = {"cifar10": "'cifar10' is not packed: one of cifar10_jpeg", "cifar10_jpeg": "cat has no images"}
    for name, said in mistakes.items():
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            make_packs(name, tmp_path / "from", tmp_path / "to")
    with pytest.raises(FileNotFoundError, match=r"wnids\.txt is missing: expected tiny-imagenet-200"):
        make_packs("tiny_imagenet_jpeg", tmp_path / "from", tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="none is not a folder: expected CIFAR-10-images"):
        make_packs("cifar10_jpeg", tmp_path / "none", tmp_path / "to")
    with pytest.raises(FileNotFoundError, match="cifar10_jpeg"):
        load_split("cifar10_jpeg", "test", tmp_path / "to")
