"""A report of every compiled kernel, with no GPU: python benchmarks/kernel_report.py [--check].

For sm_80, 86, 89, 90, 100 and 120. Triton: every case of lib/triton_cases.py. CUDA: every instantiation in csrc/, with
the threads and the dynamic shared memory that the launchers ask for at DDPM++/NCSN++ shapes (lib/launches.py) on such a
device. --check holds the kernels that those shapes use to the bars and fails on a miss that EXCEPTIONS does not
explain; of Triton's cases and of the norms in csrc/ it compiles no others. --rows-of-eight counts the instructions of
the norms' loops alone (benchmarks/lib/row_loops.py).

The bar on random bits: in every loop's body that draws (and in the code outside of loops, if that does), a thread calls
Philox at most once for eight elements of every tensor that it reads or writes there (for four where the bits become
noise).

DRAM traffic is what the ops' modules declare; tests/kernels/test_dram.py counts every access and holds them to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ect_kernels.choice import OPS
from lib import cubins, launches, row_loops, sass
from lib.options import Parser
from rich.console import Console
from rich.text import Text

from ect.show.table import Table

ROOT = Path(__file__).parents[1]
QUICK = (80, 90)  # the architectures for which --quick leaves nothing out
SAME_PTX = {86: 80, 89: 80}  # nvcc writes the same PTX for these, and --quick assembles that of the first for them
PER_CALL = {"perturb": 4}  # elements for a call of Philox: normal deviates, not bits of a mask (8)

# Triton cases that training DDPM++ and NCSN++ has no use for: its residual_group_norm_silu drops nothing (one case with dropout
# is checked all the same) and has 128 channels, or 128 in the second source, at 32x32 alone; its images are 3x32x32, the noise
# drawn, not given; two and three averages are what four are, less some.
UNUSED = {
    "residual_group_norm_silu": r"c=128\+0 hw=(256|64)|c=128\+256|c=256\+128 hw=(256|64)|(?<!c=256\+128 hw=1024) drop=1",
    "consistency_loss": r"^12288 ",
    "perturb": "no seed",
    "radam_ema": "^update, [23] EMAs",
}

# Triton parameters that are no tensors of the data's size: vectors by channel, sample or group, and workspace of that size.
# (For CUDA the report sees the sizes in the launches.)
SMALL = re.compile(
    r"(d?(gamma|beta|bias|skip_bias|v|scale|shift)|mean|rstd|seed|n0|t|r|weight|loss|flip|partials|f|s|c)(_ptr)?"
)

# (op, form, bar): what may be found (a pattern), and why.
NARROW = r"((, )?(load images|store in_[tr]) \[[\d, ]+\] bits)+"
AN_IMAGE = "no tensor here is of the data's size: a few numbers an image, each drawn by a call of its own"
TWO_TILES = "rows of x and dy at 32x32 leave no room for a second block; reading them twice would cost more"
EXCEPTIONS: dict[tuple[str, str, str], tuple[str, str]] = {
    ("group_norm_silu", "cuda", "ctas"): (r"1 CTAs of 6\d KB on an SM of 100", TWO_TILES),
    ("residual_group_norm_silu", "cuda", "ctas"): (r"1 CTAs of 6\d KB on an SM of 100", TWO_TILES),
    ("levels", "triton", "width"): (r"((, )?(load stage|store (t_out|r_out|label_[tr])) \[(64|32)\] bits)+", AN_IMAGE),
    ("levels", "cuda", "width"): (r"((, )?store (t|r|label_[tr]|flip) \[(32|8)\] bits)+", AN_IMAGE),
    ("levels", "triton", "philox"): ("1 calls for 1 elements", AN_IMAGE),
    ("levels", "cuda", "philox"): ("1 calls for 0 elements", AN_IMAGE),
    ("perturb", "triton", "width"): (
        NARROW,
        "a thread's run of four elements is 4 B of uint8, 8 B of half and 16 B of fp32; flipped rows are read byte by byte",
    ),
}


@dataclass
class Row:
    """One compiled kernel on one architecture. threads, shared: of its largest launch; held: to the bars.

    names: kernel parameter -> name; small: names of those that are no tensor of the data's size; sizes: name -> bits of an
    element, where they are not those of the kernel's dtype.
    """

    op: str
    form: str
    kernel: str
    arch: int
    usage: sass.Usage
    threads: int
    shared: int
    sixteen_bit: bool
    held: bool
    note: str = ""
    names: dict[str, str] = field(default_factory=dict)
    small: frozenset[str] = frozenset()
    sizes: dict[str, int] = field(default_factory=dict)
    misses: dict[str, str] = field(default_factory=dict)

    @property
    def ctas(self) -> int:
        return sass.ctas_per_sm(self.arch, self.usage.registers, self.threads, self.shared) if self.threads else 0

    def access(self) -> sass.Widths:
        """Return the accesses to global memory by parameter name: {"load x": {128}}."""
        named: sass.Widths = {}
        for key, bits in self.usage.access.items():
            verb, _, parameter = key.partition(" ")
            name = f"{verb} {self.names.get(parameter, parameter)}"
            named[name] = named.get(name, frozenset()) | bits
        return named

    def is_tensor(self, name: str) -> bool:
        """Return whether it is a tensor: no vector by channel, sample or group, no workspace, no pointer that is null here."""
        return name not in self.small and not name[0].isdigit()

    def drawn(self) -> list[tuple[int, float]]:
        """Return (calls of Philox, elements of a tensor that a thread handles) of each place that draws."""
        found = []
        for draws in self.usage.draws:
            counts = []
            for key, bits in draws.bits.items():
                parameter = key.partition(" ")[2]
                name = self.names.get(parameter, parameter)
                if name and self.is_tensor(name):
                    counts.append(bits / self.sizes.get(name, 16 if self.sixteen_bit else 32))
            # Noise that first goes to shared memory, as fp32; in csrc/ a norm's rows, which stay there in their own type.
            rows = self.form == "cuda" and self.op in row_loops.OPS and self.sixteen_bit
            found.append((draws.calls, min(counts, default=draws.bits["shared"] / (16 if rows else 32))))
        return found


def bars(row: Row) -> dict[str, str]:
    """Return {bar: what was found} of each bar that the kernel misses."""
    access = [(key, key.partition(" ")[2], bits) for key, bits in row.access().items()]
    narrow = {key: sorted(bits) for key, name, bits in access if row.is_tensor(name) and bits != {128}}
    lost = [key for key, name, _ in access if name == "?"]  # such as a global access to shared memory, which faults
    drawn, room, few = row.drawn(), row.shared, row.sixteen_bit and row.ctas < 2
    excess = [
        f"{calls} calls for {elements:g} elements"
        for calls, elements in drawn
        if calls * PER_CALL.get(row.op, 8) > elements
    ]
    if "seed" in row.names.values() and not drawn:
        excess.append("a seed, but no call found")
    found = {
        "spills": f"{row.usage.spills} local-memory instructions" if row.usage.spills else "",
        "width": ", ".join(f"{key} {bits} bits" for key, bits in narrow.items()),
        "address": f"{', '.join(lost)} from no parameter" if lost else "",
        "atomics": f"{row.usage.atomics}" if row.usage.atomics else "",
        "ctas": f"{row.ctas} CTAs of {room // 1024} KB on an SM of {sass.SMS[row.arch].shared // 1024}" if few else "",
        "philox": ", ".join(excess),
    }
    return {bar: text for bar, text in found.items() if text}


def excuse(row: Row, bar: str, text: str) -> str | None:
    """Return why what was found may be so, or None."""
    pattern, reason = EXCEPTIONS.get((row.op, row.form, bar), ("", ""))
    return reason if reason and re.fullmatch(pattern, text) else None


def judge(rows: list[Row], console: Console) -> bool:
    """Fill in the misses of the rows that are held to the bars; print them; whether any has no excuse."""
    failed = False
    for row in rows:
        for bar, text in bars(row).items() if row.held else ():
            reason = excuse(row, bar, text)
            verdict = f"excused: {reason}" if reason else "[red]MISSED[/]"
            console.print(f"{row.op} {row.form} {row.kernel} sm_{row.arch}: {bar}: {text}; {verdict}", highlight=False)
            if reason is None:
                row.misses[bar] = text
                failed = True
    return failed


def triton_cases(op: str, every: bool) -> list[int]:
    """Return the numbers of op's Triton cases, without `every` those of DDPM++ and NCSN++ alone; none without triton."""
    if importlib.util.find_spec("triton") is None:
        return []
    from lib import triton_cases

    cases = getattr(triton_cases, op)()
    return [k for k, (name, *_, note) in enumerate(cases) if every or _held(op, name, note)]


