"""Files of torch.save: whole ones spoilt, and those whose pickle or storages are, in an archive that is whole."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from ect.files import torch_file
from ect.metrics.weights import read_state
from tests.fuzz.mutations import spoilt
from tests.fuzz.snapshots import programs


def saved(zipped: bool) -> bytes:
    file, base = io.BytesIO(), torch.arange(12.0)
    state = {
        "a.weight": base.view(3, 4).t(),
        "b": base[2:5].half(),
        "c": torch.tensor(3),
        "d": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(
        {**state, "e": torch.zeros(1).expand(7), "mean": np.arange(3.0)}, file, _use_new_zipfile_serialization=zipped
    )
    return file.getvalue()


WHOLE = saved(True)


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """The zip form with one member spoilt, dropped, doubled or compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(file, "w") as new:
        chosen = draw(st.sampled_from(old.namelist()))
        kind = draw(st.sampled_from(["spoil", "spoil", "spoil", "program", "drop", "double", "deflate"]))
        for name in old.namelist():
            data = old.read(name)
            if name == chosen and kind == "spoil":
                data = draw(spoilt(data))
            elif name.endswith("data.pkl") and kind == "program":
                data = draw(programs())
            if name != chosen or kind != "drop":
                new.writestr(
                    name, data, zipfile.ZIP_DEFLATED if kind == "deflate" and name == chosen else zipfile.ZIP_STORED
                )
            if name == chosen and kind == "double":
                new.writestr(f"x/{name}", data)
    return file.getvalue()


INPUTS = st.one_of(archives(), spoilt(WHOLE), spoilt(saved(False)), programs())


def read(folder: Path, data: bytes) -> Any:
    path = folder / "file.pth"
    path.write_bytes(data)
    value = torch_file.read(path)
    arrays = isinstance(value, dict) and any(isinstance(item, np.ndarray) for item in value.values())
    return value if arrays else read_state(path)
