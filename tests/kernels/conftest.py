"""Kernel tests without a GPU: Triton through its interpreter, CUDA through the emulator."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ect_kernels.dispatch import Op


@lru_cache(None)
def load_emulated(name: str) -> None:
    """Backend 'emulated' of one op: csrc/<name>.cu compiled by g++."""
    from ect_kernels.testing import emulator

    try:
        emulator.load(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def need(op: Op, backend: str, device: str, dtype: torch.dtype | None = None) -> torch.device:
    """The device, where this backend of the op runs on it in this dtype; else the test is skipped, with the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if backend == "emulated":
        load_emulated(op.name)
    if (reason := op.why_not(backend, torch.device(device))) is not None:
        pytest.skip(reason)
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16: the emulator's figures count")
    return torch.device(device)
