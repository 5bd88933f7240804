"""What the compiler made of every kernel, for sm_80 and sm_90, with no GPU: python benchmarks/kernel_report.py [--check].

Triton: every case of benchmarks/triton_cases.py. CUDA: every instantiation in csrc/, with the threads and the dynamic shared
memory that the launchers ask for at DDPM++/NCSN++ shapes (benchmarks/launches.py). --check holds the kernels that those shapes
use to the bars and fails on a miss that EXCEPTIONS does not explain.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import launches
import sass
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
OPS = ("group_norm_silu", "residual_group_norm_silu", "perturb", "consistency_loss", "radam_ema")
KEEP = ROOT / "build" / "kernel_report"

# Triton parameters that are no tensors of the data's size: vectors by channel, sample or group, and workspace of that size.
# (For CUDA the report sees the sizes in the launches.)
SMALL = re.compile(
    r"(d?(gamma|beta|bias|skip_bias|v|scale|shift)|mean|rstd|seed|t|r|weight|loss|flip|partials|f|s|c)(_ptr)?"
)

# (op, form, kernel pattern, bar): why it may be missed.
EXCEPTIONS: dict[tuple[str, str, str, str], str] = {
    (
        "perturb",
        "triton",
        "",
        "width",
    ): "a thread's run of four elements is 4 B of uint8, 8 B of half and 16 B of fp32; flipped rows are read byte by byte",
    ("consistency_loss", "triton", "1x8x8", "width"): "64 elements a sample are less than one vector a thread (digits)",
}


@dataclass
class Row:
    """One compiled kernel on one architecture. threads, shared: of its largest launch; held: to the bars.

    names: kernel parameter -> name; small: names of those that are no tensor of the data's size.
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
    misses: dict[str, str] = field(default_factory=dict)

    @property
    def ctas(self) -> int:
        return sass.ctas_per_sm(self.arch, self.usage.registers, self.threads, self.shared) if self.threads else 0

    def access(self) -> sass.Widths:
        """Accesses to global memory by parameter name: {"load x": {128}}."""
        named: sass.Widths = {}
        for key, bits in self.usage.access.items():
            verb, _, parameter = key.partition(" ")
            name = f"{verb} {self.names.get(parameter, parameter)}"
            named[name] = named.get(name, frozenset()) | bits
        return named

    def tensors(self) -> sass.Widths:
        """`access` without vectors by channel, sample or group, workspace of that size, and pointers that are null here."""
        named = {key: (bits, key.split(" ", 1)[1]) for key, bits in self.access().items()}
        return {key: bits for key, (bits, name) in named.items() if name not in self.small and not name[0].isdigit()}


def bars(row: Row) -> dict[str, str]:
    """{bar: what was found} of each bar that the kernel misses."""
    narrow = {key: sorted(bits) for key, bits in row.tensors().items() if bits != {128}}
    vectors = sum(row.usage.sass[op] for op in ("LDG.128", "LDGSTS.128", "STG.128"))
    found = {
        "spills": f"{row.usage.spills} local-memory instructions" if row.usage.spills else "",
        "width": ", ".join(f"{key} {bits} bits" for key, bits in narrow.items()),
        "atomics": f"{row.usage.atomics}" if row.usage.atomics else "",
        "ctas": f"{row.ctas} CTAs per SM" if row.sixteen_bit and row.ctas < 2 else "",
        "philox": f"{row.usage.philox_calls} calls for {vectors} vectors" if row.usage.philox_calls > vectors else "",
    }
    return {bar: text for bar, text in found.items() if text}


def excuse(row: Row, bar: str) -> str | None:
    for (op, form, pattern, which), reason in EXCEPTIONS.items():
        if (op, form, which) == (row.op, row.form, bar) and re.search(pattern, row.kernel):
            return reason
    return None


def judge(rows: list[Row], console: Console) -> bool:
    """Fill in the misses of the rows that are held to the bars; print them; whether any has no excuse."""
    failed = False
    for row in rows:
        for bar, text in bars(row).items() if row.held else ():
            reason = excuse(row, bar)
            verdict = f"excused: {reason}" if reason else "[red]MISSED[/]"
            console.print(f"{row.op} {row.form} {row.kernel} sm_{row.arch}: {bar}: {text}; {verdict}", highlight=False)
            if reason is None:
                row.misses[bar] = text
                failed = True
    return failed


