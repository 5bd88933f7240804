"""The text of --seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ect.sample import Options, _seeds
from tests.fuzz.mutations import LIMIT

_PARTS = [
    "0",
    "7",
    "0-63",
    "-",
    "--",
    "1-",
    "-1",
    "9-1",
    "٣",
    "²",
    "1e3",
    "0x1",
    "",
    " ",
    "0-999999",
    "99999999999999999999",
    "9223372036854775807",
    "0-9223372036854775807",
    "\0",
    "\n",
    "1_0",
    "+1",
    "0" * 30,
    "9" * 5000,
    "1-" * 500,
]
TEXTS = st.lists(st.sampled_from(_PARTS) | st.text(max_size=4), max_size=8).map(",".join)
INPUTS = st.one_of(
    TEXTS,
    st.builds(
        lambda text, n: (text + ",") * min(n, LIMIT // (len(text) + 1)), TEXTS, st.sampled_from([2, 1000, 40_000])
    ),
    st.text(),
)


def read(folder: Path, text: str) -> Any:
    return _seeds(Options(folder, seeds=text))
