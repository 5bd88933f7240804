"""levels: every backend against the mapping of ect.objective in fp64."""

from __future__ import annotations

import functools

import pytest
import torch
from ect_kernels.levels import OP, forward_op, levels

from ect.objective import Mapping
from tests.kernels.conftest import load_emulated

torch.set_num_threads(1)
TARGETS = [
    ("reference", "cpu"),
    ("triton", "cpu"),
    ("emulated", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]


@functools.lru_cache(None)
def _load() -> None:
    load_emulated("levels")


def need(backend: str, device: str) -> torch.device:
    """Skips, with the reason, where the backend cannot run."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "emulated":
        _load()
    reason = OP.why_not(backend, torch.device(device))
    if reason is not None:
        pytest.skip(reason)
    return torch.device(device)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("stage", [0, 1, 7])
@pytest.mark.parametrize("mapping", [Mapping(), Mapping("const", q=256.0), Mapping(q=1.5, k=2.0, b=0.5)], ids=str)
def test_matches_the_objectives_mapping(backend: str, device: str, stage: int, mapping: Mapping) -> None:
    where = need(backend, device)
    z = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(where)
    k = mapping.k if mapping.kind == "sigmoid" else 0.0
    out = levels(z, torch.tensor(stage, device=where), -1.1, 2.0, mapping.q, k, mapping.b, backend)
    t = (-1.1 + 2.0 * z.double()).exp()
    r = mapping(t, stage)
    label_r = torch.where(r > 0, r, torch.ones_like(r)).log() / 4
    torch.testing.assert_close(out.t.double(), t, rtol=1e-6, atol=0)
    gap = (out.t.double() - out.r.double()) * (
        t / out.t.double()
    )  # t and r are rounded each: half a unit of t's last place
    assert ((gap - (t - r)).abs() <= 2e-6 * (t - r) + 2**-22 * t).all()
    torch.testing.assert_close(out.label_t.double(), t.log() / 4, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.r > 0, r > 0)
    torch.testing.assert_close(out.label_r.double(), label_r, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_no_samples(backend: str, device: str) -> None:
    where = need(backend, device)
    out = levels(torch.empty(0, device=where), torch.tensor(0, device=where), -1.1, 2.0, 2.0, 8.0, 1.0, backend)
    assert all(values.shape == (0,) for values in out)


def test_opcheck() -> None:
    torch.library.opcheck(forward_op, (torch.randn(5), torch.tensor(1), -1.1, 2.0, 2.0, 8.0, 1.0, "reference"))
