"""Hypothesis on every reader, the same files each time: `make fuzz` takes others, for longer."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ect.errors import UserError
from tests.fuzz.bounded import bounded
from tests.fuzz.readers import READERS, explore

EXAMPLES = dict.fromkeys(READERS, 100) | {"configs": 60, "arrays": 60, "cells": 60}
WANTED = {
    "snapshots",
    "weights",
    "model_files",
    "zips",
    "labels",
    "tarballs",
    "idx",
    "configs",
    "checkpoints",
    "seeds",
    "arrays",
    "cells",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches memory by /proc")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_or_reads_what_is_spoilt(name: str, tmp_path: Path) -> None:
    taken = explore(name, tmp_path, EXAMPLES[name])
    assert 0 < taken < EXAMPLES[name], "of spoilt files some are still whole, and some are not"


def test_every_kind_is_there() -> None:
    assert set(READERS) == WANTED


@pytest.mark.slow
def test_the_watch_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> None:
        raise UserError(text)

    def forever() -> None:
        while True:
            pass

    def execute() -> None:
        import os

        os.system("true")

    assert bounded(lambda: 3) is None and bounded(lambda: refuse("no such file")) == "no such file"
    for fault, said in [
        (lambda: refuse("y" * 10**6), None),
        (lambda: np.ones(1_200 << 20, np.uint8), "MB above"),
        (execute, "executed"),
        (lambda: {}["a"], "a"),
    ]:
        if said is None:
            assert bounded(fault)  # cut to a line
            continue
        with pytest.raises((AssertionError, KeyError), match=said):
            bounded(fault)
    begin = time.process_time()
    monkeypatch.setattr("tests.fuzz.bounded.SECONDS", 0.2)
    with pytest.raises(AssertionError, match=r"more than 0\.2 s"):
        bounded(forever)
    assert time.process_time() - begin < 2 and signal.getitimer(signal.ITIMER_PROF) == (0, 0)
