"""Which device a run gets: the current one of its process, and a GPU that torch cannot use is never passed over in silence."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ops
import precision
import profile_step
import pytest
import step_time
import torch

from ect import evaluate, sample, train
from ect.errors import UserError
from ect.ranks import device, driver
from ect.ranks.distributed import World
from ect.ranks.driver import Driver

ROOT = Path(__file__).parents[1]
STUB = """
#include <stdlib.h>
static int set(const char* name) { const char* text = getenv(name); return text ? atoi(text) : 0; }
int cuDriverGetVersion(int* version) { *version = set("STUB_CUDA"); return 0; }
int cuInit(unsigned flags) { return set("STUB_INIT"); }
int cuDeviceGetCount(int* count) { *count = set("STUB_GPUS"); return 0; }
int cuGetErrorString(int code, const char** text) { *text = "system not yet initialized"; return 0; }
"""
OLD = Driver(1, (12, 2))


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A libcuda that answers what the environment says."""
    folder = tmp_path_factory.mktemp("driver")
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "libcuda.so.1")]
    try:
        subprocess.run(command, input=STUB, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("needs a C compiler")
    return folder / "libcuda.so.1"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A machine with GPUs that torch can use, of these names and capabilities; returns what is made the current device."""

    def make(*found: tuple[str, int, int]) -> list[Any]:
        made: list[Any] = []
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: found[index or 0][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: found[index or 0][1:])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "compute_90"])
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch, "zeros", lambda *shape, **options: None)
        monkeypatch.setattr(torch.cuda, "set_device", made.append)
        return made

    return make


def unusable(monkeypatch: pytest.MonkeyPatch, found: Driver, cuda: str | None = "13.0", torchs: str = "") -> None:
    """A machine with this driver, where torch says that there is no CUDA."""

    def is_available() -> bool:
        if torchs:
            warnings.warn(torchs, stacklevel=1)
        return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(driver, "ask", lambda: found)
    monkeypatch.setattr(driver, "_heard", [])
    monkeypatch.setattr(driver, "VERSION", Path("/nowhere"))


A100, V100, H100, NEWER = ("A100", 8, 0), ("V100", 7, 0), ("H100", 9, 0), ("a newer one", 12, 0)


def test_the_gpu_of_a_run_is_the_current_one(gpus: Callable[..., list[Any]]) -> None:
    current = gpus(A100, H100)
    assert device.resolve("cuda:1") == torch.device("cuda:1")
    assert device.resolve("cuda:0") == torch.device("cuda:0")
    assert device.resolve("cuda", World(3, 4, 1, 2)) == torch.device("cuda:1")
    assert device.resolve("auto", World(2, 4, 0, 2)) == torch.device("cuda:0")
    assert current == [torch.device(f"cuda:{number}") for number in (1, 0, 1, 0)]
    assert device.resolve("cuda") == device.resolve("auto") == torch.device("cuda")  # the current one
    assert device.resolve("cpu") == torch.device("cpu") and len(current) == 4


@pytest.mark.parametrize("name", ["cuda:1", "cuda:7"])
def test_a_gpu_that_is_not_there(gpus: Callable[..., list[Any]], name: str) -> None:
    gpus(A100)
    with pytest.raises(UserError, match=rf"--device {name}: this machine has 1 GPU\(s\), from cuda:0 to cuda:0"):
        device.resolve(name)


@pytest.mark.parametrize(
    ("found", "usable"), [(A100, True), (H100, True), (("4090", 8, 9), True), (NEWER, True), (V100, False)]
)
def test_a_gpu_that_torch_has_no_kernels_for(
    gpus: Callable[..., list[Any]], found: tuple[str, int, int], usable: bool
) -> None:
    gpus(H100, found)
    if usable:
        assert device.resolve("cuda:1") == torch.device("cuda:1")
        return
    with pytest.raises(
        UserError, match=r"--device cuda:1: torch .* was built for sm_75, .*, and the V100 is sm_70; install"
    ):
        device.resolve("cuda:1")
    gpus(found)
    with pytest.warns(UserWarning, match="using the CPU: torch .* and the V100 is sm_70"):
        assert device.resolve("auto") == torch.device("cpu")


def test_machine_code_runs_on_its_own_generation_alone(
    gpus: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(NEWER)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a"])
    with pytest.raises(UserError, match="the a newer one is sm_120"):
        device.resolve("cuda")


UNUSABLE = {
    "a driver too old": (
        OLD, "13.0", "was built for CUDA 13.0, and the driver is for CUDA up to 12.2; update the driver to 580.65 or newer, or "
        "install a torch built for CUDA 12",
    ),
    "a torch without CUDA": (OLD, None, "was built without CUDA; install a build for CUDA 12, its driver takes up to 12.2"),
    "a driver that does not start": (Driver(1, (13, 0), "it is out of order"), "13.0", "cannot use it: it is out of order"),
    "no reason that we know": (Driver(1, (13, 0)), "13.0", "cannot use it: CUDA says no"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_gpu_that_torch_cannot_use(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """'auto' says so, once a machine; the GPU by name is refused. Same facts."""
    found, cuda, reason = UNUSABLE[case]
    unusable(monkeypatch, found, cuda, "CUDA says no (Triggered internally at x.cpp)")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert device.resolve("auto") == torch.device("cpu")
        assert device.resolve("auto", World(1, 2, 1, 2)) == torch.device("cpu")
    (text,) = [str(warning.message) for warning in said]
    assert text.startswith("--device auto: using the CPU: this machine has an NVIDIA GPU") and reason in text
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError) as refused:
            device.resolve(name)
        assert str(refused.value).startswith(f"--device {name}: this machine has") and reason in str(refused.value)


def test_no_gpu_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    unusable(monkeypatch, Driver(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.resolve("auto") == torch.device("cpu")


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus_are_meant(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable(monkeypatch, OLD)
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.resolve("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: CUDA_VISIBLE_DEVICES hides every GPU; unset it"):
        device.resolve("cuda")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_no_benchmark_reads_a_device_of_its_own(path: Path) -> None:
    """As torch.device reads it, cuda:1 would not be the current device."""
    assert "type=torch.device" not in path.read_text(encoding="utf-8")


def _status(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    "command",
    [
        lambda device, path: train.main(["--device", device, "--run-dir", str(path / "run")]),
        lambda device, path: sample.main([str(path), "--device", device]),
        lambda device, path: evaluate.main([str(path), "--device", device]),
        lambda device, path: ops.main(["--device", device]),
        lambda device, path: step_time.main(["--device", device]),
        lambda device, path: precision.main(["--device", device]),
        lambda device, path: profile_step.main(["--device", device]),
    ],
    ids=["train", "sample", "evaluate", "ops", "step_time", "precision", "profile_step"],
)
def test_every_command_reads_its_device_so(
    command: Callable[[str, Path], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    unusable(monkeypatch, OLD)
    assert _status(lambda: command("cuda:1", tmp_path)) == 2
    assert "--device cuda:1: this machine has an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("says", "want"),
    [
        ({"STUB_CUDA": "12020", "STUB_GPUS": "2"}, Driver(2, (12, 2))),
        ({"STUB_CUDA": "13000"}, Driver(0, (13, 0))),
        ({"STUB_CUDA": "13000", "STUB_INIT": "100"}, Driver(0, (13, 0))),
        (
            {"STUB_CUDA": "13000", "STUB_INIT": "802"},
            Driver(
                1, (13, 0), "the driver does not start (error 802: system not yet initialized); reboot, or reinstall it"
            ),
        ),
    ],
)
def test_the_driver_is_asked(stub: Path, says: dict[str, str], want: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", str(stub))
    monkeypatch.setattr(driver, "VERSION", Path("/nowhere"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in says.items():
        monkeypatch.setenv(name, value)
    assert driver.ask() == want


def test_a_gpu_without_the_drivers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", str(tmp_path / "none.so"))
    monkeypatch.setattr(driver, "NODES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert driver.ask() == Driver(0)
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert driver.ask() == Driver(1, fault=f"the driver's {tmp_path / 'none.so'} is not installed here")


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 11.4.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (x)\nGCC version: 12.2.0",
    ],
)
def test_the_drivers_version(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unusable(monkeypatch, OLD)
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(driver, "VERSION", tmp_path / "version")
    assert "and the driver 535.104.05 is for CUDA up to 12.2" in (driver.why_unusable() or "")


SCENE = """
import torch
from ect import sample
from ect.ranks import device
assert device.resolve("auto") == torch.device("cpu")
sample.main(["nothing.safetensors", "--device", "cuda"])
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch built for CUDA")
def test_torch_itself_on_an_old_driver(stub: Path, tmp_path: Path) -> None:
    """Nothing mocked but the driver: libcuda.so.1 is found by torch and by us."""
    paths = os.environ.get("LD_LIBRARY_PATH")
    env = {
        **os.environ,
        "STUB_CUDA": "10020",
        "STUB_GPUS": "1",
        "LD_LIBRARY_PATH": str(stub.parent) + (f":{paths}" if paths else ""),
    }
    env.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", SCENE], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("UserWarning") == 1
    facts = f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, and the driver"
    assert done.stderr.count(facts) == 2 and done.stderr.count("is for CUDA up to 10.2; update the driver to ") == 2
    assert f"error: --device cuda: this machine has an NVIDIA GPU, but {facts}" in done.stderr


def test_a_torch_that_names_no_architectures_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    assert driver.why_unusable(0) is None
