"""Reader of JPEG packs: many small JPEG files end to end in one `.npz`.

A pack holds, for a prefix such as `train`, three arrays: `train_jpeg` (uint8, all files end to end),
`train_offset` (int64, N + 1 starts) and `train_label` (integers). `classes` names the labels, `names` does so
where classes are codes.
"""

import io
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np


def data_file(folder: Path, name: str) -> Path:
    """Path of a file in the data folder; FileNotFoundError, naming both, if it is missing."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} not found in data folder {folder} (what it is: docs/training.md)")
    return path


def is_image(name: str) -> bool:
    """Whether a file of this name is an image, and not what a file manager leaves beside them."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def read_pack(path: Path, prefix: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode all JPEG files of one part of a pack.

    Grey images become RGB. All images of a part must have one size.

    Args:
        path: the `.npz` file.
        prefix: part of the pack, for example `train`.

    Returns:
        Images (N, H, W, 3) uint8, labels (N,) int64, and the class names.

    Raises:
        RuntimeError: if the file is no pack, lacks the part, or a JPEG in it cannot be decoded.
    """
    arrays = _load_arrays(path, prefix)
    jpeg, offset, labels = (arrays[f"{prefix}_{part}"] for part in ("jpeg", "offset", "label"))
    for what, array, kinds in (("jpeg", jpeg, "u"), ("offset", offset, "iu"), ("label", labels, "iu")):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise RuntimeError(f"{path}: {prefix}_{what} is {array.dtype}{list(array.shape)}, not a row of integers")
    labels, count = labels.astype(np.int64), len(offset) - 1
    classes = [str(name) for name in np.atleast_1d(arrays.get("names", arrays["classes"]))]
    if count < 1 or len(labels) != count or offset[-1] > len(jpeg):
        raise RuntimeError(f"{path} is damaged: {prefix}_offset, {prefix}_label and {prefix}_jpeg disagree")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise RuntimeError(
            f"{path}: {prefix}_label holds {labels.min()} to {labels.max()}, expected 0 to {len(classes) - 1}"
        )
    buffer = np.ascontiguousarray(jpeg).data

    def decode(index: int) -> np.ndarray:
        return _decode(buffer[offset[index] : offset[index + 1]], f"{path}: {prefix} image {index}")

    images = np.empty((count, *decode(0).shape), np.uint8)

    def fill(start: int) -> None:
        for index in range(start, min(start + 1000, count)):
            image = decode(index)
            if image.shape != images.shape[1:]:
                raise RuntimeError(
                    f"{path}: {prefix} image {index} is {image.shape[:2]}, others {images.shape[1:3]}: "
                    "a pack holds one size"
                )
            images[index] = image

    with ThreadPoolExecutor() as pool:  # the decoder releases the interpreter lock
        list(pool.map(fill, range(0, count, 1000)))
    return images, labels, classes


def _load_arrays(path: Path, prefix: str) -> dict[str, Any]:
    """Read the arrays of one part, with a clear error for what is no pack."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is a single array, as of a .npy file")
        with loaded as pack:
            wanted = [f"{prefix}_jpeg", f"{prefix}_offset", f"{prefix}_label", "classes"]
            missing = [key for key in wanted if key not in pack]
            if missing:
                raise RuntimeError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(pack.files)}")
            return {key: pack[key] for key in [*wanted, *(["names"] if "names" in pack else [])]}
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise RuntimeError(f"{path} is not a readable .npz pack: {error}") from error


def _decode(data: memoryview, what: str) -> np.ndarray:
    """Decode one JPEG to (H, W, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's UnidentifiedImageError is an OSError
        raise RuntimeError(f"{what} cannot be decoded: {type(error).__name__}") from error
