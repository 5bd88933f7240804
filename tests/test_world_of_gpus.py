"""Which process groups a World is made of where there are GPUs; torch.distributed is a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from ect.ranks import distributed, driver
from ect.ranks.heartbeat import Heartbeat
from ect.ranks.place import Place


@pytest.mark.parametrize(
    ("gpu", "nccl", "backend"), [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")]
)
def test_sums_run_by_nccl_where_there_are_gpus(
    gpu: bool, nccl: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(driver, "available", lambda: gpu)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.update(backend=backend, **options))
    monkeypatch.setattr(dist, "new_group", lambda **options: f"{options['backend']} control")
    place, heartbeat = Place(1, 2, 1, 2, "host", 29500), Heartbeat(1, 2, {}, 60, 600, lambda end: None)
    world = distributed.start(place, "store", heartbeat)
    assert made["backend"] == backend and (made["rank"], made["world_size"], made["store"]) == (1, 2, "store")
    assert (world.rank, world.size, world.local_rank, world.local_size) == (1, 2, 1, 2)
    assert (world.control, world.heartbeat) == ("gloo control", heartbeat)
