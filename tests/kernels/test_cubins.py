"""benchmarks/lib/cubins.py, and the PTX that the kernel report shares: both show what separate calls of the tools show."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import kernel_report
import pytest
from lib import cubins, sass

ROOT = Path(__file__).parents[2]
# Of one kernel and of two, of different lengths.
SOURCES = (
    "__global__ void one(float* x) { x[threadIdx.x] *= 2.f; }",
    "__global__ void two(int* x, int n) { for (int k = 0; k < n; k++) atomicAdd(x + k, __expf(k)); }"
    "__global__ void three(float4* x) { x[threadIdx.x] = x[threadIdx.x + 32]; }",
)


@pytest.fixture(autouse=True)
def tools() -> None:
    for name in ("nvcc", "nvdisasm"):
        try:
            sass.tool(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))


def compiled(arch: str, folder: Path) -> list[Path]:
    made = []
    for k, source in enumerate(SOURCES):
        (folder / f"{k}.cu").write_text(source)
        made.append(folder / f"{k}.cubin")
        subprocess.run(
            [sass.tool("nvcc"), "-cubin", f"-arch={arch}", f"{k}.cu", "-o", made[-1]], cwd=folder, check=True
        )
    return made


@pytest.mark.parametrize(("arch", "suffix"), [(80, ""), (120, "a")])
def test_cubins_read_together_as_each_alone(
    arch: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where an instruction is not shown it is an error: each kernel behind it would be given another's."""
    made = compiled(f"sm_{arch}{suffix}", tmp_path)  # as Triton does
    together = cubins.listings([path.read_bytes() for path in made], arch)
    assert [len(kernels) for kernels in together] == [1, 2]
    for path, kernels in zip(made, together, strict=True):
        alone = sass.disassembled(path)
        opcodes = {name: sass.INSTRUCTION.findall(text) for name, text in alone.items()}
        assert {name: sass.INSTRUCTION.findall(text) for name, text in kernels.items()} == opcodes
        assert all(opcodes.values())
    monkeypatch.setattr(cubins, "LINE", re.compile(r"^.*EXIT.*$", re.M))
    with pytest.raises(RuntimeError, match=rf"shows 1 instructions in \d+ bytes for SM{arch}"):
        cubins.listings([made[0].read_bytes()], arch)


@pytest.mark.slow
def test_architectures_that_share_ptx_have_the_same(tmp_path: Path) -> None:
    kernel = "group_norm_silu_fwd_kernel<__half, 8, true>"

    def text(arch: int) -> str:
        ptx = sass.translated(ROOT / "csrc" / "group_norm_silu.cu", arch, tmp_path, [kernel]).read_text()
        assert f"\n.target sm_{arch}\n" in ptx and ".entry" in ptx
        return ptx.replace(f"\n.target sm_{arch}\n", "")

    (source,) = set(kernel_report.SAME_PTX.values())
    assert {text(arch) for arch in kernel_report.SAME_PTX} == {text(source)}
