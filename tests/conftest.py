"""Every test runs on one thread: on a busy machine OpenMP spins."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_seed() -> None:
    torch.manual_seed(0)
