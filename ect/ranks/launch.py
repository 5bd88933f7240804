"""The begin and the end of an entry point, alone or as one of several processes of torchrun: each message comes once."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ect.config import Config
from ect.errors import UserError
from ect.ranks import interrupts
from ect.ranks.ending import Ending, say
from ect.ranks.heartbeat import Heartbeat
from ect.ranks.paths import refuse_impossible
from ect.ranks.place import Place
from ect.ranks.roster import hello, refusal
from ect.ranks.sentences import parsed, sentence

if TYPE_CHECKING:
    from ect.ranks.distributed import World

T = TypeVar("T")
JOIN = 10
"""Times as long may pass until all ranks have come: they load torch first, perhaps from a disk that they share."""


def launch(parse: Callable[[], T | None], work: Callable[[T, World], int], interrupted: str = "interrupted") -> int:
    """Return the exit status of an entry point: what `work` returns; a UserError's own, 130 after Ctrl-C.

    SIGTERM and SIGHUP are as Ctrl-C, with 143 and 129. Each comes with one message, but before `work` there is none. Of
    several processes, those that are left where one is lost end with the status of `heartbeat.STATUS`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file may have no letter for a name in what is printed
        sys.stdout.reconfigure(errors="backslashreplace")
    with interrupts.answered_by(interrupts.leave), interrupts.read_or_not():
        try:
            place = Place.read()
            return _alone(parse, work, interrupted) if place.size == 1 else _together(place, parse, work, interrupted)
        except UserError as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            return error.status


def _alone(parse: Callable[[], T | None], work: Callable[[T, World], int], interrupted: str) -> int:
    options = _options(parse)
    if options is None:
        return 0
    from ect.ranks.distributed import World  # not earlier: torch takes seconds to import, --help needs none

    try:
        with interrupts.answered_by(interrupts.interrupt):
            return work(options, World())
    except KeyboardInterrupt as error:
        print(interrupted, file=sys.stderr)
        return interrupts.status(error)


def _together(place: Place, parse: Callable[[], T | None], work: Callable[[T, World], int], interrupted: str) -> int:
    if place.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    options, told = _read(parse, place.rank == 0)
    seconds = float(getattr(options, "heartbeat", Config.heartbeat))  # some commands have no option for it
    # Who has nothing to run waits less for the others: it is only to tell them so.
    patience = seconds * (JOIN if options is not None else 1)
    ending = Ending(place, quiet=options is None)
    ending.heartbeat = heartbeat = Heartbeat(place.rank, place.size, told, seconds, patience, ending.of_another)
    from ect.ranks.distributed import Severed, find, start

    try:
        with interrupts.answered_by(interrupts.interrupt):
            ending.store = store = find(place, heartbeat, patience)
            hellos = heartbeat.meet()
            if not hellos:
                raise Severed("another rank ended")
            if (why := refusal(hellos)) is not None:
                status, said = why
                if said and place.rank == 0:
                    say(f"error: {said}")
                heartbeat.leave(after_rank_0=True)
                return status
            world = start(place, store, heartbeat)
            assert options is not None
            ending.interrupted = interrupted
            status = work(options, world)
            world.stop()
            return status
    except (Exception, KeyboardInterrupt) as error:
        status = ending.report(error)
    if options is None:  # and nobody came to hear it
        say(told["said"])
        status = told["status"]
    os._exit(status)  # at once: winding torch.distributed up would wait for the other ranks, which wait for this one


def _read(parse: Callable[[], T | None], first: bool) -> tuple[T | None, dict[str, Any]]:
    """Return the options, and what to tell the other ranks of them. Only rank 0 prints; the others' words are passed on."""
    options, status, said = None, None, io.StringIO()
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(said):
        try:
            options = _options(parse)
            status = 0 if options is None else None
        except UserError as error:
            status = error.status
            print(f"error: {sentence(error)}" if first else sentence(error), file=sys.stderr)
        except SystemExit as error:  # of --help, and of tyro, which says what it refuses
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except Exception:
            status = 1
            traceback.print_exc()
    return options, hello(options, status, said.getvalue().removeprefix("error: "))


def _options(parse: Callable[[], T | None]) -> T | None:
    """Return the options that a command line means. Raises UserError on one that no system can take."""
    options = parsed(parse)
    refuse_impossible(options)
    return options
