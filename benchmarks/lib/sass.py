"""Reads compiled kernels without a GPU: what cuobjdump, nvdisasm and the PTX say of registers, spills, memory and widths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

PHILOX = ("-766435501", "-845247145")  # its two multipliers as PTX writes them
PHILOX_MULTIPLIES = 18  # high halves of products: 20 in a call, two of which a loop may find before it starts


@dataclass(frozen=True)
class Sm:
    """The limits of an SM, by the CUDA programming guide's table of compute capabilities.

    shared: bytes, of which one CTA may have all but 1 KiB. Every SM has 64 K registers.
    """

    shared: int
    threads: int
    ctas: int

    @property
    def cta_shared(self) -> int:
        return self.shared - 1024


SMS = {
    80: Sm(164 * 1024, 2048, 32),
    86: Sm(100 * 1024, 1536, 16),
    89: Sm(100 * 1024, 1536, 24),
    90: Sm(228 * 1024, 2048, 32),
    100: Sm(228 * 1024, 2048, 32),
    120: Sm(100 * 1024, 1536, 24),
}

Widths = dict[str, frozenset[int]]  # "load x" -> bits


@dataclass
class Draws:
    """A place where a thread draws random bits, and what it does there: one loop's body, or all that is in no loop.

    multiplies: Philox's, for the high half. bits: "load x" -> of all such accesses; "shared" -> of stores to shared
    memory.
    """

    multiplies: int = 0
    bits: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        """Calls of Philox, never fewer than there are."""
        return self.multiplies // PHILOX_MULTIPLIES


@dataclass
class Usage:
    """The resources of one compiled kernel. static_shared and stack in bytes; spills: count of local-memory instructions."""

    registers: int
    stack: int
    static_shared: int
    spills: int = 0
    atomics: int = 0
    mufu: int = 0
    max_threads: int = 0
    sass: Counter[str] = field(default_factory=Counter)
    access: Widths = field(default_factory=dict)
    draws: list[Draws] = field(default_factory=list)


@cache
def tool(name: str) -> str:
    """Return the path of nvcc, cuobjdump or nvdisasm: the toolkit's, else Triton's own. Raises FileNotFoundError."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    try:
        import triton

        folders.append(Path(triton.__file__).parent / "backends/nvidia/bin")
    except ImportError:
        pass
    found = shutil.which(name)
    for path in [Path(found)] if found else [folder / name for folder in folders]:
        if path.is_file():
            return str(path)
    raise FileNotFoundError(f"no {name} on PATH, in CUDA_HOME, /usr/local/cuda or Triton's package")


# What instantiates kernels: cut out, a file compiles those that are asked for by name and no others.
LAUNCHER = re.compile(r'^extern "C" int .*?^}\n', re.M | re.S)
# A file of csrc/ whose launchers instantiate the kernels of one dtype.
PART = """#include "vec.cuh"
#undef BY_DTYPE
#define BY_DTYPE(code, CALL) {choice}
#include "{source}"
"""
TYPES = {16: ("F16", "__half"), 32: ("F32", "float")}


def compiled(
    source: Path, arch: int, folder: Path, only: Collection[str] = (), bits: int | None = None
) -> tuple[Path, str]:
    """Return the cubin of a file of csrc/, made by nvcc in a folder, and its PTX.

    only: of a norm's kernels these alone. bits: those of fp16 or fp32.
    """
    ptx = translated(source, arch, folder, only, bits)
    return assembled(ptx, arch), ptx.read_text(encoding="utf-8")


def translated(source: Path, arch: int, folder: Path, only: Collection[str] = (), bits: int | None = None) -> Path:
    """Return the PTX of a file of csrc/; for the rest see `compiled`."""
    file = source
    if only or bits:
        file = folder / "part.cu"
        code, name = TYPES[bits or 32]
        text = PART.format(choice=f"if (code == {code}) {{ using T = {name}; CALL; }}", source=source)
        if only:
            text = LAUNCHER.sub("", source.read_text(encoding="utf-8"))
        for kernel in sorted(only):
            text += f"template __global__ void {kernel}(const gn::{'Backward' if '_bwd_' in kernel else 'Forward'});\n"
        file.write_text(text, encoding="utf-8")
    ptx = folder / "out.ptx"
    includes = (f"-I{source.parent}/common", f"-I{source.parent}")
    _nvcc(source, arch, "-ptx", *includes, str(file), "-o", str(ptx))
    return ptx


