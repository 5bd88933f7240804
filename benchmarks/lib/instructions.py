"""A count of the instructions that a warp issues in our CUDA kernels' loops for a row of eight elements a lane, from SASS.

A loop's count is that of the longest way through its body, without the dropout where none is asked for. What a kernel
does outside of its loops is left out, but for radam_ema's update, which has none and is counted whole, as with four
averages. Compiling takes a while: the counts of a version of csrc/ are kept under build/sass.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

from lib import launches, row_loops, sass

ROOT = Path(__file__).resolve().parents[2]
OPS = (*row_loops.OPS, "radam_ema", "perturb", "consistency_loss")
UPDATE_ELEMENTS = 8  # that a thread of radam_ema's update handles
NORMALS = 4  # that one call of Philox gives perturb
Counts = dict[str, float]


@cache
def counts(arch: int) -> dict[int, Counts] | None:
    """Return {bits of an element: {kernel: instructions}}; None where they cannot be had, as without nvcc or nvdisasm.

    Kernels: 'radam_ema', 'perturb', 'consistency_loss' and a norm's, named by `norm`.
    """
    if not (sass.available("nvcc") and sass.available("nvdisasm")):
        return None
    try:
        return _counts(arch)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:  # another compiler than was tried
        print(f"sm_{arch}: the instructions of the kernels in csrc/ cannot be counted: {error}", file=sys.stderr)
        return None


def _counts(arch: int) -> dict[int, Counts]:
    kept = ROOT / "build" / "sass" / f"sm_{arch}-{_digest()}.json"
    if not kept.exists():
        jobs = [(op, bits) for bits in sass.TYPES for op in OPS]
        with ThreadPoolExecutor() as pool:
            parts = pool.map(partial(_of_op, arch), *zip(*jobs, strict=True))
        found: dict[int, Counts] = {bits: {} for bits in sass.TYPES}
        for (_, bits), part in zip(jobs, parts, strict=True):
            found[bits] |= part
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    return {int(bits): counts for bits, counts in json.loads(kept.read_text(encoding="utf-8")).items()}


def norm(op: str, backward: bool, drops: bool, computes: bool = False) -> str:
    """Return a norm's key in the counts; computes: a residual norm's forward adds up its x rather than being given it."""
    words = (f"{op}_{'bwd' if backward else 'fwd'}", "dropout" if drops else "", "computed" if computes else "")
    return " ".join(word for word in words if word)


def _digest() -> str:
    """Return a digest of all that the counts depend on."""
    files = [
        *sorted((ROOT / "csrc").rglob("*.cu*")),
        *(Path(m.__file__ or "") for m in (sass, row_loops)),
        Path(__file__),
    ]
    version = subprocess.run([sass.tool("nvcc"), "--version"], check=True, capture_output=True).stdout
    return hashlib.sha256(b"\0".join([version, *(file.read_bytes() for file in files)])).hexdigest()[:16]


def _of_op(arch: int, op: str, bits: int) -> Counts:
    """Compile an op of csrc/ and count."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, _ = sass.compiled(ROOT / "csrc" / f"{op}.cu", arch, Path(folder), bits=bits)
        listing = launches.demangled(sass.disassembled(cubin))
    if op in row_loops.OPS:
        return of_norm(op, row_loops.of_kernels(listing, arch, bits))
    return {op: of_elementwise(listing, bits)}


def of_norm(op: str, loops: Iterable[row_loops.RowLoop]) -> Counts:
    """Count the loops of a norm's kernels; of each kind the one that takes the most."""
    loops = list(loops)

    def most(kind: str, way: str, direction: str) -> float:
        return max(getattr(loop, way) for loop in loops if loop.kind == kind and direction in loop.kernel)

    # A loop that adds up x and one that is given it may be two.
    given = min(loop.unstored for loop in loops if loop.kind == "Welford")

    out: Counts = {}
    for drops, way in ((False, "undrawn"), (True, "longest")):
        apply = most("apply", way, "fwd")
        out[norm(op, False, drops)] = most("copy", way, "fwd") + given + apply
        if op.startswith("residual"):  # such rows are not copied
            out[norm(op, False, drops, True)] = most("Welford", "longest", "fwd") + apply
        out[norm(op, True, drops)] = sum(most(kind, way, "bwd") for kind in ("copy", "backward 1", "backward 2"))
    return out


def of_elementwise(listing: dict[str, str], bits: int) -> float:
    """Count an op that handles one element like any other: the sum over its kernels' loops."""
    total = 0.0
    for name, text in listing.items():
        types = row_loops.types(name)
        if name.endswith(", 1>") or types - {sass.TYPES[bits][1]}:
            continue  # where sizes or addresses forbid vectors; of another type
        graph = row_loops.blocks(text)
        loops = [_of_loop(graph, header, body, bits if types else 32) for header, body in row_loops.innermost(graph)]
        total += sum(loops)
        if name.startswith("radam_ema_update"):
            total += 8 / UPDATE_ELEMENTS * row_loops.longest_way(graph, 0, range(len(graph)), row_loops.size)
    return total


def _of_loop(graph: list[row_loops.Block], header: int, body: frozenset[int], bits: int) -> float:
    """Count a loop's instructions for eight elements; 0 where it handles none.

    Its elements follow from the calls of Philox, else from the accesses of 16 bytes: to shared memory as fp32.
    """
    way = partial(row_loops.longest_way, graph, header, body)
    elements = NORMALS * (way(row_loops.multiplies) // sass.PHILOX_MULTIPLIES)
    if not elements:
        moved = {kind: way(partial(row_loops.moved, kind)) for kind in row_loops.ACCESSES}
        computes = any(i.opcode.startswith(("FADD", "FMUL", "FFMA")) for k in body for i in graph[k].code)
        if not computes or not (moved["LDG"] or moved["STG"]):
            return 0.0
        sizes = {"LDS": 32, "STS": 32}
        elements = min(count / sizes.get(kind, bits) for kind, count in moved.items() if count)
    return 8 / elements * way(row_loops.size)
