"""The posterior target: x_t is paired with where the ODE of the training images themselves leads from it."""

from __future__ import annotations

import torch
from torch import Tensor

from ect.data.stream import to_float
from ect.objectives.distillation import ConsistencyDistillation

CHUNK = 2**24
"""Values of the images that are floats at a time: 64 MB."""
_NEVER = -1e38  # the logarithm of no weight; finite, so that a difference of two is a number


class PosteriorMean:
    """The denoiser of the training images: E[y | x] where y is one of them, each as likely, and x = y + sigma eps.

    xbar = sum_i w_i x_i, w = softmax_i(-||x - x_i||^2 / (2 sigma^2)). With flips every image counts with its mirror image; with
    labels those of the row's own class alone. The sum is over all images, as many at a time as CHUNK allows; products are
    fp32, or TF32 where the run has it. Source: Xu et al., 2023, "Stable target field" (arXiv 2302.00670), of all the data.

    Args: images: uint8 [M, H, W, C] on the device, read at each call. labels: one-hot [M, L], or None. flips: as said.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, flips: bool = False) -> None:
        self.images, self.flips = images, flips
        self.classes = None if labels is None else labels.argmax(1)

    def __call__(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Return xbar, fp32 [N, C, H, W], of images x, likewise, at levels sigma [N] > 0.

        class_labels: one-hot [N, L], where there are labels. augment_labels: None, since augmented images are not the data's.
        """
        if augment_labels is not None:
            raise ValueError("the posterior over the training images knows no augmented ones")
        views = (
            [x, x.flip(3)] if self.flips else [x]
        )  # x and a mirror image are as far apart as x mirrored and the image
        queries = torch.stack(views).flatten(2)  # [views, N, C H W]
        precision = (1 / sigma.to(queries.dtype) ** 2).view(-1, 1)
        top = queries.new_full((len(x), 1), _NEVER)
        total, mean = torch.zeros_like(top), torch.zeros_like(queries)
        rows = max(CHUNK // queries.shape[2], 1)
        for first in range(0, len(self.images), rows):
            data = to_float(self.images[first : first + rows]).flatten(1)
            logits = precision * (queries @ data.T - data.square().sum(1) / 2)
            if self.classes is not None and class_labels is not None:
                other = self.classes[first : first + rows] != class_labels.argmax(1, keepdim=True)
                logits = logits.masked_fill(other, _NEVER)
            before, top = top, torch.maximum(top, logits.amax((0, 2)).view(-1, 1))
            kept, weights = (before - top).exp(), (logits - top).exp()
            total = kept * total + weights.sum((0, 2)).view(-1, 1)
            mean = kept * mean + weights @ data
        means = (mean / total).view(len(views), *x.shape)
        return means[0] + means[1].flip(3) if self.flips else means[0]


class PosteriorTarget(ConsistencyDistillation):
    """ECT with x_r one Euler step from x_t along the ODE of the training images, x_r = x_t + (r - t) (x_t - xbar) / t.

    It is consistency distillation whose teacher is `PosteriorMean`: exact, and of less variance than one image's own noise
    where several images explain x_t. Where r = 0 the target is xbar. Source: Wang et al., 2024, "Stable consistency tuning"
    (arXiv 2410.18958).

    There is no fast form, as for distillation: the op `perturb` makes x_r from the image and the noise.
    """

    wants_teacher = False
    wants_data = True
