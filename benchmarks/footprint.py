"""The operations, launches and bytes of DDPM++'s update on a GPU, counted without one: python benchmarks/footprint.py.

The update is that of cifar10-1h in fp16 as the trainer has it, but for torch.compile: channels-last, on the fused ops. It is
walked on the meta device (ect.cost.footprint). `python -m tests.gpu_paths.compiled_step` counts the compiled one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from lib.options import Parser, at_least, command

from ect.assembly import flat_state, network_spec, train_step
from ect.cost.footprint import Footprint
from ect.cost.trace import trace
from ect.data import Dataset, ImageStream
from ect.models import build
from ect.presets import PRESETS

BLOCKS = ("norm", "activation", "dropout", "residual", "concat")
"""Categories of what lies between the convolutions."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--batch", type=at_least(1), default=128, help="images (default: 128)")
    parser.add_argument("--by", choices=("category", "op", "site"), default="category", help="rows of the table")
    options = parser.parse_args(argv)
    cfg = replace(PRESETS["cifar10-1h"], batch=options.batch, precision="fp16", channels_last=True)
    data = Dataset("cifar10", torch.empty(50_000, 32, 32, 3, dtype=torch.uint8, device="meta"), None)
    with torch.device("meta"):
        net = build(network_spec(cfg.net, "ECMPrecond", data, 0)).train()
    step = train_step(cfg, flat_state(cfg, net), ImageStream(data, 0, "meta", cfg.batch))
    cost = Footprint.of(trace(step.update))
    blocks = sum(cost.traffic[name] for name in BLOCKS)
    print(f"DDPM++, {cfg.batch} images, fp16: {cost.launches} launches; {', '.join(BLOCKS)} move {blocks / 1e9:.1f} GB")
    print(cost.table(options.by))
    return 0


if __name__ == "__main__":
    sys.exit(main())
