"""setup.py: which GPUs it builds for, and what it says where there is no nvcc."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module; setup() does nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.delenv("ECT_CUDA_ARCHS", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    spec = importlib.util.spec_from_file_location("ect_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", [(80, 0), (90, 90)]),
        ("80", [(80, 80)]),
        ("8.6;9.0", [(86, 0), (90, 90)]),
        ("90, 80", [(80, 0), (90, 90)]),
        ("120;80;", [(80, 0), (120, 120)]),
    ],
)
def test_targets(script: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, want: list[tuple[int, int]]) -> None:
    monkeypatch.setenv("ECT_CUDA_ARCHS", text)
    assert script.targets() == want


def test_targets_are_the_gpus_present(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 9.0\necho 8.0\necho 9.0\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("shutil.which", lambda name: str(fake) if name == "nvidia-smi" else None)
    assert script.targets() == [(80, 0), (90, 90)]


def test_build_without_nvcc_succeeds_loudly(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)]
    env = {**os.environ, "ECT_SKIP_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "*** ect: the CUDA kernels were NOT built" in done.stderr
    assert not list(tmp_path.rglob("_C*.so"))


def test_cuda_home_needs_nvcc_and_headers(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert script.cuda_home() != tmp_path
    for name in ("bin/nvcc", "include/cuda_runtime_api.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert script.cuda_home() == tmp_path
