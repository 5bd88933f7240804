"""The record of a build of the CUDA extension and of the CPU kernels: why there are none, and which sources they were made of.

pip shows what a build says only where the install fails, so the reason is kept in a file. setup.py uses this module
too, where torch may be absent: standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

OLDEST = 80  # compute capability of the oldest GPUs: the kernels copy to shared memory by cp.async
NOTE, CPU_NOTE = "_not_built.txt", "_cpu_not_built.txt"
SOURCES = Path(__file__).parents[2] / "csrc"  # of a checkout; an installed package has none
_REMEDIES = {NOTE: "builds it where nvcc is found", CPU_NOTE: "builds them where a C++ compiler is found"}


def write(folder: Path, reason: str | None, note: str = NOTE) -> None:
    """Note beside the package's modules why the extension, or what `note` is of, was not built; None: it was."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / note).unlink(missing_ok=True)
    if reason is not None:
        (folder / note).write_text(reason + "\n", encoding="utf-8")


def why_not_built(folder: Path = Path(__file__).parent, note: str = NOTE) -> str:
    """Return the reason why there is no extension, or nothing of what `note` is of, in one line."""
    try:
        return (folder / note).read_text(encoding="utf-8").strip()
    except OSError:
        return f"nothing has built {'it' if note == NOTE else 'them'}; pip install -e . {_REMEDIES[note]}"


def digest(sources: Path = SOURCES, cpu: bool = False) -> str:
    """Return a digest of the C++ and CUDA files in a folder: of the CUDA extension, or of the CPU kernels in cpu/."""
    total = hashlib.sha256()
    for path in sorted(path for path in sources.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h", ".hpp")):
        shared = path.name in ("launchers.h", "advance.h")
        if shared or (path.parent.name == "cpu") == cpu:
            total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def why_stale(module: Any, sources: Path = SOURCES, cpu: bool = False) -> str | None:
    """Return why what was built must not be used, else None: its launchers may not take what the sources now say.

    module: has the digest of its sources as `sources`.
    """
    if not sources.is_dir() or getattr(module, "sources", None) == digest(sources, cpu):
        return None
    folder, what = ("csrc/cpu/ holds", "them") if cpu else ("csrc/ holds", "it")
    return f"{'they were' if cpu else 'it was'} built from other sources than {folder} now; pip install -e . builds {what} anew"
