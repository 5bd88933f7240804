"""The operations, launches and bytes of DDPM++'s update on a GPU, counted without one: python benchmarks/footprint.py.

The update is that of cifar10-1h in fp16 as the trainer has it, but for torch.compile: channels-last, on the fused ops. It is
walked on the meta device (ect.cost.footprint). `python -m tests.gpu_paths.compiled_step` counts the compiled one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from ect.assembly import flat_state, network_spec, train_step
from ect.cost.footprint import trace
from ect.data import Dataset, ImageStream
from ect.models import build
from ect.presets import PRESETS

BLOCKS = ("norm", "activation", "dropout", "residual", "concat")
"""Categories of what lies between the convolutions."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images (default: 128)")
    parser.add_argument("--by", choices=("category", "op", "site"), default="category", help="rows of the table")
    options = parser.parse_args(argv)
    cfg = replace(PRESETS["cifar10-1h"], batch=options.batch, precision="fp16", channels_last=True)
    data = Dataset("cifar10", torch.empty(50_000, 32, 32, 3, dtype=torch.uint8, device="meta"), None)
    with torch.device("meta"):
        net = build(network_spec(cfg.net, "ECMPrecond", data, 0)).train()
    cost = trace(train_step(cfg, flat_state(cfg, net), ImageStream(data, 0, "meta", cfg.batch)))
    blocks = sum(cost.traffic[name] for name in BLOCKS)
    print(f"DDPM++, {cfg.batch} images, fp16: {cost.launches} launches; {', '.join(BLOCKS)} move {blocks / 1e9:.1f} GB")
    print(cost.table(options.by))


if __name__ == "__main__":
    main()
