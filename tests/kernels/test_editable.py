"""pip install -e . beside a clone of the public code: one package or the other is imported, never modules of both."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = "import runpy, site, sys; sys.path.append({packages!r}); site.addsitedir({site!r}); "
RUN += "sys.argv = ['ect', '--help']; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of site-packages with the editable install of a copy of this tree."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("ect", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "editable_wheel", "--dist-dir", str(site)]
    env = {"ECT_SKIP_CUDA": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=env)
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    """python -m MODULE --help in a folder, with the install and torch, and without any other install of ours."""
    code = RUN.format(packages=sysconfig.get_paths()["purelib"], site=str(site), module=module)
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_it_is_two_folders_on_the_path(installed: Path) -> None:
    (pth,) = installed.glob("*.pth")
    first, second = map(Path, pth.read_text().splitlines())
    assert (first / "ect/__init__.py").is_file() and (second / "ect_kernels/__init__.py").is_file()
    assert not list(installed.glob("*finder*"))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ect.train", "ect.evaluate", "ect_kernels"])
def test_a_clone_of_the_public_code_does_not_mix_in(installed: Path, tmp_path: Path, module: str) -> None:
    for name in ("metrics", "training", "torch_utils"):
        (tmp_path / "ect" / name).mkdir(parents=True)
        (tmp_path / "ect" / name / "__init__.py").touch()
    found = run(installed, tmp_path, module)
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr


def test_another_package_of_the_name_is_whole_too(installed: Path, tmp_path: Path) -> None:
    """Then nothing of ours is found, and Python says so."""
    (tmp_path / "ect").mkdir()
    (tmp_path / "ect/__init__.py").touch()
    found = run(installed, tmp_path, "ect.train")
    assert found.returncode == 1 and "No module named ect.train" in found.stderr
