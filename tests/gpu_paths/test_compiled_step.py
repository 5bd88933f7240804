"""The step of DDPM++ under torch.compile, counted: bars on its launches and on the bytes that it moves."""

from __future__ import annotations

import pytest

from tests.gpu_paths import test_inductor  # noqa: F401  (skips where torch has other internals)
from tests.gpu_paths.processes import ask


@pytest.mark.full
def test_the_compiled_step_launches_and_moves_no_more_than_the_eager_one_may(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """128 images in fp16; tests/test_footprint.py holds the same bars for the eager step."""
    found = ask("compiled_step", {})
    with capsys.disabled():
        print(f"\nDDPM++, 128 images, fp16, counted: {found}")
    assert found["launches"]["compiled"] <= 700 and found["launches"]["eager"] <= 700
    assert found["norm to concat, GB"]["compiled"] <= 22
