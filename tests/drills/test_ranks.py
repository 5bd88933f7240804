"""Drills of 2 to 4 gloo ranks: one is killed, stopped, slow, or started with something else. The others end in time, and one
sentence says why. The short form has two ranks; --full adds worlds of three and four, and kills at random moments."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ect.ranks.ending import GRACE
from ect.ranks.heartbeat import STATUS
from tests.rank_pool import Ranks

HEARTBEAT = 3.0
SLACK = 8.0  # seconds: other work may have the processor
OPTIONS = ["--heartbeat", f"{HEARTBEAT:g}"]
ABSENT = sys.platform == "win32" or not torch.distributed.is_gloo_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(ABSENT, reason="needs torch.distributed with gloo")]
RESUME = re.compile(r"the last checkpoint is (run/checkpoint-\S+\.safetensors); continue with: (.*)$")


def full(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.full)


def check_loss(ranks: Ranks, victim: int, why: str, seconds: float) -> None:
    """All but the victim end within the seconds, with the status of a loss, and one sentence: rank, checkpoint, command."""
    statuses, took = ranks.ended(victim)
    assert statuses == [STATUS] * (ranks.size - 1) and took < seconds + SLACK, ranks.said(victim)
    said = ranks.errors(victim)
    speakers = 1 if ranks.served or victim else ranks.size - 1  # the store went with rank 0: each rank for itself
    assert len(said) == speakers and "Traceback" not in ranks.said(victim)
    for line in said:
        assert line.startswith(f"error: rank {victim} of {ranks.size} {why}")
        found = RESUME.search(line)
        assert found is not None and (ranks.folder / found[1]).is_file(), line
        assert found[2] == f"torchrun --nproc-per-node {ranks.size} -m ect.train --resume run"


@pytest.mark.parametrize(
    ("size", "victim", "served"),
    [(2, 1, True), (2, 0, True), full(2, 0, False), full(3, 0, True), full(3, 2, False), full(4, 0, True), full(4, 3, True)],
)  # fmt: skip
def test_a_killed_rank(size: int, victim: int, served: bool, tmp_path: Path) -> None:
    with Ranks(tmp_path, size, OPTIONS, served=served).started() as ranks:
        ranks.training()
        ranks.signal(victim, signal.SIGKILL)
        check_loss(ranks, victim, "was killed, or its machine failed", GRACE)


@pytest.mark.parametrize(
    ("size", "victim", "served"),
    [(2, 1, False), full(2, 0, True), full(2, 0, False), full(3, 0, True), full(3, 1, True), full(4, 2, True)],
)
def test_a_stopped_rank(size: int, victim: int, served: bool, tmp_path: Path) -> None:
    with Ranks(tmp_path, size, OPTIONS, served=served).started() as ranks:
        ranks.training()
        ranks.signal(victim, signal.SIGSTOP)
        check_loss(ranks, victim, "was not heard for 3 s", HEARTBEAT + GRACE)


def busy(seconds: float) -> None:
    """Let this rank's second checkpoint take this long, as an evaluation or a slow disk would."""
    from ect.files.checkpoint import Checkpoints

    save, saves = Checkpoints.save, []

    def slow(*args: object) -> object:
        saves.append(args)
        if len(saves) == 2:
            time.sleep(seconds)
        return save(*args)  # type: ignore[arg-type]

    Checkpoints.save = slow  # type: ignore[assignment]


@pytest.mark.parametrize(("size", "slow"), [(2, 1), full(2, 0), full(4, 3)])
def test_a_slow_rank_is_not_lost(size: int, slow: int, tmp_path: Path) -> None:
    """Rank 0 works longer than the heartbeat while the others wait, and a rank is away for less; a signal to one ends all."""
    before = {0: partial(busy, HEARTBEAT + 1)}
    with Ranks(tmp_path, size, OPTIONS, before=before).started() as ranks:
        ranks.training()
        ranks.signal(slow, signal.SIGSTOP)
        time.sleep(HEARTBEAT / 2)
        ranks.signal(slow, signal.SIGCONT)
        last = (ranks.run / "latest").read_text()
        ranks.wait_for(lambda: (ranks.run / "latest").read_text() != last)
        ranks.signal(size - 1, signal.SIGTERM)
        statuses, _ = ranks.ended()
        assert statuses == [0] * size and ranks.errors() == [], ranks.said()


