"""Images that live on the device, served in an order that depends on the seed and the sample's index alone."""

from __future__ import annotations

import numpy as np
import torch

from ect.data.datasets import Dataset


class ImageStream:
    """An endless shuffle without state: sample i is image `permutation(seed, i // N)[i % N]` of the N images.

    So every epoch shows each image once, a resumed run needs nothing but nimg, and micro-batches or ranks that ask for
    neighbouring ranges see together what one large batch would.
    """

    def __init__(self, dataset: Dataset, seed: int, device: torch.device | str = "cpu") -> None:
        self.images = dataset.images.to(device)
        self.labels = None if dataset.labels is None else dataset.labels.to(device)
        self.seed = seed % 2**64  # numpy takes no negative seeds
        self._orders: dict[int, torch.Tensor] = {}

    def indices(self, first: int, n: int) -> torch.Tensor:
        """Image numbers of the samples first .. first + n - 1: int64 [n] on the device."""
        if first < 0 or n < 1:
            raise ValueError(f"expected first >= 0 and n >= 1, found {first} and {n}")
        parts = []
        while n > 0:
            epoch, start = divmod(first, len(self.images))
            part = self._order(epoch)[start : start + n]
            parts.append(part)
            first, n = first + len(part), n - len(part)
        return torch.cat(parts)

    def batch(self, first: int, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The samples first .. first + n - 1, counted from the start of the run (nimg plus the offset in the batch).

        Returns images uint8 [n, H, W, C] and labels float32 [n, L] or None, on the device.
        """
        index = self.indices(first, n)
        return self.images[index], None if self.labels is None else self.labels[index]

    def _order(self, epoch: int) -> torch.Tensor:
        """Permutation of an epoch; the latest two are kept, for batches that cross into the next epoch."""
        if epoch not in self._orders:
            if len(self._orders) == 2:
                del self._orders[min(self._orders)]
            # numpy promises that a bit generator's stream never changes, but no such thing of its permutations.
            keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self.images))
            self._orders[epoch] = torch.from_numpy(np.argsort(keys, kind="stable")).to(self.images.device)
        return self._orders[epoch]


def to_float(images: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1], by x / 127.5 - 1, in the same memory order.

    flip: bool [N], the images to mirror left to right.
    """
    if flip is not None:
        images = torch.where(flip[:, None, None, None], images.flip(2), images)
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
