"""The drills of several ranks: two of them in the short form, up to four with --full."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from tests.drills.ranks import RANK_DRILLS

ABSENT = sys.platform == "win32" or not torch.distributed.is_gloo_available()
CASES = [
    pytest.param(case, number, most, id=f"{name} {number}", marks=[pytest.mark.full] if number >= short else [])
    for name, case, short, most in RANK_DRILLS for number in range(most)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(ABSENT, reason="needs torch.distributed with gloo")
@pytest.mark.parametrize(("case", "number", "count"), CASES)
def test_the_others_end(case: Callable[[object, int, int], None], number: int, count: int) -> None:
    case(None, number, count)