def triton_rows(op: str, archs: list[int]) -> Iterator[Row]:
    """Rows of op's Triton cases; none where triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton_cases

    for name, kernel, signature, constexprs, attrs, warps, stages, note in getattr(triton_cases, op)():
        names = [arg for arg in kernel.arg_names if signature.get(arg, "constexpr") != "constexpr"]
        small = frozenset(arg for arg in names if SMALL.fullmatch(arg.lower()))
        sixteen = any("16" in signature[arg] for arg in names if arg not in small)
        for arch in archs:
            usage, threads, shared = compile_triton(kernel, signature, constexprs, attrs, warps, stages, arch)
            held = "generic" not in f"{name} {note}"
            row = Row(op, "triton", name, arch, usage, threads, shared, sixteen, held, note)
            row.names, row.small = {str(i): arg for i, arg in enumerate(names)}, small
            yield row


def compile_triton(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    attrs: dict[Any, Any],
    warps: int,
    stages: int,
    arch: int,
) -> tuple[sass.Usage, int, int]:
    """(usage, threads, shared memory) of one Triton kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    KEEP.mkdir(parents=True, exist_ok=True)
    cubin = KEEP / f"triton-{os.getpid()}.cubin"
    cubin.write_bytes(built.asm["cubin"])
    (usage,) = sass.read(cubin, built.asm["ptx"], arch).values()
    cubin.unlink()
    return usage, 32 * built.metadata.num_warps, built.metadata.shared


def cuda_rows(op: str, archs: list[int]) -> Iterator[Row]:
    """Rows of every kernel instantiation of csrc/<op>.cu; those that a DDPM++/NCSN++ shape launches are held to the bars."""
    source = ROOT / "csrc" / f"{op}.cu"
    if not source.is_file():
        return
    used = launches.record(op)
    for arch in archs:
        cubin, ptx = compile_cuda(source, arch)
        usages = sass.read(cubin, ptx, arch)
        plain = launches.demangle(list(usages))
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
            yield row


def compile_cuda(source: Path, arch: int) -> tuple[Path, str]:
    """(cubin, PTX) of a .cu file; made once per content of csrc/."""
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted((ROOT / "csrc").rglob("*.*h")):
        digest.update(header.read_bytes())
    folder = KEEP / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}"
    cubin, ptx = folder / "out.cubin", folder / f"{source.stem}.ptx"
    if not cubin.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sass.tool("nvcc"), "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++17", f"-I{ROOT}/csrc/common"]
        temp = folder / f"{os.getpid()}.cubin"
        subprocess.run([*command, "--keep", "--keep-dir", str(folder), str(source), "-o", str(temp)], check=True)
        temp.rename(cubin)
        for extra in set(folder.iterdir()) - {cubin, ptx}:  # preprocessed text, megabytes of it
            extra.unlink()
    return cubin, ptx.read_text(encoding="utf-8")


def _has(name: str) -> bool:
    try:
        sass.tool(name)
    except FileNotFoundError:
        return False
    return True


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Compiled kernels (< reads, > writes: bits)")
    numbers = ("regs", "stack", "spills", "smem", "threads", "CTAs/SM")
    for column in ("op", "kernel", "sm", *numbers, "global accesses", "atomics", "MUFU", "Philox"):
        table.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
    for row in rows:
        widths = []
        for key, bits in row.access().items():
            verb, _, name = key.partition(" ")
            widths.append({"load": "<", "store": ">"}.get(verb, "!") + name + ":" + "/".join(map(str, sorted(bits))))
        u = row.usage
        cells = [u.registers, u.stack, u.spills, row.shared, row.threads, row.ctas, " ".join(widths), u.atomics, u.mufu]
        style = "red" if row.misses else None if row.held else "dim"
        kernel = f"{row.form}: {row.kernel}"
        table.add_row(row.op, kernel, str(row.arch), *map(str, cells), str(u.philox_calls), style=style)
    console.print(table, highlight=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a kernel misses a bar")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(sass.SM_SHARED))
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be repeated)")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    ops = options.op or OPS
    rows = [row for op in ops for row in triton_rows(op, options.arch)]
    if _has("nvcc"):
        sources = [path for op in ops if (path := ROOT / "csrc" / f"{op}.cu").is_file()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # nvcc is what takes the time
            list(pool.map(compile_cuda, *zip(*((s, a) for s in sources for a in options.arch), strict=True)))
        rows += [row for op in ops for row in cuda_rows(op, options.arch)]
    else:
        console.print("[bold red]*** no nvcc: the CUDA kernels are NOT in this report ***[/]")
    failed = judge(rows, console)
    show(rows, console)
    for op in ops:
        module = importlib.import_module(f"ect_kernels.{op}")
        traffic = ", ".join(f"{name} {size}" for name, size in getattr(module, "DRAM", {}).items())
        console.print(f"DRAM of {op}: {traffic or '[red]not declared[/]'}", highlight=False)
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
