"""Which process groups a World is made of where there are GPUs; torch.distributed is a stand-in."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from ect.ranks import distributed, driver


@pytest.mark.parametrize(
    ("gpu", "nccl", "backend"), [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")]
)
def test_sums_run_by_nccl_where_there_are_gpus(
    gpu: bool, nccl: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(driver, "available", lambda: gpu)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **options: iter([("store", 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.update(backend=backend, **options))
    monkeypatch.setattr(dist, "new_group", lambda **options: f"{options['backend']} control")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    world = distributed.start(1, 2)
    assert made["backend"] == backend and (made["rank"], made["world_size"]) == (1, 2)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (1, 2, 1, 2)
    assert (world.control, world.store) == ("gloo control", "store")
