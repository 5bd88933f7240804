"""The update of the public design in plain PyTorch, on this project's networks: `plain` of benchmarks/step_time.py.

Our own implementation, on the same network as everything else (its plain forward pass), of what the public ECT trainer does at
each step: images come from the host; the teacher repeats the student's dropout by setting the generators back; gradients are
cleaned one parameter at a time; torch.optim.RAdam steps; the weight average is updated one parameter at a time. It is kinder
than the public code in three places: attention is PyTorch's fused one, biases are added inside the convolutions, and no
value is read on the host to see whether any r is 0.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from ect_kernels.levels import noise_level
from torch import Tensor, nn
from torch.profiler import record_function

from ect.models import EDMPrecond
from ect.models.layers import UNetBlock
from ect.objective import ConsistencyObjective

LOSS_SCALE = 2.0**10


class Updates:
    """torch.optim.RAdam (its multi-tensor form) and a weight average, with a Python loop over parameters before and after."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], ema_beta: float
    ) -> None:
        self.parameters, self.ema_beta = list(parameters), ema_beta
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.RAdam(self.parameters, lr=lr, betas=betas, foreach=True)

    def step(self) -> None:
        """Update the parameters from the gradients in .grad."""
        with record_function("optimizer"), torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
            self.optimizer.step()
            for p, average in zip(self.parameters, self.ema, strict=True):
                average.copy_(p.detach().lerp(average, self.ema_beta))

    def tensors(self) -> list[Tensor]:
        """Return everything that lives from step to step."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return [*self.parameters, *self.ema, *moments, *grads]


class PlainStep:
    """Calling it with (nimg, stage) trains on `batch` images of `images`, uint8 [N, H, W, C] on the host, and returns the loss.

    Args: net: on its device, in train mode; its dropout becomes torch's. half: run under autocast to fp16 with a loss scale.
    channels_last: memory order of weights and images.
    """

    def __init__(
        self, net: EDMPrecond, objective: ConsistencyObjective, images: Tensor, *, batch: int, lr: float,
        betas: tuple[float, float], ema_beta: float, half: bool = False, channels_last: bool = False,
    ) -> None:  # fmt: skip
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = torch_dropout(net).to(memory_format=self.format)
        self.net.model.on_ops = False
        self.objective, self.images, self.batch, self.half = objective, images, batch, half
        self.device = next(net.parameters()).device
        self.updates = Updates(list(self.net.parameters()), lr, betas, ema_beta)

    def __call__(self, nimg: int, stage: int) -> Tensor:
        index = torch.arange(nimg, nimg + self.batch) % len(self.images)
        y = self.images[index].to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        y = y.contiguous(memory_format=self.format)
        normal, eps = torch.randn(self.batch, device=self.device), torch.randn_like(y)
        t = noise_level(normal, self.objective.P_mean, self.objective.P_std)
        r = self.objective.mapping(t, stage)
        self.updates.optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast(self.device.type, torch.float16) if self.half else nullcontext()
        with autocast:
            loss = self.objective.loss(self.net, y, t, r, eps).mean()
        (loss * LOSS_SCALE if self.half else loss).backward()
        if self.half:
            with record_function("optimizer"):
                torch._foreach_div_([p.grad for p in self.updates.parameters if p.grad is not None], LOSS_SCALE)
        self.updates.step()
        return loss.detach()

    def tensors(self) -> list[Tensor]:
        return self.updates.tensors()


class ParameterState:
    """An optimizer state for ect.step.TrainStep in the public design: the `+fused ops` row, before the flat arenas.

    Args: net: as for FlatState. half: dtype of the `core` weights in `compute`, a twin; they are rounded anew after
    each step.
    """

    def __init__(
        self, net: EDMPrecond, *, lr: float, betas: tuple[float, float], ema_beta: float,
        half: torch.dtype | None = None, core: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.net = net
        self.updates = Updates(list(net.parameters()), lr, betas, ema_beta)
        self.params = self.updates.parameters[0]  # says the device
        self.grads = torch.zeros(0, device=self.params.device)  # nothing to reduce: one process
        self.loss_scale = None if half is None else torch.full((), LOSS_SCALE, device=self.params.device)
        shared: dict[int, Any] = {id(buffer): buffer for buffer in net.buffers()}
        for name, p in net.named_parameters():
            shared[id(p)] = nn.Parameter(p.detach().to(half)) if half is not None and name in core else p
        self.compute: EDMPrecond = copy.deepcopy(net, shared)
        self.compute.model.on_ops = True
        self.inputs = list(self.compute.parameters())

    def load_grads(self, grads: Sequence[Tensor], add: bool = False) -> None:
        with record_function("optimizer"):
            for p, grad in zip(self.updates.parameters, grads, strict=True):
                grad = grad.to(p.dtype) if self.loss_scale is None else grad.to(p.dtype) / LOSS_SCALE
                p.grad = grad if not add or p.grad is None else p.grad + grad

    def step(self) -> None:
        self.updates.step()
        with record_function("optimizer"), torch.no_grad():
            for p, twin in zip(self.updates.parameters, self.inputs, strict=True):
                if twin is not p:
                    twin.copy_(p)

    def tensors(self) -> list[Tensor]:
        return [*self.updates.tensors(), *self.inputs]


def torch_dropout(net: EDMPrecond) -> EDMPrecond:
    """Replace the network's counter-based masks, in place, by F.dropout, which draws from torch's generators."""
    for block in net.modules():
        if isinstance(block, UNetBlock) and block.dropout > 0:
            p, block.dropout = block.dropout, 0.0

            def hook(module: nn.Module, args: tuple[Tensor], p: float = p) -> tuple[Tensor]:
                return (F.dropout(args[0], p, training=module.training),)

            block.conv1.register_forward_pre_hook(hook)
    return net
