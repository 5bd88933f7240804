"""TrainStep: one update, top to bottom. Every random draw is a pure function of (run seed, step, index in the batch).

So accumulation over micro-batches equals one large batch to fp32 rounding, and a resume needs no generator state.
"""

from __future__ import annotations

import torch
from ect_kernels import philox
from ect_kernels.consistency_loss import consistency_loss
from ect_kernels.perturb import perturb
from torch import Tensor

from ect.data.augment import AugmentPipe
from ect.data.resident import ImageStream, to_float
from ect.models import EDMPrecond, MaskKey, fused
from ect.objective import WEIGHTINGS, ConsistencyObjective, Objective
from ect.optim import FlatState


class TrainStep:
    """Calling it with (nimg, stage) trains on the images nimg ... nimg + batch of the stream and returns the mean loss.

    Args: net: preconditioned network in train mode whose parameters `state` holds. objective: what to minimise. stream:
    uint8 images by global index. seed: the run's. batch, micro_batch: images an update, and a forward pass. xflip: flip
    half the images. augment: probability of EDM's augmentations, 0 for none.
    """

    def __init__(
        self, net: EDMPrecond, objective: Objective, state: FlatState, stream: ImageStream, *,
        seed: int, batch: int, micro_batch: int | None = None, xflip: bool = False, augment: float = 0.0,
    ) -> None:  # fmt: skip
        self.net, self.objective, self.state, self.stream = net, objective, state, stream
        self.seed, self.batch, self.micro_batch = seed, batch, micro_batch or batch
        self.xflip = xflip
        self.augment = AugmentPipe(augment).to(state.params.device) if augment > 0 else None

    def __call__(self, nimg: int, stage: int) -> Tensor:
        self.state.zero_grad()
        device = self.state.params.device
        # The run's seed is the high half of the Philox key, the step number the low half.
        seed = torch.tensor((self.seed << 32) | (nimg // self.batch), device=device)
        total = torch.zeros((), device=device)
        for n0 in range(0, self.batch, self.micro_batch):
            loss = self.loss(nimg, n0, seed, stage).sum() / self.batch
            loss.backward()
            total += loss.detach()
        self.state.step()
        return total

    def loss(self, nimg: int, n0: int, seed: Tensor, stage: int) -> Tensor:
        """Per-sample loss [micro_batch] of the images nimg + n0 ..."""
        images, labels = self.stream.batch(nimg + n0, self.micro_batch)
        if (
            self.augment is None
            and isinstance(self.objective, ConsistencyObjective)
            and fused.wanted(self.net.runs_on_ops, self.state.params)
        ):
            return self.fused_loss(self.objective, images, labels, n0, seed, stage)
        y, augment_labels = self.prepare(images, n0, seed)
        n, device = len(y), y.device
        normal = philox.normal(seed, philox.STREAM_T, n0, n, 1, device).view(n)
        eps = philox.normal(seed, philox.STREAM_EPS, n0, n, y[0].numel(), device).view(y.shape)
        mask = MaskKey(seed, n0)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return self.net(x, sigma, labels, augment_labels, mask)

        return self.objective.train_loss(denoiser, y, normal, eps, stage)

    def fused_loss(
        self, objective: ConsistencyObjective, images: Tensor, labels: Tensor | None, n0: int, seed: Tensor, stage: int
    ) -> Tensor:
        """What objective.train_loss computes, on the ops: from uint8 images to the U-Net's inputs, and from its outputs to loss
        and gradient, in one launch each. A test holds the two equal."""
        n, device, sigma_data = len(images), images.device, objective.sigma_data
        t = (objective.P_mean + objective.P_std * philox.normal(seed, philox.STREAM_T, n0, n, 1, device).view(n)).exp()
        r = objective.mapping(t, stage)
        in_t, in_r, x_t, x_r = perturb(images, t, r, sigma_data, seed, n0=n0, flip=self.flips(n, n0, seed))
        mask, unet = MaskKey(seed, n0), self.net.model
        F_t = unet(in_t, t.log() / 4, labels, None, mask)
        with torch.no_grad():
            F_r = unet(in_r, torch.where(r > 0, r, torch.ones_like(r)).log() / 4, labels, None, mask)
        weight = WEIGHTINGS[objective.weighting](t, r, sigma_data)
        return consistency_loss(F_t, F_r, x_t, x_r, t, r, weight, objective.c, sigma_data)

    def flips(self, n: int, n0: int, seed: Tensor) -> Tensor | None:
        """Which images to mirror, bool [n]; None: none."""
        if not self.xflip:
            return None
        return philox.uniform(seed, philox.STREAM_FLIP, n0, n, 1, seed.device).view(n) < 0.5

    def prepare(self, images: Tensor, n0: int, seed: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [n, H, W, C] -> (float32 [n, C, H, W] in [-1, 1], flipped and augmented; augmentation labels [n, 9])."""
        n, device = len(images), images.device
        y = to_float(images, self.flips(n, n0, seed))
        if self.augment is None:
            return y, None
        uniform = philox.uniform(seed, philox.STREAM_AUGMENT_UNIFORM, n0, n, self.augment.uniforms, device)
        normal = philox.normal(seed, philox.STREAM_AUGMENT_NORMAL, n0, n, self.augment.normals, device)
        return self.augment(y, uniform, normal)
