"""Stopping cleanly: Ctrl-C, SIGTERM and SIGHUP, heard by one rank and acted upon by all after the same step."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ect.ranks.distributed import World
from ect.ranks.interrupts import answered_by, interrupt

ECHO_SECONDS = 3.0  # within which a second signal under torchrun is the first one again


@dataclass
class StopSignal:
    """A flag that Ctrl-C, SIGTERM or SIGHUP sets; the loop looks at it after each step.

    Ranks hear a signal at different steps, or not at all: what one of them heard, all act upon after the same step
    (`heard`).
    """

    requested: bool = False
    world: World = World()

    def heard(self) -> bool:
        """Return whether any rank was asked to stop; a call by all ranks.

        It costs a round trip between the hosts (on a GPU while it works on the step just launched), and so ranks never
        drift apart, and a lost one is noticed in the next step.
        """
        return self.world.any(self.requested)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Catch the signals inside the block.

        A second one raises KeyboardInterrupt, for a user in a hurry; under torchrun it must come later, for torchrun
        answers one Ctrl-C with SIGINT and SIGTERM to each process.
        """
        first = 0.0

        def handler(number: int, frame: FrameType | None) -> None:
            nonlocal first
            if not self.requested:
                self.requested, first = True, time.monotonic()
                if self.world.rank == 0:
                    with contextlib.suppress(
                        OSError, RuntimeError
                    ):  # the terminal is gone; a line of its own is under way
                        print(
                            "\nstopping after this step and saving; once more quits at once",
                            file=sys.stderr,
                            flush=True,
                        )
            elif self.world.size == 1 or time.monotonic() > first + ECHO_SECONDS:
                interrupt(number, frame)

        with answered_by(handler):
            yield
