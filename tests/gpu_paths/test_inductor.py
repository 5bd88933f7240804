"""What torch.compile makes of the U-Net for an A100 and an H100, lowered by Inductor in processes of its own (inductor.py)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.gpu_paths.processes import ask

pytestmark = pytest.mark.slow

INTERNALS = {
    "torch._dynamo.backends.common": "aot_autograd",
    "torch._dynamo.device_interface": "CudaInterface",
    "torch._inductor.compile_fx": "_recursive_joint_graph_passes",
    "torch._inductor.graph": "GraphLowering",
    "torch._inductor.virtualized": "V",
    "torch._inductor.debug": "DebugContext",
    "functorch.compile": "min_cut_rematerialization_partition",
}
for _module, _name in INTERNALS.items():
    _found = pytest.importorskip(_module, reason=f"this torch has no {_module}")
    if not hasattr(_found, _name):
        pytest.skip(f"this torch has no {_module}.{_name}", allow_module_level=True)

GPUS = ["A100", "H100"]
CASES: dict[str, dict[str, Any]] = {
    "ddpmpp, fp16": {"arch": "ddpmpp", "precision": "fp16"},
    "ncsnpp, bf16": {"arch": "ncsnpp", "precision": "bf16"},
    "adm, fp32, labels": {"arch": "adm", "precision": "fp32", "labels": True},
}
FULL = {
    f"{arch}, {precision}{', labels' if labels else ''}": {"arch": arch, "precision": precision, "labels": labels}
    for arch in ("ddpmpp", "ncsnpp", "adm") for precision in ("fp16", "bf16", "fp32") for labels in (False, True)
}  # fmt: skip
PLANT = {"plant": True}


@pytest.fixture(scope="session")
def lowered(pytestconfig: pytest.Config) -> Iterator[Any]:
    """lowered(name): what inductor.py found; two processes at a time, all of them started by the first call."""
    requests = {**CASES, "plant": PLANT, **(FULL if pytestconfig.getoption("--full") else {})}
    with ThreadPoolExecutor(2) as pool:

        @cache
        def started() -> dict[str, Future[dict[str, Any]]]:
            return {name: pool.submit(ask, "inductor", {"gpus": GPUS, **case}) for name, case in requests.items()}

        yield lambda name: started()[name].result()


REST = [pytest.param(name, marks=pytest.mark.full) for name in FULL if name not in CASES]
every_case = pytest.mark.parametrize("name", [*CASES, *REST])


@every_case
def test_the_backward_fills_no_images_with_zeros(name: str, lowered: Any) -> None:
    assert lowered(name)["zeros"] == []


@every_case
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_layout_is_copied_round_a_convolution(name: str, arch: str, lowered: Any) -> None:
    found = lowered(name)[arch]
    assert found["copies"] == {"forward": [], "backward": []}
    runs = found["runs"]
    assert runs["forward"]["convolution"] > 20 and runs["backward"]["convolution_backward"] > 20
    assert runs["forward"]["group_norm_silu"] > 5 and runs["backward"]["residual_group_norm_silu_bwd"] > 5


def test_planted_faults_are_found(lowered: Any) -> None:
    found = lowered("plant")
    for arch in ("sm_80", "sm_90"):
        assert {way: len(copies) for way, copies in found[arch]["copies"].items()} == {"forward": 1, "backward": 1}
    assert found["zeros"] == ["aten.full.default (2, 8, 16, 16) for aten.cat.default"]
