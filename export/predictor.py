"""Run an exported model on images with NumPy, Pillow and ONNX Runtime or OpenVINO alone; this file stands by itself.

from poolskip_predictor import Predictor
print(Predictor("model.onnx")("photo.jpg")[:5])

On the command line: python poolskip_predictor.py model.onnx photo.jpg …
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ["Predictor"]

_KEY = "poolskip_zoo"

Run = Callable[[np.ndarray], list[np.ndarray]]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image; 16 bits per pixel are scaled to eight, where Pillow would cut off at 255."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.dtype.itemsize == 2 or values.max(initial=0) > 255:  # a PNG of 16 bits is one of 32 to older Pillow
            image = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


class Predictor:
    """A model file with the preprocessing and class names that it holds.

    Args:
        path: `.onnx` file, or `.xml` of OpenVINO, that the exporter of poolskip-zoo wrote.
        runtime: `onnxruntime` or `openvino`; by default the one that is installed and reads the file, ONNX Runtime
            first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind, holds no metadata of the exporter or takes several images at once
            alone, or the runtime is unknown.
        ImportError: if the runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], runtime: str | None = None) -> None:
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no such model: {path}")
        if not path.endswith((".onnx", ".xml")):
            raise ValueError(f"{path}: expected an .onnx file, or .xml of OpenVINO")
        runtimes = ("openvino",) if path.endswith(".xml") else ("onnxruntime", "openvino")
        if runtime is not None and runtime not in runtimes:
            raise ValueError(f"runtime={runtime!r}: expected one of {', '.join(runtimes)} for {path}")
        self._run, text, batch = _load(path, (runtime,) if runtime else runtimes)
        if not text:
            raise ValueError(f"{path} holds no metadata of poolskip-zoo's exporter")
        self.metadata: dict[str, Any] = json.loads(text)
        if batch != 1:
            raise ValueError(f"{path} takes exactly {batch} images at once: export it with the batch open, or with one")
        lacking = {"input_size", "mean", "std", "interpolation", "crop_pct"} - set(self.metadata)
        if lacking:
            raise ValueError(f"{path} does not say how images are prepared: {', '.join(sorted(lacking))} missing")
        if len(self.metadata["mean"]) != 3:
            raise ValueError(f"{path} takes images of {len(self.metadata['mean'])} channels: expected 3, RGB")
        if (self.metadata.get("crop_mode") or "center") not in ("center", "squash"):
            raise ValueError(f"crop_mode {self.metadata['crop_mode']!r}: expected center or squash")

    def __call__(self, image: Any) -> Any:
        """Classify or segment one image.

        Args:
            image: path, whose EXIF orientation counts, or Pillow image as it is.

        Returns:
            For a classifier its (label, probability) pairs, the most likely first; for a segmentation model the class
            of each pixel, an int32 array (height, width) of the image's own size. Where the metadata hold a
            `threshold` classes may overlap: (classes, height, width), 1 where a class's output is above it.

        Raises:
            OSError: if the file is missing or no image.
        """
        if not isinstance(image, Image.Image):
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
        image = _to_rgb(image)
        mask = self.metadata.get("task") == "segmentation"
        height, width = self.metadata["input_size"][-2:]
        prepared = image.resize((width, height), Image.Resampling.BILINEAR) if mask else self._crop(image)
        output = self._run(self._normalise(prepared))[0]
        return self._mask(output, image.size) if mask else self._rank(output)

    def _crop(self, image: Image.Image) -> Image.Image:
        """The evaluation transform of timm: scale, then cut out the middle."""
        height, width = self.metadata["input_size"][-2:]
        scale = self.metadata["crop_pct"]
        tall, wide = math.floor(height / scale), math.floor(width / scale)
        if self.metadata.get("crop_mode") == "squash":
            size = (wide, tall)
        elif tall == wide:
            # torchvision's rule: the short side takes the size, the long side is cut to an int.
            short, long = min(image.size), max(image.size)
            other = int(tall * long / short)
            size = (tall, other) if image.width <= image.height else (other, tall)
        else:
            # timm's rule where height and width differ.
            ratio = min(image.height / tall, image.width / wide)
            size = (round(image.width / ratio), round(image.height / ratio))
        resampling = Image.Resampling[self.metadata["interpolation"].upper()]
        if size != image.size:
            image = image.resize(size, resampling)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        # Beyond the image crop fills with zeros, as torchvision pads.
        if image.width < width:
            left = -((width - image.width) // 2)
        if image.height < height:
            top = -((height - image.height) // 2)
        return image.crop((left, top, left + width, top + height))

    def _normalise(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.asarray(self.metadata[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
        return np.ascontiguousarray(((pixels - mean) / std)[None])

    def _rank(self, logits: np.ndarray) -> list[tuple[str, float]]:
        shares = np.exp(logits[0] - logits[0].max())
        shares = shares / shares.sum()
        labels = self.metadata.get("class_names") or [str(i) for i in range(len(shares))]
        return [(labels[i], float(shares[i])) for i in np.argsort(-shares, kind="stable")]

    def _mask(self, output: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        threshold = self.metadata.get("threshold")
        exclusive = threshold is None and output.shape[1] > 1
        found = output[0].argmax(0)[None] if exclusive else output[0] > (threshold or 0)
        images = [Image.fromarray(each.astype(np.int32)) for each in found]
        masks = np.stack([np.asarray(each.resize(size, Image.Resampling.NEAREST)) for each in images])
        return masks[0] if len(masks) == 1 else masks


def _load(path: str, runtimes: tuple[str, ...]) -> tuple[Run, str | None, int]:
    """A function from an array to output arrays, the metadata's text, and the batch, 1 where it is open."""
    for runtime in runtimes:
        try:
            return _load_onnxruntime(path) if runtime == "onnxruntime" else _load_openvino(path)
        except ImportError:
            continue
    raise ImportError(f"{path} needs {' or '.join(runtimes)}: pip install {runtimes[0]}")


def _load_onnxruntime(path: str) -> tuple[Run, str | None, int]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    batch = image.shape[0] if isinstance(image.shape[0], int) else 1
    text = session.get_modelmeta().custom_metadata_map.get(_KEY)
    return lambda array: session.run(None, {image.name: array}), text, batch


def _load_openvino(path: str) -> tuple[Run, str | None, int]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    place = ["framework", _KEY]  # where OpenVINO keeps the metadata of ONNX files, also of those it saves as its own
    text = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else None
    batch = model.input(0).partial_shape[0]
    return lambda array: list(compiled([array]).values()), text, batch.get_length() if batch.is_static else 1


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python poolskip_predictor.py MODEL IMAGE…")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console may lack letters of a path or a label
    predictor = Predictor(sys.argv[1])
    for name in sys.argv[2:]:
        found = predictor(name)
        if isinstance(found, np.ndarray):  # of pixels: the shares of the classes
            labels = predictor.metadata.get("class_names") or []
            if found.ndim == 3 or len(labels) == 1:  # one mask for each class
                shares = np.atleast_1d(found.mean((-2, -1)))
                classes = np.arange(len(shares))
            else:
                classes, counts = np.unique(found, return_counts=True)
                shares = counts / found.size
            known = [labels[each] if each < len(labels) else str(each) for each in classes]
            found = sorted(zip(known, shares, strict=True), key=lambda pair: -pair[1])
        print(f"{name}: " + ", ".join(f"{label} {share:.1%}" for label, share in found[:5]))
