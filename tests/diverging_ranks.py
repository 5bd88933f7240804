"""What the tests run under torchrun: one rank's loss, or its average, goes bad, and all ranks stop together."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from rich.console import Console

from ect.config import LogConfig
from ect.cost import memory
from ect.job import Job
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.step import TrainStep
from tests import predictions
from tests.tiny import config

LOSS = TrainStep.loss


def work(arguments: tuple[Path, str], world: World) -> int:
    folder, what = arguments

    def loss(self: TrainStep, i: int) -> torch.Tensor:
        bad = world.rank == 1 and int(self.key) >= 4
        if bad and what == "average":
            self.state.emas[0][8:] = math.nan
        return LOSS(self, i) * (math.nan if bad and what == "loss" else 1.0)

    TrainStep.loss = loss  # type: ignore[method-assign]
    memory.predict = predictions.nothing
    log = LogConfig(stats_kimg=0.016, sample_kimg=0, checkpoint_kimg=0.016, keep=1)
    try:
        Job(config(run_dir=folder / "run", log=log), Console(quiet=True), world).run()
    except Exception as error:
        (folder / f"rank{world.rank}").write_text(f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(launch(lambda: (Path(sys.argv[1]), sys.argv[2]), work))
