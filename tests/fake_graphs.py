"""torch.cuda's graphs on a CPU: capturing runs nothing that lasts, replaying runs what was captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ect.step import TrainStep


@dataclass
class Graphs:
    """What was captured. fail: called in each capture, to raise or not. replayed: called after each replay."""

    step: TrainStep
    fail: Callable[[], None] = lambda: None
    replayed: Callable[[TrainStep], None] = lambda step: None
    made: list[FakeGraph] = field(default_factory=list)
    streams: list[Any] = field(default_factory=lambda: ["first"])
    """The current stream is the last one."""
    emptied: int = 0


class FakeGraph:
    def __init__(self, graphs: Graphs) -> None:
        self.graphs, self.part = graphs, graphs.step.update
        self.pool_of: FakeGraph | None = None

    def pool(self) -> FakeGraph:
        return self

    def replay(self) -> None:
        self.part()
        self.graphs.replayed(self.graphs.step)


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        pass


def install(patch: pytest.MonkeyPatch, step: TrainStep, **faults: Any) -> Graphs:
    """Let `step` capture on the CPU."""
    graphs = Graphs(step, **faults)

    @contextmanager
    def stream(new: Any) -> Iterator[None]:
        depth = len(graphs.streams)
        graphs.streams.append(new)
        try:
            yield
        finally:
            del graphs.streams[depth:]

    @contextmanager
    def graph(made: FakeGraph, pool: FakeGraph | None, side: FakeStream, mode: str) -> Iterator[None]:
        assert mode == "thread_local" and graphs.streams[-1] is side
        made.part, made.pool_of = step.parts()[len(graphs.made)], pool
        saved = [tensor.clone() for tensor in step.tensors()]
        graphs.streams.append(side)
        try:
            yield
        finally:
            torch._foreach_copy_(step.tensors(), saved)
            graphs.fail()
        graphs.streams.pop()  # where the end of a capture fails, torch does not come to this
        graphs.made.append(made)

    def empty_cache() -> None:
        graphs.emptied += 1

    patch.setattr(torch.cuda, "Stream", FakeStream)
    patch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(device))
    patch.setattr(torch.cuda, "stream", stream)
    patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(graphs))
    patch.setattr(torch.cuda, "graph", graph)
    patch.setattr(torch.cuda, "synchronize", lambda device: None)
    patch.setattr(torch.cuda, "empty_cache", empty_cache)
    return graphs
