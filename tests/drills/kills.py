"""SIGKILL at a random moment of a run, or within one of its writes; then a resume, to the same end."""

from __future__ import annotations

import random
import signal
import time

from tests.drills.equal import same
from tests.drills.runs import PLAIN, WHOLE, Fault, Ground


def kill(ground: Ground, number: int, count: int) -> None:
    """Kill a run once, every fifth one twice. Half of the moments are times, some of them of a new process, half are writes."""
    dice = random.Random(f"kill {number}")
    options = WHOLE if number % 4 == 1 else PLAIN
    want, whole = ground.undisturbed(options)
    with ground.place() as place:
        if number % 2:
            at = dice.randint(1, len(whole.changes))
            end = place.start(options, Fault(at, signal.SIGKILL)).end()
        else:
            real = number % 10 == 0
            lasts = whole.seconds if real else ground.seconds(options)
            run = place.start(options, real=real)
            time.sleep(dice.uniform(0, lasts))
            run.send(signal.SIGKILL)
            end = run.end()
        assert end.status in (-signal.SIGKILL, 0)  # 0: it was faster than the one before
        if number % 5 == 0:
            again = place.start(None, Fault(dice.randint(1, 40), signal.SIGKILL)).end()
            assert again.status in (-signal.SIGKILL, 0), again.err
        place.start(None).end().done()
        same(place.run, want)
