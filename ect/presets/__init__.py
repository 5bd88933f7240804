"""Recipes by name: a file a family, whose RECIPES are added here."""

from dataclasses import replace

from ect.config import Config
from ect.presets import cifar10, digits, fashion

PRESETS: dict[str, Config] = {
    name: replace(recipe, preset=name)
    for family in (digits, fashion, cifar10)
    for name, recipe in family.RECIPES.items()
}
NOTES: dict[str, str] = cifar10.NOTES
"""Words that stand beside the name of a recipe, wherever it is listed."""
