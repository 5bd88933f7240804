"""python -m ect.train trains a diffusion model, tunes it into a consistency model, or does both (the default, on digits)."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if __name__ == "__main__":  # before the imports below, which take seconds
    from ect.ranks.interrupts import install, leave

    install(leave)

# Before torch loads OpenMP: idle threads sleep, instead of spinning against other work on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ect.options import parse
from ect.ranks.launch import launch
from ect.show.dry_run import describe

if TYPE_CHECKING:
    from ect.config import Config
    from ect.ranks.distributed import World


def main(argv: list[str]) -> int:
    """Train as the command line says, and return the exit status.

    It is 0 when done or stopped by a signal (all is saved), 2 on bad input, 3 where the run diverged, 4 where another process
    of it was lost, 130 on an impatient second Ctrl-C.
    """

    def configure() -> Config | None:
        cfg = parse(argv)
        if cfg.dry_run:
            print(describe(cfg))
            return None
        if cfg.plan:
            from ect.cost import plan  # not earlier: it imports torch
            from ect.show.log import Screen

            plan.show(cfg, Screen())
            return None
        return cfg

    return launch(configure, train, interrupted="interrupted; the last checkpoint is what is saved")


def train(cfg: Config, world: World) -> int:
    from ect.job import Job  # not earlier: torch takes seconds to import, --help and --dry-run need none

    job = Job(cfg, world=world)
    if not job.run():
        print(f"Stopped; all is saved. Continue with: python -m ect.train --resume {job.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
