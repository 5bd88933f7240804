"""The data sets and recipes of the ledger. Both are lists of ect.train's options, so that a new one is a line."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from digits_quality import stretch

from ect.config import Config
from ect.job import pretrain_config
from ect.options import parse

BASE = "published"
"""The recipe that all others are compared with."""
TEACHER = "diffusion"
"""The teacher itself, by 35 evaluations: rated, but not tuned."""


@dataclass(frozen=True)
class DataSet:
    """A data set with the length of its runs.

    options: of ect.train. teacher, tuning: factors of the preset's lengths. points: evaluations of a run, the last included.
    seeds: that a claim needs.
    """

    options: str
    teacher: float = 1.0
    tuning: float = 1.0
    points: int = 8
    seeds: int = 3


@dataclass(frozen=True)
class Recipe:
    """A way to tune a teacher.

    options: of ect.train, after the data set's. before: commands of python whose work the tuning rests on, such as features
    of the data; in them {data} is the data set's --data.source, {resolution} its --data.resolution, {teacher} the teacher's
    file. Each is run once (one that names the teacher, once a seed), and charged to every line that needs it. A result that is
    there already, made by hand, would be found by such a command at no cost: remove it first.
    """

    options: str = ""
    before: tuple[str, ...] = ()


SETS = {
    "digits": DataSet("--preset digits", seeds=5),
    "fashion16": DataSet(
        "--preset digits --data.source datasets/fashion16 --net.channel-mult 1 2 2 --eval.samples 5000", teacher=5 / 3
    ),
    "fashion28": DataSet("--preset fashion --data.source datasets/fashion-mnist", points=6, seeds=2),
    "smoke": DataSet("--preset digits --eval.samples 300", teacher=0.05, tuning=0.05, points=2, seeds=1),
}
ONE_STAGE = "--objective.n-stages 1 --objective.q"
FEATURES = "--objective.direction features"
TANGENT = ("-m ect.tangent --data.source {data} --data.resolution {resolution}",)
RECIPES = {
    TEACHER: Recipe(),
    BASE: Recipe(),  # the preset's six stages of q = 2, weight 1/(t - r)
    "q16": Recipe(f"{ONE_STAGE} 16"),
    "q64": Recipe(f"{ONE_STAGE} 64"),
    "q256": Recipe(f"{ONE_STAGE} 256"),
    "c43": Recipe("--objective.c 0.0043"),
    "c300": Recipe("--objective.c 0.03"),
    "q64-c43": Recipe(f"{ONE_STAGE} 64 --objective.c 0.0043"),
    "teacher-target": Recipe("--objective.target teacher"),
    "q64-teacher-target": Recipe(f"{ONE_STAGE} 64 --objective.target teacher"),
    "batch32": Recipe("--batch 32"),
    "q64-batch32": Recipe(f"{ONE_STAGE} 64 --batch 32"),
    "constant-lr": Recipe("--optim.decay constant"),
    "cooldown": Recipe("--optim.decay cooldown"),
    "posterior": Recipe("--objective.target posterior"),
    "q64-posterior": Recipe(f"{ONE_STAGE} 64 --objective.target posterior"),
    "adaptive": Recipe("--objective.weighting adaptive"),
    "q64-adaptive": Recipe(f"{ONE_STAGE} 64 --objective.weighting adaptive"),
    "q64-adaptive-c43": Recipe(f"{ONE_STAGE} 64 --objective.weighting adaptive --objective.c 0.0043"),
    "q256-adaptive": Recipe(f"{ONE_STAGE} 256 --objective.weighting adaptive"),
    "features": Recipe(FEATURES, TANGENT),
    "q64-features": Recipe(f"{ONE_STAGE} 64 {FEATURES}", TANGENT),
    "q64-adaptive-features": Recipe(f"{ONE_STAGE} 64 --objective.weighting adaptive {FEATURES}", TANGENT),
}


def config(name: str, recipe: str, length: float, seed: int, threads: int) -> Config:
    """Return the configuration of a tuning, whose length is `length` times the data set's. Raises UserError."""
    found, options = SETS[name], shlex.split(f"{SETS[name].options} {RECIPES[recipe].options}")
    cfg = stretch(parse(options), found.tuning * length)
    log = replace(
        cfg.log, stats_kimg=cfg.total_kimg / 48, sample_kimg=0.0, checkpoint_kimg=cfg.total_kimg / 8, keep=1,
        eval_kimg=cfg.total_kimg / found.points,
    )  # fmt: skip
    return replace(cfg, seed=seed, threads=threads, log=log)


def teacher_config(name: str, seed: int, threads: int) -> Config:
    """Return the configuration of the diffusion phase, which all recipes of a data set share."""
    cfg = config(name, BASE, 1.0, seed, threads)
    phase = stretch(pretrain_config(cfg), SETS[name].teacher)
    return replace(phase, log=replace(phase.log, checkpoint_kimg=phase.total_kimg / 16, eval_kimg=0.0))


def options_of(name: str, recipe: str) -> list[str]:
    """Return the options by which a line was made; a recorded line of other options is another recipe's."""
    before = [word for command in RECIPES[recipe].before for word in shlex.split(command)]
    return [*shlex.split(f"{SETS[name].options} {RECIPES[recipe].options}"), *before]
