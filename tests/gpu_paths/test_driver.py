"""A driver that does not fit, behind the real CUDA runtime and the real probe: a reason in a sentence, and the next backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ect_kernels import levels, native

from tests.gpu_paths.fake_gpu import GPUS, told

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda", 0)
PROBE = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).probe())"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With levels.so, which holds the probe, and libcuda.so.1, the stub."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    made, here = tmp_path_factory.mktemp("driver"), Path(__file__).parent
    nvcc = ["nvcc", "-shared", "-Xcompiler", "-fPIC"]
    stub = [*nvcc, "-cudart", "none", "-Xlinker", "-soname=libcuda.so.1", here / "stub_driver.c"]
    subprocess.run([*stub, "-o", made / "libcuda.so.1"], check=True)
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'common'}"]
    options = ["-arch=sm_80", "-std=c++17", *include, ROOT / "csrc" / "levels.cu"]
    subprocess.run([*nvcc, *options, "-o", made / "levels.so"], check=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "code"),
    [
        ({"STUB_VERSION": "12040"}, 35),  # older than the runtime
        ({"STUB_INIT": "803"}, 803),  # another version than the kernel module's
        ({"STUB_INIT": "100"}, 100),  # no device
        ({"STUB_INIT": "999"}, 999),
    ],
)
def test_the_probe_says_what_the_driver_lacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, machine: dict[str, str], code: int
) -> None:
    env = os.environ | {"LD_LIBRARY_PATH": str(folder)} | machine
    command = [sys.executable, "-c", PROBE, str(folder / "levels.so")]
    said = int(subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout)
    assert said == code
    module = SimpleNamespace(archs=lambda: [(80, 80)], probe=lambda: f"CUDA error {said}")
    monkeypatch.setattr(native, "extension", lambda: module)
    native._probe.cache_clear()
    try:
        with told(GPUS["A100"]):
            reason = native.why_not_built(GPU)
            assert reason is not None and f"CUDA error {code}" in reason and "driver" in reason
            assert levels.OP.candidates(GPU) == ["triton", "reference"]
    finally:
        native._probe.cache_clear()
