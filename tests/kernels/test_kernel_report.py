"""benchmarks/kernel_report.py: what it reads from compiled kernels, and (slow) its bars over all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).parents[2]
KERNEL = """
#include "philox.cuh"
struct Out { float* low; float* high; };
__global__ void __launch_bounds__(96)
parsed_kernel(const uint4* x, const float* scale, uint4* y, uint64_t seed, int64_t n, Out out) {
  __shared__ float s[96];
  for (int64_t i = blockIdx.x * 96 + threadIdx.x; i < n; i += 96 * gridDim.x) {
    s[threadIdx.x] = scale[n + i];
    __syncthreads();
    uint4 v = x[i];
    const uint4 w = philox(seed, uint32_t(i), 3);
    v.x ^= w.x; v.y ^= w.y; v.z ^= w.z; v.w ^= w.w ^ __float_as_uint(__expf(s[95 - threadIdx.x]));
    y[i] = v;
    out.high[i] = 1.f;
    atomicAdd(out.low, 1.f);
  }
}
"""


@pytest.fixture(scope="module", params=[80, 90])
def usage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> sass.Usage:
    """The kernel above, compiled."""
    try:
        nvcc = sass.tool("nvcc")
        sass.tool("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("parsed")
    (folder / "k.cu").write_text(KERNEL)
    command = [nvcc, "-cubin", f"-arch=sm_{request.param}", "-O3", "-std=c++17", f"-I{ROOT}/csrc/common", "--keep"]
    subprocess.run([*command, "--keep-dir", str(folder), "k.cu", "-o", "out.cubin"], cwd=folder, check=True)
    (found,) = sass.read(folder / "out.cubin", (folder / "k.ptx").read_text(), request.param).values()
    return found


def test_reads_a_compiled_kernel(usage: sass.Usage) -> None:
    assert usage.max_threads == 96
    assert usage.static_shared == 96 * 4
    assert (usage.spills, usage.stack) == (0, 0)
    assert 0 < usage.registers < 100
    assert usage.atomics == 1
    assert usage.mufu >= 1
    assert usage.philox_calls == 1
    assert usage.sass["LDG.128"] == usage.sass["STG.128"] == 1


def test_follows_addresses_to_parameters(usage: sass.Usage) -> None:
    assert usage.access == {
        "load 0": {128},
        "load 1": {32},
        "store 2": {128},
        "store 5+8": {32},
        "atomic 5": {32},
    }


def test_counts_spills_atomics_and_widths() -> None:
    text = """
        /*0010*/                   LDL.64 R2, [R1] ;
        /*0020*/               @P0 STL [R1+0x8], R4 ;
        /*0030*/              @!P1 REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0040*/                   REDUX.SUM UR4, R3 ;
        /*0050*/                   LDG.E.U16.CONSTANT R2, desc[UR4][R2.64] ;
        /*0060*/                   ATOMG.E.ADD.STRONG.GPU PT, R5, desc[UR4][R2.64], R5 ;
        /*0070*/                   LDG.E.128.CONSTANT R2, desc[UR4][R2.64] ;
"""
    usage = sass.Usage(1, 0, 0)
    sass.count_instructions(usage, text)
    assert (usage.spills, usage.atomics) == (2, 2)
    assert usage.sass["LDG.16"] == usage.sass["LDG.128"] == 1


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "want"),
    [
        (80, 32, 256, 0, 8),  # threads
        (80, 128, 256, 0, 2),  # registers
        (80, 129, 256, 0, 1),
        (80, 32, 256, 80 * 1024, 2),  # 164 KiB less 1 KiB a CTA
        (80, 32, 256, 82 * 1024, 1),
        (90, 32, 256, 112 * 1024, 2),
        (80, 32, 256, 164 * 1024, 0),  # more than a CTA may have
        (80, 16, 32, 0, 32),  # CTAs
        (80, 255, 256, 0, 1),
    ],
)
def test_ctas_per_sm(arch: int, registers: int, threads: int, shared: int, want: int) -> None:
    assert sass.ctas_per_sm(arch, registers, threads, shared) == want


@pytest.mark.report
def test_every_kernel_meets_the_bars() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "benchmarks/kernel_report.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
