"""The instructions of many cubins from one start of nvdisasm, which takes longer than to read most kernels."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from lib import sass

BYTES = 16  # of an instruction
LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/.*;.*$", re.M)


def code(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the (mangled) name and the machine code of each kernel of a cubin, an ELF file of 64 bits."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", cubin, sections + k * size) for k in range(count)]
    for name, _, _, _, start, length in heads:
        at = heads[names][4] + name
        text = cubin[at : cubin.index(b"\0", at)].decode()
        if text.startswith(".text."):
            yield text.removeprefix(".text."), cubin[start : start + length]


def listings(cubins: Sequence[bytes], arch: int) -> list[dict[str, str]]:
    """Return of each cubin the SASS of its kernels by name, without labels: to count instructions, not to follow branches."""
    kernels = [list(code(cubin)) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.write_bytes(b"".join(text for found in kernels for _, text in found))
        # Triton compiles for sm_90a where it is asked for sm_90, and so on.
        decoder = f"SM{arch}{'a' if arch >= 90 else ''}"
        command = [sass.tool("nvdisasm"), "-ndf", "-b", decoder, str(raw)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = LINE.findall(text)
        if BYTES * len(lines) != raw.stat().st_size:
            raise RuntimeError(f"nvdisasm shows {len(lines)} instructions in {raw.stat().st_size} bytes for {decoder}")
    rest = iter(lines)
    return [{name: "\n".join(islice(rest, len(text) // BYTES)) for name, text in found} for found in kernels]
