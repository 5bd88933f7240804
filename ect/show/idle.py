"""Notes on options that do nothing in a run, for the console."""

from __future__ import annotations

from collections.abc import Iterator

from ect.config import Config
from ect.data import Dataset


def idle_options(cfg: Config, dataset: Dataset) -> Iterator[str]:
    """Name the options that do nothing in a run on this data set, as lines for the console."""
    sizes = [dataset.resolution >> level for level in range(len(cfg.net.channel_mult))]
    idle = [size for size in cfg.net.attn_resolutions if size not in sizes]
    if idle and cfg.init_from is None and cfg.resume is None:
        levels = ", ".join(map(str, sizes))
        yield f"--net.attn-resolutions {' '.join(map(str, idle))}: no level of the network has this size, but {levels}"
    if cfg.net.label_dropout > 0 and dataset.labels is None:
        yield f"--net.label-dropout {cfg.net.label_dropout}: there are no labels to drop; give --data.labels"
    objective = cfg.objective
    if 0 < objective.min_gap <= (last := objective.q**-objective.n_stages):
        yield f"--objective.min-gap {objective.min_gap}: no stage comes so close; the gap of the last one is {last:.3g}"
    if objective.direction == "features" and objective.c > 0 and objective.weighting != "adaptive":
        yield f"--objective.c {objective.c}: along features the loss has a gradient without it; it changes what is logged alone"
