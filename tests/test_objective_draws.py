"""What a denoiser draws from torch's own generator in the two passes of a training pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ect.objective import ConsistencyObjective


@pytest.mark.parametrize("share", [True, False])
def test_only_a_denoiser_without_a_key_shares_its_draws(share: bool) -> None:
    """A step's denoiser holds its key itself, and the generators' states, kept aside, could not be captured into a graph."""
    y, normal, eps = torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.randn(2, 1, 4, 4)
    objective, drawn = ConsistencyObjective(), []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        drawn.append(torch.rand(()).item())
        return x

    if share:
        t = torch.ones(2)
        objective.loss(denoiser, y, t, t / 2, eps)
    else:
        objective.train_loss(denoiser, y, normal, eps, 0)
    assert len(drawn) == 2 and (drawn[0] == drawn[1]) is share
