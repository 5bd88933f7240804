"""Every Triton launch of a step, bound, specialised and compiled by Triton itself for each kind of GPU.

In a process without TRITON_INTERPRET; see launches.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ect_kernels import dispatch

from tests.gpu_paths.cases import allowed
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
EVERY = [{"precision": precision, "arch": arch, "xflip": True} for precision in ("fp16", "bf16", "fp32")
         for arch in ("ddpmpp", "ncsnpp", "adm")] + DDPMPP  # fmt: skip
FULL: dict[str, list[dict[str, Any]]] = {gpu: [case for case in EVERY if allowed(case | {"gpu": gpu})] for gpu in GPUS}


@pytest.fixture(scope="session")
def answer(pytestconfig: pytest.Config) -> dict[str, Any]:
    """What launches.py found: one process for all devices, since they share what it imports and what Triton parses."""
    steps = FULL if (full := pytestconfig.getoption("--full")) else {
        gpu: [step | {"small": True} for step in some] for gpu, some in SMALL.items()
    }  # fmt: skip
    requests = [{"gpu": gpu, "steps": some, "ops": full or gpu == OPS} for gpu, some in steps.items()]
    return ask("launches", {"launches": requests, "bind": True})


@pytest.fixture
def launches(answer: dict[str, Any]) -> Callable[[str], Any]:
    """launches(gpu): what became of them on this device."""
    return lambda gpu: answer["found"][gpu]


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


def test_no_parameter_of_a_kernel_hides_a_name_of_tritons_binder(answer: dict[str, Any]) -> None:
    """Nor would a planted one pass: names that some version of Triton keeps for itself."""
    assert len(answer["binds"]) >= 10
    assert {name: fault for name, fault in answer["binds"].items() if fault is not None} == {}
    assert any(answer["plants"])
