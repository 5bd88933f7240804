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
                del self._epochs[min(self._epochs)]
            # numpy promises that a bit generator's stream never changes, but no such thing of its permutations.
            keys = np.random.PCG64([self.seed, number]).random_raw(self.length)
            self._epochs[number] = torch.from_numpy(np.argsort(keys, kind="stable"))
        return self._epochs[number]

    def indices(self, first: int, n: int) -> Tensor:
        """Image numbers of the samples first .. first + n - 1: int64 [n]."""
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
    there, gathered one step ahead by a thread. None: resident where the images take at most a quarter of a GPU's free
    memory, and always on a CPU. `note` says what was chosen. Both ways serve the same samples.

    Everything that batch() reads has a fixed address on the device, so that a captured CUDA graph sees what seek() wrote.
    """

    def __init__(
        self, dataset: Dataset, seed: int, device: torch.device | str = "cpu", batch: int | None = None,
        resident: bool | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.device = dataset, torch.device(device)
        self.batch_size = batch or len(dataset.images)
        self.resident, self.note = _choose(dataset.images.nbytes, self.device, resident)
        epochs = -(-self.batch_size // len(dataset.images)) + 1
        self.order = Order(len(dataset.images), seed, keep=epochs + 1)
        labels = dataset.labels
        if self.resident:
            self.images = dataset.images.to(self.device)
            self.labels = None if labels is None else labels.to(self.device)
            self.index = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        else:
            self.images = dataset.images.new_zeros((self.batch_size, *dataset.images.shape[1:]), device=self.device)
            self.labels = (
                None if labels is None else labels.new_zeros((self.batch_size, labels.shape[1]), device=self.device)
            )
            self._worker = ThreadPoolExecutor(1, "images")
            self._ahead: tuple[int, Future[list[Tensor]]] | None = None

    def seek(self, nimg: int) -> None:
        """Make the samples nimg .. nimg + batch - 1 of the run what batch() serves. Errors of the thread surface here."""
        if self.resident:
            index = self.order.indices(nimg, self.batch_size)
            self.index.copy_(index.pin_memory() if self.device.type == "cuda" else index, non_blocking=True)
            return
        first, gathered = self._ahead or (-1, None)
        host = gathered.result() if gathered is not None and first == nimg else self._gather(nimg)
        self.images.copy_(host[0], non_blocking=True)
        if self.labels is not None:
            self.labels.copy_(host[1], non_blocking=True)
        following = nimg + self.batch_size
        self._ahead = following, self._worker.submit(self._gather, following)

    def _gather(self, nimg: int) -> list[Tensor]:
        """The batch on the host, in pinned memory for a GPU: torch keeps it until the copy from it is done."""
        index = self.order.indices(nimg, self.batch_size)
        tensors = [t[index] for t in (self.dataset.images, self.dataset.labels) if t is not None]
        return [t.pin_memory() for t in tensors] if self.device.type == "cuda" else tensors

    def batch(self, n0: int, n: int) -> tuple[Tensor, Tensor | None]:
        """The samples nimg + n0 .. nimg + n0 + n - 1: images uint8 [n, H, W, C] and labels float32 [n, L] or None."""
        if not self.resident:
            return self.images[n0 : n0 + n], None if self.labels is None else self.labels[n0 : n0 + n]
        index = self.index[n0 : n0 + n]
        return self.images[index], None if self.labels is None else self.labels[index]

    def close(self) -> None:
        """Stop the thread, if there is one."""
        if not self.resident:
            self._worker.shutdown(cancel_futures=True)


def _choose(size: int, device: torch.device, resident: bool | None) -> tuple[bool, str]:
    """Whether `size` bytes of images stay on the device, and why."""
    if resident is not None or device.type != "cuda":
        resident = resident is not False
        return resident, f"images {'on' if resident else 'streamed to'} {device}"
    free, _ = torch.cuda.mem_get_info(device)
    resident = size <= RESIDENT_SHARE * free
    where = f"on {device}" if resident else f"streamed to {device}"
    return resident, f"images {where}: {size / 1e6:,.0f} MB, {free / 1e9:.1f} GB free"


def to_float(images: Tensor, flip: Tensor | None = None) -> Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1], by x / 127.5 - 1, in the same memory order.

    flip: bool [N], the images to mirror left to right.
    """
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(2), images)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
