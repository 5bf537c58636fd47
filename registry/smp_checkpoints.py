"""Trained segmentation models, which smp loads from their folders."""

from .checkpoint import SegmentationCheckpoint, add_checkpoints

CHECKPOINTS: tuple[SegmentationCheckpoint, ...] = ()

add_checkpoints(CHECKPOINTS)
