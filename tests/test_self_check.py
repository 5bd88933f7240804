"""The self-check leaves no trace where all is well, and where not, a step without what failed, and a line that says so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ect_kernels import check, dispatch
from torch import Tensor, nn

from ect.errors import UserError
from ect.options import parse
from ect.ranks import self_check
from ect.ranks.distributed import World
from ect.step import WARM_UP, TrainStep
from tests.fake_graphs import Graphs, install
from tests.planted import NAME, plant
from tests.test_step import make

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"batch": 4, "net": {"dropout": 0.2}}


@pytest.fixture(autouse=True)
def _nothing_refused() -> Iterator[None]:
    yield
    dispatch.clear_refused()
    dispatch.set_choice(None)


def compile_as(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let nn.Module.compile make a network that changes what the plain one computes."""

    def compile(self: nn.Module, **options: Any) -> None:
        self._compiled_call_impl = lambda *args: change(self._call_impl(*args))

    patch.setattr(nn.Module, "compile", compile)


def state(step: TrainStep) -> list[Tensor]:
    return [tensor.clone() for tensor in [*step.tensors(), torch.get_rng_state()]]


# --- where all is well ---


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_is_left_of_it_but_the_graph(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as(monkeypatch, lambda x: x)
    step, plain = (make(**SMALL, precision=precision, xflip=True) for _ in range(2))
    step.use(True, True)
    graphs = install(monkeypatch, step)
    before = state(step)
    lines = self_check.run(step, [], 8, 3)
    assert all(torch.equal(a, b) for a, b in zip(state(step), before, strict=True))
    assert step.compiled and step.wants_graph and step.graphs == graphs.made and len(graphs.made) == 1
    assert lines[1].startswith("self-check: the compiled step agrees with the plain one: losses within ")
    assert lines[2] == "self-check: the replayed step equals the launched one bit for bit"
    for nimg in (8, 12):  # the data too: the order and the place in it
        assert torch.equal(step(nimg, 3), plain(nimg, 3))
    assert torch.equal(step.state.params, plain.state.params) and len(graphs.made) == 1


def test_a_step_that_is_neither_compiled_nor_captured_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(**SMALL)
    monkeypatch.setattr(step, "update", pytest.fail)
    assert self_check.run(step, [], 0, 0) == ["self-check: no op but references to check (0.0 s)"]


def test_it_is_on_where_there_is_a_gpu() -> None:
    devices = (CPU, torch.device("cuda"))
    assert [self_check.wanted(choice, d) for choice in (None, True, False) for d in devices] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    assert parse(["--total-kimg", "1"]).self_check is None


# --- the compiled step ---


def _fail(x: Tensor) -> Tensor:
    raise NotImplementedError("an operator that the compiler lacks\nand a trace")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_fail, "NotImplementedError: an operator that the compiler lacks ("),
        (lambda x: x * 30, "loss: "),
        (lambda x: x * 1.1, "gradients: "),
        (lambda x: x * torch.nan, "loss: nan for "),
    ],
)  # fmt: skip
def test_a_network_that_compiles_wrongly_runs_plain(
    change: Callable[[Tensor], Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_as(monkeypatch, change)
    step, plain = make(**SMALL), make(**SMALL)
    step.use(True, True)
    install(monkeypatch, step)
    line = self_check.run(step, [], 0, 3)[1]
    assert line.startswith(f"self-check: compile failed and is off: {said}")
    assert not step.compiled and step.wants_graph and len(step.graphs) == 1
    assert torch.equal(step(0, 3), plain(0, 3)) and torch.equal(step.state.params, plain.state.params)


# --- the captured step ---


def _full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def _invalid() -> None:
    raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nCUDA kernel errors")


def _doubled(step: TrainStep) -> None:
    step.mean_loss.mul_(2)


def _one_parameter(step: TrainStep) -> None:
    step.state.params[3] += 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"fail": _full}, "OutOfMemoryError: CUDA out of memory. Tried to allocate"),
        ({"fail": _invalid}, "RuntimeError: CUDA error: operation failed due to a previous error during capture"),
        ({"replayed": _doubled}, "loss: "),
        ({"replayed": _one_parameter}, "other bits than those of the launched step, which repeats its own"),
    ],
)  # fmt: skip
def test_a_graph_that_fails_is_off(faults: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, plain = make(**SMALL), make(**SMALL)
    step.use(False, True)
    graphs = install(monkeypatch, step, **faults)
    before = state(step)
    line = self_check.run(step, [], 0, 3)[1]
    assert line.startswith(f"self-check: graph failed and is off: {said}")
    assert all(torch.equal(a, b) for a, b in zip(state(step), before, strict=True))
    assert not step.wants_graph and step.graphs == [] and graphs.streams == ["first"]
    assert torch.equal(step(0, 3), plain(0, 3)) and torch.equal(step.state.params, plain.state.params)


@pytest.mark.slow
def test_bits_are_not_asked_of_a_step_that_has_none_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = make(**SMALL), [0]
    step.use(False, True)
    install(monkeypatch, step)
    update = step.update

    def shaky() -> None:
        count[0] += 1
        update()
        step.state.grads.mul_(1 + 1e-6 * count[0])

    monkeypatch.setattr(step, "update", shaky)
    line = self_check.run(step, [], 0, 3)[1]
    assert (
        line == "self-check: the replayed step agrees with the launched one, which does not repeat itself bit for bit"
    )
    assert step.wants_graph and len(step.graphs) == 1


@pytest.mark.slow
def test_a_graph_is_kept_where_no_second_update_fits_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its private memory stays taken, as long as there is a graph."""
    step, count = make(**SMALL), [0]
    step.use(False, True)
    graphs = install(monkeypatch, step)
    update = step.update

    def shaky() -> None:
        if graphs.made and not step.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")
        count[0] += 1
        update()
        step.state.grads.mul_(1 + 1e-6 * count[0])

    monkeypatch.setattr(step, "update", shaky)
    assert "does not repeat itself bit for bit" in self_check.run(step, [], 0, 3)[1]
    assert step.wants_graph and len(step.graphs) == 1


def test_a_step_that_does_not_fit_is_refused_with_the_option_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(**SMALL)
    step.use(False, True)
    monkeypatch.setattr(step, "update", _full)
    with pytest.raises(UserError, match=r"--batch-per-device 4: .* does not fit into the memory of cpu; try .* auto"):
        self_check.run(step, [], 0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fail", [_full, _invalid])
def test_without_a_check_a_failing_capture_warns_and_trains(
    fail: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, plain = make(**SMALL), make(**SMALL)
    step.use(False, True)
    graphs = install(monkeypatch, step, fail=fail)
    with pytest.warns(UserWarning, match=r"cannot be captured into a CUDA graph, and runs without: \w+Error: CUDA"):
        loss = step(0, 3)
    assert torch.equal(loss, plain(0, 3)) and torch.equal(step(4, 3), plain(4, 3))
    assert torch.equal(step.state.params, plain.state.params)
    assert graphs.emptied == 1 and graphs.streams == ["first"] and not step.wants_graph


@pytest.mark.slow
def test_a_broken_capture_names_its_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = make(**SMALL), [0]
    step.use(False, True)
    install(monkeypatch, step, fail=_invalid)
    update = step.update

    def broken() -> None:
        count[0] += 1
        update()
        if count[0] > WARM_UP:
            raise NotImplementedError("not in a capture")

    monkeypatch.setattr(step, "update", broken)
    assert step.capture() == "NotImplementedError: not in a capture"


@pytest.mark.slow
def test_a_replay_that_raises_is_no_end_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(**SMALL)
    step.use(False, True)
    install(monkeypatch, step, replayed=lambda step: _invalid())
    line = self_check.run(step, [], 0, 3)[1]
    assert line.startswith("self-check: graph failed and is off: RuntimeError: CUDA error") and not step.graphs


@pytest.mark.slow
def test_a_warm_up_that_fails_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(**SMALL)
    step.use(False, True)
    install(monkeypatch, step)
    update, before = step.update, state(step)

    def broken() -> None:
        update()
        _full()

    monkeypatch.setattr(step, "update", broken)
    assert step.capture() == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert all(torch.equal(a, b) for a, b in zip(state(step), before, strict=True))


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    steps = self_check._Steps(make(**SMALL), 0, 0)
    for steps.device in (CPU, torch.device("cuda")):
        with steps._bounded("the replayed step", "--no-graph", 0.05):
            time.sleep(0.5)
    assert ended == [check.HUNG]
    said = "error: the replayed step did not return within 0.05 s; start again with --no-graph\n"
    assert capsys.readouterr().err == said


# --- several ranks ---


class Pair(World):
    """Rank 0 of two, which hears what the other one says and does not wait for it."""

    other: list[Any] = []  # noqa: RUF012  of a frozen dataclass that a test fills

    def sum_(self, tensor: Tensor) -> None:
        self.other.append("sum")
        tensor.mul_(2)

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, part: Tensor) -> list[Tensor]:
        theirs = part.clone()
        names = [(op.name, backend) for op in dispatch.OPS.values() for backend in op.backends]
        for pair in self.other:
            if pair in names:
                theirs[names.index(pair)] = 1
        return [part, theirs]


@pytest.mark.slow
def test_several_ranks_sum_between_two_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "other", [])
    step, plain = (make(**SMALL, world=Pair(0, 2)) for _ in range(2))
    step.use(False, True)
    graphs: Graphs = install(monkeypatch, step)
    lines = self_check.run(step, [], 0, 3)
    assert Pair.other == []  # the check waits for no one
    equal = "self-check: the replayed step equals the launched one bit for bit"
    assert lines[1] == f"{equal}; the sum over ranks is between two graphs"
    assert len(graphs.made) == 2 and graphs.made[1].pool_of is graphs.made[0]
    loss = step(0, 3)
    assert Pair.other == ["sum"]
    assert torch.equal(loss, plain(0, 3)) and torch.equal(step.state.params, plain.state.params)


def test_ranks_take_the_weakest_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "levels")
    monkeypatch.setattr(Pair, "other", [("levels", NAME)])
    lines = self_check.run(make(**SMALL, world=Pair(0, 2)), [], 0, 3)
    assert lines[0] == f"self-check: levels: {NAME} failed and is not used: it failed on rank 1"
    assert dispatch.OPS["levels"].candidates(CPU) == ["reference"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compile", "graph"])
def test_a_rank_gives_up_what_another_one_must(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_as(monkeypatch, lambda x: x)
    step, answers = make(**SMALL, world=Pair(0, 2)), iter([False, what == "compile", what == "graph"])
    monkeypatch.setattr(Pair, "any", lambda self, flag: next(answers))
    step.use(True, True)
    install(monkeypatch, step)
    lines = self_check.run(step, [], 0, 3)
    assert any(line.startswith(f"self-check: {what} failed and is off: it failed on another rank") for line in lines)
    assert (step.compiled, step.wants_graph) == (what != "compile", what != "graph")
