"""The last words of several processes, of which one is lost, fails, or is told to end: one of them speaks for all."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from typing import Any

from ect.errors import UserError
from ect.ranks import interrupts
from ect.ranks.heartbeat import ANSWER, End, Heartbeat
from ect.ranks.place import Place
from ect.ranks.sentences import sentence

GRACE = 5.0
"""Seconds in which a process ends by itself, as a wait for the lost rank fails; after them it is ended."""


def say(text: str) -> None:
    """Print on stderr what is not empty, if anybody reads it: a terminal that is gone must not keep a process from its end."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, end="\n" if text else "", flush=True)


class Ending:
    """Says once why this process ends, if it is for this one to say.

    quiet: it has nothing to run, and no loss concerns it. interrupted: what to say of a signal.
    """

    def __init__(self, place: Place, quiet: bool = False) -> None:
        self.place, self.quiet, self.interrupted = place, quiet, ""
        self.heartbeat: Heartbeat | None = None
        self.store: Any = None
        self._lock, self._told = threading.Lock(), False

    def of_another(self, end: End) -> None:
        """Say what became of another rank, and end this process: in the heartbeat's thread, since the main one may wait."""
        deadline = time.monotonic() + GRACE
        try:
            self.tell(end)
            time.sleep(max(deadline - time.monotonic(), 0.0))
        finally:
            os._exit(end.status)

    def report(self, error: BaseException) -> int:
        """Say why this rank ends, unless another one ended before, and return the exit status. The main thread calls it."""
        from ect.ranks.distributed import Severed

        assert self.heartbeat is not None
        # torchrun ends all where one has ended: not this one before it has spoken.
        interrupts.install(lambda number, frame: None)
        rank, size, status = self.place.rank, self.place.size, 1
        if isinstance(error, UserError):
            status = error.status
        elif isinstance(error, KeyboardInterrupt):
            status = interrupts.status(error)
        severed = isinstance(error, Severed)
        # A closed connection is soon known to be a lost rank's.
        end = self.heartbeat.first_end(GRACE) if severed else None
        if end is None:
            expected = isinstance(error, (UserError, KeyboardInterrupt))
            end = self.heartbeat.report(End(rank, "told" if expected else "failed", status))
        if end.rank != rank or end.how == "lost":
            self.tell(end)
        elif self.quiet:
            pass
        elif severed:
            what = f"rank {rank} of {size}: an exchange failed, though all ranks beat ({error})"
            say(f"error: {what}; {self.heartbeat.way_back()}")
            self.heartbeat.record("failed", what)
        elif end.how == "told":
            say(self.interrupted if isinstance(error, KeyboardInterrupt) else f"error: {sentence(error)}")
        else:
            text = "".join(traceback.format_exception(error))
            say(f"rank {rank} of {size} failed:\n{text.rstrip()}")
        return end.status

    def tell(self, end: End) -> None:
        """Say, once for all ranks where that can be, that one is lost or has failed. Of one that was told to end, nothing."""
        assert self.heartbeat is not None
        with self._lock:
            if self._told:
                return
            self._told = True
            if self.quiet or not self._speaks(end):
                return
            told = {
                "lost": end.text,
                "failed": "failed, as its traceback says",
                "told": f"ended with status {end.status}",
            }
            what = f"rank {end.rank} of {self.place.size} {told[end.how]}"
            if end.how != "told":
                say(f"error: {what}; {self.heartbeat.way_back()}")
            by_signal = end.how == "told" and end.status > 128
            self.heartbeat.record("stop" if by_signal else "lost" if end.how == "lost" else "failed", what)

    def _speaks(self, end: End) -> bool:
        """Return whether this rank speaks: rank 0, or where that is the lost one, the first that asks a launcher's store.

        A store that rank 0 kept went with it: then each rank speaks. So does one that was stopped, and goes on without the
        others.
        """
        if self.place.rank == 0 or end.rank == self.place.rank:
            return True
        if end.rank != 0:
            return False
        if end.how != "lost" or not self.place.served:
            return end.how == "lost"
        from ect.ranks.distributed import bounded

        mine = str(self.place.rank)
        key = f"ect/speaks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            return bounded(lambda: self.store.compare_set(key, "", mine).decode(), ANSWER) == mine
        except (RuntimeError, OSError):
            return True