def _held(op: str, name: str, note: str) -> bool:
    return "generic" not in f"{name} {note}" and not (op in UNUSED and re.search(UNUSED[op], name))


def triton_rows(op: str, numbers: Sequence[int], arch: int) -> list[Row]:
    """Compile Triton cases of an op."""
    from lib import triton_cases

    cases = [getattr(triton_cases, op)()[number] for number in numbers]
    built = [triton_compiled(case, arch) for case in cases]
    listings = cubins.listings([kernel.asm["cubin"] for kernel in built], arch)
    return [triton_row(op, arch, *found) for found in zip(cases, built, listings, strict=True)]


def triton_compiled(case: Any, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, signature, constexprs, attrs, warps, stages, _ = case
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def triton_row(op: str, arch: int, case: Any, built: Any, listing: dict[str, str]) -> Row:
    """Return the row of a compiled case. listing: its SASS by the kernel's name."""
    name, kernel, signature, *_, note = case
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        cubin.write_bytes(built.asm["cubin"])
        (usage,) = sass.read(cubin, built.asm["ptx"], arch, listing).values()
    names = [arg for arg in kernel.arg_names if signature.get(arg, "constexpr") != "constexpr"]
    small = frozenset(arg for arg in names if SMALL.fullmatch(arg.lower()))
    sixteen = any("16" in signature[arg] for arg in names if arg not in small)
    threads, shared, held = 32 * built.metadata.num_warps, built.metadata.shared, _held(op, name, note)
    row = Row(op, "triton", name, arch, usage, threads, shared, sixteen, held, note)
    row.names, row.small = {str(i): arg for i, arg in enumerate(names)}, small
    row.sizes = {arg: int(bits[0]) for arg in names if (bits := re.findall(r"\d+", signature[arg]))}
    return row


def cuda_usages(op: str, wanted: dict[int, list[str]]) -> list[tuple[dict[str, sass.Usage], list[row_loops.RowLoop]]]:
    """Return of each architecture, from the PTX of the first, the usage of each kernel of csrc/<op>.cu by its symbol.

    And the row loops of those that normalise in fp16. wanted: by architecture the kernels of a norm, or none for all there are.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        every = {kernel for kernels in wanted.values() for kernel in kernels}
        ptx = sass.translated(ROOT / "csrc" / f"{op}.cu", min(wanted), Path(folder), every)
        for arch, only in wanted.items():
            listing = sass.disassembled(cubin := sass.assembled(ptx, arch))
            names = launches.demangle(list(listing))
            listing = {name: text for name, text in listing.items() if not only or names[name] in only}
            usages = sass.read(cubin, ptx.read_text(encoding="utf-8"), arch, listing)
            loops = row_loops.of_kernels(launches.demangled(listing), arch) if op in row_loops.OPS else []
            found.append(({symbol: usages[symbol] for symbol in listing}, loops))
    return found


def cuda_row_loops(op: str, arch: int) -> list[row_loops.RowLoop]:
    """Return the row loops of the fp16 kernels of csrc/<op>.cu, compiled for nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, _ = sass.compiled(ROOT / "csrc" / f"{op}.cu", arch, Path(folder), bits=16)
        listing = sass.disassembled(cubin)
        return row_loops.of_kernels(launches.demangled(listing), arch)


def cuda_rows(op: str, arch: int, usages: dict[str, sass.Usage], used: dict[str, launches.Launch]) -> list[Row]:
    """Return a row for every kernel instantiation of csrc/<op>.cu; those that a DDPM++/NCSN++ shape launches have bars."""
    plain, rows = launches.demangle(list(usages)), []
    if lost := {kernel for kernel in used if kernel.startswith(op)} - set(plain.values()):
        raise RuntimeError(f"launched, but not compiled for sm_{arch}: {', '.join(sorted(lost))}")
    for symbol, usage in usages.items():
        launch = used.get(plain[symbol])
        threads = launch.threads if launch else usage.max_threads
        shared = usage.static_shared + (launch.shared if launch else 0)
        sixteen = re.search(r"__half|__nv_bfloat16", plain[symbol]) is not None
        row = Row(op, "cuda", plain[symbol], arch, usage, threads, shared, sixteen, launch is not None)
        if launch:
            row.names = {key: name for key, (name, _) in launch.pointers.items()}
            row.small = frozenset(name for name, tensor in launch.pointers.values() if not tensor)
            row.note = ", ".join(launch.shapes)
        rows.append(row)
    return rows


def compile_all(
    ops: Sequence[str], archs: Sequence[int], every: bool, quick: bool
) -> tuple[list[Row], list[row_loops.RowLoop]]:
    """Return the rows of Triton, then those of CUDA where nvcc is, and the norms' row loops; several processes compile.

    every: not only what DDPM++ and NCSN++ launch. quick: for some architectures the CUDA norms alone, and PTX by SAME_PTX.
    """
    written = [op for op in ops if (ROOT / "csrc" / f"{op}.cu").exists()] if sass.available("nvcc") else []
    some = [arch for arch in archs if arch in QUICK] if quick else archs
    record = cache(launches.record)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
        cases = {op: numbers for op in ops if (numbers := triton_cases(op, every))}
        triton = [[pool.submit(triton_rows, op, numbers, arch) for arch in some] for op, numbers in cases.items()]
        native = []
        for op in written:
            norm = op in row_loops.OPS
            groups: dict[int, dict[int, dict[str, launches.Launch]]] = {}
            for arch in archs if norm else some:
                used = record(op, sass.SMS[arch].cta_shared // 1024)
                groups.setdefault(SAME_PTX.get(arch, arch) if quick else arch, {})[arch] = used
            for group in groups.values():
                part = norm and not every
                only = {arch: [k for k in used if part and k.startswith(op)] for arch, used in group.items()}
                native.append((op, group, pool.submit(cuda_usages, op, only)))
        by_case = (zip(*(future.result() for future in futures), strict=True) for futures in triton)
        rows = [row for op_cases in by_case for archs_rows in op_cases for row in archs_rows]
        loops = []
        for op, group, future in native:
            for (arch, used), (usages, found) in zip(group.items(), future.result(), strict=True):
                rows += cuda_rows(op, arch, usages, used)
                loops += found
    return rows, loops


def compile_row_loops(ops: Sequence[str], archs: list[int]) -> list[row_loops.RowLoop]:
    native = [(op, arch) for op in ops for arch in archs]
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), get_context("spawn")) as pool:
        return [loop for found in pool.map(cuda_row_loops, *zip(*native, strict=True)) for loop in found]


