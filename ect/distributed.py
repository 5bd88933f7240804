"""Rank, world size and the one all-reduce of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among `size` processes; one process alone needs no torch.distributed."""

    rank: int = 0
    size: int = 1

    def sum_(self, tensor: Tensor) -> None:
        """Replace tensor by its sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
