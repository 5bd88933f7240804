"""What holds for every test does hold: new memory reads as NaN."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch would choose other kernels")
def test_new_memory_is_nan() -> None:
    like = torch.zeros(3, dtype=torch.float16)
    for made in (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (2,))):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.unwritten
def test_a_mark_leaves_new_memory_alone() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
