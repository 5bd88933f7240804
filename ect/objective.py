"""The objectives: noise levels, the mapping t -> r, weightings, and the losses of consistency and of diffusion training.

Everything here takes a denoiser, a callable (x [N, C, H, W], sigma [N]) -> D_x, not a network. Formulas that an op computes too
are called where the op has them. Further objectives are files in ect/objectives/. Sources: Geng et al., "Consistency models
made easy" (ECT, arXiv 2406.14548), sections 3 and 4; Karras et al., 2022 (EDM) for the diffusion loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from ect_kernels import philox
from ect_kernels.consistency_loss import consistency_loss, denoised, pseudo_huber, target_of
from ect_kernels.levels import levels, lower_level, noise_level
from ect_kernels.perturb import perturb
from ect_kernels.preconditioning import noise_label
from torch import Tensor

from ect.config import STAGED, ObjectiveConfig, admit, refuse_taken
from ect.data.stream import to_float
from ect.objectives.direction import Distance, along
from ect.objectives.gaps import Gaps
from ect.objectives.weights import ADAPTIVE, WEIGHTINGS, adaptive_weight
from ect.sampler import Heun, Sampler, consistency_samplers

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mapping:
    """The smaller noise level r of a training pair (ECT, section 3.2): r = t (1 - n(t) / q^(stage + 1)), at least 0.

    kind 'sigmoid': n(t) = 1 + k sigmoid(-b t); kind 'const': n(t) = 1. The gap shrinks by q each stage, until 1 - r/t is
    min_gap: then r = (1 - min_gap) t. Source of that: FastGen caps r/t at .999.
    """

    kind: Literal["sigmoid", "const"] = "sigmoid"
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_gap < 1:
            raise ValueError(f"min_gap is {self.min_gap}; it is the least 1 - r/t, from 0 to below 1")
        if self.kind not in ("sigmoid", "const"):
            raise ValueError(f"mapping kind is {self.kind!r}; known: 'sigmoid', 'const'")
        if not self.q > 1:
            raise ValueError(f"mapping q is {self.q}; it divides the gap at each stage and must be greater than 1")

    @property
    def curve(self) -> tuple[float, float, float]:
        """The (q, k, b) by which ect_kernels.levels computes this mapping. Raises KeyError for a kind that has none."""
        return self.q, {"sigmoid": self.k, "const": 0.0}[self.kind], self.b

    def __call__(self, t: Tensor, stage: Tensor | int) -> Tensor:
        """Return r [N] with 0 <= r <= t, in t's dtype, of levels t [N] > 0 at a stage (int or 0-d tensor, >= 0).

        r = t only where the gap q^-(stage + 1) is below the dtype's rounding (fp32: 2^-24).
        """
        return self.capped(t, lower_level(t, stage, *self.curve))

    def capped(self, t: Tensor, r: Tensor) -> Tensor:
        """Return r [N], lowered where it is closer to t [N] than min_gap allows; r itself where there is no such limit."""
        return torch.minimum(r, (1 - self.min_gap) * t) if self.min_gap else r


class Draw(NamedTuple):
    """Standard normal numbers that an objective takes for each image, from a Philox stream of their own.

    size: how many, [N] for 1 and [N, size] for more; None: one for each value of the image, in the image's shape.
    """

    stream: int
    size: int | None = 1


class Objective:
    """The loss that a training step minimises. A new objective derives from this class, and declares what differs.

    draws: the random numbers that `train_loss` takes, by the name of its argument; mirroring images is the step's. precond: the
    preconditioning of the network, a class of ect.models. staged: whether t and r close up in stages, from a pretrained network
    on. wants_teacher: whether `train_loss` takes a second, frozen network as `teacher`. wants_data: whether it takes the
    posterior mean over the training images there.
    """

    draws: ClassVar[dict[str, Draw]] = {"normal": Draw(philox.STREAM_T), "eps": Draw(philox.STREAM_EPS, None)}
    precond: ClassVar[Literal["ECMPrecond", "EDMPrecond"]] = "EDMPrecond"
    staged: ClassVar[bool] = False
    wants_teacher: ClassVar[bool] = False
    wants_data: ClassVar[bool] = False

    @classmethod
    def configured(cls, cfg: ObjectiveConfig, sigma_data: float) -> Objective:
        """Return the objective that a configuration means, for data of standard deviation sigma_data."""
        return cls()

    def tensors(self) -> list[Tensor]:
        """Return every tensor that a loss writes, and that outlives it."""
        return []

    def train_loss(self, denoiser: Denoiser, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss [N] of clean images y, fp32 [N, C, H, W] in [-1, 1].

        Further arguments: each of `draws` by its name, `stage` (0-d int64 tensor), and `teacher`, another denoiser, where
        `wants_teacher` or `wants_data`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no train_loss")

    def fast_loss(
        self, unet: Denoiser, sigma_data: float, images: Tensor, key: Tensor, n0: Tensor | int, stage: Tensor, xflip: bool
    ) -> Tensor | None:  # fmt: skip
        """Return what `train_loss` does, computed on the ops of ect_kernels; None where there is no such form.

        Args: unet: (c_in x, ln(sigma) / 4) -> raw output F_x, preconditioned as EDM does for sigma_data. images: uint8
        [N, H, W, C], the global samples n0 ... n0 + N. key, stage: 0-d int64 tensors. xflip: whether to mirror half of them.
        """
        return None

    @classmethod
    def samplers(cls, mid_t: Sequence[float], heun_steps: Sequence[int]) -> Sequence[Sampler]:
        """Return the samplers that suit a network so trained: here EDM's Heun sampler, at each number of heun_steps.

        mid_t: the noise levels of a consistency sampler after its first.
        """
        return [Heun(steps) for steps in heun_steps]


OBJECTIVES: dict[str, type[Objective]] = {}
"""The objectives by the names that --objective.kind has for them."""
_Of = TypeVar("_Of", bound=Objective)


def register(kind: str) -> Callable[[type[_Of]], type[_Of]]:
    """Return a decorator that makes an objective known to --objective.kind, as `kind`.

    Raises ValueError where another one has this name.
    """

    def known(objective: type[_Of]) -> type[_Of]:
        refuse_taken("objective", kind, OBJECTIVES.get(kind), objective)
        OBJECTIVES[kind] = objective
        admit("Kind", kind)
        (STAGED.add if objective.staged else STAGED.discard)(kind)
        return objective

    return known


@register("consistency")
@dataclass(frozen=True)
class ConsistencyObjective(Objective):
    """ECT: D(x_t, t) shall equal the stop-gradient D(x_r, r) of the same weights, noise and dropout mask.

    loss = w (sqrt(||D_t - D_r||^2 + c^2) - c). Noise levels follow ln t ~ N(P_mean, P_std^2). w is one of WEIGHTINGS, or
    'adaptive': ect.objectives.weights.adaptive_weight, with this c and `floor`. gaps: what the pairs are counted in, if at all.
    distance: where there is one, D_t is drawn along its gradient (ect.objectives.direction), and the loss keeps its value.
    """

    mapping: Mapping = Mapping()
    c: float = 0.0
    weighting: str = "inverse_gap"
    sigma_data: float = 0.5
    P_mean: float = -1.1
    P_std: float = 2.0
    floor: float = 0.05
    gaps: Gaps | None = field(default=None, compare=False)
    distance: Distance | None = field(default=None, compare=False)

    precond = "ECMPrecond"
    staged = True

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise ValueError(f"pseudo-Huber c is {self.c}; it must be 0 (plain L2) or greater")
        if self.weighting not in (*WEIGHTINGS, ADAPTIVE):
            raise ValueError(f"weighting is {self.weighting!r}; known: {', '.join((*WEIGHTINGS, ADAPTIVE))}")
        if not self.floor > 0:
            raise ValueError(f"floor is {self.floor}; it bounds the adaptive weight 1 / floor and must be above 0")

    @classmethod
    def configured(cls, cfg: ObjectiveConfig, sigma_data: float) -> ConsistencyObjective:
        mapping = Mapping(cfg.mapping, cfg.q, cfg.k, cfg.b, cfg.min_gap)
        return cls(mapping, cfg.c, cfg.weighting, sigma_data, cfg.P_mean, cfg.P_std, cfg.weight_floor)

    def tensors(self) -> list[Tensor]:
        return [] if self.gaps is None else [self.gaps.sums]

    def weight(self, t: Tensor, r: Tensor, target: Tensor | None, y: Tensor | None) -> Tensor:
        """Return the weight [N] of pairs at levels t > r >= 0 [N]; 'adaptive' wants their targets and clean images, too."""
        if self.weighting != ADAPTIVE:
            return WEIGHTINGS[self.weighting](t, r, self.sigma_data)
        if target is None or y is None:
            raise ValueError("the adaptive weight wants the clean images of the pairs, y")
        return adaptive_weight(target, y, self.c, self.floor)

    def compare(
        self, denoiser: Denoiser, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None, *,
        share_rng: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the loss [N] of pairs x_t, x_r [N, C, H, W] at levels t > r >= 0 [N], y their clean images.

        Rows with r = 0 take x_r as their target: the answer to x_r there, D at sigma = 1, is discarded. share_rng: as for
        `loss`. Raises ValueError without y where the weight depends on it.
        """
        # x_r goes first: what its pass may keep for a backward is gone before the student's begins.
        generators = torch.random.fork_rng([x_t.device] if x_t.device.type == "cuda" else [], enabled=share_rng)
        with torch.no_grad(), generators:
            D_r = denoiser(x_r, torch.where(r > 0, r, torch.ones_like(r)))
            target = torch.where((r > 0).view(-1, 1, 1, 1), D_r, x_r.to(D_r.dtype))
        weight, D_t = self.weight(t, r, target, y), denoiser(x_t, t)
        if self.gaps is not None and y is not None:
            self.gaps.add(t, r, D_t.detach(), target, y)
        apart = (
            pseudo_huber(D_t - target, self.c) if self.distance is None else along(self.distance, D_t, target, self.c)
        )
        return weight * apart

    def loss(
        self, denoiser: Denoiser, y: Tensor, t: Tensor, r: Tensor, eps: Tensor, *, share_rng: bool = True
    ) -> Tensor:
        """Return the loss [N] of clean images y [N, C, H, W] in [-1, 1], at levels t > r >= 0 [N], with unit noise eps like y.

        Rows with r = 0 take y as their target. share_rng makes both passes draw the same from torch's global generators; a
        denoiser that holds its dropout key itself does not need it.
        """
        x_t, x_r = (y + sigma.view(-1, 1, 1, 1) * eps for sigma in (t, r))
        return self.compare(denoiser, x_t, x_r, t, r, y, share_rng=share_rng)

    def train_loss(self, denoiser: Denoiser, y: Tensor, normal: Tensor, eps: Tensor, stage: Tensor | int) -> Tensor:
        """Return the loss [N] with t = exp(P_mean + P_std normal) and r by the mapping; the denoiser fixes its own mask."""
        t = noise_level(normal, self.P_mean, self.P_std)
        return self.loss(denoiser, y, t, self.mapping(t, stage), eps, share_rng=False)

    def fast_loss(
        self, unet: Denoiser, sigma_data: float, images: Tensor, key: Tensor, n0: Tensor | int, stage: Tensor, xflip: bool
    ) -> Tensor | None:  # fmt: skip
        """Return what `train_loss` does, in three launches beside the network; None for a subclass of this class or Mapping.

        Two lead from uint8 images to the U-Net's inputs, one from its outputs to loss and gradient. The formulas of a subclass
        are its own, and the ops do not know them. A least gap, the adaptive weight and `gaps` take some small launches more.
        None with `distance`, too: its passes through another network are many launches, beside which these are few.
        """
        if type(self) is not ConsistencyObjective or type(self.mapping) is not Mapping or self.distance is not None:
            return None
        levels_of = (self.P_mean, self.P_std, *self.mapping.curve)
        t, r, label_t, label_r, flip = levels(key, stage, n0, len(images), *levels_of)
        if self.mapping.min_gap:
            r = self.mapping.capped(t, r)
            label_r = noise_label(torch.where(r > 0, r, torch.ones_like(r)))
        in_t, in_r, x_t, x_r = perturb(images, t, r, sigma_data, key, n0, flip if xflip else None)
        with torch.no_grad():
            F_r = unet(in_r, label_r)
        F_t = unet(in_t, label_t)
        target = y = None
        if self.weighting == ADAPTIVE or self.gaps is not None:
            target, y = target_of(F_r, x_r, r, sigma_data), to_float(images, flip if xflip else None)
            if self.gaps is not None:
                self.gaps.add(t, r, denoised(F_t.detach(), x_t, t, sigma_data), target, y)
        weight = self.weight(t, r, target, y)
        return consistency_loss(F_t, F_r, x_t, x_r, t, r, weight, self.c, sigma_data)

    @classmethod
    def samplers(cls, mid_t: Sequence[float], heun_steps: Sequence[int]) -> Sequence[Sampler]:
        return consistency_samplers(mid_t)


