"""ImageStream: the shuffle as documented, resident and streamed alike, nothing read on the host inside a step."""

from __future__ import annotations

import threading
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch

from ect.config import DataConfig
from ect.data import Dataset, ImageStream, load, to_float
from ect.data.stream import Order
from tests.audit import Audit

DATA = load(DataConfig(labels=True))
SMALL = Dataset("small", DATA.images[:10], DATA.labels[:10])  # type: ignore[index]


def want(dataset: Dataset, seed: int, first: int, n: int) -> list[int]:
    """The documented order, one sample at a time."""
    length, numbers = len(dataset.images), []
    for i in range(first, first + n):
        keys = np.random.PCG64([seed, i // length]).random_raw(length)
        numbers.append(int(np.argsort(keys, kind="stable")[i % length]))
    return numbers


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("batch", [4, 10, 25])
def test_samples_follow_the_documented_shuffle(resident: bool, batch: int) -> None:
    stream = ImageStream(SMALL, 7, batch=batch, resident=resident)
    for nimg in (0, batch, 2 * batch, 5 * batch, batch):  # in order, ahead, and back
        stream.seek(nimg)
        numbers = want(SMALL, 7, nimg, batch)
        images, labels = stream.batch(1, batch - 1)
        assert torch.equal(images, SMALL.images[numbers][1:])
        assert torch.equal(labels, SMALL.labels[numbers][1:])  # type: ignore[index, arg-type]
    stream.close()


def test_every_epoch_shows_each_image_once_in_another_order() -> None:
    stream = ImageStream(replace(DATA, labels=None), 1)
    orders = [stream.order.epoch(i).clone() for i in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(len(DATA.images)))
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[0], ImageStream(DATA, 2).order.epoch(0))
    stream.seek(0)
    assert stream.batch(0, 3)[1] is None


@pytest.mark.parametrize("resident", [True, False])
def test_a_run_resumes_anywhere(resident: bool) -> None:
    def serve(first: int, steps: int) -> list[torch.Tensor]:
        stream, batches = ImageStream(SMALL, 3, batch=4, resident=resident), []
        for i in range(steps):
            stream.seek(first + 4 * i)
            batches.append(stream.batch(0, 4)[0].clone())
        stream.close()
        return batches

    whole = serve(0, 12)  # nearly five epochs
    for step in (1, 5, 11):
        assert all(torch.equal(a, b) for a, b in zip(serve(4 * step, 12 - step), whole[step:], strict=True))


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_a_batch_is_made_of_what_stays_in_place(resident: bool, labels: bool) -> None:
    """No host read, no copy from the host, the same memory and operations at every step: a captured graph sees each seek."""
    stream = ImageStream(SMALL if labels else replace(SMALL, labels=None), 7, batch=25, resident=resident)
    audits = []
    for nimg in (0, 25, 50, 75, 7):
        stream.seek(nimg)
        audit = Audit()
        images, given = audit.run(lambda: stream.batch(5, 20))
        assert audit.faults == [] and (given is not None) == labels
        assert torch.equal(images, SMALL.images[want(SMALL, 7, nimg, 25)[5:]])
        audits.append(audit)
    assert audits[0].outside and len(audits[0].calls) == (1 if resident else 0) + 1 + labels
    assert all(a.outside == audits[0].outside and a.calls == audits[0].calls for a in audits)
    stream.close()


@pytest.mark.parametrize("resident", [True, False])
def test_every_step_is_prepared_by_the_thread_a_step_ahead(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ImageStream(SMALL, 7, batch=4, resident=resident)
    epochs, epoch, done = [], stream.order.epoch, {i: threading.Event() for i in range(3)}

    def spy(number: int) -> torch.Tensor:
        epochs.append((number, threading.current_thread() is threading.main_thread()))
        permutation = epoch(number)
        done[number].set()
        return permutation

    monkeypatch.setattr(stream.order, "epoch", spy)
    stream.seek(0)
    stream.seek(4)  # the last before the epoch of 10 images rolls over
    assert done[1].wait(20)
    assert not done[2].is_set() and not any(on_main for _, on_main in epochs)
    stream.close()


@pytest.mark.parametrize("resident", [True, False])
def test_an_error_of_the_thread_surfaces_with_its_traceback(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ImageStream(SMALL, 7, batch=4, resident=resident)
    gather, failures = stream.order.indices, ["disk gone"]

    def unplugged(first: int, n: int) -> torch.Tensor:
        if first == 8 and failures:
            raise OSError(failures.pop())
        return gather(first, n)

    monkeypatch.setattr(stream.order, "indices", unplugged)
    stream.seek(0)
    stream.seek(4)
    with pytest.raises(OSError, match="disk gone") as caught:
        stream.seek(8)
    assert "unplugged" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert torch.equal(stream.batch(0, 4)[0], SMALL.images[want(SMALL, 7, 4, 4)])  # as it was
    stream.seek(8)  # once the cause is gone
    assert torch.equal(stream.batch(0, 4)[0], SMALL.images[want(SMALL, 7, 8, 4)])
    stream.close()


@pytest.mark.parametrize("resident", [True, False])
def test_close_ends_the_thread(resident: bool) -> None:
    before = set(threading.enumerate())
    stream = ImageStream(SMALL, 7, batch=4, resident=resident)
    stream.seek(0)
    assert len(set(threading.enumerate()) - before) == 1
    stream.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(RuntimeError, match="shutdown"):
        stream.seek(4)


def test_buffers_are_filled_only_once_copied_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, by its events; here with the order of events written down."""
    log: list[tuple[str, int]] = []

    class Event:
        def __init__(self, slot: int) -> None:
            self.slot = slot

        def record(self, on: object) -> None:
            log.append(("copy", self.slot))

        def synchronize(self) -> None:
            log.append(("wait", self.slot))

    stream = ImageStream(SMALL, 7, batch=4, resident=False)
    fill = stream._gather

    def spy(nimg: int, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        log.append(("fill", int(buffers is stream._host[1])))
        return fill(nimg, buffers)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(stream, "_gather", spy)
    monkeypatch.setattr(stream, "_copied", [Event(0), Event(1)])
    for nimg in (0, 4, 8):
        stream.seek(nimg)
    stream._ahead[1].result()  # type: ignore[index]  # before its thread is stopped
    stream.close()
    events = ["wait", "fill", "copy"] * 2
    assert [event for event, slot in log if slot == 0] == events
    assert [event for event, slot in log if slot == 1] == events[:-1]  # its second batch was not asked for


@pytest.mark.gpu(twin="tests/test_stream.py::test_a_batch_is_made_of_what_stays_in_place")
@pytest.mark.parametrize("resident", [True, False])
def test_a_captured_graph_sees_every_seek(resident: bool) -> None:
    stream, graph = ImageStream(DATA, 7, "cuda", 64, resident), torch.cuda.CUDAGraph()
    stream.seek(0)
    with torch.cuda.graph(graph):  # while the thread prepares the next batch
        images, labels = (t.clone() for t in stream.batch(3, 61))  # type: ignore[union-attr]
    served = []
    for i in range(100):  # far ahead of the device
        stream.seek(64 * i)
        graph.replay()
        served.append((images.clone(), labels.clone()))
    for i, batch in enumerate(served):
        numbers = want(DATA, 7, 64 * i, 64)[3:]
        assert torch.equal(batch[0].cpu(), DATA.images[numbers])
        assert torch.equal(batch[1].cpu(), DATA.labels[numbers])  # type: ignore[index]
    stream.close()


def test_the_choice_is_by_size_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from ect.data.stream import _choose

    free, gpu = 40 * 10**9, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert _choose(free // 4, gpu, None) == (
        True, "images resident on cuda: 10,000.0 MB, at most 25% of the 40.0 GB free"
    )  # fmt: skip
    assert _choose(free // 4 + 1, gpu, None) == (
        False, "images streamed to cuda: 10,000.0 MB, more than 25% of the 40.0 GB free"
    )  # fmt: skip
    assert _choose(10**6, gpu, False) == (False, "images streamed to cuda: 1.0 MB, as asked")
    assert _choose(free, gpu, True)[0]
    stream = ImageStream(SMALL, 0)
    assert stream.resident and stream.note == "images resident on cpu: 0.0 MB, its memory holds them already"


@pytest.mark.parametrize(("n0", "n"), [(-1, 2), (0, 0), (3, 2), (0, 5)])
@pytest.mark.parametrize("resident", [True, False])
def test_samples_outside_the_batch_are_refused(resident: bool, n0: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"n0 \+ n <= 4"):
        ImageStream(SMALL, 0, batch=4, resident=resident).batch(n0, n)


@pytest.mark.parametrize(("first", "n"), [(-1, 3), (0, 0)])
def test_impossible_ranges_are_refused(first: int, n: int) -> None:
    with pytest.raises(ValueError, match="first >= 0"):
        ImageStream(SMALL, 0).order.indices(first, n)


def test_pixels_span_minus_one_to_one_and_flips_mirror() -> None:
    images = torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8).view(1, 2, 2, 1).repeat(2, 1, 1, 1)
    x = to_float(images, torch.tensor([False, True]))
    torch.testing.assert_close(x[0, 0], torch.tensor([[-1.0, 1.0], [-0.6, 0.6]]))
    assert torch.equal(x[1, 0], x[0, 0].flip(1))


def test_order_is_pinned() -> None:
    """Another order would make old runs resume on other data."""
    numbers = Order(23, seed=0).indices(0, 8)
    assert numbers.tolist() == [11, 3, 20, 13, 2, 21, 15, 1]


def test_all_256_values_survive_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    x = to_float(values)
    assert x.dtype == torch.float32 and x.shape == (1, 1, 16, 16)
    assert (x.min().item(), x.max().item()) == (-1, 1)
    exact = values.double().permute(0, 3, 1, 2) / 127.5 - 1
    assert (x - exact).abs().max() <= 2**-23
    back = (127.5 * x + 128).clamp(0, 255).floor().to(torch.uint8)
    assert torch.equal(back.permute(0, 2, 3, 1), values)
