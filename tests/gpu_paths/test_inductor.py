"""torch.compile of updates on a GPU that is not there: Dynamo makes one graph of the U-Net for a whole run, and what Inductor
makes of it for an A100 and an H100 copies no layout. In processes of their own (inductor.py)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from tests.gpu_paths.cases import allowed
from tests.gpu_paths.pairwise import Case, name, product
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
AXES: dict[str, list[Any]] = {
    "arch": ["ddpmpp", "ncsnpp", "adm", "edm2-narrow"],
    "objective": ["consistency", "diffusion"],
    "precision": ["fp16", "fp32", "bf16"],
    "labels": [False, True],
    "augment": [False, True],
}
SHORT: list[Case] = [
    {"arch": "ddpmpp", "objective": "consistency", "precision": "fp16"},
    {"arch": "ncsnpp", "objective": "diffusion", "precision": "bf16"},
    {"arch": "ncsnpp", "objective": "diffusion", "precision": "bf16", "augment": True},
    {"arch": "adm", "objective": "consistency", "precision": "fp32", "labels": True},
    {"arch": "edm2-narrow", "objective": "consistency", "precision": "fp16", "labels": True},
]
GATE = {name(case): case for case in SHORT}
FULL = {name(case): case for case in product(AXES, allowed) if name(case) not in GATE}


@pytest.fixture(scope="session")
def found(pytestconfig: pytest.Config) -> Iterator[Any]:
    """found(name): what inductor.py found. A process has many cases, which share what it imports; they start with the first
    call, two at a time."""
    groups: list[dict[str, Case]] = [{**GATE, "plant": {"plant": True}}]
    if pytestconfig.getoption("--full"):
        groups += [{name: case for name, case in FULL.items() if case["arch"] == arch} for arch in AXES["arch"]]
    with ThreadPoolExecutor(2) as pool:

        @cache
        def started() -> dict[str, Future[dict[str, Any]]]:
            answers = [pool.submit(ask, "inductor", {"gpus": GPUS, "cases": group}) for group in groups]
            return {name: answer for group, answer in zip(groups, answers, strict=True) for name in group}

        yield lambda name: started()[name].result()[name]


def cases() -> Any:
    """Decorates a test of a case."""
    rest = [pytest.param(name, id=f"full: {name}", marks=pytest.mark.full) for name in FULL]
    return pytest.mark.parametrize("name", [*GATE, *rest])


@cases()
def test_all_micro_batches_run_one_graph(name: str, found: Any) -> None:
    """It traces without a graph break, and once for a whole run."""
    assert found(name)["graphs"] == 1
    assert found(name)["on ops"] or "edm2" in name, "the network did not run on the ops"


@cases()
def test_the_backward_fills_no_images_with_zeros(name: str, found: Any) -> None:
    assert found(name)["zeros"] == []


@cases()
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_layout_is_copied_round_a_convolution(name: str, arch: str, found: Any) -> None:
    lowered = found(name)[arch]
    assert lowered["copies"] == {"forward": [], "backward": []}
    runs = lowered["runs"]
    assert runs["forward"]["convolution"] > 20 and runs["backward"]["convolution_backward"] > 20
    if "edm2" in name:  # its norms have no ops of ours
        assert not {"group_norm_silu", "residual_group_norm_silu_bwd"} & {*runs["forward"], *runs["backward"]}
    else:
        assert runs["forward"]["group_norm_silu"] > 5 and runs["backward"]["residual_group_norm_silu_bwd"] > 5


def test_planted_faults_are_found(found: Any) -> None:
    planted = found("plant")
    for arch in ("sm_80", "sm_90"):
        assert {way: len(copies) for way, copies in planted[arch]["copies"].items()} == {"forward": 1, "backward": 1}
    assert planted["zeros"] == ["aten.full.default (2, 8, 16, 16) for aten.cat.default"]
