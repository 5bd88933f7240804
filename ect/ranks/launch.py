"""The begin and the end of an entry point, alone or as one of several processes of torchrun: each message comes once."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ect.errors import UserError
from ect.ranks import interrupts
from ect.ranks.paths import refuse_impossible
from ect.ranks.sentences import parsed, sentence

if TYPE_CHECKING:
    from ect.ranks.distributed import World

T = TypeVar("T")


def launch(parse: Callable[[], T | None], work: Callable[[T, World], int], interrupted: str = "interrupted") -> int:
    """Return the exit status of an entry point: what `work` returns; a UserError's own, 130 after Ctrl-C.

    SIGTERM and SIGHUP are as Ctrl-C, with 143 and 129. Each comes with one message, but before `work` there is none.
    """
    with interrupts.answered_by(interrupts.leave), interrupts.read_or_not():
        return _launch(parse, work, interrupted)


def _launch(parse: Callable[[], T | None], work: Callable[[T, World], int], interrupted: str) -> int:
    rank, size = rank_and_size()
    first = rank == 0
    if not first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    try:
        # All ranks read the same command line, and would answer the same.
        with contextlib.nullcontext() if first else contextlib.redirect_stderr(sys.stdout):
            options = parsed(parse)
            if options is None:
                return 0
            refuse_impossible(options)
            from ect.ranks.distributed import start  # not earlier: torch takes seconds to import, --help needs none

            world = start(rank, size)
    except UserError as error:
        if first:
            print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    try:
        with interrupts.answered_by(interrupts.interrupt):
            status = work(options, world)
            world.stop()
            return status
    except (Exception, KeyboardInterrupt) as error:
        status = _report(error, world, interrupted)
    if world.size > 1:  # at once: winding torch.distributed up would wait for the other ranks, which wait for this one
        sys.stderr.flush()
        os._exit(status)
    return status


def rank_and_size() -> tuple[int, int]:
    """Return this process's number among those of torchrun, and how many they are; (0, 1) without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    return (int(os.environ["RANK"]), size) if size > 1 else (0, 1)


def _report(error: BaseException, world: World, interrupted: str) -> int:
    """Say why this rank ends, unless another one failed before and this is the consequence; returns the exit status."""
    mendable = isinstance(error, UserError)
    expected = mendable or isinstance(error, KeyboardInterrupt)
    if world.size == 1 and not expected:
        raise error
    before = world.failed("told" if expected else "crashed")
    if before is None and expected:
        print(f"error: {sentence(error)}" if mendable else interrupted, file=sys.stderr)
    elif before is None:
        text = "".join(traceback.format_exception(error))
        print(f"rank {world.rank} of {world.size} failed:\n{text}", file=sys.stderr, end="")
    elif before == "crashed":
        reason = (str(error).splitlines() or [""])[0]
        print(f"rank {world.rank} ended after it: {type(error).__name__}: {reason}", file=sys.stderr)
    if isinstance(error, UserError):
        return error.status
    return interrupts.status(error) if isinstance(error, KeyboardInterrupt) else 1
