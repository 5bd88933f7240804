"""The 8x8 digits: 1200 steps of diffusion, then 1200 of ECT; minutes on two CPU cores."""

from dataclasses import replace

from ect.config import Config, EvalConfig, LogConfig, NetConfig, ObjectiveConfig, OptimConfig

_OPTIM = OptimConfig(
    betas=(0.9, 0.99), warmup_kimg=6.4, decay="linear", decay_kimg=38.4, emas=(".995",), ema_rampup=0.05
)
_DIGITS = Config(
    total_kimg=76.8,
    batch=64,
    threads=1,  # a second thread gains a tenth, and loses tenfold where other work wants the core
    net=NetConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0),
    objective=ObjectiveConfig(q=2.0, n_stages=6, stage_kimg=12.8),
    optim=replace(_OPTIM, optimizer="radam", lr=1e-3),
    pretrain="digits-diffusion",
    log=LogConfig(stats_kimg=1.6, sample_kimg=19.2, checkpoint_kimg=19.2),
    eval=EvalConfig(samples=3000, batch=250),
)

_EDM2 = replace(_DIGITS.net, arch="edm2-narrow")
RECIPES = {
    "digits": _DIGITS,
    # The last gap, q = 64, from the first step on.
    "digits-one-stage": replace(
        _DIGITS, objective=replace(_DIGITS.objective, q=64.0, n_stages=1, stage_kimg=_DIGITS.total_kimg)
    ),
    "digits-diffusion": replace(
        _DIGITS,
        objective=ObjectiveConfig(kind="diffusion", P_mean=-1.2, P_std=1.2),
        optim=replace(_OPTIM, optimizer="adam", lr=4e-3),
        pretrain=None,
    ),
    # The same of an EDM2 network. Its weights count by their directions alone, which Adam turns by about lr a step.
    "digits-edm2": replace(
        _DIGITS, net=_EDM2, optim=replace(_OPTIM, optimizer="adam", lr=1e-2), pretrain="digits-edm2-diffusion"
    ),
    "digits-edm2-diffusion": replace(
        _DIGITS,
        net=_EDM2,
        objective=ObjectiveConfig(kind="diffusion", P_mean=-1.2, P_std=1.2),
        optim=replace(_OPTIM, optimizer="adam", lr=2e-2),
        pretrain=None,
    ),
}
