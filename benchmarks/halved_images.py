"""Halve a grey data set into IDX files: python benchmarks/halved_images.py SOURCE FOLDER.

Each pixel is the mean of 2x2; images of 28x28 get a black border first, to 32x32. Of Fashion-MNIST it makes fashion16, which
benchmarks/ledger.py trains on within minutes:

    apt-get install dataset-fashion-mnist
    python benchmarks/halved_images.py /usr/share/datasets/fashion-mnist datasets/fashion16
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lib import options
from numpy.typing import NDArray

from ect.config import DataConfig
from ect.data import load
from ect.errors import UserError
from ect.files.atomic import atomic


def halved(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the means of 2x2 pixels of uint8 [N, H, W], rounded, uint8 [N, H / 2, W / 2]; H and W are even."""
    sums = sum(images[:, y::2, x::2].astype(np.uint16) for y in (0, 1) for x in (0, 1))
    return ((np.asarray(sums) + 2) // 4).astype(np.uint8)


def idx(values: NDArray[np.uint8]) -> bytes:
    """Return an IDX file of uint8 values of any number of dimensions."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write(source: str, folder: Path) -> None:
    """Write train-images-idx3-ubyte and train-labels-idx1-ubyte of a grey data set with classes."""
    data = load(DataConfig(source, labels=True))
    if data.channels != 1 or data.labels is None:
        raise UserError(f"{source}: expected grey images with classes, found {data.describe()}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (
        ("train-labels-idx1-ubyte", data.labels.argmax(1).numpy().astype(np.uint8)),
        ("train-images-idx3-ubyte", halved(data.images[..., 0].numpy())),
    ):
        with atomic(folder / name) as temp:
            temp.write_bytes(idx(values))


@options.command
def main(argv: Sequence[str] | None = None) -> int:
    parser = options.Parser(description=__doc__)
    parser.add_argument("source", help="the data set, as --data.source of ect.train")
    parser.add_argument("folder", type=options.folder, help="where to write the two files")
    found = parser.parse_args(argv)
    write(found.source, found.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
