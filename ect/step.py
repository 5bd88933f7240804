"""TrainStep: one update, top to bottom. Every random draw is a pure function of (run seed, step, index in the batch).

So accumulation over micro-batches equals one large batch to fp32 rounding, and a resume needs no generator state.
"""

from __future__ import annotations

import torch
from ect_kernels import philox
from torch import Tensor

from ect.data.augment import AugmentPipe
from ect.data.resident import ImageStream, to_float
from ect.models import EDMPrecond, MaskKey
from ect.objective import Objective
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
        y, augment_labels = self.prepare(images, n0, seed)
        n, device = len(y), y.device
        normal = philox.normal(seed, philox.STREAM_T, n0, n, 1, device).view(n)
        eps = philox.normal(seed, philox.STREAM_EPS, n0, n, y[0].numel(), device).view(y.shape)
        mask = MaskKey(seed, n0)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return self.net(x, sigma, labels, augment_labels, mask)

        return self.objective.train_loss(denoiser, y, normal, eps, stage)

    def prepare(self, images: Tensor, n0: int, seed: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [n, H, W, C] -> (float32 [n, C, H, W] in [-1, 1], flipped and augmented; augmentation labels [n, 9])."""
        n, device = len(images), images.device
        flip = philox.uniform(seed, philox.STREAM_FLIP, n0, n, 1, device).view(n) < 0.5 if self.xflip else None
        y = to_float(images, flip)
        if self.augment is None:
            return y, None
        uniform = philox.uniform(seed, philox.STREAM_AUGMENT_UNIFORM, n0, n, self.augment.uniforms, device)
        normal = philox.normal(seed, philox.STREAM_AUGMENT_NORMAL, n0, n, self.augment.normals, device)
        return self.augment(y, uniform, normal)
