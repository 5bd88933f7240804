"""Images by their place in an endless shuffle, ready on the device before the step that trains on them.

Sample i is image `permutation(seed, i // N)[i % N]` of the N images: every epoch shows each image once, a resumed run needs
nothing but nimg, and micro-batches or ranks that ask for neighbouring ranges see together what one large batch would.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ect.data.datasets import Dataset

RESIDENT_SHARE = 0.25  # of a GPU's free memory that the images may take; the network needs the rest


class Order:
    """The shuffle: image numbers of any range of samples, int64 on the host. The latest epochs' permutations are kept."""

    def __init__(self, length: int, seed: int, keep: int = 2) -> None:
        self.length, self.seed, self.keep = length, seed % 2**64, keep  # numpy takes no negative seeds
        self._epochs: dict[int, Tensor] = {}

    def epoch(self, number: int) -> Tensor:
        if number not in self._epochs:
            while len(self._epochs) >= self.keep:
                del self._epochs[next(iter(self._epochs))]  # the oldest
            # numpy promises that a bit generator's stream never changes, but no such thing of its permutations.
            keys = np.random.PCG64([self.seed, number]).random_raw(self.length)
            self._epochs[number] = torch.from_numpy(np.argsort(keys, kind="stable"))
        return self._epochs[number]

    def indices(self, first: int, n: int) -> Tensor:
        """Return the image numbers of the samples first .. first + n - 1: int64 [n]."""
        if first < 0 or n < 1:
            raise ValueError(f"expected first >= 0 and n >= 1, found {first} and {n}")
        parts = []
        while n > 0:
            epoch, start = divmod(first, self.length)
            part = self.epoch(epoch)[start : start + n]
            parts.append(part)
            first, n = first + len(part), n - len(part)
        return torch.cat(parts)


class ImageStream:
    """Batches of uint8 images: `seek(nimg)` on the host before a step, `batch(n0, n)` on the device inside it.

    Args: dataset: images and labels. seed: of the shuffle. device: where batches are wanted. batch: samples a step, on all
    ranks together (None: the data set's length). resident: keep all images on the device; else only the batch of a step is
    there. None: resident where the images take at most a quarter of a GPU's free memory, and always on a CPU. `note` says
    what was chosen and why. Both ways serve the same samples.

    Everything that batch() reads has a fixed address on the device, so that a captured CUDA graph sees what seek() wrote.
    A thread prepares the next step's share of that on the host: image numbers if resident, else images and labels.
    """

    def __init__(
        self, dataset: Dataset, seed: int, device: torch.device | str = "cpu", batch: int | None = None,
        resident: bool | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.device = dataset, torch.device(device)
        self.batch_size = len(dataset.images) if batch is None else batch
        self.resident, self.note = _choose(dataset.images.nbytes, self.device, resident)
        epochs = -(-self.batch_size // len(dataset.images)) + 1
        self.order = Order(len(dataset.images), seed, keep=epochs + 1)
        self._sources = [t for t in (dataset.images, dataset.labels) if t is not None]
        if self.resident:
            held = [t.to(self.device) for t in self._sources]
            self.index = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
            self._written = [self.index]
        else:
            held = self._written = [
                t.new_zeros((self.batch_size, *t.shape[1:]), device=self.device) for t in self._sources
            ]
        self.images, self.labels = held[0], held[1] if len(held) > 1 else None
        # Two sets of buffers: the thread fills one while the device may still copy from the other.
        pinned = self.device.type == "cuda"
        self._host = [[torch.empty_like(t, device="cpu", pin_memory=pinned) for t in self._written] for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self._slot = 0
        self._worker = ThreadPoolExecutor(1, "images")
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None

    def seek(self, nimg: int) -> None:
        """Make the samples nimg .. nimg + batch - 1 of the run what batch() serves. Errors of the thread surface here."""
        first, prepared = self._ahead or (-1, None)
        self._ahead = None  # so that a seek after a failed one tries again
        if prepared is None or first != nimg:
            prepared = self._prepare(nimg)
        for tensor, host in zip(self._written, prepared.result(), strict=True):
            tensor.copy_(host, non_blocking=True)
        if self._copied:
            self._copied[self._slot].record(torch.cuda.current_stream(self.device))
        self._slot = 1 - self._slot
        following = nimg + self.batch_size
        self._ahead = following, self._prepare(following)

    def _prepare(self, nimg: int) -> Future[list[Tensor]]:
        """Let the thread fill the free buffers. It makes no CUDA call, which could fall into the capture of a graph."""
        if self._copied:
            self._copied[self._slot].synchronize()  # of two steps ago: the host stays at most two steps ahead
        return self._worker.submit(self._gather, nimg, self._host[self._slot])

    def _gather(self, nimg: int, buffers: list[Tensor]) -> list[Tensor]:
        index = self.order.indices(nimg, self.batch_size)
        if self.resident:
            buffers[0].copy_(index)
        else:
            for source, buffer in zip(self._sources, buffers, strict=True):
                torch.index_select(source, 0, index, out=buffer)
        return buffers

    def batch(self, n0: int, n: int) -> tuple[Tensor, Tensor | None]:
        """Return the samples nimg + n0 .. nimg + n0 + n - 1: images uint8 [n, H, W, C] and labels float32 [n, L] or None.

        Raises ValueError for samples outside the batch.
        """
        if n0 < 0 or n < 1 or n0 + n > self.batch_size:
            raise ValueError(f"expected n0 >= 0, n >= 1 and n0 + n <= {self.batch_size}, found {n0} and {n}")
        which = self.index[n0 : n0 + n] if self.resident else slice(n0, n0 + n)
        return self.images[which], None if self.labels is None else self.labels[which].float()

    def close(self) -> None:
        """Stop the thread and wait for its end; no seek can follow."""
        self._ahead = None
        self._worker.shutdown(cancel_futures=True)


def _choose(size: int, device: torch.device, resident: bool | None) -> tuple[bool, str]:
    """Return whether `size` bytes of images stay on the device, and why."""
    if resident is not None:
        why = "as asked"
    elif device.type != "cuda":
        resident, why = True, "its memory holds them already"
    else:
        free, _ = torch.cuda.mem_get_info(device)
        resident = size <= RESIDENT_SHARE * free
        why = f"{'at most' if resident else 'more than'} {RESIDENT_SHARE:.0%} of the {free / 1e9:.1f} GB free"
    return resident, f"images {'resident on' if resident else 'streamed to'} {device}: {size / 1e6:,.1f} MB, {why}"


def to_float(images: Tensor, flip: Tensor | None = None) -> Tensor:
    """Turn uint8 [N, H, W, C] into float32 [N, C, H, W] in [-1, 1], by x / 127.5 - 1, in the same memory order."""
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(2), images)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
