"""From noise to images: the consistency sampler, EDM's deterministic Heun sampler, and batched generation by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ect.models import EDMPrecond
from ect.ranks.distributed import World

SIGMA_MAX = 80.0
SIGMA_MIN = 0.002
RHO = 7.0


@torch.no_grad()
def consistency_sample(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    sigmas: Sequence[float],
    noises: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """Multistep consistency sampling (ECT; Song et al., 2023, algorithm 1): one denoiser call per entry of sigmas.

    Args: denoiser: (x fp32 [N, C, H, W], sigma fp32 [N]) -> D_x. latents: unit normal [N, C, H, W]; multiplied by sigmas[0]
    here. sigmas: noise levels, decreasing, e.g. [80] or [80, 0.821]. noises: noises[i] is the fresh unit noise after
    step i (len(sigmas) - 1 of them are used); None draws them from torch's global generator.
    Returns float64 [N, C, H, W], about [-1, 1]. Between steps everything is float64. Raises ValueError on no sigmas.
    """
    if len(sigmas) == 0:
        raise ValueError("sigmas is empty; give at least the largest noise level, e.g. [80]")
    x = latents.to(torch.float64) * sigmas[0]
    for i, sigma in enumerate(sigmas):
        if i > 0:
            noise = torch.randn_like(latents) if noises is None else noises[i - 1]
            x = x + sigma * noise.to(torch.float64)
        x = _denoise(denoiser, x, sigma)
    return x


@torch.no_grad()
def heun_sample(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    num_steps: int,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """EDM's deterministic second-order sampler (Karras et al., 2022, algorithm 1): 2 num_steps - 1 denoiser calls.

    Args and result as in consistency_sample. Raises ValueError if num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    levels = [*levels.tolist(), 0.0]
    x = latents.to(torch.float64) * levels[0]
    for sigma, sigma_next in pairwise(levels):
        slope = (x - _denoise(denoiser, x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (x_next - _denoise(denoiser, x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def _denoise(denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
    levels = torch.full([x.shape[0]], sigma, dtype=torch.float32, device=x.device)
    return denoiser(x.to(torch.float32), levels).to(torch.float64)


def to_uint8(x: Tensor) -> Tensor:
    """float [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C] by floor(127.5 x + 128), the field's convention."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draw(net: EDMPrecond, seed: int, noises: int = 0) -> tuple[Tensor, int, Tensor]:
    """What one image starts from: latents [C, R, R], class (-1 for an unconditional net), fresh noises [noises, C, R, R]."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    generator = torch.Generator().manual_seed(int(seed))
    latents = torch.randn(shape, generator=generator)
    label = int(torch.randint(net.label_dim, (), generator=generator)) if net.label_dim else -1
    return latents, label, torch.randn([noises, *shape], generator=generator)


def generate(
    net: EDMPrecond,
    seeds: Sequence[int],
    *,
    sigmas: Sequence[float] | None = None,
    heun_steps: int | None = None,
    class_idx: int | None = None,
    batch: int = 256,
    device: torch.device | str = "cpu",
    world: World = World(),
) -> Iterator[Tensor]:
    """Images of a preconditioned network, one per seed, in batches of uint8 [n, H, W, C] on the CPU.

    Each image draws latents, class (class-conditional networks with class_idx None) and noises from a generator of its
    own seed, so an image depends on the batch size by rounding only. Give sigmas (consistency sampler) or heun_steps.

    The ranks of `world` take turns: of each round of batches every rank makes one, and yields all of them, in order.
    """
    if (sigmas is None) == (heun_steps is None):
        raise ValueError("give either sigmas (consistency sampler) or heun_steps (diffusion sampler)")
    batch = min(batch, -(-len(seeds) // world.size))  # work for every rank
    for start in range(0, len(seeds), max(batch, 1) * world.size):
        together = seeds[start : start + batch * world.size]
        mine = together[world.rank * batch : (world.rank + 1) * batch]
        # Filled up to a whole batch, since ranks exchange equal shapes: only the last ones of a round lack any.
        images = torch.zeros([batch, net.img_resolution, net.img_resolution, net.img_channels], dtype=torch.uint8)
        if len(mine) > 0:
            images[: len(mine)] = to_uint8(_images(net, mine, sigmas, heun_steps, class_idx, device)).cpu()
        yield torch.cat(world.gather(images))[: len(together)]


def _images(
    net: EDMPrecond, seeds: Sequence[int], sigmas: Sequence[float] | None, heun_steps: int | None,
    class_idx: int | None, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """One batch, float64 [len(seeds), C, H, W] on the device."""
    extra = 0 if sigmas is None else len(sigmas) - 1
    latents, labels, noises = zip(*(draw(net, seed, extra) for seed in seeds), strict=True)
    classes: Tensor | None = None
    if net.label_dim:
        index = torch.tensor(labels if class_idx is None else [class_idx] * len(labels))
        classes = torch.nn.functional.one_hot(index, net.label_dim).float().to(device)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x, sigma, classes)

    z = torch.stack(latents).to(device)
    if sigmas is not None:
        return consistency_sample(denoiser, z, sigmas, torch.stack(noises, dim=1).to(device))
    assert heun_steps is not None
    return heun_sample(denoiser, z, heun_steps)
