"""benchmarks/lib/row_loops.py: loops, their rows and their instructions, in SASS written by hand and in that of a kernel."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from lib import row_loops, sass

ROOT = Path(__file__).parents[2]
PHILOX = ["IMAD.WIDE.U32 R8, R8, -0x2daee0ad, RZ", "IMAD.HI.U32 R8, R8, -0x326172a9, RZ"] * 10


def listing(lines: list[str]) -> str:
    """SASS as nvdisasm prints it; a line that ends in ':' is a label."""
    return "\n".join(line if line.endswith(":") else f"        /*{k:04x}*/  {line} ;" for k, line in enumerate(lines))


# An outer loop; in it one over rows, read from one of two places, with a branch round a call of Philox, and one branch of two
# sides; behind its end a cold block that branches back, which makes no loop.
ROWS = [
    "LDS.128 R4, [R2]",
    "@P0 LDG.E.128.CONSTANT R4, [R2.64]",
    "@!P0 LDG.E.128.CONSTANT R4, [R6.64]",
    "@!P1 BRA `(.L_x_2)",
    *PHILOX,
    ".L_x_2:",
    "MUFU.EX2 R9, R9",
    "BRA.U UP0, `(.L_x_3)",
    "FMUL R4, R4, R9",
    "FMUL R5, R5, R9",
    "BRA `(.L_x_4)",
    ".L_x_3:",
    "FADD R4, R4, R9",
    ".L_x_4:",
    "STG.E.EF.128 [R2.64], R4",
]
BEFORE = ["MOV R1, c[0x0][0x28]", ".L_x_0:", "IADD3 R2, R2, 0x1, RZ", ".L_x_1:"]
AFTER = [
    "@!P2 BRA `(.L_x_1)",
    "@P3 BRA !P4, `(.L_x_0)",
    "@P3 BRA `(.L_x_6)",
    ".L_x_5:",
    "EXIT",
    ".L_x_6:",
    "CALL.REL.NOINC `($slow_path)",
    "BRA `(.L_x_5)",
]


def test_counts_a_loop_written_by_hand() -> None:
    (loop,) = row_loops.row_loops("norm_fwd_kernel<__half>", 80, listing(BEFORE + ROWS + AFTER))
    # Of the branch of two sides the longest way takes the one of three instructions.
    assert loop == row_loops.RowLoop(
        "norm_fwd_kernel<__half>", 80, "apply", 1, body=32, longest=31, undrawn=11, unstored=31
    )


def test_two_rows_an_iteration_halve_the_count() -> None:
    again = [line.replace("L_x_", "L_x_1") for line in ROWS]
    (loop,) = row_loops.row_loops("norm_fwd_kernel<__half>", 80, listing(BEFORE + ROWS + again + AFTER))
    assert (loop.rows, loop.body, loop.longest, loop.undrawn) == (2, 31.5, 30.5, 10.5)
    undrawn = [line for line in ROWS + again if line not in PHILOX]
    (loop,) = row_loops.row_loops("norm_fwd_kernel<__half>", 80, listing(BEFORE + undrawn + AFTER))
    assert (loop.rows, loop.body, loop.longest) == (2, 11.5, 10.5)


def test_a_long_kernel_and_one_that_turns_in_a_circle_have_a_longest_way() -> None:
    chain = [row_loops.Block([row_loops.Instruction("", "NOP", "")], [k + 1]) for k in range(5000)]
    chain.append(row_loops.Block([], []))
    assert row_loops.longest_way(chain, 0, range(5001), row_loops.size) == 5000
    chain[4000].after.append(3000)  # a loop inside: passed once
    assert row_loops.longest_way(chain, 0, range(5001), row_loops.size) == 5000


KERNEL = """
#include "philox.cuh"
#include "access.cuh"
template <int U> __global__ void kernel_fwd(const __half* x, __half* y, uint64_t seed, int n, float scale) {
  uint32_t row = threadIdx.x;
#pragma unroll U
  for (int k = 0; k < n; k++, row += 32) {
    float e[8];
    load<true>(x + row * 8, e);
    if (seed != 0) {
      const uint4 bits = philox(seed, row, 3);
#pragma unroll
      for (int j = 0; j < 8; j++) e[j] = keep8(bits, j, 77) ? e[j] : 0.f;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) e[j] *= sigmoid(e[j] * scale);
    store<true>(y + row * 8, e);
  }
}
template __global__ void kernel_fwd<1>(const __half*, __half*, uint64_t, int, float);
template __global__ void kernel_fwd<4>(const __half*, __half*, uint64_t, int, float);
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 120])
def test_a_compiled_kernel_takes_as_many_instructions_a_row_however_it_is_unrolled(arch: int, tmp_path: Path) -> None:
    try:
        nvcc = sass.tool("nvcc")
        sass.tool("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (tmp_path / "k.cu").write_text(KERNEL)
    command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++17", f"-I{ROOT}/csrc/common", "k.cu"]
    subprocess.run([*command, "-o", "k.cubin"], cwd=tmp_path, check=True)
    found = {}
    for name, text in sass.disassembled(tmp_path / "k.cubin").items():
        main = max(
            row_loops.row_loops("kernel_fwd", arch, text), key=lambda loop: loop.rows
        )  # the other takes the rest
        found["ILi4E" in name] = main
    once, unrolled = found[False], found[True]
    assert (once.rows, unrolled.rows, once.kind) == (1, 4, "apply")
    assert unrolled.body == pytest.approx(once.body, rel=0.1)
    assert 60 < once.undrawn < once.longest - 50  # Philox is 20 multiplications and 20 xors, then come comparisons


def loop(kind: str, body: float, kernel: str = "group_norm_silu_fwd_kernel<__half, 8>") -> row_loops.RowLoop:
    return row_loops.RowLoop(kernel, 80, kind, 1, body, body, body, body)


def test_bars() -> None:
    backward = [loop(kind, 289, "group_norm_silu_bwd_kernel<__half, 8>") for kind in ("backward 1", "backward 2")]
    good = [loop("copy", 500), loop("Welford", 88), loop("apply", 192), *backward]
    assert row_loops.missed(good) == []
    for k, over in enumerate(good[1:], start=1):
        rest = good[:k] + good[k + 1 :]
        missed = row_loops.missed([replace(over, body=over.body + 1), *rest])
        assert f"{over.kind}: {over.body + 1} instructions" in missed[0]
        assert [miss for miss in missed[1:] if "forward: 281" not in miss] == []
        assert f"group_norm_silu sm_80: {over.kind}: no such loop found" in row_loops.missed(rest)
    elsewhere = [replace(each, arch=90, body=1000) for each in good] + [
        replace(good[1], kernel="residual_x", body=1000)
    ]
    assert row_loops.missed([*good, *elsewhere]) == []
