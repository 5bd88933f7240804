"""Recipes by name: a file a family, whose RECIPES are added here."""

from collections.abc import Mapping
from dataclasses import replace

from ect.config import Config
from ect.presets import cifar10, digits, fashion, imagenet
from ect.presets.shapes import SHAPES, Shape

__all__ = ["NOTES", "PRESETS", "SHAPES", "Shape", "by_name"]


def by_name(*families: Mapping[str, Config]) -> dict[str, Config]:
    """Return the recipes of all families, each with its name. Raises ValueError where two have one name."""
    found: dict[str, Config] = {}
    for family in families:
        for name, recipe in family.items():
            if name in found:
                raise ValueError(f"preset {name!r}: two families have this name; choose another")
            found[name] = replace(recipe, preset=name)
    return found


PRESETS = by_name(digits.RECIPES, fashion.RECIPES, cifar10.RECIPES, imagenet.RECIPES)
NOTES: dict[str, str] = cifar10.NOTES | imagenet.NOTES
"""Words that stand beside the name of a recipe, wherever it is listed."""
