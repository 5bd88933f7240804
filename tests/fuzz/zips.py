"""Zips in EDM's layout: the archive, the names in it, the pictures and the labels."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from ect.config import DataConfig
from ect.data import load
from tests.fuzz.labels import CLASSES, NAMES, VECTORS
from tests.fuzz.mutations import WORDS, spoilt, spoilt_text


def picture(mode: str, kind: str, size: int = 8, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, kind)
    return file.getvalue()


KINDS = [
    ("RGB", "PNG"),
    ("L", "PNG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("1", "PNG"),
    ("I", "TIFF"),
    ("RGB", "JPEG"),
    ("CMYK", "JPEG"),
    ("RGB", "BMP"),
    ("P", "GIF"),
    ("RGB", "TIFF"),
    ("RGB", "WEBP"),
    ("L", "PPM"),
    ("RGB", "TGA"),
    ("RGBA", "ICO"),
]
PICTURES = [picture(*kind, seed=i) for i, kind in enumerate(KINDS)]
_NAMES = [
    *NAMES,
    "dataset.json",
    "00000\\a.png",
    "/abs.png",
    "../up.png",
    "__MACOSX/a.png",
    ".x/a.png",
    "a.png/",
    "x/dataset.json",
    "a.jpg",
    *(word + ".png" for word in WORDS),
]


def archive(members: list[tuple[str, bytes]], compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, data in members:
            new.writestr(name.encode("utf-8", "replace").decode().replace("\0", "?"), data)
    return file.getvalue()


PLAIN = [(name, PICTURES[0]) for name in NAMES] + [("dataset.json", json.dumps(CLASSES).encode())]
COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A whole archive of some pictures, whole and spoilt, under some names."""
    pictures = st.sampled_from(PICTURES) | st.sampled_from(PICTURES).flatmap(spoilt)
    members = [(name, draw(pictures)) for name in draw(st.lists(st.sampled_from(_NAMES), max_size=4))]
    if draw(st.booleans()):
        members = [*PLAIN[:3], ("dataset.json", draw(spoilt_text(CLASSES) | spoilt_text(VECTORS)))]
    return archive(members, draw(st.sampled_from(COMPRESSIONS)))


INPUTS = st.tuples(
    st.one_of(archives(), *(spoilt(archive(PLAIN, kind)) for kind in COMPRESSIONS)),
    st.booleans(),
    st.sampled_from([None, 4, 8]),
    st.sampled_from([None, "rgb", "grey"]),
)


def read(folder: Path, given: tuple[bytes, bool, int | None, Any]) -> Any:
    data, labels, resolution, convert = given
    path = folder / "set.zip"
    path.write_bytes(data)
    return load(DataConfig(str(path), labels=labels, resolution=resolution, convert=convert)).describe()
