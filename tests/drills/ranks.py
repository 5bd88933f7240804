"""Drills of 2 to 4 gloo ranks: one is killed, stopped, slow, or started with something else; the others end in time, and one
sentence says why. Each function holds one case of its list; the first ones, of two ranks, are the short form."""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ect.doctor.__main__ import examine
from ect.ranks.ending import GRACE
from ect.ranks.heartbeat import STATUS
from tests.drills.runs import Skipped
from tests.rank_pool import Ranks

HEARTBEAT = 3.0
SLACK = 8.0  # seconds: other work may have the processor
OPTIONS = ["--heartbeat", f"{HEARTBEAT:g}"]
RESUME = re.compile(r"the last checkpoint is (run/checkpoint-\S+\.safetensors); continue with: (.*)$")

KILLED = [(2, 1, True), (2, 0, True), (2, 0, False), (3, 0, True), (3, 2, False), (4, 0, True), (4, 3, True)]
STOPPED = [(2, 1, False), (2, 0, True), (2, 0, False), (3, 0, True), (3, 1, True), (4, 2, True)]
"""Number of ranks, the one that it happens to, and whether the store is a launcher's or rank 0's."""
SLOW = [(2, 1), (2, 0), (4, 3)]
SIZES = [2, 3, 4]
ABSENT = [(1, True), (0, True), (1, False), (0, False)]
OTHER = [
    (2, ["--seed", "7", "--optim.lr", "0.5"], "has other options than rank 0: --seed 7 for 0, --optim.lr 0.5 for "),
    (2, ["--batch", "-3"], "refuses its command line: --batch -3: expected at least 1"),
    (2, ["--batch", "x"], "refuses its command line: "),
    (2, ["--dry-run"], "has nothing to run (--help or --dry-run), and others have"),
    (3, ["--heartbeat", "0"], "refuses its command line: --heartbeat 0.0: expected from 1 to 86,400 seconds"),
    (4, ["--total-kimg", "7"], "has other options than rank 0: --total-kimg 7.0 for 1000.0; give all the same"),
]


def folder() -> tempfile.TemporaryDirectory[str]:
    if not torch.distributed.is_gloo_available():
        raise Skipped("needs torch.distributed with gloo")
    return tempfile.TemporaryDirectory(prefix="ranks")


def check_loss(ranks: Ranks, victim: int, why: str, seconds: float) -> None:
    """All but the victim end within the seconds, with the status of a loss, and one sentence: rank, checkpoint, command."""
    statuses, took = ranks.ended(victim)
    assert statuses == [STATUS] * (ranks.size - 1) and took < seconds + SLACK, (took, ranks.said(victim))
    said = ranks.errors(victim)
    speakers = 1 if ranks.served or victim else ranks.size - 1  # the store went with rank 0: each rank for itself
    assert len(said) == speakers and "Traceback" not in ranks.said(victim), ranks.said(victim)
    for line in said:
        assert line.startswith(f"error: rank {victim} of {ranks.size} {why}"), line
        found = RESUME.search(line)
        assert found is not None and (ranks.folder / found[1]).is_file(), line
        assert found[2] == f"torchrun --nproc-per-node {ranks.size} -m ect.train --resume run", line
    story = "\n".join(examine(ranks.run))
    assert f"lost ranks:       rank {victim} of {ranks.size} {why}" in story, story
    state = "a process trains in it now" if victim == 0 and "not heard" in why else "ended because a rank was lost at "
    assert f"state:            {state}" in story, story  # a stopped rank 0 has its lock still


def killed(ground: object, number: int, count: int) -> None:
    size, victim, served = KILLED[number]
    with folder() as path, Ranks(Path(path), size, OPTIONS, served=served).started() as ranks:
        ranks.training()
        ranks.signal(victim, signal.SIGKILL)
        check_loss(ranks, victim, "ended without a word: it was killed", GRACE)
        assert ranks.resumed() == 0, (ranks.folder / "resumed").read_text()


def stopped(ground: object, number: int, count: int) -> None:
    size, victim, served = STOPPED[number]
    with folder() as path, Ranks(Path(path), size, OPTIONS, served=served).started() as ranks:
        ranks.training()
        ranks.signal(victim, signal.SIGSTOP)
        check_loss(ranks, victim, "was not heard for 3 s", HEARTBEAT + GRACE)
        ranks.signal(victim, signal.SIGCONT)  # it goes on, and finds itself alone
        others = [rank for rank in range(size) if rank != victim]
        assert ranks.ended(*others)[0] == [STATUS], ranks.said()
        (said,) = ranks.errors(*others)
        assert said.startswith(f"error: rank {victim} of {size} was not heard for 3 s"), said


def hang() -> None:
    """Let no sum of this rank end any more, once it has saved: as NCCL's do not where a rank is lost."""
    from ect.ranks.distributed import World
    from ect.step import TrainStep

    steps: list[int] = []
    call, sum_ = TrainStep.__call__, World.sum_

    def counted(self: TrainStep, nimg: int, stage: int) -> object:
        steps.append(nimg)
        return call(self, nimg, stage)

    def waits(self: World, tensor: object) -> None:
        if len(steps) > 25:
            time.sleep(3600)
        sum_(self, tensor)  # type: ignore[arg-type]

    TrainStep.__call__ = counted  # type: ignore[assignment]
    World.sum_ = waits  # type: ignore[assignment]


def killed_while_the_others_hang(ground: object, number: int, count: int) -> None:
    size = SIZES[number]
    before = dict.fromkeys(range(size), hang)
    with folder() as path, Ranks(Path(path), size, OPTIONS, before=before).started() as ranks:
        ranks.training()
        time.sleep(1)
        ranks.signal(size - 1, signal.SIGKILL)
        check_loss(ranks, size - 1, "ended without a word: it was killed", GRACE)


