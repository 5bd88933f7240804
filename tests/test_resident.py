"""ImageStream: the shuffle as documented, resident and streamed alike, nothing read on the host inside a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ect.config import DataConfig
from ect.data import Dataset, ImageStream, load, to_float
from ect.data.resident import Order

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
        assert torch.equal(labels, SMALL.labels[numbers][1:])  # type: ignore[index]
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
def test_batches_keep_their_place_in_memory(resident: bool) -> None:
    stream = ImageStream(SMALL, 7, batch=4, resident=resident)
    stream.seek(0)
    tensors = [stream.images, stream.labels] + ([stream.index] if resident else [])
    addresses = [t.data_ptr() for t in tensors if t is not None]
    for i in range(1, 8):
        stream.seek(4 * i)
    tensors = [stream.images, stream.labels] + ([stream.index] if resident else [])
    assert [t.data_ptr() for t in tensors if t is not None] == addresses
    stream.close()


def test_a_streamed_batch_is_gathered_ahead_and_its_errors_surface(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ImageStream(SMALL, 7, batch=4, resident=False)
    calls, gather = [], stream._gather

    def spy(nimg: int) -> list[torch.Tensor]:
        calls.append(nimg)
        if nimg == 8:
            raise OSError("disk gone")
        return gather(nimg)

    monkeypatch.setattr(stream, "_gather", spy)
    stream.seek(0)
    stream.seek(4)  # was gathered meanwhile
    assert calls[:2] == [0, 4]
    with pytest.raises(OSError, match="disk gone"):
        stream.seek(8)
    stream.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        stream.seek(12)


def test_the_choice_is_by_size_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from ect.data import resident

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    gpu = torch.device("cuda")
    assert resident._choose(250, gpu, None)[0] and not resident._choose(251, gpu, None)[0]
    assert "streamed to cuda" in resident._choose(251, gpu, None)[1]
    assert resident._choose(10**12, torch.device("cpu"), None) == (True, "images on cpu")
    assert resident._choose(1, gpu, False) == (False, "images streamed to cuda")


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
