"""The phases of a run: what a configuration with --pretrain does first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ect.config import Config
from ect.files.run_folder import CONFIG, load
from ect.options import preset


def pretrain_config(cfg: Config, run_dir: Path | None = None) -> Config:
    """Return the diffusion phase as a configuration of its own.

    --pretrain's preset gives length, objective and optimizer, `cfg` the rest. run_dir: the folder of the phase; once it has
    begun there, it goes on as it began, whatever became of the preset.
    """
    assert cfg.pretrain is not None
    if run_dir is not None and (run_dir / CONFIG).is_file():
        phase = load(run_dir)
    else:
        phase = preset(cfg.pretrain, "--pretrain")
        phase = replace(phase, total_kimg=cfg.pretrain_kimg or phase.total_kimg)
    parts: dict[str, Any] = {name: getattr(phase, name) for name in ("total_kimg", "objective", "optim")}
    return replace(cfg, pretrain=None, pretrain_kimg=None, target=None, **parts)
