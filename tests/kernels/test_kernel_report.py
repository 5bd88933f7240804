"""benchmarks/kernel_report.py: what it reads from compiled kernels, what its bars catch, and the bars over every kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_report
import pytest
from lib import launches, row_loops, sass

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


@pytest.fixture(scope="module", params=[80, 90, 100, 120])
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


@pytest.mark.slow
def test_reads_a_compiled_kernel(usage: sass.Usage) -> None:
    assert usage.max_threads == 96
    assert usage.static_shared == 96 * 4
    assert (usage.spills, usage.stack) == (0, 0)
    assert 0 < usage.registers < 100
    assert usage.atomics == 1
    assert usage.mufu >= 1
    assert usage.sass["LDG.128"] == usage.sass["STG.128"] == 1


def test_follows_addresses_to_parameters(usage: sass.Usage) -> None:
    assert usage.access == {
        "load 0": {128},
        "load 1": {32},
        "store 2": {128},
        "store 5+8": {32},
        "atomic 5": {32},
    }


def test_counts_random_bits_by_loop(usage: sass.Usage) -> None:
    (loop,) = usage.draws
    assert loop.calls == 1
    assert loop.bits == {"load 0": 128, "load 1": 32, "store 2": 128, "store 5+8": 32, "atomic 5": 32, "shared": 32}


def kernel_of(**given: Any) -> kernel_report.Row:
    """A kernel that meets the bars but for what is given of its usage, fp16."""
    draws = [sass.Draws(19, Counter({"load 0": 128, "store 1": 256, "load 2": 64, "load 3": 32}))]
    access = {
        "load 0": frozenset({128}),
        "store 1": frozenset({128}),
        "load 2": frozenset({64}),
        "load 3": frozenset({32}),
    }
    usage = sass.Usage(64, 0, 0, access=access, draws=draws)
    row = kernel_report.Row("group_norm_silu", "triton", "k", 80, replace(usage, **given), 256, 0, True, True)
    row.names, row.small = {"0": "x", "1": "y", "2": "seed", "3": "gamma"}, frozenset({"seed", "gamma"})
    return row


def test_bars() -> None:
    assert kernel_report.bars(kernel_of()) == {}
    too_many = [sass.Draws(36, Counter({"load 0": 128, "store 1": 256}))]
    of_no_tensor = [sass.Draws(20, Counter({"shared": 128}))]  # 4 elements
    wide = {"load 0": frozenset({128})}
    caught: list[tuple[str, dict[str, Any]]] = [
        ("philox", {"draws": too_many}),
        ("philox", {"draws": of_no_tensor}),
        ("philox", {"draws": []}),  # though it has a seed
        ("width", {"access": wide | {"store 1": frozenset({128, 64})}}),
        ("address", {"access": wide | {"store ?": frozenset({128})}}),
        ("spills", {"spills": 1}),
        ("atomics", {"atomics": 1}),
        ("ctas", {"registers": 129}),
    ]
    for bar, given in caught:
        assert list(kernel_report.bars(kernel_of(**given))) == [bar], given
    noise = kernel_of(draws=of_no_tensor)
    noise.op = "perturb"  # four normal deviates a call
    assert kernel_report.bars(noise) == {}


def test_exceptions_excuse_no_more_than_they_name() -> None:
    row = kernel_of()
    row.op = "perturb"
    allowed = "load images [8, 32] bits, store in_t [64] bits"
    assert kernel_report.excuse(row, "width", allowed)
    assert kernel_report.excuse(row, "width", f"{allowed}, store x_t [64] bits") is None
    assert kernel_report.excuse(row, "ctas", allowed) is None
    row.form = "cuda"
    assert kernel_report.excuse(row, "width", allowed) is None
    row.op = "group_norm_silu"
    assert kernel_report.excuse(row, "ctas", "1 CTAs of 66 KB on an SM of 100")  # as consumer cards have
    for found in (
        "1 CTAs of 96 KB on an SM of 100",
        "1 CTAs of 66 KB on an SM of 164",
        "0 CTAs of 66 KB on an SM of 100",
    ):
        assert kernel_report.excuse(row, "ctas", found) is None


CALL = "mul.wide.u32 %rd9, %r9, -766435501; mul.wide.u32 %rd9, %r9, -845247145;" * 10  # of Philox
FIRST, SECOND = (f"ld.global.nc.v4.u32 {{%r1,%r2,%r3,%r4}}, [%rd5{offset}];" for offset in ("", "+16"))


@pytest.mark.parametrize(
    "loop",
    [
        # A `continue` branches back too: what follows it belongs to the loop.
        f"$L__BB0_1: {CALL} {FIRST} @%p1 bra $L__BB0_1; {SECOND} @%p2 bra $L__BB0_1; ret;",
        # What follows a loop may stand inside of it: a branch back to that is no loop.
        f"$L__BB0_1: {CALL} {FIRST} bra.uni $L__BB0_3; $L__BB0_2: ret; "
        f"$L__BB0_3: {SECOND} @%p1 bra $L__BB0_1; bra.uni $L__BB0_2;",
    ],
    ids=["continue", "code of after it"],
)
def test_a_loop_is_all_that_is_repeated(loop: str) -> None:
    (draws,) = sass.draws(f"mov.b64  %rd1, kernel_param_0; ld.param.u64  %rd5, [%rd1]; {loop}")
    assert draws.calls == 1 and draws.bits == {"load 0": 256}


def test_rows_in_shared_memory_are_of_the_kernels_type() -> None:
    row = kernel_of(draws=[sass.Draws(20, Counter({"shared": 128}))])
    assert row.drawn() == [(1, 4)]  # Triton's: taken for fp32
    row.form = "cuda"
    assert row.drawn() == [(1, 8)] and kernel_report.bars(row) == {}


def test_global_store_to_shared_memory_has_no_origin() -> None:
    """As nvcc writes __stcs() of a pointer into shared memory: st.global with an address that a GPU does not take."""
    body = """
    mov.u64 %rd3, dyn_smem_;
    { .reg .b64 %tmp;
      cvt.u64.u32  %tmp, %r7;
      cvta.shared.u64  %rd1, %tmp; }
    add.s64  %rd2, %rd1, 16;
    // begin inline asm
    st.global.cs.v4.u32 [%rd2], {%r1,%r2,%r3,%r4};
    // end inline asm
    ret;