def images(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")


def moved(folder: str) -> None:
    os.chdir(folder)


@pytest.mark.parametrize("size", [2, full(3), full(4)])
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--seed", "7", "--optim.lr", "0.5"], "has other options than rank 0: --seed 7 for 0, --optim.lr 0.5 for "),
        (["--batch", "-3"], "refuses its command line: --batch -3: expected at least 1"),
        full(["--batch", "x"], "refuses its command line: "),
        full(["--dry-run"], "has nothing to run (--help or --dry-run), and others have"),
        full(["--heartbeat", "0"], "refuses its command line: --heartbeat 0.0: expected from 1 to 86,400 seconds"),
    ],
)
def test_a_rank_with_other_options(size: int, own: Sequence[str], said: str, tmp_path: Path) -> None:
    with Ranks(tmp_path, size, OPTIONS, own={size - 1: own}).started() as ranks:
        refused(ranks, f"error: rank {size - 1} of {size} {said}")


def refused(ranks: Ranks, said: str) -> None:
    statuses, _ = ranks.ended()
    errors = ranks.errors()
    assert statuses == [2] * ranks.size and len(errors) == 1 and errors[0].startswith(said), ranks.said()
    assert "Traceback" not in ranks.said() and not ranks.run.exists()


@pytest.mark.parametrize("size", [2, full(3), full(4)])
def test_a_rank_with_other_data(size: int, tmp_path: Path) -> None:
    for rank in range(2):
        images(tmp_path / f"data{rank}" / "images", rank)
    before = {rank: partial(moved, str(tmp_path / f"data{int(rank == size - 1)}")) for rank in range(size)}
    with Ranks(tmp_path, size, [*OPTIONS, "--data.source", "images"], before=before).started() as ranks:
        refused(ranks, f"error: process {size - 1} of {size} does not agree with process 0 on: images")
    assert {path.name for path in tmp_path.glob("data?/*")} == {"images"}


def test_a_rank_without_data(tmp_path: Path) -> None:
    images(tmp_path / "data0" / "images", 0)
    (tmp_path / "data1").mkdir()
    before = {rank: partial(moved, str(tmp_path / f"data{rank}")) for rank in range(2)}
    with Ranks(tmp_path, 2, [*OPTIONS, "--data.source", "images"], before=before).started() as ranks:
        refused(ranks, "error: --data.source images")
    assert {path.name for path in tmp_path.glob("data?/*")} == {"images"}


@pytest.mark.parametrize("size", [2, full(3), full(4)])
def test_a_rank_of_another_world(size: int, tmp_path: Path) -> None:
    with Ranks(tmp_path, size, OPTIONS, sizes={size - 1: size + 1}).started() as ranks:
        refused(ranks, f"error: rank {size - 1} was started as one of {size + 1} (WORLD_SIZE), rank 0 as one of {size};")


@pytest.mark.full
@pytest.mark.parametrize("absent", [0, 1])
@pytest.mark.parametrize("served", [True, False])
def test_a_rank_that_never_comes(absent: int, served: bool, tmp_path: Path) -> None:
    with Ranks(tmp_path, 2, ["--heartbeat", "1"], absent=[absent], served=served).started() as ranks:
        statuses, took = ranks.ended()
        (said,) = ranks.errors()
        assert statuses == [STATUS] and took < 10 + GRACE + SLACK and not ranks.run.exists()
        assert said.startswith(f"error: rank {absent} of 2 {'did not come' if absent else 'was not found'}"), said


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12))
def test_a_rank_killed_at_a_random_moment(seed: int, tmp_path: Path) -> None:
    """From before it has joined the others: then no rank can name it before they have waited for it."""
    draw = random.Random(seed)
    size = 2 + seed % 3
    victim, moment = draw.randrange(size), draw.uniform(0, 4)
    with Ranks(tmp_path, size, ["--heartbeat", "1"]).started() as ranks:
        time.sleep(moment)
        ranks.signal(victim, signal.SIGKILL)
        statuses, took = ranks.ended(victim)
        said = ranks.errors(victim)
        assert statuses == [STATUS] * (size - 1) and took < 10 + GRACE + SLACK, ranks.said(victim)
        assert "Traceback" not in ranks.said(victim)
        named = [line for line in said if line.startswith(f"error: rank {victim} of {size} ")]
        assert said == named and (len(said) == 1 or victim == 0)
