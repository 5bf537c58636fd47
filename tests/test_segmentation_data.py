"""Segmentation data: packs and folders, augmentation of images with their labels, loaders."""

import io
import os
import random
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from poolskip_zoo.data import DATASETS
from poolskip_zoo.data.scene_augment import SceneAugment, scaled_size
from poolskip_zoo.data.scene_loader import SceneEvalLoader, SceneTrainLoader
from poolskip_zoo.data.scenes import Scenes, load_scenes

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
VOID = 11


def scene(rng: np.random.Generator, height: int = 48, width: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Sky, road and a car, each of its own colour, and a strip of void."""
    labels = np.full((height, width), 3, np.uint8)
    labels[: height // 3] = 0
    top, left = rng.integers(height // 3, height - 12), rng.integers(0, width - 16)
    labels[top : top + 12, left : left + 16] = 8
    labels[:, :2] = VOID
    colours = np.array([[200, 210, 250]] + [[0, 0, 0]] * 2 + [[90, 90, 90]] + [[0, 0, 0]] * 4 + [[220, 30, 30]])
    pixels = colours[np.where(labels == VOID, 3, labels)] + rng.normal(0, 8, (height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def write_camvid(folder: Path, train: int = 12, val: int = 4, test: int = 4) -> None:
    rng = np.random.default_rng(0)
    with ZipFile(folder / "camvid.zip", "w") as pack:
        for split, count in (("train", train), ("val", val), ("test", test)):
            for place in reversed(range(count)):
                pixels, labels = scene(rng)
                pack.writestr(f"camvid/{split}/{place:04}.webp", encode(pixels, "WEBP"))
                pack.writestr(f"camvid/{split}annot/{place:04}.png", encode(labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("camvid")
    write_camvid(path)
    return path


def same(one: Scenes, two: Scenes) -> bool:
    pairs = [zip(a, b, strict=True) for a, b in zip(one.items, two.items, strict=True)]
    return all(torch.equal(x, y) for pair in pairs for x, y in pair)


def test_masks_of_one_bit_and_of_sixteen(tmp_path: Path) -> None:
    write_camvid(tmp_path)
    with ZipFile(tmp_path / "camvid.zip") as pack:
        pack.extractall(tmp_path)
    mask = np.arange(48 * 64).reshape(48, 64) % 2 == 0
    path = tmp_path / "camvid" / "trainannot" / "0000.png"
    Image.fromarray(mask).save(path)
    assert Image.open(path).mode == "1"
    (split,) = load_scenes("camvid", ("train",), tmp_path)
    assert torch.equal(split.items[0][1], torch.from_numpy(mask.astype(np.uint8)))
    Image.fromarray(mask.astype(np.uint16) * 300).save(path)
    with pytest.raises(RuntimeError, match=r"train/0000\.webp or its labels cannot be read: the labels go up to 300"):
        load_scenes("camvid", ("train",), tmp_path)


def test_camvid_from_its_pack_and_from_its_folder(folder: Path, tmp_path: Path) -> None:
    splits = load_scenes("camvid", ("train", "val", "test"), folder)
    assert [len(split) for split in splits] == [12, 4, 4]
    assert (repr(splits[1]), splits[1] == splits[2]) == ("Scenes(4 images of 11 classes)", False)
    image, labels = splits[0].items[0]
    assert (image.shape, image.dtype, labels.shape, labels.dtype) == ((3, 48, 64), torch.uint8, (48, 64), torch.uint8)
    assert sorted(labels.unique().tolist()) == [0, 3, 8, VOID]
    assert splits[0].classes[8] == "Car"
    with ZipFile(folder / "camvid.zip") as pack:
        first = np.asarray(Image.open(io.BytesIO(pack.read("camvid/train/0000.webp"))))
        pack.extractall(tmp_path)
    (tmp_path / "camvid" / "val" / ".DS_Store").write_bytes(b"Bud1")
    assert np.array_equal(image.permute(1, 2, 0), first)  # in the order of names, not of the file
    assert all(
        same(*pair) for pair in zip(splits, load_scenes("camvid", ("train", "val", "test"), tmp_path), strict=True)
    )


def test_held_out_images_come_from_training(folder: Path) -> None:
    train, val = load_scenes("camvid", ("train", "val"), folder, hold_out=5)
    assert (len(train), len(val)) == (7, 5)
    everything = load_scenes("camvid", ("train",), folder)[0]
    seen = {image.numpy().tobytes() for split in (train, val) for image, _ in split.items}
    assert seen == {image.numpy().tobytes() for image, _ in everything.items}


def write_cityscapes(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for split, cities in (("train", ("b", "a")), ("val", ("c",))):
        for city in cities:
            for kind in ("leftImg8bit", "gtFine"):
                (folder / "cityscapes" / kind / split / city).mkdir(parents=True)
            for place in range(3):
                pixels, _ = scene(rng)
                name = f"{split}/{city}/{city}_00000{place}_000019"
                Image.fromarray(pixels).save(folder / f"cityscapes/leftImg8bit/{name}_leftImg8bit.png")
                ids = np.full((48, 64), 7, np.uint8)  # road
                ids[:10], ids[10:20] = 23, 1  # sky, ego vehicle
                Image.fromarray(ids).save(folder / f"cityscapes/gtFine/{name}_gtFine_labelIds.png")
    (folder / "cityscapes/leftImg8bit/test").mkdir()


def test_cityscapes_maps_ids_and_is_read_lazily(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    train, val, test = load_scenes("cityscapes", ("train", "val", "test"), tmp_path, hold_out=2)
    assert [len(split) for split in (train, val, test)] == [4, 2, 3]
    assert not isinstance(train.items, list)
    image, labels = test.items[2]
    assert image.shape == (3, 48, 64)
    assert [labels[row, 0].item() for row in (0, 10, 40)] == [10, 255, 0]  # train ids of sky and road, void
    assert DATASETS["cityscapes"].labels[10] == "sky"  # type: ignore[index]
    assert sum(train.count_labels())[[0, 10, 255]].tolist() == [4 * 64 * rows for rows in (28, 10, 10)]  # type: ignore


def test_voc_keeps_its_borders_void(tmp_path: Path) -> None:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for each in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (base / each).mkdir(parents=True)
    for split, names in (("train", "ab"), ("val", "c")):
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    for name, size in (("a", (30, 40)), ("b", (50, 20)), ("c", (33, 33))):
        Image.new("RGB", size[::-1], (9, 9, 9)).save(base / f"JPEGImages/{name}.jpg")
        labels = np.zeros(size, np.uint8)
        labels[5:15, 5:15], labels[:2] = 20, 255
        marks = Image.fromarray(labels).convert("P")
        marks.putpalette(bytes(range(256)) * 3)
        marks.save(base / f"SegmentationClass/{name}.png")
    train, test = load_scenes("voc2012", ("train", "test"), tmp_path, hold_out=0)
    assert (len(train), len(test)) == (2, 1)
    assert sorted(train.items[1][1].unique().tolist()) == [0, 20, 255]
    loader = SceneEvalLoader(train, image_size=0, **PLAIN)
    assert [labels.shape for _, labels in loader] == [(1, 30, 40), (1, 50, 20)]  # one by one: sizes differ
    # Files are read late: what is wrong with one is said by its name all the same.
    Image.new("RGB", (20, 30)).save(base / "JPEGImages/b.jpg")
    with pytest.raises(RuntimeError, match=r"b\.jpg or its labels cannot be read: they differ in size: \(30, 20\)"):
        train.items[1]
    photo = base / "JPEGImages/a.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])
    with pytest.raises(RuntimeError, match=r"a\.jpg or its labels cannot be read: .*[Tt]runcated"):
        train.items[0]


def test_palettes_and_labels_fit() -> None:
    for name in ("camvid", "cityscapes", "voc2012"):
        info = DATASETS[name]
        assert len(info.labels) == len(info.palette) == len(set(info.palette)) == info.num_classes  # type: ignore
    assert DATASETS["voc2012"].palette[15] == (192, 128, 128)  # type: ignore[attr-defined]  # person


def test_what_is_missing_or_damaged_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    for error, message, arguments, settings in (
        (FileNotFoundError, r"camvid\.zip not found in data folder", ("camvid", ("test",), tmp_path), {}),
        (FileNotFoundError, "Cityscapes is not in .*gtFine", ("cityscapes", ("test",), tmp_path), {"hold_out": 5}),
        (FileNotFoundError, "VOC 2012 is not in .*VOCdevkit", ("voc2012", ("test",), tmp_path), {"hold_out": 5}),
        (ValueError, "unknown dataset 'cifar10': one of camvid", ("cifar10", ("test",), folder), {}),
        (ValueError, "unknown split 'dev'", ("camvid", ("dev",), folder), {}),
        (ValueError, "hold_out=12 must be .* below the 12", ("camvid", ("val",), folder), {"hold_out": 12}),
        (ValueError, "no val split with hold_out=0", ("camvid", ("val",), folder), {"hold_out": 0}),
        (ValueError, "cityscapes has no validation images apart", ("cityscapes", ("val",), folder), {}),
        (ValueError, "camvid cannot be downloaded", ("camvid", ("test",), folder), {"download": True}),
    ):
        with pytest.raises(error, match=message):
            load_scenes(*arguments, **settings)
    whole = (folder / "camvid.zip").read_bytes()
    (tmp_path / "camvid.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match=r"camvid\.zip is not a readable zip"):
        load_scenes("camvid", ("test",), tmp_path)
    for name, content in (
        ("0001.png", b"no image"),
        ("0001.png", encode(np.zeros((5, 5), np.uint8))),
        ("other.png", b""),
    ):
        with ZipFile(tmp_path / "camvid.zip", "w") as pack:
            pack.writestr("camvid/test/0001.webp", encode(scene(np.random.default_rng(0))[0]))
            pack.writestr(f"camvid/testannot/{name}", content)
        with pytest.raises(
            RuntimeError, match=r"camvid\.zip: test/0001\.webp (or its labels cannot|and its labels differ)"
        ):
            load_scenes("camvid", ("test",), tmp_path)
        with pytest.raises(RuntimeError, match="has no val images"):
            load_scenes("camvid", ("val",), tmp_path)


# --- augmentation


def marked(height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose pixels say where they are, and labels that say the same."""
    labels = (torch.arange(height)[:, None] // 8 * 7 + torch.arange(width) // 8).byte()
    return torch.stack([labels * 5, labels, 255 - labels]), labels


def test_a_crop_is_a_window_of_image_and_labels() -> None:
    image, labels = marked()
    corners, flips = set(), 0
    for index in range(40):
        crop, cut = SceneAugment(3, (24, 32), flip=True)(image, labels, index, 2)
        matches = [
            (top, left, flip)
            for flip in (False, True)
            for top in range(40 - 24 + 1)
            for left in range(56 - 32 + 1)
            if torch.equal(cut.flip(-1) if flip else cut, labels[top : top + 24, left : left + 32])
        ]
        assert len(matches) == 1
        assert torch.equal(crop, torch.stack([cut * 5, cut, 255 - cut]))
        corners.add(matches[0][:2])
        flips += matches[0][2]
    assert len(corners) > 30
    assert 10 < flips < 30


@pytest.mark.parametrize(("scale", "size"), [((2.0, 2.0), (64, 96)), ((0.5, 0.5), (20, 28)), ((1.0, 1.0), (40, 56))])
def test_scale_keeps_image_and_labels_together(scale: Sequence[float], size: tuple[int, int]) -> None:
    image, labels = marked()
    crop, cut = SceneAugment(3, (64, 96), scale=scale)(image, labels, 0, 0)
    assert tuple(cut.shape) == size  # what is smaller than the crop stays so: the loader fills it
    agree = (crop[1].int() - cut.int()).abs() <= 1
    assert agree.float().mean() > 0.7  # but at the edges between blocks, where pixels are mixed
    assert len(cut.unique()) >= 15


def test_a_thin_image_is_not_blown_up() -> None:
    with pytest.raises(ValueError, match="an image of 1x3000 pixels is too thin: its shorter side becomes 180"):
        scaled_size((3000, 1), 180)


def test_image_size_comes_before_scale() -> None:
    image, labels = marked(40, 80)
    _, cut = SceneAugment(0, (96, 96), image_size=20)(image, labels, 0, 0)
    assert tuple(cut.shape) == (20, 40)


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    image, labels = marked()
    settings = {"crop": (32, 32), "scale": (0.5, 2.0), "flip": True, "jitter": 0.4}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    once = SceneAugment(5, **settings)(image, labels, 7, 3)
    assert (states[0], states[1]) == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    torch.manual_seed(99)
    again = SceneAugment(5, **settings)(image, labels, 7, 3)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
    for seed, index, epoch in ((6, 7, 3), (5, 8, 3), (5, 7, 4)):
        other = SceneAugment(seed, **settings)(image, labels, index, epoch)[0]
        assert other.shape != once[0].shape or not torch.equal(other, once[0])


def test_jitter_changes_colours_and_leaves_labels() -> None:
    image, labels = marked()
    means = []
    for index in range(20):
        changed, same_labels = SceneAugment(1, (40, 56), jitter=0.3)(image, labels, index, 0)
        assert torch.equal(same_labels, labels)
        means.append(changed.float().mean().item())
    assert 5 < np.std(means) < 60


# --- loaders


def test_processes_and_accumulation_share_the_batch_of_one(folder: Path) -> None:
    scenes = load_scenes("camvid", ("train",), folder)[0]

    def loader(rank: int = 0, world: int = 1, accumulation: int = 1) -> SceneTrainLoader:
        augment = SceneAugment(7, (32, 32), scale=(0.5, 1.0), flip=True, jitter=0.2)
        return SceneTrainLoader(
            scenes, 8, augment, void=VOID, **PLAIN, rank=rank, world=world, accumulation=accumulation
        )

    images, labels = loader().batch(2, 0)
    assert (images.shape, labels.shape, labels.dtype) == ((8, 3, 32, 32), (8, 32, 32), torch.int64)
    parts = [loader(rank, 2, 2).batch(2, 0, micro) for micro in range(2) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_reading_ahead_gives_the_same_batches_in_any_order(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    lazy = load_scenes("cityscapes", ("train",), tmp_path, hold_out=0)[0]
    augment = SceneAugment(1, (32, 32), scale=(0.5, 1.5))
    settings = {"void": 255, **PLAIN, "accumulation": 2}
    ahead, held = (
        SceneTrainLoader(scenes, 2, augment, **settings) for scenes in (lazy, Scenes(list(lazy.items), lazy.classes))
    )
    asked = [(epoch, step, micro) for epoch in range(2) for step in range(3) for micro in range(2)]
    for key in [*asked, (0, 1, 1), (1, 0, 0)]:
        assert all(torch.equal(*pair) for pair in zip(ahead.batch(*key), held.batch(*key), strict=True)), key


def test_what_a_small_image_leaves_is_void_and_mean() -> None:
    image, labels = torch.full((3, 20, 40), 51, dtype=torch.uint8), torch.zeros(20, 40, dtype=torch.uint8)
    mean = (0.5, 0.4, 0.3)
    loader = SceneTrainLoader(
        Scenes([(image, labels)], []), 1, SceneAugment(0, (32, 64)), void=VOID, mean=mean, std=(0.1, 0.2, 0.4)
    )
    batch, targets = loader.batch(0, 0)
    assert (targets[0, :20, :40] == 0).all()
    assert (targets == VOID).sum() == 32 * 64 - 20 * 40
    torch.testing.assert_close(batch[0, :, 0, 0], torch.tensor([-3.0, -1.0, -0.25]))
    assert batch[0, :, 20:].abs().max() == batch[0, :, :, 40:].abs().max() == 0


def test_evaluation_resizes_images_and_keeps_labels(folder: Path) -> None:
    scenes = load_scenes("camvid", ("test",), folder)[0]
    batches = list(SceneEvalLoader(scenes, image_size=24, **PLAIN, channels_last=True, batch_size=3))
    assert [batch[0].shape for batch in batches] == [(3, 3, 24, 32), (1, 3, 24, 32)]
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        torch.cat([labels for _, labels in batches]), torch.stack([item[1] for item in scenes.items]).long()
    )
    parts = [SceneEvalLoader(scenes, image_size=24, **PLAIN, rank=rank, world=2, batch_size=1) for rank in range(2)]
    assert [len(list(part)) for part in parts] == [2, 2]
    assert torch.equal(next(iter(parts[1]))[0], batches[0][0][1:2])


@pytest.mark.data
def test_real_camvid() -> None:
    if not (Path(os.environ.get("POOLSKIP_DATA_DIR", "")) / "camvid.zip").is_file():
        pytest.skip("POOLSKIP_DATA_DIR has no camvid.zip")
    val, test = load_scenes("camvid", ("val", "test"))
    assert (len(val), len(test)) == (101, 233)
    assert {item[0].shape for item in (*val.items, *test.items)} == {(3, 360, 480)}
    share = sum(test.count_labels())[:12] / (233 * 360 * 480)
    assert [val.classes[label] for label in np.argsort(-share)[:2]] == ["Road", "Building"]
    assert share.sum() == pytest.approx(1)
    assert 0.005 < share[VOID] < 0.1
