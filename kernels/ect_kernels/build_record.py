"""The record of a build of the CUDA extension: why there is none, and which sources it was made of.

pip shows what a build says only where the install fails, so the reason is kept in a file. setup.py uses this module
too, where torch may be absent: standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

OLDEST = 80  # compute capability of the oldest GPUs: the kernels copy to shared memory by cp.async
NOTE = "_not_built.txt"
SOURCES = Path(__file__).parents[2] / "csrc"  # of a checkout; an installed package has none
_REMEDY = "pip install -e . builds it where nvcc is found"


def write(folder: Path, reason: str | None) -> None:
    """Note beside the package's modules why the extension was not built; None: it was."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NOTE).unlink(missing_ok=True)
    if reason is not None:
        (folder / NOTE).write_text(reason + "\n", encoding="utf-8")


def why_not_built(folder: Path = Path(__file__).parent) -> str:
    """Return the reason why there is no extension, in one line."""
    try:
        return (folder / NOTE).read_text(encoding="utf-8").strip()
    except OSError:
        return f"nothing has built it; {_REMEDY}"


def digest(sources: Path = SOURCES) -> str:
    """Return a digest of all C++ and CUDA files in a folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in sources.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def why_stale(module: Any, sources: Path = SOURCES) -> str | None:
    """Return why a built extension must not be used, else None: its launchers may not take what the sources now say."""
    if not sources.is_dir() or getattr(module, "sources", None) == digest(sources):
        return None
    return "it was built from other sources than csrc/ holds now; pip install -e . builds it anew"
