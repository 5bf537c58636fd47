"""Training by recipe, and evaluation."""

from .evaluate import Scores, SegmentationScores, describe, evaluate, evaluate_segmentation
from .loop import train
from .many import Outcome, join_weights, load_list, train_list, train_many
from .recipe import Recipe, load_recipe, make_recipe, recipe_names

__all__ = [
    "Outcome",
    "Recipe",
    "Scores",
    "SegmentationScores",
    "describe",
    "evaluate",
    "evaluate_segmentation",
    "join_weights",
    "load_list",
    "load_recipe",
    "make_recipe",
    "recipe_names",
    "train",
    "train_list",
    "train_many",
]
