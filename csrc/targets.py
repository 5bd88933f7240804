"""The GPUs that csrc/ is compiled for: those asked for or present, less what the kernels or this nvcc cannot do.

setup.py uses it: standard library only. Nothing here raises: what has to be left out becomes a sentence.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ect_kernels.build_record import OLDEST

DEFAULT = "80;90"  # with PTX of the newest these run on every GPU from the oldest on
PATIENCE = 10.0  # seconds for nvidia-smi, which hangs where the driver does

_CAPABILITY = re.compile(r"(?:sm_|compute_)?(1?\d)\.?(\d)[af]?(\+PTX)?", re.IGNORECASE)


class Target(NamedTuple):
    """Compute capability of the machine code, and of the PTX beside it or 0."""

    arch: int
    ptx: int


def present() -> list[str]:
    """Return the compute capability of each GPU as nvidia-smi says it; nothing where it is absent, fails or hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(query, stdout=said, stderr=subprocess.DEVNULL)
        except OSError:
            return []
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()  # and no waiting for its end: a driver that hangs holds it even then
            return []
        said.seek(0)
        return [line.strip() for line in said if line.strip()] if status == 0 else []


def wanted(text: str) -> tuple[list[Target], list[str]]:
    """Return ECT_CUDA_ARCHS as (targets in order, sentences about what cannot be read).

    text: such as "80;90", "8.9+PTX", "90a" or "native"; empty is native: the GPUs present, else DEFAULT. +PTX adds the PTX of
    that target; where nobody says it the newest target has it, so that newer GPUs can compile it for themselves.
    """
    parts: list[tuple[int, bool]] = []
    unread = []
    for word in re.split(r"[;,\s]+", text.strip() or "native"):
        named = _read([word])
        if word.lower() == "native":
            named = _read(present()) or _read(DEFAULT.split(";"))
        elif word and not named:
            unread.append(
                f"ECT_CUDA_ARCHS: cannot read {word!r}, expected compute capabilities such as 80;90, or native"
            )
        parts += named
    archs = sorted({arch for arch, _ in parts})
    if not any(ptx for _, ptx in parts):
        parts += [(arch, True) for arch in archs[-1:]]
    return [Target(arch, arch if (arch, True) in parts else 0) for arch in archs], unread


def buildable(targets: Iterable[Target], known: Sequence[int]) -> tuple[list[Target], list[str]]:
    """Return those of `targets` that nvcc, which knows the architectures `known`, can build for; and a sentence on each other.

    A GPU that nvcc does not know gets the code of the nearest older one, with PTX, which its driver compiles.
    """
    built: dict[int, int] = {}
    notes = []
    for arch, ptx in targets:
        nearest = max((a for a in known if OLDEST <= a <= arch), default=0)
        if arch < OLDEST:
            notes.append(f"sm_{arch} is too old, the kernels need sm_{OLDEST} or newer")
        elif not nearest:
            notes.append(f"this nvcc knows no sm_{arch}; install a newer CUDA toolkit")
        else:
            if nearest != arch:
                notes.append(f"this nvcc knows no sm_{arch}, which gets the PTX of sm_{nearest} instead")
            built[nearest] = max(built.get(nearest, 0), nearest if ptx or nearest != arch else 0)
    return [Target(arch, ptx) for arch, ptx in sorted(built.items())], notes


def _read(words: Iterable[str]) -> list[tuple[int, bool]]:
    """Return (compute capability, whether PTX is asked for) of each word that is one."""
    found = [_CAPABILITY.fullmatch(word) for word in words]
    return [(10 * int(match[1]) + int(match[2]), match[3] is not None) for match in found if match]
