"""All drills: how often each is held in the short form, which the gate has, and in the long one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.drills import damage, disk, folders, kills, ranks, signals
from tests.drills.runs import Case, Ground


@dataclass(frozen=True)
class Drill:
    """One kind of accident.

    name: its row in the table. case: takes where, the number of the case and how many there are; it raises where the run does
    not stand it. short, long: how many; a function asks a run that nothing happens to.
    """

    name: str
    case: Case
    short: int
    long: int | Callable[[Ground], int]


DRILLS = [
    Drill("killed at a random moment, then resumed", kills.kill, 16, 100),
    Drill("checkpoint cut short", damage.truncated, 6, 50),
    Drill("checkpoint with a flipped bit", damage.flipped, 6, 50),
    Drill("damage beside the checkpoint", damage.beside, 5, 50),
    Drill("damaged model file without a manifest", damage.model_file, 40, 400),
    Drill("no space at a write", disk.full, 14, disk.places),
    Drill("no space for the output", disk.silent, 1, 4),
    Drill("a small disk", disk.small, 3, 20),
    Drill("folder or disk that is read-only", disk.read_only, 4, 30),
    Drill("two processes in one folder", folders.two, 3, 12),
    Drill("clock set back", folders.clock, 2, 10),
    Drill("SIGTERM, SIGINT, SIGHUP to a new process", signals.real, 6, 3 * signals.MOMENTS),
    Drill("SIGTERM, SIGINT, SIGHUP at a write or any time", signals.forked, 9, 60),
    *(Drill(*each) for each in ranks.RANK_DRILLS),
]
