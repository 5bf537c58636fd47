"""Packs, splits, augmentation and loaders."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from poolskip_zoo.data import DATASETS, EvalLoader, Split, TrainLoader, load_split, load_splits
from poolskip_zoo.data.augment import Augment, uniform
from poolskip_zoo.data.datasets import spread_choice
from poolskip_zoo.data.packs import read_pack

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "image_size": 8}


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pack(path: Path, count: int = 10, **parts: tuple[list[bytes], list[int]]) -> None:
    arrays: dict[str, np.ndarray] = {"classes": np.array([f"class{i}" for i in range(count)])}
    for prefix, (files, labels) in parts.items():
        arrays[f"{prefix}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{prefix}_offset"] = np.cumsum([0] + [len(file) for file in files])
        arrays[f"{prefix}_label"] = np.array(labels)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data")
    train = [encode(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(100)]
    test = [encode(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(20)]
    labels = [i // 10 for i in range(100)]
    write_pack(path / "cifar10_jpeg.npz", train=(train, labels), test=(test, [i // 2 for i in range(20)]))
    for start, part in enumerate("abc"):
        write_pack(path / f"tiny_imagenet_train_{part}.npz", 200, train=(train[start::3], labels[start::3]))
    write_pack(path / "tiny_imagenet_val.npz", 200, val=(test, [i // 2 for i in range(20)]))
    return path


def images(count: int = 64, size: int = 8) -> Split:
    pixels = torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    return Split(pixels, torch.arange(count) % 10, [str(i) for i in range(10)])


def test_pack_decodes_what_pil_decodes_and_greys_become_rgb(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    colour, grey = rng.integers(0, 256, (6, 9, 3), np.uint8), rng.integers(0, 256, (6, 9), np.uint8)
    files = [encode(colour), encode(grey)]
    write_pack(tmp_path / "p.npz", train=(files, [3, 7]))
    pixels, labels, classes = read_pack(tmp_path / "p.npz", "train")
    expected = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    assert np.array_equal(pixels, np.stack(expected))
    assert labels.tolist() == [3, 7]
    assert classes[3] == "class3"


def test_damaged_packs_are_named(tmp_path: Path, folder: Path) -> None:
    whole = (folder / "cifar10_jpeg.npz").read_bytes()
    path = tmp_path / "p.npz"
    for contents in (whole[: len(whole) // 2], b"<html>not found</html>", b""):
        path.write_bytes(contents)
        with pytest.raises(RuntimeError, match=r"p\.npz is not a readable \.npz pack"):
            read_pack(path, "train")
    with pytest.raises(RuntimeError, match=r"lacks val_jpeg, val_offset, val_label; it holds .*train_jpeg"):
        read_pack(folder / "cifar10_jpeg.npz", "val")
    good = encode(np.zeros((8, 8, 3), np.uint8))
    write_pack(path, train=([good, b"no image"], [0, 1]))
    with pytest.raises(RuntimeError, match=r"p\.npz: train image 1 cannot be decoded"):
        read_pack(path, "train")
    write_pack(path, train=([good, encode(np.zeros((8, 9, 3), np.uint8))], [0, 1]))
    with pytest.raises(RuntimeError, match="a pack holds one size"):
        read_pack(path, "train")
    write_pack(path, train=([good, good], [0]))
    with pytest.raises(RuntimeError, match="damaged"):
        read_pack(path, "train")
    for label in (-100, -1, 10):
        write_pack(path, train=([good, good], [1, label]))
        with pytest.raises(RuntimeError, match=rf"train_label holds .*{label}.*expected 0 to 9"):
            read_pack(path, "train")
    for labels, what in (([0.7, 1.0], r"float64\[2\]"), (["a", "b"], r"<U1\[2\]"), ([[0], [1]], r"int64\[2, 1\]")):
        write_pack(path, train=([good, good], labels))
        with pytest.raises(RuntimeError, match=rf"train_label is {what}, not a row of integers"):
            read_pack(path, "train")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(RuntimeError, match="not a readable"):
        read_pack(path, "train")
    write_pack(path.with_name("cifar10_jpeg.npz"), 3, test=([good, good], [0, 2]))
    with pytest.raises(RuntimeError, match="have 3 classes, not 10"):
        load_split("cifar10_jpeg", "test", tmp_path)


def test_splits_are_disjoint_balanced_and_fixed(folder: Path) -> None:
    train, val, test = load_splits("cifar10_jpeg", ("train", "val", "test"), folder, hold_out=20)
    assert (len(train), len(val), len(test)) == (80, 20, 20)
    assert repr(val) == "Split(20 images of 10 classes)"
    assert (val == val, val == test, len({val, test})) == (True, False, 2)
    assert torch.bincount(val.labels).tolist() == [2] * 10
    everything = load_split("cifar10_jpeg", "train", folder, hold_out=0)
    seen = {image.numpy().tobytes() for image in torch.cat([train.images, val.images])}
    assert seen == {image.numpy().tobytes() for image in everything.images}
    again = load_split("cifar10_jpeg", "val", folder, hold_out=20)
    assert torch.equal(val.images, again.images)


def test_uneven_classes_are_held_out_as_evenly_as_possible() -> None:
    labels = np.array([0] * 2 + [1] * 50 + [2] * 50)
    assert np.bincount(labels[spread_choice(labels, 32)]).tolist() == [2, 15, 15]


def test_tiny_imagenet_joins_its_parts_and_tests_on_val(folder: Path) -> None:
    train, test = load_splits("tiny_imagenet_jpeg", ("train", "test"), folder, hold_out=10)
    assert (len(train), len(test)) == (90, 20)


def test_what_is_missing_is_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POOLSKIP_DATA_DIR", raising=False)
    with pytest.raises(ValueError, match=r"no data folder: give data_dir \(--data-dir\) or set POOLSKIP_DATA_DIR"):
        load_split("cifar10_jpeg", "test")
    monkeypatch.setenv("POOLSKIP_DATA_DIR", str(folder))
    assert len(load_split("cifar10_jpeg", "test")) == 20
    with pytest.raises(FileNotFoundError, match=r"data folder .*nowhere does not exist"):
        load_split("cifar10_jpeg", "test", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"cifar10_jpeg\.npz not found in data folder"):
        load_split("cifar10_jpeg", "test", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"CIFAR100 is missing .*cifar-100-python"):
        load_split("cifar100", "train", tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'mnist': one of cifar10,"):
        load_split("mnist", "train", folder)
    with pytest.raises(ValueError, match="unknown split 'dev': one of train, val, test"):
        load_split("cifar10_jpeg", "dev", folder)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_split("cifar10_jpeg", "train", folder, download=True)
    with pytest.raises(ValueError, match="no val split with hold_out=0"):
        load_split("cifar10_jpeg", "val", folder, hold_out=0)
    with pytest.raises(ValueError, match=r"hold_out=100 must be .* below the 100"):
        load_split("cifar10_jpeg", "train", folder, hold_out=100)


def test_uniform_draws_are_uniform_and_independent() -> None:
    index = np.arange(20000)
    draws = np.stack([uniform(3, epoch, index, stream) for epoch in range(2) for stream in range(3)])
    assert np.abs(draws.mean(1) - 0.5).max() < 0.01
    assert np.abs(draws.var(1) - 1 / 12).max() < 0.002
    correlation = np.corrcoef(draws)
    assert np.abs(correlation - np.eye(6)).max() < 0.03


@pytest.mark.parametrize(("pad", "crop"), [(2, 0), (2, 8), (0, 4), (1, 6), (1, 9)])
def test_crop_and_flip_cut_from_the_padded_image(pad: int, crop: int) -> None:
    split = images()
    index = np.arange(64)
    result = Augment(5, crop_padding=pad, crop_size=crop, flip=True).pixels(split.images, index, 3)
    side = crop or 8
    places = 8 + 2 * pad - side + 1
    shifts, flips = set(), 0
    for before, after in zip(split.images.numpy(), result.numpy(), strict=True):
        padded = np.pad(before, ((pad, pad), (pad, pad), (0, 0)))
        matches = [
            (row, col, flip)
            for row in range(places)
            for col in range(places)
            for flip in (False, True)
            if np.array_equal(padded[row : row + side, col : col + side][:, :: -1 if flip else 1], after)
        ]
        assert len(matches) == 1
        shifts.add(matches[0][:2])
        flips += matches[0][2]
    assert len(shifts) > 0.6 * places**2
    assert 16 < flips < 48


@pytest.mark.parametrize("settings", [{"crop_padding": 2, "flip": True}, {"rand_augment": "rand-m9-n2-mstd0.5"}])
def test_augmentation_depends_on_seed_epoch_and_index_alone(settings: dict) -> None:
    split = images()
    augment = Augment(5, **settings)
    index = np.arange(64)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    whole = augment.pixels(split.images, index, 3)
    assert (states[0], states[1]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    order = np.random.default_rng(0).permutation(64)[:10]
    random.seed(99)
    assert torch.equal(augment.pixels(split.images[order], order, 3), whole[order])
    assert not torch.equal(augment.pixels(split.images, index, 4), whole)
    assert not torch.equal(Augment(6, **settings).pixels(split.images, index, 3), whole)


def test_erasing_makes_rectangles_of_the_stated_area() -> None:
    batch = Augment(1, erasing=0.5).erase(torch.ones(400, 3, 32, 32), np.arange(400), 0)
    holes = (batch == 0).all(1)
    area = holes.flatten(1).float().mean(1)
    hit = area > 0
    assert 0.4 < hit.float().mean() < 0.6
    assert area[hit].min() > 0.01
    assert area[hit].max() < 0.36
    for hole in holes[hit]:
        assert hole.sum() == hole.any(1).sum() * hole.any(0).sum()  # a rectangle


def test_bad_rand_augment_is_refused() -> None:
    with pytest.raises(ValueError, match="rand_augment='auto-m9' is not a RandAugment string"):
        Augment(0, rand_augment="auto-m9")


def test_processes_and_accumulation_share_the_batch_of_one() -> None:
    split = images()

    def loader(rank: int = 0, world: int = 1, accumulation: int = 1) -> TrainLoader:
        augment = Augment(7, crop_padding=1, flip=True)
        return TrainLoader(split, 16, augment, **PLAIN, rank=rank, world=world, accumulation=accumulation)

    whole_images, whole_labels = loader().batch(2, 1)
    parts = [loader(rank, 2, 2).batch(2, 1, micro) for micro in range(2) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), whole_images)
    assert torch.equal(torch.cat([part[1] for part in parts]), whole_labels)


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    split = images(64)
    split = Split(split.images, torch.arange(64), split.classes)
    loader = TrainLoader(split, 16, Augment(0), **PLAIN)
    orders = [torch.cat([loader.batch(epoch, step)[1] for step in range(loader.steps)]).tolist() for epoch in range(2)]
    assert sorted(orders[0]) == list(range(64)) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_normalisation_resizing_and_layout() -> None:
    split = images(4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    loader = EvalLoader(split, 4, mean=mean, std=std, image_size=8, channels_last=True)
    batch, labels = next(iter(loader))
    expected = split.images.permute(0, 3, 1, 2) / 255
    expected = (expected - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(batch, expected)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, split.labels)
    larger = next(iter(EvalLoader(split, 4, mean=mean, std=std, image_size=12)))[0]
    assert larger.shape == (4, 3, 12, 12)
    assert larger.is_contiguous()


def test_sizes_of_training_images_follow_the_epoch() -> None:
    split = images(16)
    loader = TrainLoader(split, 16, Augment(0), **PLAIN, sizes=[[0, 4], [2, 6], [3, 8]])
    assert [tuple(loader.batch(epoch, 0)[0].shape[2:]) for epoch in range(5)] == [(s, s) for s in (4, 4, 6, 8, 8)]
    whole = TrainLoader(split, 16, Augment(0), **PLAIN)
    assert torch.equal(loader.batch(4, 0)[0], whole.batch(4, 0)[0])


def test_processes_evaluate_every_image_once() -> None:
    split = Split(images(10).images, torch.arange(10), [])
    loaders = [EvalLoader(split, 4, **PLAIN, rank=rank, world=2) for rank in range(2)]
    labels = [label for loader in loaders for batch in loader for label in batch[1].tolist()]
    assert sorted(labels) == list(range(10))


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=16 is not divisible by 3 process\(es\) x accumulation=1"):
        TrainLoader(images(), 16, Augment(0), **PLAIN, world=3)
    with pytest.raises(ValueError, match="batch_size=128 is larger than the 64 training images"):
        TrainLoader(images(), 128, Augment(0), **PLAIN)


@pytest.mark.data
def test_real_class_names() -> None:
    """Ours are the first names of the packs' classes, in their order."""
    import os

    folder = Path(os.environ.get("POOLSKIP_DATA_DIR", ""))
    for name, pack, key in (
        ("cifar10_jpeg", "cifar10_jpeg", "classes"),
        ("tiny_imagenet_jpeg", "tiny_imagenet_val", "names"),
    ):
        if not (folder / f"{pack}.npz").is_file():
            pytest.skip(f"POOLSKIP_DATA_DIR has no {pack}.npz")
        with np.load(folder / f"{pack}.npz") as arrays:
            assert tuple(str(each).partition(",")[0] for each in arrays[key]) == DATASETS[name].labels


@pytest.mark.data
def test_real_cifar10(request: pytest.FixtureRequest) -> None:
    import os

    if not (Path(os.environ.get("POOLSKIP_DATA_DIR", "")) / "cifar10_jpeg.npz").is_file():
        pytest.skip("POOLSKIP_DATA_DIR has no cifar10_jpeg.npz")
    val = load_split("cifar10_jpeg", "val")
    assert val.images.shape == (5000, 32, 32, 3)
    assert torch.bincount(val.labels).tolist() == [500] * 10
    assert val.classes[0] == "airplane"
    assert 0.4 < val.images.float().mean() / 255 < 0.55
