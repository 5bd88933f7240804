"""The public name of ect.files.checkpoint: how to load and save a model."""

from ect.files.checkpoint import load_model, save_model

__all__ = ["load_model", "save_model"]
