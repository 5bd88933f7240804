"""The training of the features of a data set, on its images alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ect.data.stream import to_float
from ect.tangent.augmentation import Augmentation, P
from ect.tangent.network import Features

LR = 1e-3
"""RAdam's rate at the first step; it falls linearly to 0. Align Your Tangent has a constant 1e-4, for 400,000 steps."""
RAMP = 8
"""The probability of the transformations rises over the first eighth of the steps."""
TRIALS = 16
"""Batches, augmented anew, on which the trained features are rated."""


class Trained(NamedTuple):
    """Features with their mean squared error over labels and images, beside the labels' own variance."""

    features: Features
    error: float
    variance: float


def train(images: Tensor, steps: int, batch: int, seed: int, device: torch.device) -> Trained:
    """Train features of uint8 images [N, H, H, C] to regress the labels of their augmentation; deterministic on a CPU.

    Args: batch: images a step, drawn with replacement.
    """
    _, side, _, channels = images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Features(side, channels, norms=True).to(device)
    numbers = torch.Generator().manual_seed(seed)
    strengths = torch.Generator(device).manual_seed(seed)
    augmentation = Augmentation().to(device)

    def sample(p: float) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (batch,), generator=numbers)
        x, labels = augmentation(to_float(images[rows].to(device)), p, strengths)
        return x, labels

    optimizer = torch.optim.RAdam(net.parameters(), LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        x, labels = sample(P * min(1, RAMP * (step + 1) / steps))
        optimizer.zero_grad()
        mse_loss(net(x), labels).backward()
        optimizer.step()
        schedule.step()
    features = net.folded()
    pairs = [(features(x), labels) for x, labels in (sample(P) for _ in range(TRIALS))]
    told, true = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return Trained(features, float(mse_loss(told, true)), float(true.var(0, correction=0).mean()))