"""
    assert sass.accesses(body) == {"store ?": {128}}


def test_follows_a_choice_of_two_parameters_past_inline_assembly() -> None:
    body = """
    mov.b64  %rd1, kernel_param_0;
    add.s64  %rd2, %rd1, 16;
    add.s64  %rd3, %rd1, 8;
    selp.b64  %rd4, %rd2, %rd3, %p1;
    ld.param.u64  %rd5, [%rd4];
    {  cvt.f32.f16 %f1, %rs1;}
    // end inline asm
    ld.global.nc.v4.u32 {%r1,%r2,%r3,%r4}, [%rd5];
"""
    assert sass.accesses(body) == {"load 0+8": {128}, "load 0+16": {128}}


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
        (86, 32, 64, 0, 16),  # fewer CTAs
        (89, 32, 64, 0, 24),
        (120, 32, 256, 0, 6),  # fewer threads
        (89, 64, 256, 48 * 1024, 2),  # 100 KiB
        (120, 64, 256, 49 * 1024, 2),
        (86, 64, 256, 50 * 1024, 1),
        (86, 64, 256, 99 * 1024, 1),
        (86, 64, 256, 99 * 1024 + 16, 0),
        (100, 64, 256, 112 * 1024, 2),
    ],
)
def test_ctas_per_sm(arch: int, registers: int, threads: int, shared: int, want: int) -> None:
    assert sass.ctas_per_sm(arch, registers, threads, shared) == want


@pytest.mark.parametrize("op", row_loops.OPS)
def test_kernels_asked_for_by_name_are_all_that_is_compiled(op: str) -> None:
    """A launcher names every kernel of its file, and nvcc compiles what is named; of the residual norm three times as many."""
    source = (ROOT / "csrc" / f"{op}.cu").read_text(encoding="utf-8")
    rest = sass.LAUNCHER.sub("", source)
    assert source.count("gn::start(") >= 2 and rest.count(f"{op}_fwd_kernel") == rest.count(f"{op}_bwd_kernel") == 1
    assert "gn::start(" not in rest and "return f.p.resident" not in rest


@pytest.mark.slow
def test_every_kernel_meets_the_bars() -> None:
    """Compiled anew: Triton's and CUDA's for sm_80 and sm_90, the norms in csrc/ for four more."""
    for tool in ("cuobjdump", "nvdisasm"):
        try:
            sass.tool(tool)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "benchmarks"))
    command = [sys.executable, str(ROOT / "benchmarks/kernel_report.py"), "--check", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if "NOT in this report" in done.stdout:
        pytest.skip("no nvcc: Triton's kernels meet the bars, those of csrc/ were not compiled")


def test_launches_are_recorded_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launches, "_record", lambda op: seen.append(os.environ.get("CUDA_HOST_DEVICE")) or {})
    monkeypatch.setenv("CUDA_HOST_DEVICE", "1")
    for arch in sorted(sass.SMS):
        launches.record("group_norm_silu", sass.SMS[arch].cta_shared // 1024)
    launches.record("group_norm_silu")
    assert seen == ["1", "0", "0", "2", "2", "0", "1"]  # sm_80, 86, 89, 90, 100, 120; the one of the environment
