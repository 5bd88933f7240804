"""Several processes as one: who is who, the gradient's sum, and the small exchanges on the host that keep ranks together.

torchrun starts the processes and names them in the environment. Sums of the step run where the tensors are: by NCCL on GPUs,
by gloo on CPUs. Everything else goes over a second gloo group, which never waits for a GPU; so a rank learns within a step
that another one is gone (its connections close), even where NCCL would wait.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ect.config import Config
from ect.errors import UserError
from ect.ranks import driver

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of the sums in a step: all ranks come to them within a step's time
PATIENCE = timedelta(days=1)  # of the exchanges on the host: rank 0 may rate images or write files for long
_FAILURE = "ect/failure"


@dataclass(frozen=True)
class World:
    """One process among `size` processes; one process alone needs no torch.distributed.

    local_rank, local_size: the same among those of this machine. Every method but `failed` is called by all ranks
    together.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = field(default=None, repr=False)
    """Process group of the exchanges on the host."""
    store: Any = field(default=None, repr=False)
    """torch.distributed's key-value store, which outlives a rank."""

    def sum_(self, tensor: Tensor) -> None:
        """Replace tensor by its sum over all ranks, in place, bit for bit the same on all of them."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def mean(self, value: float) -> float:
        """Return the mean over the ranks."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so."""
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)])
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.control)
        return bool(said)

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return the CPU tensors of all ranks, in order, on every rank; they agree in shape and dtype."""
        if self.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.control)
        return parts

    def first(self, work: Callable[[], T]) -> T:
        """Do on rank 0 alone what returns something JSON-able, and return that on every rank; the others wait."""
        if self.size == 1:
            return work()
        text = json.dumps(work()).encode() if self.rank == 0 else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, 0, group=self.control)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(int(length)).byte()
        dist.broadcast(data, 0, group=self.control)
        result: T = json.loads(data.numpy().tobytes())
        return result

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise UserError, on every rank, that names the facts on which a rank differs from rank 0."""
        digests = [
            torch.frombuffer(bytearray(hashlib.sha256(f.encode()).digest()), dtype=torch.uint8) for f in facts.values()
        ]
        told = self.gather(torch.stack(digests))
        for rank, theirs in enumerate(told):
            differ = [name for name, a, b in zip(facts, theirs, told[0], strict=True) if not torch.equal(a, b)]
            if differ:
                raise UserError(
                    f"process {rank} of {self.size} does not agree with process 0 on: {', '.join(differ)}; give all of them "
                    "the same options, files and version of this package"
                )

    def failed(self, how: str) -> str | None:
        """Note that this rank ends by an error; returns None on the first one that does, else how that one ended."""
        if self.size == 1:
            return None
        mine = f"{self.rank} {how}"
        try:
            noted = self.store.compare_set(_FAILURE, "", mine).decode()
        except RuntimeError:  # the store went with the process that kept it
            return "crashed"
        return None if noted == mine else noted.split()[1]

    def stop(self) -> None:
        """End it, once all ranks are here."""
        if self.size > 1:
            gc.collect()  # captured graphs hold NCCL's communicators, and go before them
            dist.barrier(group=self.control)
            dist.destroy_process_group()


def start(rank: int, size: int) -> World:
    """Return the World of process `rank` of `size`, which find each other by torchrun's environment.

    For one process nothing is set up. Raises UserError where torch has no torch.distributed.
    """
    if size == 1:
        return World()
    if not dist.is_available():
        raise UserError(
            "torchrun: this build of torch has no torch.distributed; train with one process, or install another"
        )
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
    gpus = driver.available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    local_rank, local_size = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
    return World(rank, size, local_rank, max(local_size, 1), control, store)


def check_share(cfg: Config, size: int) -> None:
    """Raise UserError unless `size` processes can share a batch, in whole forward passes."""
    share, passes = cfg.batch // size, cfg.batch_per_device
    if cfg.batch % size:
        raise UserError(
            f"--batch {cfg.batch}: {size} processes cannot share it equally; choose a multiple of {size}, or another number "
            "for torchrun --nproc-per-node"
        )
    if isinstance(passes, int) and share % passes:
        raise UserError(
            f"--batch-per-device {passes}: each of the {size} processes trains on {share} images of --batch {cfg.batch}; "
            f"choose a divisor of {share}"
        )
