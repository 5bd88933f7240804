"""Instructions of a GroupNorm kernel's loops for one row of eight elements, counted in its SASS.

A loop is a backward branch to a block that dominates it, with the blocks from which control flows to that branch. A row loop
holds no other loop and moves rows, 16 bytes or more an access. `body` counts all its instructions, predicated or not, on every
side of a branch; `longest` those of the longest way through it, the most that a warp issues; `undrawn` and `unstored` those of
the longest way that calls no Philox, and that stores no row. Each is divided by the rows that nvcc unrolled the loop to: one
way through the body makes as many calls of Philox, and as many accesses of a kind, as it handles rows. A call (of a division's
slow path, say) is one instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from lib import sass

ACCESSES = ("LDG", "LDS", "STG", "STS", "LDGSTS")
PHILOX = ("-0x2daee0ad", "-0x326172a9")  # its multipliers as nvdisasm writes them
LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);|^([.$][\w.$]+):", re.M)


@dataclass(frozen=True)
class Instruction:
    guard: str  # "@P0", "@!P0" or none
    opcode: str
    operands: str

    @property
    def row_bits(self) -> int:
        """Return the bits of an access of 16 bytes or more, else 0."""
        kind = self.opcode.split(".")[0]
        bits = sass.width(self.opcode) if kind in ACCESSES else 0
        return bits if bits >= 128 else 0

    @property
    def draws(self) -> bool:
        """Return whether this is one of Philox's multiplications."""
        return self.opcode.startswith(("IMAD", "UIMAD")) and any(word in self.operands for word in PHILOX)


@dataclass
class Block:
    """Instructions that run together, and the blocks that may follow."""

    code: list[Instruction]
    after: list[int]


@dataclass(frozen=True)
class RowLoop:
    """kind: a key of BARS, or 'copy'. Instructions for a row of eight elements; rows: handled in one way through the body."""

    kernel: str
    arch: int
    kind: str
    rows: float
    body: float
    longest: float
    undrawn: float
    unstored: float


OPS = ("group_norm_silu", "residual_group_norm_silu")
# The most instructions of a loop's body for a row of eight fp16 elements on sm_80, of group_norm_silu in shared memory.
BARS = {"Welford": 88, "apply": 192, "forward": 280, "backward 1": 289, "backward 2": 289}


def blocks(text: str) -> list[Block]:
    """Return a kernel's control flow graph from its SASS; the first block is the entry."""
    code: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for guard, opcode, operands, label in LINE.findall(text):
        last = code[-1][-1].opcode if code[-1] else ""
        if (label and code[-1]) or last.startswith(("BRA", "BRX", "EXIT", "RET")):
            code.append([])
        if label:
            labels[label] = len(code) - 1
        else:
            code[-1].append(Instruction(guard, opcode, operands))
    graph = []
    for k, part in enumerate(code):
        end = part[-1] if part else Instruction("", "NOP", "")
        target = re.search(r"`\(([^)]+)\)", end.operands) if end.opcode.startswith("BRA") else None
        after = [labels[target[1]]] if target and target[1] in labels else []
        # A branch may name a condition beside its guard: BRA.U UP0, `(.L_1); BRA !P1, `(.L_1).
        ends = (
            end.opcode.startswith(("BRA", "BRX", "EXIT", "RET"))
            and not end.guard
            and "P" not in end.operands.split("`")[0]
        )
        ends = ends and not end.opcode.startswith("BRA.DIV")
        if not ends and k + 1 < len(code):
            after.append(k + 1)
        graph.append(Block(part, after))
    return graph


def innermost(graph: list[Block]) -> list[tuple[int, frozenset[int]]]:
    """Return (header, blocks) of each loop that holds no other."""
    before: list[list[int]] = [[] for _ in graph]
    for k, block in enumerate(graph):
        for target in block.after:
            before[target].append(k)
    bodies: dict[int, frozenset[int]] = {}
    for end, block in enumerate(graph):
        for header in block.after:
            if header <= end and (body := _loop(before, header, end)):
                bodies[header] = bodies.get(header, frozenset()) | body
    return [(h, body) for h, body in bodies.items() if not any(other < body for other in bodies.values())]


def _loop(before: list[list[int]], header: int, end: int) -> frozenset[int]:
    """Return the blocks from which `end` is reached without passing `header`.

    There are none where the entry is among them: no loop, then.
    """
    found, todo = {header}, [end]
    while todo:
        block = todo.pop()
        if block not in found:
            found.add(block)
            todo += before[block]
    return frozenset() if 0 in found and header != 0 else frozenset(found)


Weight = Callable[[Block], float]


