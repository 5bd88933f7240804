"""Ranks as torchrun starts them: real processes with gloo between them, forked from one that has imported torch already.

A process that imports torch costs seconds; a fork of one that has done so costs a tenth of one. Each rank runs
`ect.train.main` with its own environment, folder, options and output.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ect.cost import memory
from tests import predictions

_TINY = (
    "--batch 12 --net.model-channels 8 --net.channel-mult 1 --net.num-blocks 1 --net.attn-resolutions --pretrain None "
    "--objective.n-stages 4 --eval.samples 0 --log.sample-kimg 0 --log.stats-kimg 0.12 --log.checkpoint-kimg 0.12 "
    "--threads 1 --device cpu --total-kimg 1000 --optim.decay constant"
)
TINY = _TINY.split()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ect.job", "torch._dynamo", "torch.utils.tensorboard", "tests.rank_pool"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _rank(argv: list[str], env: dict[str, str], cwd: str, said: str, before: Callable[[], None] | None) -> None:
    os.environ.update(env)
    os.chdir(cwd)
    descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if before is not None:
        before()
    memory.predict = predictions.nothing
    from ect.train import main

    raise SystemExit(main(argv))


@dataclass
class Ranks:
    """Processes 0 to size - 1, in a folder of theirs; `options` are those of all, and those of one rank may follow.

    served: this process keeps the store, as torchrun does. sizes: WORLD_SIZE as each rank is told it. before: called in the
    process of a rank, first of all.
    """

    folder: Path
    size: int = 2
    options: Sequence[str] = ()
    own: dict[int, Sequence[str]] = field(default_factory=dict)
    served: bool = True
    sizes: dict[int, int] = field(default_factory=dict)
    before: dict[int, Callable[[], None]] = field(default_factory=dict)
    absent: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.store: Any = None
        self.processes: dict[int, BaseProcess] = {}
        self.began = time.monotonic()
        self._saved: set[str] = set()

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @contextlib.contextmanager
    def started(self) -> Iterator[Ranks]:
        """Start them; afterwards none is left."""
        port = free_port()
        if self.served:
            from torch.distributed import TCPStore

            self.store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
            )
        try:
            for rank in sorted(set(range(self.size)) - {*self.absent}):
                size = str(self.sizes.get(rank, self.size))
                env = {
                    "RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size,
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(self.served),
                }  # fmt: skip
                argv = [*TINY, "--run-dir", "run", *self.options, *self.own.get(rank, ())]
                said = str(self.folder / f"rank{rank}")
                process = CONTEXT.Process(target=_rank, args=(argv, env, str(self.folder), said, self.before.get(rank)))
                process.start()
                self.processes[rank] = process
            yield self
        finally:
            for process in self.processes.values():
                process.kill()
                process.join(10)

    def wait_for(self, what: Callable[[], bool], seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline and any(p.is_alive() for p in self.processes.values()), self.said()
            time.sleep(0.02)

    def saved(self) -> set[str]:
        """Return the checkpoints that have been there: of those before the last ones, none is left."""
        self._saved |= {path.stem for path in self.run.glob("checkpoint-*.json")}
        return self._saved

    def training(self) -> None:
        """Wait until they train, and have written two checkpoints."""
        self.wait_for(lambda: len(self.saved()) > 1)

    def signal(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)
        self.began = time.monotonic()

    def ended(self, *but: int, seconds: float = 40) -> tuple[list[int | None], float]:
        """Wait for all but these ranks; return their exit statuses, and the seconds since the last signal or the start."""
        others = [process for rank, process in self.processes.items() if rank not in but]
        deadline = time.monotonic() + seconds
        for process in others:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in others], time.monotonic() - self.began

    def resumed(self) -> int | None:
        """Go on with the run in one process, for a few steps; return its exit status."""
        kimg = float((self.run / "latest").read_text().strip().removeprefix("checkpoint-")) + 0.024
        argv = ["--resume", "run", "--total-kimg", f"{kimg:.3f}"]
        process = CONTEXT.Process(target=_rank, args=(argv, {}, str(self.folder), str(self.folder / "resumed"), None))
        process.start()
        process.join(40)
        return process.exitcode

    def said(self, *but: int) -> str:
        """Return what these ranks wrote."""
        files = [self.folder / f"rank{rank}" for rank in self.processes if rank not in but]
        return "".join(file.read_text() for file in files if file.is_file())

    def errors(self, *but: int) -> list[str]:
        return [line for line in self.said(*but).splitlines() if line.startswith("error: ")]
