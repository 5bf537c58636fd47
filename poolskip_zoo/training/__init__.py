"""Training by recipe, and evaluation."""

from .evaluate import Scores, evaluate
from .loop import train
from .recipe import Recipe, load_recipe, make_recipe, recipe_names

__all__ = ["Recipe", "Scores", "evaluate", "load_recipe", "make_recipe", "recipe_names", "train"]
