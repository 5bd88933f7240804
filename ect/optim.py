"""FlatState: a network's parameters, gradients, moments and weight averages in flat arenas, updated by RAdam or Adam.

One arena a role means a handful of launches a step whatever the number of parameters. Sources: Liu et al., "On the variance of
the adaptive learning rate and beyond" (RAdam, 2020); Kingma & Ba, 2015 (Adam); the results equal torch.optim's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGN = 8  # elements: 16 bytes in half precision, so every view can be read in 128-bit vectors


class FlatState:
    """Optimizer state of `net`. The network's parameters become views into `params`, their .grad views into `grads`.

    Args: net: moved to its device before. optimizer: 'radam' or 'adam'. lr, betas, eps: torch's meaning. ema_betas: one
    weight average per entry, ema <- beta ema + (1 - beta) params, starting at the parameters. clip: largest global
    gradient norm, or None. Raises ValueError on an unknown optimizer or an impossible value.

    lr and ema_betas may be changed between steps. Non-finite gradients never enter the moments: nan becomes 0 and inf
    +-1e5 (the public code's rule); `nonfinite` counts them, on the device.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: str = "radam",
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        ema_betas: Sequence[float] = (),
        clip: float | None = None,
    ) -> None:
        if optimizer not in ("radam", "adam"):
            raise ValueError(f"optimizer is {optimizer!r}; known: 'radam', 'adam'")
        for name, value, ok in [
            ("lr", lr, lr >= 0), ("betas", betas, all(0 <= b < 1 for b in betas)), ("eps", eps, eps >= 0),
            ("ema_betas", ema_betas, all(0 <= b <= 1 for b in ema_betas)), ("clip", clip, clip is None or clip > 0),
        ]:  # fmt: skip
            if not ok:
                raise ValueError(f"{name} is {value}, out of range")
        self.net, self.optimizer, self.lr, self.betas, self.eps = net, optimizer, lr, tuple(betas), eps
        self.ema_betas, self.clip = list(ema_betas), clip
        self.steps = 0
        self._names, self._shapes, self._offsets, end = [], [], [], 0
        for name, p in net.named_parameters():
            self._names.append(name)
            self._shapes.append(p.shape)
            self._offsets.append(end)
            end += -(-p.numel() // _ALIGN) * _ALIGN
        device = next(net.parameters()).device
        self.params, self.grads, self.exp_avg, self.exp_avg_sq = (torch.zeros(end, device=device) for _ in range(4))
        self._parameters = list(net.parameters())
        for p, view in zip(self._parameters, self.views(self.params), strict=True):
            view.copy_(p.detach())
            p.data = view
        self._grad_views = self.views(self.grads)
        self.emas = [self.params.clone() for _ in self.ema_betas]
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.zero_grad()

    def views(self, arena: Tensor) -> list[Tensor]:
        """The parameters' views of an arena, in named_parameters() order."""
        offsets = zip(self._offsets, self._shapes, strict=True)
        return [arena[offset : offset + shape.numel()].view(shape) for offset, shape in offsets]

    def zero_grad(self) -> None:
        """Zero all gradients and tie every parameter's .grad to the arena."""
        self.grads.zero_()
        for p, view in zip(self._parameters, self._grad_views, strict=True):
            p.grad = view

    @torch.no_grad()
    def step(self) -> None:
        """One update from the accumulated gradients: clean, clip, RAdam or Adam, weight averages."""
        for p, view in zip(self._parameters, self._grad_views, strict=True):
            if p.grad is None:  # someone cleared or replaced it: bring the arena in line
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
        grads = self.grads
        self.nonfinite += grads.numel() - grads.isfinite().sum()
        grads.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        self.grad_norm = grads.norm()
        if self.clip is not None:
            grads.mul_((self.clip / (self.grad_norm + 1e-6)).clamp(max=1.0))
        self.steps += 1
        beta1, beta2 = self.betas
        self.exp_avg.lerp_(grads, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        scale, correction2 = self._coefficients()
        if correction2 is None:
            self.params.add_(self.exp_avg, alpha=-scale)
        elif self.optimizer == "adam":
            self.params.addcdiv_(self.exp_avg, (self.exp_avg_sq.sqrt() / correction2).add_(self.eps), value=-scale)
        else:
            self.params.addcdiv_(self.exp_avg, self.exp_avg_sq.sqrt().add_(self.eps), value=-scale * correction2)
        for ema, beta in zip(self.emas, self.ema_betas, strict=True):
            ema.lerp_(self.params, 1 - beta)

    def _coefficients(self) -> tuple[float, float | None]:
        """Step size on the first moment, and sqrt(1 - beta2^t), or None where RAdam takes a plain momentum step."""
        (beta1, beta2), t = self.betas, self.steps
        scale, correction2 = self.lr / (1 - beta1**t), 1 - beta2**t
        if self.optimizer == "adam":
            return scale, math.sqrt(correction2)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / correction2
        if rho <= 5:
            return scale, None
        rectification = ((rho - 4) * (rho - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho)
        return scale * math.sqrt(rectification), math.sqrt(correction2)

    def ema_state_dict(self, i: int = 0) -> dict[str, Tensor]:
        """Copies of weight average i under all keys of net.state_dict(); buffers come from the network."""
        state = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        for name, view in zip(self._names, self.views(self.emas[i]), strict=True):
            state[name] = view.clone()
        return state

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, per parameter and named: params.*, exp_avg.*, exp_avg_sq.*, ema<i>.*; nonfinite."""
        arenas = {"params": self.params, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        arenas |= {f"ema{i}": ema for i, ema in enumerate(self.emas)}
        named = {
            f"{role}.{name}": view.clone()
            for role, arena in arenas.items()
            for name, view in zip(self._names, self.views(arena), strict=True)
        }
        return {**named, "nonfinite": self.nonfinite.clone(), "steps": torch.tensor(self.steps)}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of state_tensors(). Raises KeyError where a tensor is missing."""
        arenas = {"params": self.params, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        arenas |= {f"ema{i}": ema for i, ema in enumerate(self.emas)}
        for role, arena in arenas.items():
            for name, view in zip(self._names, self.views(arena), strict=True):
                view.copy_(tensors[f"{role}.{name}"])
        self.nonfinite.copy_(tensors["nonfinite"])
        self.steps = int(tensors["steps"])
