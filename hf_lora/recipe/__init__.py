"""Recipes: one training run as a YAML file or as frozen data, checked before it is carried out.

from hf_lora.recipe import Recipe, check, train

recipe = Recipe.load("task.yaml")
print(check(recipe))
result = train(recipe)
"""

from .problems import RecipeError, RunFolderError
from .run import Interrupted, Plan, Result, check, train
from .schema import Base, Data, Push, Recipe, Source

__all__ = [
    "Base",
    "Data",
    "Interrupted",
    "Plan",
    "Push",
    "Recipe",
    "RecipeError",
    "Result",
    "RunFolderError",
    "Source",
    "check",
    "train",
]
