"""Guidance: a denoiser's answer, moved away from a weaker one's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ect.errors import UserError
from ect.models.precond import EDMPrecond


class Guided(nn.Module):
    """D_w + weight (D - D_w), of a denoiser D and a weaker one D_w, with the call of an EDMPrecond, at twice its cost.

    The weaker one is `guide`, else the same network without its class: 0 is the weaker one, 1 is D, above 1 is beyond it. A
    guide without classes gets none. Sources: Ho & Salimans, 2022 (classifier-free guidance, arXiv 2207.12598); Karras et al.,
    2024 (autoguidance, by a worse version of the network, arXiv 2406.02507).
    """

    def __init__(self, net: EDMPrecond, weight: float, guide: EDMPrecond | None = None) -> None:
        super().__init__()
        self.net, self.weight, self.guide = net, weight, guide

    @property
    def img_resolution(self) -> int:
        return self.net.img_resolution

    @property
    def img_channels(self) -> int:
        return self.net.img_channels

    @property
    def label_dim(self) -> int:
        return self.net.label_dim

    def forward(
        self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        D = self.net(x, sigma, class_labels, augment_labels)
        if self.guide is None:
            weak = self.net(x, sigma, None, augment_labels)
        else:
            weak = self.guide(x, sigma, class_labels, augment_labels)
        return torch.lerp(weak, D, self.weight)


def guided(net: EDMPrecond, weight: float, guide: EDMPrecond | None, option: str) -> Guided:
    """Return a diffusion model guided as an option of this name says.

    Raises UserError, which names the option, where the model or the guide is a consistency model, the two are of other images
    or classes, or without a guide the model has no answer of its own to move away from.
    """
    asked = f"{option} {weight:g}"
    if any(one is not None and one.is_consistency for one in (net, guide)):
        raise UserError(
            f"{asked}: guidance is of diffusion models, and {'this' if net.is_consistency else 'the guide'} is a "
            "consistency model; distil a guided one, with --objective.guidance"
        )
    if guide is None:
        if not net.label_dim:
            raise UserError(
                f"{asked}: the model is unconditional, so it has no answer without a class to be moved away from; give a "
                "weaker model with --guide, or leave the option out"
            )
        if not getattr(net.model, "label_dropout", 0.0):
            raise UserError(
                f"{asked}: the model was trained without --net.label-dropout, so it knows no answer without a class; train it "
                "with one such as .1, or give a weaker model with --guide"
            )
        return Guided(net, weight)
    theirs, ours = ((one.img_channels, one.img_resolution, one.label_dim) for one in (guide, net))
    if theirs[:2] != ours[:2] or theirs[2] not in (0, ours[2]):
        channels, size, classes = theirs
        raise UserError(
            f"{asked}: the guide makes {size}x{size} images of {channels} channel(s) and {classes} classes, the model "
            f"{ours[1]}x{ours[1]} of {ours[0]} and {ours[2]}; give a guide of the same images and classes, or of no classes"
        )
    return Guided(net, weight, guide)