def busy(seconds: float) -> None:
    """Let this rank's third checkpoint take this long, as an evaluation or a slow disk would."""
    from ect.files.checkpoint import Checkpoints

    save, saves = Checkpoints.save, list[object]()

    def slow(*args: object) -> object:
        saves.append(args)
        if len(saves) == 3:
            time.sleep(seconds)
        return save(*args)  # type: ignore[arg-type]

    Checkpoints.save = slow  # type: ignore[assignment]


def slow(ground: object, number: int, count: int) -> None:
    """Rank 0 works for longer than the heartbeat while the others wait, and one is away for less: none is lost."""
    size, away = SLOW[number]
    before = {0: partial(busy, HEARTBEAT + 1)}
    with folder() as path, Ranks(Path(path), size, OPTIONS, before=before).started() as ranks:
        ranks.training()
        ranks.signal(away, signal.SIGSTOP)
        time.sleep(HEARTBEAT / 2)
        ranks.signal(away, signal.SIGCONT)
        ranks.wait_for(lambda: len(ranks.saved()) > 3)
        ranks.signal(size - 1, signal.SIGTERM)
        statuses, _ = ranks.ended()
        assert statuses == [0] * size and ranks.errors() == [], ranks.said()


def refused(ranks: Ranks, said: str) -> None:
    """All ranks end as on bad input, with one sentence, before there is a run folder."""
    statuses, _ = ranks.ended()
    errors = ranks.errors()
    assert statuses == [2] * ranks.size and len(errors) == 1 and errors[0].startswith(said), ranks.said()
    assert "Traceback" not in ranks.said() and not list(ranks.folder.glob("**/run")), ranks.said()


def other_options(ground: object, number: int, count: int) -> None:
    size, own, said = OTHER[number]
    with folder() as path, Ranks(Path(path), size, OPTIONS, own={size - 1: own}).started() as ranks:
        refused(ranks, f"error: rank {size - 1} of {size} {said}")


def images(path: Path, seed: int) -> None:
    path.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for i in range(12):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path / f"{i}.png")


def in_folders(path: Path, size: int, missing: bool = False) -> Ranks:
    """Return ranks in folders of their own, where the last one's images are others or missing."""
    for rank in range(size):
        if rank < size - 1 or not missing:
            images(path / f"{rank}" / "images", int(rank == size - 1))
    before: dict[int, Callable[[], None]] = {rank: partial(os.chdir, path / str(rank)) for rank in range(size)}
    (path / str(size - 1)).mkdir(exist_ok=True)
    options: Sequence[str] = [*OPTIONS, "--data.source", "images"]
    return Ranks(path, size, options, before=before)


def other_data(ground: object, number: int, count: int) -> None:
    size = SIZES[number]
    with folder() as path, in_folders(Path(path), size).started() as ranks:
        refused(ranks, f"error: process {size - 1} of {size} does not agree with process 0 on: images")


def no_data(ground: object, number: int, count: int) -> None:
    with folder() as path, in_folders(Path(path), SIZES[number], missing=True).started() as ranks:
        refused(ranks, "error: --data.source images")


def other_world(ground: object, number: int, count: int) -> None:
    size = SIZES[number]
    with folder() as path, Ranks(Path(path), size, OPTIONS, sizes={size - 1: size + 1}).started() as ranks:
        refused(
            ranks, f"error: rank {size - 1} was started as one of {size + 1} (WORLD_SIZE), rank 0 as one of {size};"
        )


def never_came(ground: object, number: int, count: int) -> None:
    absent, served = ABSENT[number]
    options = ["--heartbeat", "1"]
    with folder() as path, Ranks(Path(path), 2, options, absent=[absent], served=served).started() as ranks:
        statuses, took = ranks.ended()
        (said,) = ranks.errors()
        assert statuses == [STATUS] and took < 10 + GRACE + SLACK and not ranks.run.exists(), (took, ranks.said())
        assert said.startswith(f"error: rank {absent} of 2 {'did not come' if absent else 'was not found'}"), said


def killed_at_random(ground: object, number: int, count: int) -> None:
    """From before it has joined the others: then no rank can name it before they have waited for it."""
    draw = random.Random(number)
    size = 2 + number % 3
    victim, moment = draw.randrange(size), draw.uniform(0, 4)
    with folder() as path, Ranks(Path(path), size, ["--heartbeat", "1"]).started() as ranks:
        time.sleep(moment)
        ranks.signal(victim, signal.SIGKILL)
        statuses, took = ranks.ended(victim)
        assert statuses == [STATUS] * (size - 1) and took < 10 + GRACE + SLACK, (took, ranks.said(victim))
        said = ranks.errors(victim)
        assert "Traceback" not in ranks.said(victim) and (len(said) == 1 or victim == 0), said
        assert all(line.startswith(f"error: rank {victim} of {size} ") for line in said), said


RANK_DRILLS = [
    ("one of several ranks killed", killed, 2, len(KILLED)),
    ("a rank killed while sums never end", killed_while_the_others_hang, 1, len(SIZES)),
    ("a rank killed at a random moment", killed_at_random, 0, 30),
    ("a rank stopped", stopped, 1, len(STOPPED)),
    ("a slow rank, which is not lost", slow, 1, len(SLOW)),
    ("a rank with other options", other_options, 2, len(OTHER)),
    ("a rank with other data", other_data, 1, len(SIZES)),
    ("a rank without data", no_data, 1, len(SIZES)),
    ("a rank of another world size", other_world, 1, len(SIZES)),
    ("a rank that never comes", never_came, 0, len(ABSENT)),
]
"""Name, function, and how many cases the short and the long form have."""
