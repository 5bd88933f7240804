"""The op philox: every backend's draws are those of the reference, uniform ones to the bit."""

from __future__ import annotations

import functools

import pytest
import torch
from ect_kernels import philox
from ect_kernels.philox import OP, normal, uniform
from ect_kernels.philox import _forward_op as forward_op

from tests.kernels.conftest import load_emulated

torch.set_num_threads(1)
TARGETS = [
    ("triton", "cpu"),
    ("emulated", "cpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
]
SHAPES = [(128, 1), (3, 4), (5, 7), (2, 1030), (1, 2), (0, 3), (4, 0)]  # samples, draws of each
KEYS = [(0, 0), (-(2**40) - 7, 3), (2**62 + 11, 2**34 + 1)]  # seed, n0


@functools.lru_cache(None)
def _load() -> None:
    load_emulated("philox")


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
@pytest.mark.parametrize(("seed", "n0"), KEYS)
def test_draws_are_the_references(backend: str, device: str, seed: int, n0: int) -> None:
    where, cpu = need(backend, device), torch.device("cpu")
    for shape in SHAPES:
        for stream in (0, philox.STREAM_T):
            got = uniform(torch.tensor(seed, device=where), stream, n0, *shape, where, backend)
            assert got.shape == shape and torch.equal(got.cpu(), uniform(seed, stream, n0, *shape, cpu, "reference"))
            got = normal(torch.tensor(seed, device=where), stream, n0, *shape, where, backend)
            want = normal(seed, stream, n0, *shape, cpu, "reference")
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=2e-6)


def test_reference_is_box_muller_of_the_uniform_draws() -> None:
    u = uniform(9, 5, 2, 3, 8, torch.device("cpu")).double().view(3, 4, 2)
    radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * torch.pi * u[..., 1]
    want = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).view(3, 8)
    torch.testing.assert_close(normal(9, 5, 2, 3, 8, torch.device("cpu")).double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gaussian", [False, True])
def test_opcheck(gaussian: bool) -> None:
    torch.library.opcheck(forward_op, (torch.tensor(5), philox.STREAM_T, 3, 4, 6, gaussian, "reference"))


def test_compiles_without_a_graph_break() -> None:
    draw = functools.partial(normal, stream=3, n0=2, batch=4, per_sample=5, device=torch.device("cpu"))
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(7)), draw(torch.tensor(7)))


def test_too_many_calls_are_refused() -> None:
    assert OP.backends["cuda"].limits(philox.Inputs(torch.tensor(0), 0, 0, 2**31, 4, False))
