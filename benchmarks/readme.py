"""Put a finished digits run where it is shown: python benchmarks/readme.py runs/readme (see make readme).

Copies its picture to benchmarks/results/digits.png and its checkpoint to ect/models/digits.safetensors. Writes its table
between the markers of README.md, and that of benchmarks/digits_quality.py --report between the markers of docs/recipes.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.options import Parser, command, possible_path

from ect.errors import UserError
from ect.files.checkpoint import read_model
from ect.files.model_file import save_model

ROOT = Path(__file__).parents[1]
PLACES = {"digits": ROOT / "README.md", "seeds": ROOT / "docs/recipes.md"}


def insert(text: str, name: str, block: str) -> str:
    """Return `text` with `block` between the markers of `name`. Raises ValueError where a marker is missing."""
    begin, end = f"<!-- {name}: written by make readme -->\n", f"<!-- /{name} -->"
    head, found, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"the markers of {name!r} are missing: {begin.strip()} and {end}")
    return f"{head}{begin}{block.strip()}\n{end}{tail}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run_dir", type=possible_path, help="folder of a finished run of python -m ect.train")
    run_dir = parser.parse_args(argv).run_dir
    for name in ("samples.png", "results.md"):
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir / name}: no such file; name the folder of a finished run of python -m ect.train")
    model = read_model(run_dir)
    shutil.copy(run_dir / "samples.png", ROOT / "benchmarks/results/digits.png")
    info = {**model.info, "made_by": "make readme", "licence": "Apache-2.0"}
    save_model(ROOT / "ect/models/digits.safetensors", model.state, model.spec, info)
    report = [sys.executable, str(ROOT / "benchmarks/digits_quality.py"), "--report", "--markdown"]
    seeds = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    blocks = {"digits": (run_dir / "results.md").read_text(encoding="utf-8"), "seeds": seeds}
    for name, path in PLACES.items():
        path.write_text(insert(path.read_text(encoding="utf-8"), name, blocks[name]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
