"""Records of a run: lines of metrics, TensorBoard, a picture of curves, and what it ran on."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from ..contexts import explain_full_disk, write_atomic
from ..pictures import new_figure, save_figure

Row = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; RuntimeError if the disk is full."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def finite(value: float) -> float | None:
    """Turn a number into what JSON takes: None of one that is not finite."""
    return value if math.isfinite(value) else None


class Recorder:
    """Writes one row per epoch to `metrics.jsonl` and, where it is installed, to TensorBoard.

    The whole file is written anew each time: a resumed run goes back to its last checkpoint and leaves no row twice.

    Args:
        folder: the run folder.
        history: rows so far; appended to.
    """

    def __init__(self, folder: Path, history: list[Row]) -> None:
        self.folder, self.history = folder, history
        self._board = _open_board(folder, history[-1]["step"] + 1 if history else 0)
        self._write()

    def add(self, row: Row) -> None:
        """Add the row of an epoch, `epoch` and `step` among its numbers; RuntimeError if the disk is full."""
        self.history.append(row)
        self._write()
        if self._board is not None:
            with explain_full_disk(self.folder / "tensorboard"):
                for key, value in row.items():
                    if key not in ("epoch", "step") and value is not None:
                        self._board.add_scalar(key, value, row["step"])
                self._board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _write(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomic(self.folder / "metrics.jsonl", text.encode())


def _open_board(folder: Path, first_step: int) -> Any:
    """Open TensorBoard's writer, or return None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)


def draw_curves(path: Path, history: list[Row], title: str) -> None:
    """Draw losses, scores and learning rate over epochs as a PNG.

    Args:
        path: the picture.
        history: rows of `Recorder`.
        title: heading.

    Raises:
        ImportError: if matplotlib is missing.
        RuntimeError: if the disk is full.
    """
    panels = [
        ("loss", ("train_loss", "val_loss"), "train: with smoothing and mixing, val: without"),
        ("scores", ("val_top1", "val_top5", "val_miou", "val_pixel_accuracy"), "on held-out images, %"),
        ("learning rate", ("lr",), "at the end of the epoch"),
    ]
    # No scores where nothing is held out.
    panels = [each for each in panels if any(row.get(key) is not None for row in history for key in each[1])]
    figure = new_figure(3.7 * len(panels), 3.4)
    figure.suptitle(title, parse_math=False)  # a run may have $ in its name
    for axes, (name, keys, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=name, xlabel="epoch", ylabel=label)
        for key in keys:
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", label=key)
        if axes.lines and len(keys) > 1:
            axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def has_bf16_units() -> bool:
    """Whether the CPU computes in bfloat16 by itself; where torch cannot tell (no x86), yes."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is None or platform.machine().lower() not in ("x86_64", "amd64") or bool(supported())


def hardware(device: torch.device, processes: int) -> str:
    """Name the hardware in one line: `NVIDIA H100 80GB HBM3` or `AMD EPYC 9654 (CPU, 2 threads)`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_cpu_name()} (CPU, {threads} thread{'s' * (threads > 1)})"
    return name if processes == 1 else f"{processes} x {name}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions that a result depends on, by name: Python, system and packages."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for package in ("poolskip-zoo", "torch", "timm", "segmentation-models-pytorch", "accelerate", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
