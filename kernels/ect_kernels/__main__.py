"""python -m ect_kernels: what was built, for which GPUs, and which backend each op would use here.

--check also compares the backend that each op would use with the reference, on the shapes of DDPM++ in each dtype
(ect_kernels.check), and where it fails the next one; exit status 1 if one failed, 3 if one hangs. Another one than the first
choice is checked by ECT_KERNELS='*=triton' python -m ect_kernels --check.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from ect_kernels import cpu, dispatch, native
from ect_kernels.choice import OPS


def built() -> list[str]:
    """Return a line about the CUDA extension, and one about the CPU kernels."""
    cuda, on_cpu = native.why_no_extension(), cpu.why_not_built()
    return [
        f"CUDA kernels: built for {native.built_for()}" if cuda is None else f"CUDA kernels: NOT available: {cuda}",
        f"CPU kernels: {cpu.built_for()}" if on_cpu is None else f"CPU kernels: NOT available: {on_cpu}",
    ]


def checked(console: Console, device: torch.device) -> bool:
    """Check and print, and return whether nothing failed."""
    from ect_kernels.calls import default_calls
    from ect_kernels.check import check

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        report = check(default_calls(), device)
    except RuntimeError as error:  # a BackendError, or torch itself does not run on this device
        say(f"check: FAILED: {(str(error).splitlines() or [''])[0]}")
        return False
    for (op, backend), reason in report.failed.items():
        say(f"check: {op} on {backend} FAILED: {reason}")
    for (op, backend), count in report.calls.items():
        say(f"check: {op} on {backend}: {count} calls agree with the reference")
    for line in report.skipped:
        say(f"check: {line}")
    found = "all is well" if not report.failed else f"{len(report.failed)} backends failed"
    found = found if report.calls or report.failed else "nothing but references runs here"
    say(f"check: {found}; {report.seconds:.1f} s, of it {report.compiling:.1f} s compiling")
    return not report.failed


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m ect_kernels", description="What the fused ops run on here.")
    parser.add_argument("--check", action="store_true", help="compare the backends with the reference")
    parser.error = lambda message: parser.exit(2, f"error: {message:.500}; see --help\n")  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    for name in OPS:
        importlib.import_module(f"ect_kernels.{name}")
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console.print(*built(), sep="\n", highlight=False)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (no CUDA device)"
    table = Table("op", "backend", "why", title=f"Backends on {where}")
    for row in dispatch.table(device):
        table.add_row(*row)
    console.print(table)
    triton = native.why_no_triton(torch.device("cuda"))
    console.print(f"Triton: {triton or 'installed'}. apex: {native.why_no_apex() or 'installed'}.", highlight=False)
    return 0 if not options.check or checked(console, device) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
