"""make fuzz: hypothesis on every reader for ten minutes each, by a seed that is printed; a fault ends it with status 1.

    python -m tests.fuzz [--seconds 600] [--seed N] [READER ...]

Each reader has a process of its own: one that crashes leaves its file in runs/fuzz/READER.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz.readers import READERS, explore_for


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], help="default: all")
    parser.add_argument("--seconds", type=float, default=600, help="for each reader (default: 600)")
    parser.add_argument("--seed", type=int, help="the first seed, as an earlier run printed it")
    parser.add_argument("--here", action="store_true", help="in this process")
    options = parser.parse_args(argv)
    number = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    bad = []
    for name in options.readers or READERS:
        folder = Path("runs") / "fuzz" / name
        folder.mkdir(parents=True, exist_ok=True)
        if options.here:
            count, taken = explore_for(name, folder, options.seconds, number)
            print(f"{name}: {count:,} files, of which {taken:,} gave a value; no fault", flush=True)
        else:
            command = [
                sys.executable,
                "-m",
                "tests.fuzz",
                "--here",
                "--seconds",
                str(options.seconds),
                "--seed",
                str(number),
                name,
            ]
            status = subprocess.run(command, check=False).returncode
            if status:
                bad.append(name)
                print(f"{name}: ended with status {status}; its last file is in {folder}", flush=True)
    print(f"faults in: {', '.join(bad)}" if bad else "no fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
