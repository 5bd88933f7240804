"""Stage, learning rate and EMA decay: pure functions of nimg, the number of training images seen before the step."""

from __future__ import annotations

import math

from ect.config import ObjectiveConfig, OptimConfig
from ect.config.emas import beta_of, power_exponent, sigma_rel_of


def stage_at(nimg: int, cfg: ObjectiveConfig) -> int:
    """Return the mapping's stage: 0 ... n_stages - 1, each stage_kimg long, the last one open-ended.

    (The public code's first tick is a single step, which shifts its stages by one step; this one has no such quirk.)
    """
    stage_img = max(round(cfg.stage_kimg * 1000), 1)
    return min(nimg // stage_img, cfg.n_stages - 1)


def lr_at(nimg: int, batch: int, total_img: int, cfg: OptimConfig) -> float:
    """Return the learning rate: a linear warm-up (the first step is already above 0) times the decay.

    batch, total_img: images an update, and of the whole run.
    """
    lr = cfg.lr
    if cfg.warmup_kimg > 0:
        lr *= min((nimg + batch) / (cfg.warmup_kimg * 1000), 1.0)
    decay_img = cfg.decay_kimg * 1000
    if cfg.decay == "linear" and nimg > decay_img:
        lr *= max((total_img - nimg) / (total_img - decay_img), 0.0)
    if cfg.decay == "rsqrt" and nimg > decay_img:
        lr *= math.sqrt(decay_img / nimg)
    if cfg.decay == "cooldown":
        lr *= cooldown(nimg / total_img, cfg.cooldown_share)
    return lr


def cooldown(done: float, share: float) -> float:
    """Return 1 - sqrt(u), a factor on the learning rate, where u goes from 0 to 1 over the last `share` of a run.

    done: the part of the run that is behind, from 0 to 1. Source: Hagele et al., 2024, "Scaling laws and compute-optimal
    training beyond fixed training durations" (arXiv 2405.18392).
    """
    u = (done - (1 - share)) / share
    return 1 - math.sqrt(min(max(u, 0.0), 1.0))


def ema_betas_at(nimg: int, batch: int, cfg: OptimConfig) -> tuple[float, ...]:
    """Return the decay of each weight average in this step, of `batch` images.

    With ema_rampup the half-life of a constant decay is at most that times nimg (EDM). Power profiles know no ramp-up: they
    have one built in.
    """
    return tuple(_ema_beta_at(nimg, batch, entry, cfg.ema_rampup) for entry in cfg.emas)


def _ema_beta_at(nimg: int, batch: int, entry: str, rampup: float | None) -> float:
    sigma_rel, beta = sigma_rel_of(entry), beta_of(entry)
    if sigma_rel is not None:
        return power_ema_beta(nimg + batch, batch, sigma_rel)
    if rampup is None or beta == 0:
        return beta
    halflife_img = min(batch * math.log(0.5) / math.log(beta), nimg * rampup)
    return 0.5 ** (batch / halflife_img) if halflife_img > 0 else 0.0


def power_ema_beta(nimg: float, batch: float, sigma_rel: float) -> float:
    """Return the decay of a power-profile average in the update of `batch` images that ends at `nimg` images.

    It is (1 - batch / nimg)^(gamma + 1), and 0 in the first update: the average begins as the weights after it. Raises
    ValueError as `power_exponent`. Source: Karras et al., 2024, "Analyzing and improving the training dynamics of diffusion
    models" (EDM2, arXiv 2312.02696), section 3.1.
    """
    return max(1 - batch / nimg, 0.0) ** (power_exponent(sigma_rel) + 1) if nimg > 0 else 0.0
