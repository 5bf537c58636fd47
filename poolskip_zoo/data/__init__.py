"""Data sets of images and of scenes, and batches that are pure functions of seed, epoch and step."""

from .datasets import DATASETS, DatasetInfo, Split, load_split, load_splits
from .loader import EvalLoader, TrainLoader

__all__ = ["DATASETS", "DatasetInfo", "EvalLoader", "Split", "TrainLoader", "load_split", "load_splits"]
