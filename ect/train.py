"""python -m ect.train: train a diffusion model, tune it into a consistency model, or both (the default, on digits)."""

from __future__ import annotations

import os
import sys

# Before torch loads OpenMP: idle threads sleep, instead of spinning against other work on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ect.errors import UserError
from ect.options import describe, parse


def main(argv: list[str]) -> int:
    """Exit status: 0 when done or stopped by a signal (all is saved), 2 on bad input, 130 on an impatient second Ctrl-C."""
    try:
        cfg = parse(argv)
        if cfg.dry_run:
            print(describe(cfg))
            return 0
        from ect.job import Job  # not earlier: torch takes seconds to import, --help and --dry-run need none

        job = Job(cfg)
        if not job.run():
            print(f"Stopped; all is saved. Continue with: python -m ect.train --resume {job.run_dir}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is what is saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
