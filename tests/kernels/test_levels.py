"""levels: every backend against the draws of ect_kernels.philox and the mapping of ect.objective in fp64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ect_kernels import philox
from ect_kernels.levels import OP, _forward_op, levels

from ect.objective import Mapping
from tests.kernels import conftest

torch.set_num_threads(1)
TARGETS = [
    ("reference", "cpu"),
    ("native", "cpu"),
    ("triton", "cpu"),
    ("emulated", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]
KEYS = [(0, 0), (-(2**40) - 7, 3), (2**62 + 11, 2**34 + 1)]  # seed, n0
MAPPINGS = [Mapping(), Mapping("const", q=256.0), Mapping(q=1.5, k=2.0, b=0.5)]


need = functools.partial(conftest.need, OP)


def arguments(device: torch.device, seed: int = 5, stage: int = 1, **changes: Any) -> dict[str, Any]:
    scalars = {"seed": torch.tensor(seed, device=device), "stage": torch.tensor(stage, device=device)}
    return {**scalars, "n0": 3, "batch": 300, "P_mean": -1.1, "P_std": 2.0, "q": 2.0, "k": 8.0, "b": 1.0, **changes}


@pytest.mark.parametrize(("backend", "device"), TARGETS)
@pytest.mark.parametrize("stage", [0, 1, 7])
@pytest.mark.parametrize("mapping", MAPPINGS, ids=str)
def test_is_the_objectives_mapping_of_philox_draws(backend: str, device: str, stage: int, mapping: Mapping) -> None:
    where = need(backend, device)
    curve = {"q": mapping.q, "k": mapping.k if mapping.kind == "sigmoid" else 0.0, "b": mapping.b}
    for seed, n0 in KEYS:
        out = levels(**arguments(where, seed, stage, n0=n0, **curve), backend=backend)
        u = philox.uniform(seed, philox.STREAM_T, n0, 300, 2, torch.device("cpu")).double()
        t = (-1.1 + 2.0 * (-2 * u[:, 0].log()).sqrt() * (2 * torch.pi * u[:, 1]).cos()).exp()
        got_t, got_r, label_t, label_r = (values.double().cpu() for values in out[:4])
        torch.testing.assert_close(got_t, t, rtol=1e-5, atol=0)
        r = mapping(got_t, stage)  # of the t that was rounded
        # t and r are rounded each: half a unit of t's last place.
        assert ((got_r - r).abs() <= 2e-6 * (got_t - r) + 2**-22 * got_t).all()
        assert torch.equal(got_r > 0, r > 0)
        torch.testing.assert_close(label_t, got_t.log() / 4, rtol=1e-6, atol=1e-6)
        positive = torch.where(got_r > 0, got_r, torch.ones_like(r))
        torch.testing.assert_close(label_r, positive.log() / 4, rtol=1e-6, atol=1e-6)
        flip = philox.uniform(seed, philox.STREAM_FLIP, n0, 300, 1, torch.device("cpu")).view(-1) < 0.5
        assert out.flip.dtype == torch.bool and torch.equal(out.flip.cpu(), flip)


@pytest.mark.parametrize(("backend", "device"), TARGETS)
def test_draws_follow_the_global_index(backend: str, device: str) -> None:
    where = need(backend, device)
    whole, part = (levels(**arguments(where, n0=n0, batch=n), backend=backend) for n0, n in ((3, 300), (203, 1)))
    assert all(torch.equal(w[200:201], p) for w, p in zip(whole, part, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": 1.0}, "q is 1.0, expected"),
        ({"q": float("nan")}, "q is nan"),
        ({"batch": 0}, "batch is 0"),
        ({"stage": torch.tensor(0.0)}, "stage is torch.float32"),
        ({"stage": torch.zeros((), dtype=torch.int64, device="meta")}, "on meta, expected a 0-d int64 tensor on cpu"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is torch.int64 \\(2,\\)"),
    ],
)
@pytest.mark.parametrize(("backend", "device"), TARGETS[:3])
def test_bad_arguments_are_refused(backend: str, device: str, changes: dict[str, Any], message: str) -> None:
    given = arguments(need(backend, device)) | changes
    with pytest.raises(ValueError, match=message):
        levels(**given, backend=backend)


def test_opcheck() -> None:
    scalars = torch.tensor(5), torch.tensor(1), torch.tensor(3)
    for backend in ("reference", "native"):
        torch.library.opcheck(_forward_op, (*scalars, 5, -1.1, 2.0, 2.0, 8.0, 1.0, backend))
