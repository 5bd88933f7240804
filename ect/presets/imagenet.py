"""ImageNet at 64x64 by classes: ECT's recipes (arXiv 2406.14548) for EDM2's networks, and one for FFHQ with EDM's DDPM++.

No run here has shown yet what they give. `--init-from` takes EDM2's snapshot of the same size, such as
edm2-img64-s-1073741-0.075.pkl, or edm-ffhq-64x64-uncond-vp.pkl.
"""

from __future__ import annotations

from dataclasses import replace

from ect.config import Architecture, Config, DataConfig, EvalConfig, LogConfig, NetConfig, ObjectiveConfig, OptimConfig

_STEPS = 100_000
_LR_STEPS = 2000  # after which the learning rate falls as the root of the steps
_SIZES: dict[str, tuple[Architecture, int, float, float]] = {  # width, learning rate, dropout
    "s": ("edm2-s", 192, 1.0e-3, 0.4),
    "m": ("edm2-m", 256, 0.9e-3, 0.5),
    "l": ("edm2-l", 320, 0.8e-3, 0.5),
    "xl": ("edm2-xl", 384, 0.7e-3, 0.5),
}


def _recipe(size: str, batch: int) -> Config:
    """Return the recipe of a size: 100,000 steps in four stages, which each divide the gap 1 - r/t by 4."""
    arch, width, lr, dropout = _SIZES[size]
    total_kimg = _STEPS * batch / 1000
    return Config(
        total_kimg=total_kimg,
        batch=batch,
        data=DataConfig(source="datasets/imagenet-64x64.zip", labels=True),
        net=NetConfig(
            arch=arch,
            model_channels=width,
            channel_mult=(1, 2, 3, 4),
            num_blocks=3,
            attn_resolutions=(16, 8),
            dropout=dropout,
        ),
        objective=ObjectiveConfig(
            P_mean=-0.8, P_std=1.6, q=4.0, n_stages=4, stage_kimg=total_kimg / 4, c=0.06, weighting="inverse_c_out_sq"
        ),
        optim=OptimConfig(
            optimizer="adam",
            lr=lr,
            betas=(0.9, 0.99),
            decay="rsqrt",
            decay_kimg=_LR_STEPS * batch / 1000,
            emas=(".9999", "rel:0.010", "rel:0.050", "rel:0.100"),
        ),
        log=LogConfig(stats_kimg=12.8, sample_kimg=total_kimg / 20, checkpoint_kimg=total_kimg / 40),
        eval=EvalConfig(mid_t=(1.526,)),
    )


def _fast(recipe: Config) -> Config:
    return replace(recipe, optim=replace(recipe.optim, decay="constant", decay_kimg=0.0))


RECIPES = {
    **{f"imagenet64-{size}": _recipe(size, 128) for size in _SIZES},
    # The starred models of the paper: as many steps, of 1,024 images.
    **{f"imagenet64-{size}-102m": _recipe(size, 1024) for size in _SIZES},
    "imagenet64-s-fast": _fast(_recipe("s", 128)),
    # The CIFAR-10 recipe for the network of edm-ffhq-64x64-uncond-vp.pkl; c is iCT's .00054 sqrt(3 64 64).
    "ffhq64": Config(
        total_kimg=12_800.0,
        batch=128,
        data=DataConfig(source="datasets/ffhq-64x64.zip"),
        net=NetConfig(channel_mult=(1, 2, 2, 2), dropout=0.2),
        objective=ObjectiveConfig(q=2.0, n_stages=8, stage_kimg=1600.0, c=0.06),
        optim=OptimConfig(optimizer="radam", lr=1e-4, emas=(".9999",)),
        log=LogConfig(stats_kimg=12.8, sample_kimg=640.0, checkpoint_kimg=1280.0),
    ),
}
NOTES = dict.fromkeys(RECIPES, "not yet run here")
