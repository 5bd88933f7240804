"""The CPU kernels on several threads: the same bits as on one, in every instruction set; and in a process that was forked."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from ect_kernels import cpu, dispatch
from ect_kernels.calls import Call, default_calls
from torch import Tensor

CPU = torch.device("cpu")


@lru_cache(None)
def calls() -> list[Call]:
    """Those of the presets' networks that have a native form and are work for several threads."""
    dispatch.forget()
    return [call for call in default_calls() if "native" in dispatch.OPS[call.op].backends]


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All ops use the library of this one."""
    forget = (cpu.library, cpu._launcher)
    if not cpu.library_path(request.param).is_file():
        pytest.skip(f"no library for {request.param}")
    monkeypatch.setattr(cpu, "instruction_sets", lambda: [request.param])
    for function in forget:
        function.cache_clear()
    yield request.param
    for function in forget:
        function.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on(threads: int, call: Call, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return call.run(inputs, "native")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)) for name in a)


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_threads(instruction_set: str, threads: None) -> None:
    seen = set()
    for call in calls():
        large = [
            value for _, value in call.arguments if getattr(value, "dtype", None) in (torch.float32, torch.bfloat16)
        ]
        if not large or call.function in seen:
            continue
        seen.add(call.function)
        inputs = call.inputs(CPU)
        one, again, three = on(1, call, inputs), on(1, call, inputs), on(3, call, inputs)
        assert equal(one, again) and equal(one, three), call
    assert {call.function for call in calls()} - seen <= {"levels"}


def _norm(pipe: Any) -> None:
    torch.set_num_threads(1)  # torch's own threads do not outlive a fork
    torch.get_num_threads = lambda: 2
    call = calls()[0]
    pipe.send({name: t.numpy() for name, t in call.run(call.inputs(CPU), "native").items()})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
def test_a_forked_process_computes_the_same(threads: None) -> None:
    """Nothing that a thread held is left behind: there is none between two calls."""
    if cpu.why_not_built() is not None:
        pytest.skip(str(cpu.why_not_built()))
    call = calls()[0]
    want = on(2, call, call.inputs(CPU))
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_norm, args=(theirs,), daemon=True)
    child.start()
    assert ours.poll(30)
    got = ours.recv()
    child.join(30)
    assert child.exitcode == 0 and equal({name: torch.from_numpy(a) for name, a in got.items()}, want)