@register("diffusion")
@dataclass(frozen=True)
class DiffusionObjective(Objective):
    """EDM's denoising loss, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D(y + sigma eps, sigma) - y|^2."""

    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2

    @classmethod
    def configured(cls, cfg: ObjectiveConfig, sigma_data: float) -> DiffusionObjective:
        return cls(sigma_data, cfg.P_mean, cfg.P_std)

    def loss(self, denoiser: Denoiser, y: Tensor, sigma: Tensor | float, eps: Tensor) -> Tensor:
        """Return the weighted squared error of each value of clean images y [N, C, H, W], unit noise eps like y.

        sigma: a float, 0-d, [N] or [N, 1, 1, 1].
        """
        sigma = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).reshape(-1).expand(y.shape[0])
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        D = denoiser(y + sigma.view(-1, 1, 1, 1) * eps, sigma)
        return weight.view(-1, 1, 1, 1) * (D - y) ** 2

    def train_loss(self, denoiser: Denoiser, y: Tensor, normal: Tensor, eps: Tensor, stage: Tensor | int) -> Tensor:
        """Return the loss [N], summed over pixels, with sigma = exp(P_mean + P_std normal). The stage plays no role."""
        return self.loss(denoiser, y, noise_level(normal, self.P_mean, self.P_std), eps).flatten(1).sum(1)
