"""torch.compile of the network on a GPU that is not there: it traces, without a graph break, and once for a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from tests.gpu_paths import cases
from tests.gpu_paths.fake_gpu import GPUS, FakeGpu
from tests.gpu_paths.pairwise import Case, name, product

pytestmark = pytest.mark.slow

AXES: dict[str, list[Any]] = {
    "arch": ["ddpmpp", "ncsnpp", "adm"],
    "objective": ["consistency", "diffusion"],
    "precision": ["fp16", "fp32", "bf16"],
    "labels": [False, True],
    "augment": [False, True],
}
SHORT: list[Case] = [
    {"arch": "ddpmpp", "objective": "consistency", "precision": "fp16"},
    {"arch": "ncsnpp", "objective": "diffusion", "precision": "bf16", "augment": True},
    {"arch": "adm", "objective": "consistency", "precision": "fp32", "labels": True},
]
FULL = [pytest.param(case, id=f"full: {name(case)}", marks=pytest.mark.full) for case in product(AXES)]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [*[pytest.param(case, id=name(case)) for case in SHORT], *FULL])
def test_all_micro_batches_run_one_graph(case: Case) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with FakeGpu(GPUS["H100"], archs=cases.BUILT) as gpu:
        step = cases.step(**case, accumulation=True)
        step.compiled = True
        step.net.model.compile(fullgraph=True, dynamic=False, backend=backend)
        with closing(step.stream), gpu.for_compiler():
            assert len(step.starts) == 2
            step.update()
            step.update()
    assert len(graphs) == 1
    parts = [part for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule)]
    ops = {str(node.target) for part in parts for node in part.graph.nodes}
    assert any(op.startswith("ect.") for op in ops), "the network did not run on the ops"
