"""SIGTERM, SIGINT and SIGHUP at any moment: a quiet end with the status of the signal, or a saved one with 0; then a resume."""

from __future__ import annotations

import random
import signal
import time

from tests.drills.equal import names, same
from tests.drills.runs import PLAIN, WHOLE, End, Fault, Ground, Place

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAID = (
    "stopping after this step and saving; once more quits at once",
    "interrupted; the last checkpoint is what is saved",
)
LONG = [
    *PLAIN,
    *["--total-kimg", "4", "--log.stats-kimg", ".4", "--log.sample-kimg", "2", "--log.checkpoint-kimg", ".8"],
]
MOMENTS, SECONDS = 20, 10.0


def real(ground: Ground, number: int, count: int) -> None:
    """Send one of them to a new process, at one of 20 moments from 0 to 10 s (fewer, of all that time, in the short form)."""
    moment = (number // 3) * SECONDS / max(count // 3 - 1, 1)
    with ground.place() as place:
        run = place.start(PLAIN if count < 3 * MOMENTS else LONG, real=True)
        time.sleep(moment)
        which = NUMBERS[number % 3]
        run.send(which)
        end = run.end()
        ended(place, end, which)
        if count < 3 * MOMENTS:
            resumed(ground, place, PLAIN)
        else:
            place.start(None).end().done()
            assert (place.run / "latest").read_text() == "checkpoint-000004.000\n"


def forked(ground: Ground, number: int, count: int) -> None:
    """Send one of them at a write of a run, or at a random time; every fourth run gets it twice."""
    dice = random.Random(f"signal {number}")
    which, options = NUMBERS[number % 3], WHOLE if number % 4 == 1 else PLAIN
    _, whole = ground.undisturbed(options)
    with ground.place() as place:
        if number % 2:
            end = place.start(options, Fault(dice.randint(1, len(whole.changes)), which, lasting=number % 4 == 3)).end()
        else:
            run = place.start(options)
            time.sleep(dice.uniform(0, ground.seconds(options)))
            run.send(which)
            if number % 4 == 2:
                time.sleep(dice.uniform(0, 0.1))
                run.send(which)
            end = run.end()
        ended(place, end, which)
        resumed(ground, place, options)


def ended(place: Place, end: End, which: int) -> None:
    """Hold that a run ended as it says it does, and left nothing half-written.

    Before the first line of ect runs, and after its last, the signals do what they do to any process of Python.
    """
    python = end.status == -which or (which == signal.SIGINT and "Traceback" in end.err and "/ect/" not in end.err)
    over = "Stopped; all is saved" in end.out or "Wall clock" in end.out
    if python and not over:
        assert not end.out and not place.run.exists()
        return
    assert python or end.status in (0, 128 + which), (end.status, end.err[-2000:])
    assert all(line in SAID for line in end.err.splitlines() if line.strip()), end.err[-2000:]
    assert over or end.status > 0, end.out
    left = names(place.run) if place.run.is_dir() else set()
    assert not [name for name in left if "tmp" in name or "lock" in name], left


def resumed(ground: Ground, place: Place, options: list[str]) -> None:
    """Hold that it goes on to the end of a run that nothing happened to."""
    place.start(None).end().done()
    same(place.run, ground.undisturbed(options)[0], last=True)
