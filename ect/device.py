"""The public name of ect.ranks.device."""

from ect.ranks.device import resolve

__all__ = ["resolve"]
