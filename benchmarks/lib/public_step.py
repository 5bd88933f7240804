"""The update of the public ECT code, operation by operation: the first row of benchmarks/step_time.py.

This is our own code, written from the published formulas and from facts about what the public trainer does at each step, in its
order; no line of it was copied. In each step the student runs in NCHW with F.dropout; the generator is set back, so that
the teacher draws the same masks; one value is read on the host, to leave the teacher out where every r is 0; gradients are
cleaned one parameter at a time; torch.optim.RAdam steps as its defaults have it, on a CPU one parameter at a time; and
the weight average moves one parameter at a time. Where the formulas leave a choice, public_net.py takes the faster one, so
this row may be faster than the public code itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import record_function

from ect.objective import ConsistencyObjective
from lib.public_net import Denoiser


class PublicStep:
    """Calling it with (nimg, stage) trains on `batch` images of `images`, uint8 [N, H, W, C] on the host, and returns the loss.

    Args: net: on its device. objective: whose numbers count; the formulas are written here. Raises ValueError where it has
    other formulas than the public recipe for CIFAR-10.
    """

    def __init__(
        self, net: Denoiser, objective: ConsistencyObjective, images: Tensor, *, batch: int, lr: float,
        betas: tuple[float, float], ema_beta: float,
    ) -> None:  # fmt: skip
        public = objective.weighting == "inverse_gap" and objective.mapping.kind == "sigmoid"
        if not public or objective.mapping.min_gap or type(objective) is not ConsistencyObjective:
            raise ValueError(
                "the public step knows ECT with the weighting 'inverse_gap' and the mapping 'sigmoid' alone"
            )
        self.net, self.objective, self.images, self.batch, self.ema_beta = (
            net.train(),
            objective,
            images,
            batch,
            ema_beta,
        )
        self.parameters = list(net.parameters())
        self.device = self.parameters[0].device
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.RAdam(self.parameters, lr=lr, betas=betas, eps=1e-8)

    def __call__(self, nimg: int, stage: int) -> Tensor:
        index = torch.arange(nimg, nimg + self.batch) % len(self.images)
        y = self.images[index].permute(0, 3, 1, 2).contiguous().to(self.device).to(torch.float32) / 127.5 - 1
        return self.update(y, torch.randn(self.batch, device=self.device), torch.randn_like(y), stage)

    def update(self, y: Tensor, normal: Tensor, eps: Tensor, stage: int) -> Tensor:
        """Update once on images y [N, C, H, W] in [-1, 1], with standard normal numbers normal [N], and eps like y."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(y, normal, eps, stage).mean()
        loss.backward()
        with record_function("optimizer"), torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
            self.optimizer.step()
            for p, average in zip(self.parameters, self.ema, strict=True):
                average.copy_(p.detach().lerp(average, self.ema_beta))
        return loss.detach()

    def loss(self, y: Tensor, normal: Tensor, eps: Tensor, stage: int) -> Tensor:
        """Return |D(x_t, t) - D(x_r, r)| / (t - r) of each image, [N], with the pseudo-Huber constant in the norm."""
        o, m = self.objective, self.objective.mapping
        t = (normal * o.P_std + o.P_mean).exp()
        r = (t * (1 - m.q ** -(stage + 1) * (1 + m.k * torch.sigmoid(-m.b * t)))).clamp(min=0)
        x_t, x_r = y + t.view(-1, 1, 1, 1) * eps, y + r.view(-1, 1, 1, 1) * eps
        before = self.generator()
        D_t, target = self.net(x_t, t), y
        if bool((r > 0).any()):
            self.set_generator(before)
            with torch.no_grad():
                D_r = torch.nan_to_num(self.net(x_r, r))  # ln 0 makes a row with r = 0 nan
            target = torch.where((r > 0).view(-1, 1, 1, 1), D_r, y)
        squares = (D_t - target).square().flatten(1).sum(1)
        return ((squares + o.c**2).sqrt() - o.c) / (t - r)

    def generator(self) -> Tensor:
        """Return the state of the generator that dropout on the network's device draws from."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def set_generator(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    def tensors(self) -> list[Tensor]:
        """Return everything that lives from step to step."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return [*self.parameters, *self.ema, *moments, *grads]
