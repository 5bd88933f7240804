"""Steps under torch.compile, counted: bars on DDPM++'s launches and bytes, and why EDM2 has no ops of its own."""

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


@pytest.mark.full
def test_ops_by_hand_would_save_less_than_a_tenth_of_edm2(capsys: pytest.CaptureFixture[str]) -> None:
    """EDM2-S, 128 images in fp16, even if they fused all that the compiler has left between the library's kernels."""
    found = ask("compiled_step", {"preset": "imagenet64-s"})
    with capsys.disabled():
        print(f"\nEDM2-S, 128 images, fp16, counted: {found}")
    fused = sum(found["if all were fused, GB"].values())
    assert found["between convolutions, at least, GB"] < fused < found["Inductor's own, GB"]
    assert found["Inductor's own, GB"] - fused < 0.1 * found["GB"]["compiled"]
