"""CIFAR-10: the recipes of ECT (arXiv 2406.14548), and EDM's for the teacher that they start from."""

from dataclasses import dataclass, replace

from ect.config import Config, DataConfig, LogConfig, NetConfig, ObjectiveConfig, OptimConfig
from ect.config.emas import emas_of

_DATA = DataConfig(source="datasets/cifar-10-python.tar.gz")
# DDPM++ of EDM's edm-cifar10-32x32-uncond-vp.pkl; --init-from that file is what these recipes expect.
_CIFAR10 = Config(
    data=_DATA,
    batch=128,
    objective=ObjectiveConfig(q=2.0, n_stages=8, stage_kimg=3200.0),
    optim=OptimConfig(optimizer="radam", lr=1e-4, emas=(".9999",)),
    log=LogConfig(stats_kimg=12.8, sample_kimg=640.0, checkpoint_kimg=1280.0),
)


def _stages_of_8(total_kimg: float) -> Config:
    return replace(_CIFAR10, total_kimg=total_kimg, objective=replace(_CIFAR10.objective, stage_kimg=total_kimg / 8))


def _one_stage(total_kimg: float) -> Config:
    """Return the recipe of as many images with the last gap, r/t = 1 - n(t)/256, from its first step on."""
    objective = replace(_CIFAR10.objective, q=256.0, n_stages=1, stage_kimg=total_kimg)
    return replace(_CIFAR10, total_kimg=total_kimg, objective=objective)


@dataclass(frozen=True)
class Published:
    """FIDs of 50,000 images against CIFAR-10, by network evaluations, and where they were reported."""

    source: str
    fids: dict[int, float]


_ECT, _AYT = "Easy Consistency Tuning (arXiv 2406.14548)", "the authors of Align Your Tangent (arXiv 2510.00658)"
PUBLISHED = {
    "cifar10-1h": Published(_ECT, {2: 2.73}),
    "cifar10-100k": Published(_ECT, {1: 4.54, 2: 2.20}),
    "cifar10-400k": Published(_ECT, {1: 3.60, 2: 2.11}),
    "cifar10-100k-one-stage": Published(_AYT, {1: 3.7}),
    "cifar10-400k-one-stage": Published(_AYT, {1: 3.33}),
}
NOTES = dict.fromkeys(["cifar10-100k-one-stage", "cifar10-400k-one-stage"], "not yet measured on CIFAR-10")
RECIPES = {
    # ECT's "1 hour" recipe: 8,000 steps of 128 at a fixed r/t = 1 - n(t)/256, and it stops.
    "cifar10-1h": replace(
        _CIFAR10,
        total_kimg=1024.0,
        objective=replace(_CIFAR10.objective, q=256.0, n_stages=1, stage_kimg=1024.0),
        optim=replace(_CIFAR10.optim, emas=(".9993",)),
        log=replace(_CIFAR10.log, sample_kimg=128.0, checkpoint_kimg=256.0),
    ),
    "cifar10-100k": _stages_of_8(12_800.0),
    "cifar10-200k": _stages_of_8(25_600.0),
    "cifar10-400k": _stages_of_8(51_200.0),
    # The baseline of Align Your Tangent (arXiv 2510.00658): its FID by one evaluation, of its own code, is 3.7 after 12.8
    # Mimg and 3.33 after 51.2, where ECT's eight stages have 4.54 and 3.60. Here they are not yet measured on CIFAR-10.
    "cifar10-100k-one-stage": _one_stage(12_800.0),
    "cifar10-400k-one-stage": _one_stage(51_200.0),
    # EDM's own pretraining of the teacher (Karras et al., 2022, table 7).
    "edm-cifar10": replace(
        _CIFAR10,
        total_kimg=200_000.0,
        batch=512,
        data=replace(_DATA, augment=0.12),
        net=NetConfig(dropout=0.13),
        objective=ObjectiveConfig(kind="diffusion", P_mean=-1.2, P_std=1.2),
        optim=OptimConfig(
            optimizer="adam", lr=1e-3, warmup_kimg=10_000.0, emas=emas_of(0.5 ** (512 / 500e3)), ema_rampup=0.05
        ),
        log=LogConfig(stats_kimg=51.2, sample_kimg=2560.0, checkpoint_kimg=2560.0),
    ),
}