def assembled(ptx: Path, arch: int) -> Path:
    """Return the cubin for an architecture, which may be newer than the PTX's; it lies beside it."""
    cubin = ptx.with_suffix(f".{arch}.cubin")
    _nvcc(ptx, arch, "-cubin", str(ptx), "-o", str(cubin))
    return cubin


def _nvcc(source: Path, arch: int, *words: str) -> None:
    command = [tool("nvcc"), f"-arch=sm_{arch}", "-O3", "-std=c++17", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc cannot compile {source} for sm_{arch}:\n{done.stderr}")


def disassembled(cubin: Path) -> dict[str, str]:
    """Return the SASS of each kernel of a cubin by its (mangled) name."""
    # -ndf: no analysis of the data flow, which takes a third of the time and changes no instruction.
    return functions(_output("nvdisasm", "-c", "-ndf", str(cubin)))


def read(cubin: Path, ptx: str, arch: int, listing: dict[str, str] | None = None) -> dict[str, Usage]:
    """Return the usage of each kernel of a cubin by its (mangled) name.

    ptx: the text it was assembled from. listing: `disassembled`.
    """
    usage = resources(_output("cuobjdump", "-res-usage", str(cubin)))
    if arch >= 90:  # there the figure includes the 1 KiB that the system keeps
        for kernel in usage.values():
            kernel.static_shared = max(0, kernel.static_shared - 1024)
    for name, text in (listing or disassembled(cubin)).items():
        count_instructions(usage[name], text)
    for name, (threads, body) in entries(ptx).items():
        usage[name].max_threads = threads
        usage[name].access, usage[name].draws = accesses(body), draws(body)
    return usage


def available(name: str) -> bool:
    """Return whether there is such a tool."""
    try:
        tool(name)
    except FileNotFoundError:
        return False
    return True


def _output(name: str, *args: str) -> str:
    return subprocess.run([tool(name), *args], check=True, capture_output=True, text=True).stdout


def resources(text: str) -> dict[str, Usage]:
    """Return the text of `cuobjdump -res-usage`."""
    usage = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(REG:.*)", text):
        value = {key: int(number) for key, number in re.findall(r"([A-Z]+):(\d+)", line)}
        usage[name] = Usage(value["REG"], value["STACK"], value["SHARED"])
    return usage


def functions(sass: str) -> dict[str, str]:
    """Return the text of `nvdisasm -c`, split by kernel."""
    parts = re.split(r"^\.text\.(\S+):$", sass, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)[^;]*;", re.M)
MEMORY = re.compile(r"(LDG|STG|LDGSTS|LDS|STS|LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG|REDUX)\b")


def width(opcode: str) -> int:
    """Return the bits of a memory instruction: LDG.E.128 -> 128, LDG.E.U16 -> 16, LDG.E -> 32."""
    found = re.search(r"\.[USB]?(8|16|32|64|128|256)\b", opcode)
    return int(found[1]) if found else 32


def count_instructions(usage: Usage, sass: str) -> None:
    for opcode in INSTRUCTION.findall(sass):
        kind = MEMORY.match(opcode)
        if kind:
            usage.sass[f"{kind[1]}.{width(opcode)}"] += 1
        usage.spills += opcode.startswith(("LDL", "STL"))
        usage.atomics += opcode.startswith(("ATOM", "RED.", "REDG", "UBLKRED"))
        usage.mufu += opcode.startswith("MUFU")


def entries(ptx: str) -> dict[str, tuple[int, str]]:
    """Return (most threads of a CTA or 0, body) of each kernel of a PTX file."""
    found = {}
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        name = re.match(r"[\w$]+", part)
        assert name is not None
        head, _, body = part.partition("{")
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", head)
        count = 1
        for number in threads.groups() if threads else ():
            count *= int(number or 1)
        found[name[0]] = (count if threads else 0, body)
    return found


Place = tuple[str, int]  # kernel parameter, offset in bytes
STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*)", re.S)


