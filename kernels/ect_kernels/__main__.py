"""python -m ect_kernels: what was built, for which GPUs, and which backend each op would use here.

--check also runs every backend that could be chosen here, on the shapes of DDPM++ in each dtype, against the reference
(ect_kernels.check); exit status 1 if one fails, 3 if one hangs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from ect_kernels import dispatch, native

OPS = (
    "group_norm_silu",
    "residual_group_norm_silu",
    "skip_product",
    "levels",
    "perturb",
    "consistency_loss",
    "radam_ema",
)


def built() -> str:
    """One line about the CUDA extension."""
    if (reason := native.why_no_extension()) is not None:
        return f"CUDA kernels: NOT available: {reason}"
    return f"CUDA kernels: built for {native.built_for()}"


def check_all(console: Console, device: torch.device) -> bool:
    """Check and print; whether nothing failed."""
    from ect_kernels.calls import default_calls
    from ect_kernels.check import each

    report = each(default_calls(), device)
    for (op, backend), count in report.calls.items():
        reason = report.failed.get((op, backend))
        result = f"{count} calls agree with the reference" if reason is None else f"FAILED: {reason}"
        console.print(f"{op} on {backend}: {result}", markup=False, highlight=False, soft_wrap=True)
    for line in report.skipped:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    summary = (
        f"{len(report.failed)} of {len(report.calls)} backends failed" if report.calls else "only references run here"
    )
    console.print(
        f"check: {summary}; {report.seconds:.1f} s, {report.compiling:.1f} s of it compiling", highlight=False
    )
    return not report.failed


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m ect_kernels", description="What the fused ops run on here.")
    parser.add_argument("--check", action="store_true", help="compare every backend with the reference")
    options = parser.parse_args(argv)
    for name in OPS:
        importlib.import_module(f"ect_kernels.{name}")
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(built(), highlight=False)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (no CUDA device)"
    table = Table("op", "backend", "why", title=f"Backends on {where}")
    for row in dispatch.table(device):
        table.add_row(*row)
    console.print(table)
    triton = native.why_no_triton(torch.device("cuda"))
    console.print(f"Triton: {triton or 'installed'}. apex: {native.why_no_apex() or 'installed'}.", highlight=False)
    return 0 if not options.check or check_all(console, device) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
