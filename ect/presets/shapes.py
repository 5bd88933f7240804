"""The sizes of the data sets that presets name, for a plan before they are there."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """So many square images of so many pixels across, channels, and classes."""

    images: int
    resolution: int
    channels: int
    classes: int


SHAPES = {
    "datasets/cifar-10-python.tar.gz": Shape(50_000, 32, 3, 10),
    "datasets/fashion-mnist": Shape(60_000, 28, 1, 10),
    "datasets/ffhq-64x64.zip": Shape(70_000, 64, 3, 0),
    "datasets/imagenet-64x64.zip": Shape(1_281_167, 64, 3, 1000),
}
"""The sizes, by the --data.source of the presets."""