def _statements(body: str) -> list[tuple[str, str]]:
    """Return (opcode, operands) in order; a label is the opcode "label"."""
    statements = []
    for text in re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", body, flags=re.M).split(";"):
        # Labels, and braces of inline assembly, may precede an instruction.
        head = re.match(r"(?:\s*(?:[{}]|[\w$.]+:(?!:)))*\s*", text)
        assert head is not None
        statements += [("label", name) for name in re.findall(r"[\w$.]+", head[0])]
        if found := STATEMENT.match(text[head.end() :]):
            statements.append((found[1], found[2]))
    return statements


@lru_cache(1)
def _parsed(body: str) -> tuple[list[tuple[str, str]], dict[str, frozenset[str]]]:
    """Return the statements, and the parameters that each 64-bit register may point to."""
    statements = _statements(body)
    return statements, _origins(statements)


def accesses(body: str) -> Widths:
    """Return the bits of every access to global memory, by kernel parameter.

    An example: {"load 0": {128}, "store 3+8": {32}, "atomic 2": {32}}.
    """
    found: dict[str, set[int]] = {}
    statements, origin = _parsed(body)
    for opcode, operands in statements:
        for key, bits in _accessed(opcode, operands, origin):
            found.setdefault(key, set()).add(bits)
    return {key: frozenset(value) for key, value in found.items()}


def _accessed(opcode: str, operands: str, origin: dict[str, frozenset[str]]) -> list[tuple[str, int]]:
    """Return ("load 0", bits) for each parameter that an instruction's address may come from."""
    access = _access(opcode, operands)
    if access is None:
        return []
    verb, bits, register = access
    return [(f"{verb} {parameter}", bits) for parameter in origin.get(register) or {"?"}]


def draws(body: str) -> list[Draws]:
    """Return `Draws` of each innermost loop of a kernel's PTX that calls Philox, and of the rest if that does."""
    statements, origin = _parsed(body)
    place = {name: k for k, (opcode, name) in enumerate(statements) if opcode == "label"}
    # A loop is what lies between a label and the last branch back to it.
    targets = [
        (k, re.search(r"([\w$.]+)\s*$", text)) for k, (opcode, text) in enumerate(statements) if opcode[:3] == "bra"
    ]
    loops = list({place[t[1]]: k for k, t in targets if t and place.get(t[1], k) < k}.items())
    # Code of what follows a loop may stand among its own; a branch back to it is no loop: it starts in one and ends outside.
    loops = [(a, b) for a, b in loops if not any(c < a <= d < b for c, d in loops)]
    constants = {text.split(",")[0] for opcode, text in statements if opcode[:3] == "mov" and text.endswith(PHILOX)}
    found: dict[tuple[int, int], Draws] = {}
    for k, (opcode, text) in enumerate(statements):
        around = [loop for loop in loops if loop[0] <= k <= loop[1]]
        here = found.setdefault(min(around, key=lambda loop: loop[1] - loop[0], default=(0, 0)), Draws())
        words = set(re.findall(r"[%\w-]+", text))
        here.multiplies += opcode in ("mul.hi.u32", "mul.wide.u32") and not words.isdisjoint(constants | {*PHILOX})
        for key, bits in _accessed(opcode, text, origin):
            here.bits[key] += bits
        if opcode.startswith("st.shared"):
            here.bits["shared"] += _bits(opcode)
    return [d for d in found.values() if d.calls]


