"""The smallest configuration that runs every part of the trainer, in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ect.config import Config, EvalConfig, LogConfig, NetConfig, ObjectiveConfig
from ect.presets import PRESETS

if TYPE_CHECKING:
    from ect.job import Job

NET = NetConfig(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.1)
STEPS, BATCH = 10, 8


def config(**changes: Any) -> Config:
    """Ten steps of ECT on the digits, no pretraining, no evaluation; stages change on the way."""
    base = replace(
        PRESETS["digits"],
        batch=BATCH,
        total_kimg=STEPS * BATCH / 1000,
        net=NET,
        objective=ObjectiveConfig(n_stages=4, stage_kimg=0.024),
        pretrain=None,
        log=LogConfig(stats_kimg=0.016, sample_kimg=0.032, checkpoint_kimg=0.032),
        eval=EvalConfig(samples=0),
    )
    return replace(base, **changes)


def run(cfg: Config, folder: Path) -> Job:
    """Run a job in `folder` (or where cfg.resume says), quietly."""
    from ect.job import Job  # not earlier: it needs tyro, which a bare machine may lack

    job = Job(cfg if cfg.resume else replace(cfg, run_dir=folder), Console(quiet=True))
    assert job.run()
    return job
