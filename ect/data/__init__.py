"""Training data: `load` reads a data set, `ImageStream` serves it from the device, `AugmentPipe` warps the images."""

from __future__ import annotations

from ect.data.augment import AugmentPipe
from ect.data.datasets import Dataset, load
from ect.data.stream import ImageStream, to_float

__all__ = ["AugmentPipe", "Dataset", "ImageStream", "load", "to_float"]
