"""What torch.compile makes of the U-Net for an A100 and an H100, lowered by Inductor in processes of its own (inductor.py)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.gpu_paths.processes import ask

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

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("A100", "ddpmpp", {"precision": "fp16"}),
    ("H100", "ddpmpp", {"precision": "fp16"}),
    ("A100", "ncsnpp", {"precision": "bf16", "labels": True}),
    ("H100", "ncsnpp", {"precision": "fp32"}),
    ("A100", "adm", {"precision": "fp32"}),
    ("H100", "adm", {"precision": "fp16", "labels": True}),
]
FULL = [
    (gpu, arch, {"precision": precision, "labels": labels})
    for gpu in ("A100", "H100") for arch in ("ddpmpp", "ncsnpp", "adm")
    for precision in ("fp16", "bf16", "fp32") for labels in (False, True)
]  # fmt: skip
PLANT = "A100", "plant", {"plant": True}


@pytest.fixture(scope="session")
def lowered(pytestconfig: pytest.Config) -> Iterator[Any]:
    """lowered(case): what inductor.py found; two processes at a time, all of them started by the first call."""
    cases = [*CASES, PLANT, *(FULL if pytestconfig.getoption("--full") else [])]
    with ThreadPoolExecutor(2) as pool:

        @cache
        def started() -> dict[str, Future[dict[str, Any]]]:
            return {str(c): pool.submit(ask, "inductor", {"gpu": c[0], "arch": c[1], **c[2]}) for c in cases}

        yield lambda case: started()[str(case)].result()


def parameters(cases: list[Any], *marks: Any) -> list[Any]:
    return [pytest.param(c, id=f"{c[0]} {c[1]} {' '.join(map(str, c[2].values()))}", marks=marks) for c in cases]


every_case = pytest.mark.parametrize("case", parameters(CASES) + parameters(FULL, pytest.mark.full))


@every_case
def test_no_layout_is_copied_round_a_convolution(case: Any, lowered: Any) -> None:
    assert lowered(case)["copies"] == {"forward": [], "backward": []}


@every_case
def test_the_backward_fills_no_images_with_zeros(case: Any, lowered: Any) -> None:
    assert lowered(case)["zeros"] == []


@every_case
def test_convolutions_and_ops_run_as_themselves(case: Any, lowered: Any) -> None:
    runs = lowered(case)["runs"]
    assert runs["forward"]["convolution"] > 20 and runs["backward"]["convolution_backward"] > 20
    assert runs["forward"]["group_norm_silu"] > 5 and runs["backward"]["residual_group_norm_silu_bwd"] > 5


def test_planted_faults_are_found(lowered: Any) -> None:
    found = lowered(PLANT)
    assert len(found["copies"]["forward"]) == 1 == len(found["copies"]["backward"])
    assert found["zeros"] == ["aten.full.default (2, 8, 16, 16) for aten.cat.default"]
