"""What holds for every test: one thread, since on a busy machine OpenMP spins; a fresh seed; exact and repeatable products."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from tests.quick import Quick
from tests.tracing import Tracing

if not torch.cuda.is_available():  # before any test imports triton, whose library is interpreted or compiled for good
    os.environ["TRITON_INTERPRET"] = "1"

# To start a pool of compilers costs more than it saves here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

for name, answer in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    # Started in the background, or by nohup, the tests would find them ignored, and so would the processes that they start.
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), answer)

collect_ignore = ["drills"]  # a step of its own: `make drills-short` names the folder
torch.set_num_threads(1)
FLAGS = [
    *((torch.backends.cudnn, name) for name in ("allow_tf32", "deterministic", "benchmark")),
    *(
        (torch.backends.cuda.matmul, name)
        for name in (
            "allow_tf32",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
        )
    ),
]


@pytest.fixture(autouse=True)
def _fresh_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32, and on a GPU the same algorithm each time, whatever a test before this one asked for: tolerances
    and equal bits are of the code under test, not of cuDNN's choices."""
    from ect import precision  # here, since coverage of a worker of xdist begins after this file is read

    before = [getattr(where, name) for where, name in FLAGS]
    precision.apply(precision.PRECISIONS["fp32"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    for (where, name), value in zip(FLAGS, before, strict=True):
        setattr(where, name, value)


@pytest.fixture(autouse=True)
def _unwritten_is_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty, empty_like and new_empty give NaN: what the code under test forgets to write shows. Not on a GPU, where
    torch would choose other kernels for it."""
    from ect_kernels.check import unwritten_is_nan

    off = torch.cuda.is_available() or request.node.get_closest_marker("unwritten") is not None
    with nullcontext() if off else unwritten_is_nan():
        yield


@pytest.fixture(autouse=True)
def _backends_are_found_anew() -> Iterator[None]:
    """What can run here is found once a process, but tests change it."""
    from ect_kernels import dispatch

    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def pytorch_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes PyTorch's own operations on a CPU, not the kernels in C++, which are written in a language of their own."""
    from ect_kernels import dispatch

    monkeypatch.setitem(dispatch.AUTO, "cpu", ("reference",))
    dispatch.forget()


@pytest.fixture(autouse=True)
def _shared_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's memory is predicted at its start, two thirds of what a small run costs: once for each network of a process."""
    from tests import predictions  # here, for the same reason

    monkeypatch.setattr(predictions.memory, "predict", predictions.shared)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests/gpu_paths: every combination, not only every pair")
    parser.addoption("--quick", action="store_true", help="without the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Quick(config))
    config.pluginmanager.register(Tracing())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = {item for item in items if item.get_closest_marker("full") is not None}
        config.hook.pytest_deselected(items=list(full))
        items[:] = [item for item in items if item not in full]
