"""Fashion-MNIST at 28x28 (Xiao et al., 2017; 60,000 grey images, MIT licence): diffusion, then ECT, on two CPU cores.

The recipe is built like the digits' (ect/presets/digits.py). Its length is what two hours of two cores should hold, by the
step times in docs/recipes.md. No run has yet shown what it gives.
"""

from dataclasses import replace

from ect.config import Config, DataConfig, EvalConfig, LogConfig, NetConfig, ObjectiveConfig, OptimConfig

_OPTIM = OptimConfig(
    betas=(0.9, 0.99), warmup_kimg=12.8, decay="linear", decay_kimg=96.0, emas=(".999",), ema_rampup=0.05
)
_FASHION = Config(
    total_kimg=192.0,
    batch=64,
    threads=2,
    data=DataConfig(
        source="datasets/fashion-mnist", resolution=28
    ),  # without the border to 32, a quarter of the pixels
    net=NetConfig(model_channels=32, channel_mult=(1, 2, 2), num_blocks=1, attn_resolutions=(7,), dropout=0.0),
    objective=ObjectiveConfig(q=2.0, n_stages=6, stage_kimg=32.0),
    optim=replace(_OPTIM, optimizer="radam", lr=1e-3),
    pretrain="fashion-diffusion",
    log=LogConfig(stats_kimg=3.2, sample_kimg=32.0, checkpoint_kimg=16.0),
    eval=EvalConfig(samples=5000, batch=64),
)

RECIPES = {
    "fashion": _FASHION,
    "fashion-diffusion": replace(
        _FASHION,
        total_kimg=256.0,
        objective=ObjectiveConfig(kind="diffusion", P_mean=-1.2, P_std=1.2),
        optim=replace(_OPTIM, optimizer="adam", lr=2e-3, decay_kimg=128.0),
        pretrain=None,
    ),
}
