"""Labels in EDM's dataset.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ect.data.readers.labels import from_json
from tests.fuzz.mutations import spoilt_text

NAMES = ["00000/a.png", "00000/b.png", "00001/c.png"]
CLASSES = {"labels": [[name, i] for i, name in enumerate(NAMES)]}
VECTORS = {"labels": [[name, [0.5, i]] for i, name in enumerate(NAMES)]}
INPUTS = st.one_of(spoilt_text(CLASSES), spoilt_text(VECTORS), st.binary(max_size=40))


def read(folder: Path, data: bytes) -> Any:
    return from_json(data, NAMES, folder / "dataset.json")
