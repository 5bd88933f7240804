"""The CPU kernels of the norm ops in every instruction set that was built: fp64 truth, equal bits on any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from ect_kernels import build_record, cpu
from ect_kernels.group_norm_silu import group_norm_silu
from ect_kernels.residual_group_norm_silu import residual_group_norm_silu
from ect_kernels.testing.truth import Case, check, run
from torch import Tensor

from tests.kernels import test_group_norm_silu as plain
from tests.kernels import test_residual_group_norm_silu as residual

NORMS = [
    "C256 G32 8x8 fp32", "C12 G4 5x5 fp32 modulated", "C7 G7 3x3 fp32 linear", "mean 1000 chunked linear",
    "v of 300, one element fp16", "C128 G32 16x16 bf16", "zero variance fp32",
]  # fmt: skip
SEAMS = ["256+128, straddling group", "12+3, groups of 3, nothing aligned", "24+24, groups of 6", "one group", "NaN"]
# Where moments about the first value of a channel, in fp32, would be those of that value.
FAR = plain.case("first pixel far from the others", 1, 32, 8, 32, 32, torch.float32, first=100.0)
CALLS = [
    pytest.param(group_norm_silu, FAR, id=FAR.name),
    *(pytest.param(group_norm_silu, case, id=case.name) for case in plain.CASES if case.name in NORMS),
    *(pytest.param(residual_group_norm_silu, case, id=case.name) for case in residual.CASES if case.name in SEAMS),
]


@pytest.fixture(params=cpu.instruction_sets())
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend 'native' is this instruction set's."""
    path = cpu.library_path(request.param)
    if not path.is_file():
        pytest.skip(f"no {path.name}: {build_record.why_not_built(note=build_record.CPU_NOTE)}")
    found = cpu.Library(path)
    assert build_record.why_stale(found, cpu=True) is None
    monkeypatch.setattr(cpu, "_launcher", lru_cache(None)(lambda name: cpu.launcher(found, name)))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("function", "case"), CALLS)
def test_truth(library: None, function: Callable[..., Any], case: Case) -> None:
    assert len(CALLS) == 1 + len(NORMS) + len(SEAMS)
    for row in check(function, "native", case):
        print(f"{case.name:35} {row.tensor:9} error {row.error:.2e} bar {row.bar:.2e}")


@pytest.mark.parametrize(
    ("function", "make", "grads"),
    [
        (group_norm_silu, lambda: plain.inputs(5, 64, 16, 32, 32, torch.float32, v=True, modulated=True, p=0.2), plain.GRADS),
        (residual_group_norm_silu, lambda: residual.inputs(48, 16, 8, 32, 32, n=5)(torch.device("cpu")), residual.GRADS),
    ],
    ids=["group_norm_silu", "residual_group_norm_silu"],
)  # fmt: skip
def test_bits_do_not_depend_on_the_threads(
    library: None, threads: Callable[[int], None], function: Callable[..., Any], make: Callable[[], dict[str, Any]],
    grads: tuple[str, ...],
) -> None:  # fmt: skip
    """Five samples, each large enough for a thread of its own."""
    kwargs = make()
    results: list[dict[str, Tensor]] = []
    for number in (1, 2, 3, 8):
        threads(number)
        results.append(run(lambda **k: function(**k, backend="native"), kwargs, grads))
    assert len(results[0]) >= 7
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)
