"""python -m ect_kernels: what was built, for which GPUs, and which backend each op would use here."""

from __future__ import annotations

import importlib

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


def main() -> None:
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


if __name__ == "__main__":
    main()
