"""The samplers, which lead from noise to images, as values, and batched generation by seed with any of them.

A sampler is a frozen dataclass with the members of `Sampler`. Another one is another such class, here or elsewhere:
`generate`, `ect.metrics.quality_rows` and the tables take any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ect.config import FALLING, MID_T, SIGMA_MAX
from ect.errors import UserError
from ect.models import EDMPrecond
from ect.models.guided import Guided
from ect.ranks.distributed import World

SIGMA_MIN = 0.002
RHO = 7.0

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x fp32 [N, C, H, W], sigma fp32 [N]) -> D_x [N, C, H, W]."""


class Sampler(Protocol):
    """A way to turn noise into images: a frozen dataclass, whose fields are all that can be chosen about it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name that tables and pictures show, such as "consistency, 2 steps"."""

    @property
    def nfe(self) -> int:
        """Network evaluations that an image takes."""

    @property
    def noises(self) -> int:
        """Fresh noises that an image takes after its latents."""

    def __call__(self, denoiser: Denoiser, latents: Tensor, noises: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """Return images, float64 [N, C, H, W], about in [-1, 1].

        Args: denoiser: the network. latents: unit normal [N, C, H, W]; the sampler scales them itself. noises: noises[i] is
        the i-th fresh unit noise [N, C, H, W], of at least `self.noises`; None draws them from torch's global generator.
        """


@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling (ECT; Song et al., 2023, algorithm 1): one denoiser call per entry of sigmas.

    sigmas: noise levels, decreasing, e.g. (80.0, 0.821). Between steps everything is float64. Raises ValueError on no sigmas.
    """

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.sigmas) == 0:
            raise ValueError("sigmas is empty; give at least the largest noise level, e.g. [80]")

    def __str__(self) -> str:
        return f"{self.nfe} NFE at sigma {', '.join(f'{sigma:g}' for sigma in self.sigmas)}"

    @property
    def name(self) -> str:
        return f"consistency, {self.nfe} step{'s' if self.nfe > 1 else ''}"

    @property
    def nfe(self) -> int:
        return len(self.sigmas)

    @property
    def noises(self) -> int:
        return self.nfe - 1

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, latents: Tensor, noises: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        x = latents.to(torch.float64) * self.sigmas[0]
        for i, sigma in enumerate(self.sigmas):
            if i > 0:
                noise = torch.randn_like(latents) if noises is None else noises[i - 1]
                x = x + sigma * noise.to(torch.float64)
            x = _denoise(denoiser, x, sigma)
        return x


@dataclass(frozen=True)
class Heun:
    """EDM's deterministic second-order sampler (Karras et al., 2022, algorithm 1): 2 steps - 1 denoiser calls.

    Raises ValueError if steps < 1.
    """

    steps: int
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")

    def __str__(self) -> str:
        return f"Heun sampler, {self.steps} steps, {self.nfe} NFE"

    @property
    def name(self) -> str:
        return f"diffusion, {self.steps} Heun steps"

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    @property
    def noises(self) -> int:
        return 0

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser, latents: Tensor, noises: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        ramp = torch.arange(self.steps, dtype=torch.float64) / max(self.steps - 1, 1)
        levels = [*((first + ramp * (last - first)) ** self.rho).tolist(), 0.0]
        x = latents.to(torch.float64) * levels[0]
        for sigma, sigma_next in pairwise(levels):
            slope = (x - _denoise(denoiser, x, sigma)) / sigma
            x_next = x + (sigma_next - sigma) * slope
            if sigma_next > 0:
                slope_next = (x_next - _denoise(denoiser, x_next, sigma_next)) / sigma_next
                x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
            x = x_next
        return x


def _denoise(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    levels = torch.full([x.shape[0]], sigma, dtype=torch.float32, device=x.device)
    return denoiser(x.to(torch.float32), levels).to(torch.float64)


def consistency_samplers(mid_t: Sequence[float]) -> list[Consistency]:
    """Return the consistency sampler at 1, 2, ... len(mid_t) + 1 evaluations: SIGMA_MAX first, then mid_t in order."""
    sigmas = (SIGMA_MAX, *mid_t)
    return [Consistency(sigmas[:nfe]) for nfe in range(1, len(sigmas) + 1)]


def levels_after_first(given: Sequence[float] | None, info: dict[str, Any]) -> tuple[float, ...]:
    """Return the noise levels after SIGMA_MAX: those given as --mid-t, else those in the model file's `info`, else MID_T.

    Raises UserError unless they fall.
    """
    if given is None:
        own = info.get("mid_t") or MID_T
        given = own if isinstance(own, (list, tuple)) else [own]
        if not all(type(t) in (int, float) for t in given):
            raise UserError("the model's file says mid_t, and not in numbers; give the noise levels, --mid-t")
    if not FALLING.holds(given):
        shown = " ".join(f"{t:g}" for t in given)
        raise UserError(f"--mid-t {shown}: expected strictly decreasing levels between 0 and {SIGMA_MAX:g}")
    return tuple(map(float, given))


def consistency_sample(
    denoiser: Denoiser, latents: Tensor, sigmas: Sequence[float], noises: Sequence[Tensor] | Tensor | None = None
) -> Tensor:
    """Return what `Consistency(sigmas)(denoiser, latents, noises)` does; arguments and errors are the same."""
    return Consistency(tuple(sigmas))(denoiser, latents, noises)


def heun_sample(
    denoiser: Denoiser,
    latents: Tensor,
    num_steps: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """Return what `Heun(num_steps, sigma_min, sigma_max, rho)(denoiser, latents)` does; arguments and errors are the same."""
    return Heun(num_steps, sigma_min, sigma_max, rho)(denoiser, latents)


def to_uint8(x: Tensor) -> Tensor:
    """Turn float [N, C, H, W] in [-1, 1] into uint8 [N, H, W, C] by floor(127.5 x + 128), the field's convention."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draw(net: EDMPrecond | Guided, seed: int, noises: int = 0) -> tuple[Tensor, int, Tensor]:
    """Draw what the image of a seed starts from: latents [C, R, R], a class (-1: unconditional), noises [noises, C, R, R].

    Latents and noises are unit normal, fp32, on the CPU.
    """
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    generator = torch.Generator().manual_seed(int(seed))
    latents = torch.randn(shape, generator=generator)
    label = int(torch.randint(net.label_dim, (), generator=generator)) if net.label_dim else -1
    return latents, label, torch.randn([noises, *shape], generator=generator)


def generate(
    net: EDMPrecond | Guided,
    seeds: Sequence[int],
    sampler: Sampler,
    *,
    class_idx: int | Sequence[int] | None = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    world: World = World(),
) -> Iterator[Tensor]:
    """Yield images of a preconditioned network, one for each seed, in batches of uint8 [n, H, W, C] on the CPU.

    Each image draws latents, class (class-conditional networks without class_idx, one class or one a seed) and noises from a
    generator of its own seed, so an image depends on the batch size by rounding only.

    The ranks of `world` take turns: of each round of batches every rank makes one, and yields all of them, in order.
    """
    classes = [class_idx] * len(seeds) if isinstance(class_idx, int) else class_idx
    batch = min(batch, -(-len(seeds) // world.size))  # work for every rank
    for start in range(0, len(seeds), max(batch, 1) * world.size):
        together = seeds[start : start + batch * world.size]
        here = slice(world.rank * batch, (world.rank + 1) * batch)
        mine, chosen = together[here], None if classes is None else classes[start:][here]
        # Filled up to a whole batch, since ranks exchange equal shapes: only the last ones of a round lack any.
        images = torch.zeros([batch, net.img_resolution, net.img_resolution, net.img_channels], dtype=torch.uint8)
        if len(mine) > 0:
            images[: len(mine)] = to_uint8(_images(net, mine, sampler, chosen, device)).cpu()
        yield torch.cat(world.gather(images))[: len(together)]


def _images(
    net: EDMPrecond | Guided, seeds: Sequence[int], sampler: Sampler, chosen: Sequence[int] | None,
    device: torch.device | str,
) -> Tensor:  # fmt: skip
    """Make one batch of images, float64 [len(seeds), C, H, W], on the device."""
    latents, drawn, noises = zip(*(draw(net, seed, sampler.noises) for seed in seeds), strict=True)
    labels: Tensor | None = None
    if net.label_dim:
        index = torch.tensor(drawn if chosen is None else chosen)
        labels = torch.nn.functional.one_hot(index, net.label_dim).float().to(device)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x, sigma, labels)

    with torch.no_grad():
        return sampler(denoiser, torch.stack(latents).to(device), torch.stack(noises, dim=1).to(device))
