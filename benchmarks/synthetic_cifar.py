"""Images in CIFAR-10's format, for a machine without a network: python benchmarks/synthetic_cifar.py FILE.tar.

Soft waves, each class in a colour of its own; 2,000 of them, again and again. Good for whether training runs, and how fast.
"""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from lib.options import Parser, new_file

FOLDER, BATCHES, ROWS, DISTINCT = "cifar-10-batches-py", 5, 10_000, 2_000


def images(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [DISTINCT, 3 * 32 * 32] in planes, and their classes [DISTINCT]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, DISTINCT)
    x, y = np.meshgrid(np.linspace(0, 2 * np.pi, 32), np.linspace(0, 2 * np.pi, 32))
    draw = rng.uniform(0, 1, (3, DISTINCT, 1, 1))
    wave = np.sin(draw[0] * 2 * x + 2 * np.pi * draw[2]) * np.cos(draw[1] * 2 * y)
    phases = labels[:, None] * 2 * np.pi / 10 + np.arange(3) * 2 * np.pi / 3
    planes = 128 + 60 * wave[:, None] + 60 * np.sin(phases)[:, :, None, None]
    return planes.clip(0, 255).astype(np.uint8).reshape(DISTINCT, -1), labels


def write(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(1, BATCHES + 1):
            pixels, labels = images(number)
            batch = {
                b"data": np.tile(pixels, (ROWS // DISTINCT, 1)),
                b"labels": np.tile(labels, ROWS // DISTINCT).tolist(),
            }
            content = pickle.dumps(batch, protocol=2)
            info = tarfile.TarInfo(f"{FOLDER}/data_batch_{number}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=new_file, help="the archive to write")
    path: Path = parser.parse_args(argv).file
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
