"""A run folder that two processes want, and a clock that was set back."""

from __future__ import annotations

import random
import signal
import socket
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.drills.equal import names, same
from tests.drills.runs import PLAIN, RESUME, Fault, Ground


def two(ground: Ground, number: int, count: int) -> None:
    """Start a second process in the folder of a first one, at a random moment; or both at once."""
    dice = random.Random(f"two {number}")
    want, _ = ground.undisturbed(PLAIN)
    with ground.place() as place:
        if number % 3 == 2:
            _at_once(ground, place.folder.name)
            return
        first = place.start(PLAIN)
        while not (place.run / "config.json").exists():
            time.sleep(0.01)
        time.sleep(dice.uniform(0, ground.seconds(PLAIN) / 4))
        first.send(signal.SIGSTOP)
        if first.status() is None and (place.run / "lock").exists():
            before = names(place.run)
            with ground.place() as elsewhere:
                options = RESUME if number % 3 == 0 else PLAIN
                run_dir = [] if options == RESUME else ["--run-dir", str(place.run)]
                given = ["--resume", str(place.run)] if options == RESUME else [*PLAIN, *run_dir]
                said = elsewhere.start(given).end().refused()
            if options == RESUME:
                assert f"host {socket.gethostname()}, process {first.pid}" in said
            assert names(place.run) == before
        first.send(signal.SIGCONT)
        end = first.end()
        end.done()
        same(place.run, want)


def _at_once(ground: Ground, name: str) -> None:
    want, _ = ground.undisturbed(PLAIN)
    with ground.place() as one, ground.place() as other:
        options = [*PLAIN, "--run-dir", str(one.run)]
        runs = [place.start(options) for place in (one, other)]
        ends = [run.end() for run in runs]
        assert sorted(end.status for end in ends) == [0, 2], [end.err for end in ends]
        for end in ends:
            end.done() if end.status == 0 else end.refused()
        assert names(one.run) == names(want)


def clock(ground: Ground, number: int, count: int) -> None:
    """Set the clock back while a run trains, kill it, and set the clock further back for the resume."""
    dice = random.Random(f"clock {number}")
    want, whole = ground.undisturbed(PLAIN)
    with ground.place() as place:
        fault = Fault(dice.randint(40, len(whole.changes)), signal.SIGKILL)
        end = place.start(PLAIN, fault, back=(dice.randint(1, 30), 3600.0)).end()
        assert end.status in (-signal.SIGKILL, 0)
        place.start(None, back=(1, 86400.0 * (1 + 365 * (number % 2)))).end().done()
        same(place.run, want)
        steps = [[event.step for event in _scalars(folder)] for folder in (place.run, want)]
        assert steps[0] == steps[1]


def _scalars(folder: object) -> list:  # type: ignore[type-arg]
    board = EventAccumulator(str(folder))
    board.Reload()
    return list(board.Scalars("loss"))