def show(rows: list[Row], console: Console) -> None:
    texts, numbers = ("op", "kernel", "sm"), ("regs", "stack", "spills", "smem", "threads", "CTAs/SM")
    facts = ("global accesses", "atomics", "MUFU", "Philox calls/elements")
    lines = []
    for row in rows:
        widths = []
        for key, bits in row.access().items():
            verb, _, name = key.partition(" ")
            widths.append({"load": "<", "store": ">"}.get(verb, "!") + name + ":" + "/".join(map(str, sorted(bits))))
        u = row.usage
        cells = [u.registers, u.stack, u.spills, row.shared, row.threads, row.ctas, " ".join(widths), u.atomics, u.mufu]
        style = "red" if row.misses else "" if row.held else "dim"
        kernel = f"{row.form}: {row.kernel}"
        drawn = " ".join(f"{calls}/{elements:g}" for calls, elements in row.drawn())
        lines.append([Text(str(cell), style) for cell in (row.op, kernel, row.arch, *cells, drawn)])
    headers = (*texts, *numbers, *facts)
    console.print(Table(headers, lines, "Compiled kernels (< reads, > writes: bits)", left=(*texts, *facts)))


def show_row_loops(loops: list[row_loops.RowLoop], held: bool, console: Console) -> bool:
    """Print the loops and, where they are held to the bars, what they miss; whether they miss anything."""
    headers = ("kernel", "sm", "loop", "rows an iteration", "body", "longest way", "longest that draws nothing")
    lines = []
    for loop in dict.fromkeys(loops):
        counts = (f"{count:g}" for count in (loop.rows, loop.body, loop.longest, loop.undrawn))
        lines.append([loop.kernel, loop.arch, loop.kind, *counts])
    console.print(Table(headers, lines, "SASS instructions a row of eight fp16 elements", left=("kernel", "loop")))
    misses = row_loops.missed(loops) if held else []
    for miss in misses:
        console.print(f"{miss}; [red]MISSED[/]", highlight=False)
    return bool(misses)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where a kernel that DDPM++ or NCSN++ launches misses a bar; of Triton's and the norms' compile no others",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"but for sm_{QUICK[0]} and {QUICK[1]} compile the CUDA norms alone, as `make test` does; `make kernel-report`"
        " compiles all for every architecture, from its own PTX",
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(sass.SMS), help="default: all six; of --rows-of-eight: 80"
    )
    parser.add_argument(
        "--rows-of-eight",
        action="store_true",
        help="only count the instructions of the norms' loops, from the CUDA kernels for sm_80 or --arch (seconds)",
    )
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be repeated)")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the same instructions, sooner
    console = Console(width=None if sys.stdout.isatty() else 200)
    ops = options.op or OPS
    norms = [op for op in ops if op in row_loops.OPS]
    if options.rows_of_eight:
        archs = options.arch or [80]
        loops = compile_row_loops(norms, archs)
        missed = show_row_loops(loops, "group_norm_silu" in norms and 80 in archs, console)
        return 1 if missed and options.check else 0
    if not sass.available("nvcc"):
        console.print("[bold red]*** no nvcc: the CUDA kernels are NOT in this report ***[/]")
    archs = options.arch or sorted(sass.SMS)
    rows, loops = compile_all(ops, archs, not options.check, options.quick)
    failed = judge(rows, console)
    show(rows, console)
    if norms and sass.available("nvcc"):
        failed |= show_row_loops(loops, "group_norm_silu" in norms and 80 in archs, console)
    for op in ops:
        module = importlib.import_module(f"ect_kernels.{op}")
        traffic = ", ".join(f"{name} {size}" for name, size in getattr(module, "DRAM", {}).items())
        console.print(f"DRAM of {op}: {traffic or '[red]not declared[/]'}", highlight=False)
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
