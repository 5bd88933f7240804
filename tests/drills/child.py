"""A run of ect.train in a process that is forked off one which has imported everything: a start costs a tenth of a new one."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import rich._emoji_codes  # noqa: F401
import torch._dynamo  # which the first optimizer imports
import torch.utils.tensorboard  # noqa: F401
import typeguard._transformer  # noqa: F401

import ect.job  # noqa: F401
from ect.cost import memory
from ect.ranks import interrupts
from ect.train import main
from tests import predictions

PIL.Image.init()
NOBODY = 65534
gc.freeze()  # what all children share is not walked, and so not copied


@dataclass(frozen=True)
class Orders:
    """What a child does: `python -m ect.train` with these options, in this folder.

    drill: for preload.c, "" for nothing. as_nobody: without the rights of root. back: (n, seconds): from the n-th look at it
    on, the clock of the wall is so far behind.
    """

    options: list[str]
    folder: Path
    out: str
    err: str
    drill: str = ""
    as_nobody: bool = False
    back: tuple[int, float] | None = None


def train(orders: Orders) -> None:
    """Be the child. The prediction of memory, which writes nothing and costs half of the time, is left out."""
    os.chdir(orders.folder)
    for name, descriptor in ((orders.out, 1), (orders.err, 2)):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.install(interrupts.leave)  # as ect.train does before its imports
    memory.predict = predictions.nothing
    if orders.back is not None:
        time.time = _late(*orders.back)  # type: ignore[assignment]
    if orders.as_nobody and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if orders.drill:
        ctypes.CDLL(None).drill_arm(orders.drill.encode())
    sys.exit(main(orders.options))


def _late(look: int, seconds: float) -> Any:
    true, looks = time.time, 0

    def late() -> float:
        nonlocal looks
        looks += 1
        return true() - (seconds if looks >= look else 0.0)

    return late
