"""Kernel tests without a GPU: Triton through its interpreter, CUDA through the emulator. Set before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def load_emulated(name: str) -> None:
    """Backend 'emulated' of one op: csrc/<name>.cu compiled by g++."""
    import emulator

    try:
        emulator.load(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
