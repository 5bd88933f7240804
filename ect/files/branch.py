"""A run that branches off another one to cool down: the trunk stays as it is, and serves every length."""

from __future__ import annotations

import math
from dataclasses import replace

from ect.config import Config
from ect.errors import UserError
from ect.files.checkpoint import Checkpoints
from ect.files.run_folder import has_begun, run_folder


def cooled(cfg: Config, trunk: Config) -> Config:
    """Return the configuration of a new run that goes on from the checkpoint of --resume and cools down from there on.

    cfg: the trunk's configuration with what the command line says; trunk: the same without. The length follows from
    --optim.cooldown-share, or the share from --total-kimg where that is not the trunk's. `resume` of the result names the
    checkpoint itself. Raises UserError where the trunk has no constant learning rate, or the options do not fit it.
    """
    assert cfg.resume is not None
    remedies = (trunk, "train the trunk with --optim.decay constant"), (cfg, "leave the option out")
    for run, remedy in remedies:
        if run.optim.decay != "constant":
            raise UserError(
                f"--cooldown: the learning rate of {cfg.resume} is to be constant up to here, found --optim.decay "
                f"{run.optim.decay}; {remedy}"
            )
    if cfg.pretrain != trunk.pretrain:
        raise UserError(f"--pretrain {cfg.pretrain}: a run that cools down has no such phase; leave it out")
    folder = run_folder(cfg.resume)
    _, meta, model = Checkpoints.load(cfg.resume.expanduser())
    nimg, share, total_img = meta["nimg"], cfg.optim.cooldown_share, round(cfg.total_kimg * 1000)
    if nimg == 0:
        raise UserError(f"--cooldown: {model} is from before the first step; resume from a later checkpoint")
    if cfg.total_kimg == trunk.total_kimg:
        total_img = math.ceil(nimg / (1 - share) / cfg.batch) * cfg.batch
    elif share != trunk.optim.cooldown_share:
        raise UserError(
            f"--optim.cooldown-share {share}: it follows from --total-kimg {cfg.total_kimg}; give one of them"
        )
    if total_img <= nimg:
        raise UserError(f"--total-kimg {cfg.total_kimg}: expected more than the {nimg / 1000:g} kimg of {model}")
    teacher, run_dir = cfg.init_from, None if cfg.run_dir == trunk.run_dir else cfg.run_dir
    if teacher is None and cfg.pretrain is not None and has_begun(folder / "pretrain"):
        teacher = folder / "pretrain"
    optim = replace(cfg.optim, decay="cooldown", cooldown_share=1 - nimg / total_img)
    return replace(
        cfg, optim=optim, total_kimg=total_img / 1000, resume=model, run_dir=run_dir, pretrain=None, pretrain_kimg=None,
        init_from=teacher,
    )  # fmt: skip
