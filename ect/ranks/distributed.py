"""Several processes as one: who is who, the gradient's sum, and the small exchanges on the host that keep ranks together.

torchrun starts the processes and names them in the environment. Sums of the step run where the tensors are: by NCCL on GPUs,
by gloo on CPUs. Everything else goes over a second gloo group, which never waits for a GPU. A lost rank is noticed by the
heartbeat (`ect.ranks.heartbeat`), whatever the others wait for.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ect.config import Config
from ect.errors import UserError
from ect.ranks import driver
from ect.ranks.heartbeat import STATUS, Heartbeat
from ect.ranks.place import Place

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # of the sums in a step: all ranks come to them within a step's time
PATIENCE = timedelta(days=1)  # of the exchanges on the host: rank 0 may rate images or write files for long


class Lost(UserError):
    """A rank that was not found."""

    status = STATUS


class Severed(Lost):
    """An exchange that failed: a rank is lost, or the network between two of them."""


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Turn what torch.distributed raises inside the block into Severed; a fault of this rank's own GPU stays what it is."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of an earlier launch, perhaps: its traceback says more
        raise
    except RuntimeError as error:
        raise Severed((str(error).splitlines() or [""])[0]) from error


@dataclass(frozen=True)
class World:
    """One process among `size` processes; one process alone needs no torch.distributed.

    local_rank, local_size: the same among those of this machine. Every method but `can_go_on` is called by all ranks
    together, and raises Severed where that fails.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = field(default=None, repr=False)
    """Process group of the exchanges on the host."""
    place: Place | None = field(default=None, repr=False)
    heartbeat: Heartbeat | None = field(default=None, repr=False)

    def sum_(self, tensor: Tensor) -> None:
        """Replace tensor by its sum over all ranks, in place, bit for bit the same on all of them."""
        if self.size > 1:
            with _exchange():
                dist.all_reduce(tensor)

    def mean(self, value: float) -> float:
        """Return the mean over the ranks."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        with _exchange():
            dist.all_reduce(total, group=self.control)
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Return whether any rank says so."""
        if self.size == 1:
            return flag
        said = torch.tensor([int(flag)])
        with _exchange():
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self.control)
        return bool(said)

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return the CPU tensors of all ranks, in order, on every rank; they agree in shape and dtype."""
        if self.size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(parts, part.contiguous(), group=self.control)
        return parts

    def first(self, work: Callable[[], T]) -> T:
        """Do on rank 0 alone what returns something JSON-able, and return that on every rank; the others wait."""
        if self.size == 1:
            return work()
        text = json.dumps(work()).encode() if self.rank == 0 else b""
        length = torch.tensor([len(text)])
        with _exchange():
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

    def can_go_on(
        self, run_dir: Path, checkpoint: Callable[[], Path | None], record: Callable[[str, str], object]
    ) -> None:
        """Say after a loss that the run in this folder goes on, from the checkpoint that there is then, and `record` it."""
        if self.heartbeat is None or self.place is None:
            return
        command = self.place.again("ect.train", f"--resume {shlex.quote(str(run_dir))}")

        def way_back() -> str:
            path = checkpoint()
            last = "there is no checkpoint yet" if path is None else f"the last checkpoint is {path}"
            return f"{last}; continue with: {command}"

        self.heartbeat.way_back, self.heartbeat.record = way_back, record

    def stop(self) -> None:
        """End it, once all ranks are here."""
        if self.size > 1:
            gc.collect()  # captured graphs hold NCCL's communicators, and go before them
            with _exchange():
                dist.barrier(group=self.control)
            if self.heartbeat is not None:
                self.heartbeat.leave()
            dist.destroy_process_group()


def bounded(work: Callable[[], T], seconds: float) -> T:
    """Return what `work` returns, in a thread of its own, so that signals are answered. Raises TimeoutError."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"nothing came within {seconds:g} s")
    return results[0]


def find(place: Place, heartbeat: Heartbeat, seconds: float) -> Any:
    """Return torch.distributed's store, once the heartbeat of this rank is joined to that of rank 0.

    Raises UserError where torch has no torch.distributed, or rank 0 cannot listen; Lost where it is not found.
    """
    if not dist.is_available():
        raise UserError(
            "torchrun: this build of torch has no torch.distributed; train with one process, or install another"
        )
    key = f"ect/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    where = f"MASTER_ADDR={place.address} MASTER_PORT={place.port}"

    def meet() -> Any:
        store = dist.TCPStore(
            place.address, place.port, is_master=place.rank == 0 and not place.served, multi_tenant=True,
            wait_for_workers=False, timeout=timedelta(seconds=seconds),
        )  # fmt: skip
        if place.rank == 0:
            store.set(key, heartbeat.listen())
        else:
            heartbeat.join_rank_0(place.address, store.get(key).decode())
        return store

    try:
        return bounded(meet, seconds + 1)
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        if place.rank == 0:
            raise UserError(
                f"{where}: rank 0 cannot listen there ({reason}); choose a free port of its machine"
            ) from error
        raise Lost(f"rank 0 of {place.size} was not found at {where} within {seconds:g} s ({reason:.200})") from error


def start(place: Place, store: Any, heartbeat: Heartbeat) -> World:
    """Return the World of a process whose heartbeat has met all others. Raises Severed where one is lost meanwhile."""
    gpus = driver.available() and dist.is_nccl_available()
    rank, size = place.rank, place.size
    with _exchange():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank, size, place.local_rank, place.local_size, control, place, heartbeat)


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