def _origins(statements: list[tuple[str, str]]) -> dict[str, frozenset[str]]:
    """Return {64-bit register: kernel parameters whose pointer it may hold, "3" or "3+8" inside a struct}."""
    places: dict[str, frozenset[Place]] = {}  # registers that hold the address of a parameter
    origin: dict[str, frozenset[str]] = {}
    grew = True
    while grew:
        grew = False
        for opcode, operands in statements:
            target = re.match(r"(%rd\d+|\{[^}]*\})\s*,(.*)", operands, re.S)
            if target is None or opcode.startswith(("ld.global", "ld.shared", "ld.local", "st", "atom", "red")):
                continue
            registers, source = re.findall(r"%rd\d+", target[1]), target[2]
            found = _places(opcode, source, places)
            if found and registers and not opcode.startswith("ld.param"):
                grew |= not found <= places.get(registers[0], frozenset())
                places[registers[0]] = places.get(registers[0], frozenset()) | found
                continue
            for k, register in enumerate(registers):
                if opcode.startswith("ld.param"):  # ld.param.v2: the second is the next eight bytes
                    sources = frozenset(f"{index}+{at + 8 * k}" if at + 8 * k else index for index, at in found)
                else:
                    sources = frozenset().union(*(origin.get(r, frozenset()) for r in _base(opcode, source)))
                before = origin.get(register, frozenset())
                if not sources <= before:
                    origin[register] = before | sources
                    grew = True
    return origin


def _places(opcode: str, source: str, places: dict[str, frozenset[Place]]) -> frozenset[Place]:
    """Return each (parameter, offset in bytes) that an operand names; for selp, those of both its registers.

    Operands are "[kernel_param_0+16]", "kernel_param_0", "[%rd1+8]", "%rd1, 8".
    """
    if found := re.search(r"_param_(\d+)(?:\+(\d+))?\]?\s*$", source):
        return frozenset({(found[1], int(found[2] or 0))})
    if opcode.startswith("selp"):
        return frozenset().union(*(places.get(r, frozenset()) for r in re.findall(r"%rd\d+", source)))
    found = re.fullmatch(r"\s*\[?\s*(%rd\d+)(?:\s*[+,]\s*(-?\d+))?\s*\]?\s*", source)
    if found is None:
        return frozenset()
    return frozenset((index, offset + int(found[2] or 0)) for index, offset in places.get(found[1], ()))


def _base(opcode: str, operands: str) -> list[str]:
    """Return the registers whose pointer an instruction hands on; indices are multiplied or shifted before they are added."""
    registers = re.findall(r"%rd\d+", operands)
    verb = opcode.split(".")[0]
    if verb in ("add", "mov", "cvta", "selp", "or", "min", "max"):
        return registers
    if verb == "mad":
        return re.findall(r"(%rd\d+)\s*$", operands)
    return registers[:1] if verb == "sub" else []


def _access(opcode: str, operands: str) -> tuple[str, int, str] | None:
    """Return (verb, bits, address register) of an access to global memory, else None."""
    verb = {"ld": "load", "st": "store", "atom": "atomic", "red": "atomic", "cp": "load"}.get(opcode.split(".")[0])
    addresses = re.findall(r"\[\s*(%rd\d+)", operands)
    if verb is None or not addresses or any(s in opcode for s in (".param", ".local", ".const")):
        return None
    if opcode.startswith("cp.async"):
        size = re.search(r",\s*(0x[0-9a-fA-F]+|\d+)", operands)
        return ("load", 8 * int(size[1], 0), addresses[-1]) if size and ".bulk" not in opcode else None
    if ".shared" in opcode:
        return None
    return verb, _bits(opcode), addresses[0]


def _bits(opcode: str) -> int:
    """Return the bits of a PTX memory instruction: st.global.v4.b32 -> 128."""
    vector = re.search(r"\.v(\d)", opcode)
    element = re.search(r"\.[bsuf](8|16|32|64|128)\b", opcode) or re.search(r"x(2)\b", opcode)
    assert element is not None, f"no element size in {opcode!r}"
    return int(element[1]) * (int(vector[1]) if vector else 1)


def ctas_per_sm(arch: int, registers: int, threads: int, shared: int) -> int:
    """Return the resident CTAs by registers, threads and shared memory.

    Registers come 256 at a time, in four partitions; 1 KiB of shared memory is kept for each CTA.
    """
    sm = SMS[arch]
    if shared > sm.cta_shared:
        return 0
    warps = -(-threads // 32)
    by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
    by_shared = sm.shared // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, sm.threads // 32 // warps, sm.ctas, by_shared)
