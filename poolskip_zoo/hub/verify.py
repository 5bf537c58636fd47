"""Whether a checkpoint's folder is what was recorded: hashes of its files, and the outputs of its model."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models import PretrainedCfg, create_model, get_arch_pretrained_cfgs
from torch import nn

from ..registry.checkpoint import WEIGHTS, Checkpoint, SegmentationCheckpoint
from ..registry.resolve import local_folder, local_weights, sha256_of
from ..registry.segmentation import build_recorded, load_weights
from .segmentation import GOLDEN_SIZE

__all__ = [
    "FILES",
    "GOLDEN_TOLERANCE",
    "checkpoint_cfg",
    "checksums",
    "fetch_folder",
    "golden",
    "load_checkpoint",
    "pull",
    "verify_folder",
]

_SUMS = "SHA256SUMS"
_SUMMED = ("README.md", "config.json", "golden.safetensors", WEIGHTS)
# All that a checkpoint's folder has, and so its repository on the Hub.
FILES = (_SUMS, *_SUMMED)
# Largest difference of a golden logit, as a share of the largest one. Convolution algorithms of different processors
# and versions differ by about 1e-5; other weights by about 1.
GOLDEN_TOLERANCE = 1e-3


def checkpoint_cfg(record: Checkpoint) -> PretrainedCfg:
    """timm's configuration of a checkpoint, registered or about to be, with architecture and tag.

    Raises ValueError if the architecture is not registered.
    """
    cfgs = get_arch_pretrained_cfgs(record.arch)
    if not cfgs:
        raise ValueError(f"{record.name}: no architecture {record.arch!r} is registered")
    cfg = record.pretrained_cfg(next(iter(cfgs.values())))
    cfg.architecture, cfg.tag = record.arch, record.tag
    return cfg


def load_checkpoint(record: Checkpoint, weights: Path) -> nn.Module:
    """Build a checkpoint's model with the weights of a safetensors file: in evaluation mode, float32, on the CPU.

    Raises RuntimeError if the file cannot be read or does not fit.
    """
    if isinstance(record, SegmentationCheckpoint):
        return load_weights(build_recorded(record), weights)
    try:
        model = create_model(
            record.arch,
            pretrained=True,
            pretrained_cfg=checkpoint_cfg(record),
            pretrained_cfg_overlay={"file": str(weights)},
            **record.model_args,
        )
    except SafetensorError as error:
        raise RuntimeError(f"{weights} is not a readable safetensors file: {error}") from error
    return model.eval()


def golden(record: Checkpoint, weights: Path) -> bytes:
    """Make a safetensors file: `input` (2, C, H, W), float16, as after preprocessing; `output`, the float32 logits."""
    size = GOLDEN_SIZE if isinstance(record, SegmentationCheckpoint) else checkpoint_cfg(record).input_size
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).half()
    return save({"input": x, "output": _outputs(record, weights, x)}, {"format": "pt"})


def checksums(folder: Path) -> str:
    """The text of the SHA256SUMS of a folder with all other files, in the format of `sha256sum`."""
    return "".join(f"{sha256_of(folder / name)}  {name}\n" for name in _SUMMED)


def verify_folder(record: Checkpoint, folder: Path) -> float:
    """Compare a checkpoint's folder with its record, its SHA256SUMS and its golden output.

    Args:
        record: the checkpoint.
        folder: folder with `FILES`.

    Returns:
        Largest difference of a golden logit, as a share of the largest logit.

    Raises:
        RuntimeError: if a file is missing or another one than recorded, or the outputs differ by more than
            `GOLDEN_TOLERANCE`.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(f"{record.name}: {folder} lacks {', '.join(missing)}")
    weights = folder / WEIGHTS
    actual = sha256_of(weights)
    if actual != record.sha256:
        raise RuntimeError(
            f"{record.name}: {weights} is not the recorded file: sha256 {actual}, expected {record.sha256}"
        )
    lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
    for name in _SUMMED:
        if f"{sha256_of(folder / name)}  {name}" not in lines:
            raise RuntimeError(f"{record.name}: {folder / name} is not the file that {_SUMS} states")
    stored = load_file(folder / "golden.safetensors")
    output = stored["output"]
    difference = float((_outputs(record, weights, stored["input"]) - output).abs().max() / output.abs().max())
    if not difference <= GOLDEN_TOLERANCE:
        raise RuntimeError(
            f"{record.name}: the golden output differs by {difference:.1e} of the largest logit, more than "
            f"{GOLDEN_TOLERANCE:.0e}"
        )
    return difference


def fetch_folder(record: Checkpoint) -> Path:
    """Give a checkpoint's folder, not verified: a local one, else the Hub's at the pinned revision.

    Raises RuntimeError if it cannot be had.
    """
    folder = local_folder(record)
    if folder is None:
        from huggingface_hub import snapshot_download

        # First the weights: what can go wrong is explained there.
        local_weights(record)
        repo, _, revision = record.hub_id.partition("@")
        try:
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))
        except Exception as error:
            raise RuntimeError(
                f"cannot get the files of {record.name} from {repo}: {' '.join(str(error).split())}"
            ) from error
    return folder


def pull(record: Checkpoint, to: Path) -> Path:
    """Copy a checkpoint's verified folder, for a mirror that `POOLSKIP_HUB_DIR` names.

    Args:
        record: the checkpoint.
        to: folder to put its folder into; made if missing.

    Returns:
        The new folder; one that was there already is verified and left as it is.

    Raises:
        RuntimeError: if the folder cannot be had or is not the recorded one.
    """
    target = to / record.name
    if target.exists():
        verify_folder(record, target)
        return target
    to.mkdir(parents=True, exist_ok=True)
    folder = fetch_folder(record)
    with tempfile.TemporaryDirectory(dir=to, prefix=".pull-") as temporary:
        copy = Path(temporary) / record.name
        copy.mkdir()
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        verify_folder(record, copy)
        try:
            os.replace(copy, target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
            verify_folder(record, target)
    return target


@torch.inference_mode()
def _outputs(record: Checkpoint, weights: Path, x: torch.Tensor) -> torch.Tensor:
    return load_checkpoint(record, weights)(x.float())
