"""The public name of ect.files.checkpoint: how to load and save a model."""

from ect.files.checkpoint import load_model
from ect.files.model_file import save_model

__all__ = ["load_model", "save_model"]