def longest_way(graph: list[Block], header: int, body: Collection[int], weight: Weight) -> float:
    """Return the most that one way through `body` weighs, from the header back to it or to an end of the kernel.

    No way leads through a block of weight -inf.
    """
    best: dict[int, float] = {}
    begun: set[int] = set()  # no way passes a block twice
    todo = [header]
    while todo:
        block = todo[-1]
        begun.add(block)
        after = [target for target in graph[block].after if target in body and target != header]
        if further := [target for target in after if target not in begun]:
            todo.append(further[0])
            continue
        ways = [best.get(target, float("-inf")) for target in after]
        if header in graph[block].after or not graph[block].after:
            ways.append(0.0)
        best[block] = weight(graph[block]) + max(ways, default=float("-inf"))
        todo.pop()
    return best[header]


def moved(kind: str, block: Block) -> float:
    """Return what a block's row accesses of one kind move; of those under opposite guards, one side."""
    here = [(i.guard, i.row_bits) for i in block.code if i.opcode.split(".")[0] == kind]
    return max(sum(bits for guard, bits in here if not guard or ("!" in guard) == side) for side in (False, True))


def size(block: Block) -> float:
    return len(block.code)


def multiplies(block: Block) -> float:
    return sum(i.draws for i in block.code)


def undrawn(block: Block) -> float:
    return float("-inf") if multiplies(block) else len(block.code)


def unstored(block: Block) -> float:
    return float("-inf") if moved("STG", block) or moved("STS", block) else len(block.code)


def row_loops(kernel: str, arch: int, text: str, element_bits: int = 16) -> Iterator[RowLoop]:
    """Return the row loops of a forward or backward kernel (its name says which: 'fwd' or 'bwd')."""
    graph = blocks(text)
    backward = "bwd" in kernel
    for header, body in innermost(graph):
        way = partial(longest_way, graph, header, body)
        accessed = {kind: bits for kind in ACCESSES if (bits := way(partial(moved, kind))) > 0}
        if not accessed:
            continue
        exponential = any(i.opcode == "MUFU.EX2" for k in body for i in graph[k].code)
        if set(accessed) == {"LDGSTS"}:
            kind = "copy"
        elif backward:
            kind = "backward 2" if "STG" in accessed else "backward 1"
        else:
            kind = "apply" if exponential else "Welford"
        # A row of eight elements is 8 * element_bits; the backward copies those of two tensors.
        rows = min(accessed.values()) / (8 * element_bits * (2 if kind == "copy" and backward else 1))
        if calls := way(multiplies) // sass.PHILOX_MULTIPLIES:
            rows = min(rows, calls)
        everything = sum(size(graph[k]) for k in body)
        longest = way(size)
        others = [other if (other := way(weight)) > 0 else longest for weight in (undrawn, unstored)]
        yield RowLoop(kernel, arch, kind, rows, *(count / rows for count in (everything, longest, *others)))


def types(name: str) -> set[str]:
    """Return the types that a kernel is instantiated with."""
    return set(re.findall(r"__half|__nv_bfloat16|float", name))


def resident(text: str) -> bool:
    """Return whether a kernel keeps its rows in shared memory: it copies them there, past the registers."""
    return re.search(r"\bLDGSTS\S*\.128\b", text) is not None


def of_kernels(functions: dict[str, str], arch: int, element_bits: int = 16) -> list[RowLoop]:
    """Return the row loops of kernels by their demangled names.

    They are of those in one type alone (fp16 or fp32), with an activation, that keep their rows in shared memory.
    """
    wanted = sass.TYPES[element_bits][1]
    found: list[RowLoop] = []
    for name, text in functions.items():
        if types(name) == {wanted} and resident(text) and "MUFU.EX2" in text:
            found += row_loops(name, arch, text, element_bits)
    return found


def per_row(loops: Iterable[RowLoop]) -> dict[str, float]:
    """Return the instructions of the body by kind of loop, of each kind the most; and of the forward's two together."""
    most: dict[str, float] = {}
    for loop in loops:
        most[loop.kind] = max(most.get(loop.kind, 0.0), loop.body)
    if {"Welford", "apply"} <= set(most):
        most["forward"] = most["Welford"] + most["apply"]
    return most


def missed(loops: Iterable[RowLoop]) -> list[str]:
    """Return where group_norm_silu on sm_80 is over its bar, and what of it is in no loop."""
    held = [loop for loop in loops if loop.arch == 80 and loop.kernel.startswith("group_norm_silu_")]
    found: set[str] = set()
    out = []
    for kernel in dict.fromkeys(loop.kernel for loop in held):
        counts = per_row(loop for loop in held if loop.kernel == kernel)
        over = {kind: count for kind, count in counts.items() if count > BARS.get(kind, count)}
        out += [
            f"{kernel} sm_80: {kind}: {count:g} instructions a row, {BARS[kind]} allowed"
            for kind, count in over.items()
        ]
        found |= set(counts)
    return out + [f"group_norm_silu sm_80: {kind}: no such loop found" for kind in BARS if kind not in found]
