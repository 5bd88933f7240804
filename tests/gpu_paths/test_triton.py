"""Every Triton launch of a step, bound, specialised and compiled by Triton itself for each kind of GPU.

In processes without TRITON_INTERPRET, two at a time; see launches.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
from ect_kernels import dispatch

from tests.gpu_paths.fake_gpu import GPUS
from tests.gpu_paths.processes import ask

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

# In the gate each device compiles one precision, so that together they see everything that a step can ask for.
SMALL: dict[str, list[dict[str, Any]]] = {
    "T4": [{"precision": "fp16", "labels": True}],
    "A100": [{"precision": "fp16", "xflip": True, "accumulation": True}],
    "RTX 3090": [{"precision": "bf16", "objective": "diffusion", "augment": True}],
    "H100": [{"precision": "fp32", "xflip": True}],
    "B200": [{"precision": "bf16", "arch": "adm", "labels": True}],
    "RTX 5090": [{"precision": "fp16", "arch": "ncsnpp", "clip": True}],
}
every_gpu = pytest.mark.parametrize(
    "gpu", [pytest.param(gpu, marks=() if gpu in SMALL else pytest.mark.full) for gpu in GPUS]
)
OPS = "H100"  # where calls that no step makes are compiled too
DDPMPP = [{"ddpmpp": True, "precision": precision} for precision in ("fp16", "bf16", "fp32")]
FULL: dict[str, list[dict[str, Any]]] = {
    gpu: [{"precision": precision, "arch": arch, "xflip": True} for precision in ("fp16", "bf16", "fp32")
          for arch in ("ddpmpp", "ncsnpp", "adm")] + DDPMPP
    for gpu in GPUS
}  # fmt: skip


@pytest.fixture(scope="session")
def launches(pytestconfig: pytest.Config) -> Iterator[Any]:
    """launches(gpu): what launches.py found; all devices' processes start with the first call."""
    full = pytestconfig.getoption("--full")
    with ThreadPoolExecutor(2) as pool:

        @cache
        def started() -> dict[str, Future[dict[str, Any]]]:
            requests = {gpu: {"gpu": gpu, "steps": steps, "ops": True} for gpu, steps in FULL.items()} if full else {
                gpu: {"gpu": gpu, "steps": [step | {"small": True} for step in steps], "ops": gpu == OPS}
                for gpu, steps in SMALL.items()
            }  # fmt: skip
            return {gpu: pool.submit(ask, "launches", request) for gpu, request in requests.items()}

        yield lambda gpu: started()[gpu].result()


@every_gpu
def test_every_launch_of_a_step_compiles(gpu: str, launches: Any) -> None:
    found = launches(gpu)
    assert found["failures"] == {}
    assert found["gpu"] == GPUS[gpu].name and found["launches"] > 25
    names = {kernel["name"].removesuffix("_kernel") for kernel in found["kernels"]}
    used = {"group_norm_silu_fwd", "group_norm_silu_bwd", "residual_group_norm_silu_fwd", "residual_group_norm_silu_bwd",
            "radam_ema_check", "radam_ema_scalars", "radam_ema_update"}  # fmt: skip
    assert used <= names


@every_gpu
def test_no_kernel_spills_or_takes_more_than_the_device_has(gpu: str, launches: Any) -> None:
    device = GPUS[gpu]
    for kernel in launches(gpu)["kernels"]:
        assert kernel["shared"] <= device.shared, kernel
        assert 32 * kernel["warps"] * kernel["registers"] <= 65536, kernel
        # What is slow on a T4 is still better than the reference: its products have no tensor cores of Triton's.
        assert device.arch < 80 or kernel["stack"] == kernel["local"] == 0, kernel


def test_all_kernels_of_all_ops_are_seen(launches: Any) -> None:
    seen = {kernel["name"] for gpu in SMALL for kernel in launches(gpu)["kernels"]}
    for op in dispatch.OPS.values():
        assert "triton" not in op.backends or any(name.startswith(op.name) for name in seen), op.name


def test_no_parameter_of_a_kernel_hides_a_name_of_tritons_binder() -> None:
    """Nor would a planted one pass: names that some version of Triton keeps for itself."""
    found = ask("launches", {"gpu": "A100", "bind": True})
    assert len(found["binds"]) >= 10
    assert {name: fault for name, fault in found["binds"].items() if fault is not None} == {}
    assert any(found["plants"])
