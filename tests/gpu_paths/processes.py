"""Modules of this folder run in processes of their own, on a request in JSON and with an answer in JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def ask(module: str, request: dict[str, Any]) -> dict[str, Any]:
    """What `python -m tests.gpu_paths.<module>` answers, without TRITON_INTERPRET; compiled kernels are kept in build/."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    env |= {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.gpu_paths.{module}", json.dumps(request)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer
