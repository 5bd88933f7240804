"""What test_distributed runs under torchrun: one process group, several scenes. Each rank tells what it saw in rank<i>.json."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ect_kernels import dispatch
from rich.console import Console

from ect.config import EvalConfig
from ect.cost import memory
from ect.errors import UserError
from ect.files.kept import listed
from ect.job import Job
from ect.merge.blend import Blend, parts_of
from ect.merge.search import search
from ect.options import parse
from ect.ranks.distributed import World
from ect.ranks.launch import launch
from ect.sample import Options, sample
from ect.sampler import Consistency
from ect.search import sigmas
from ect.search.judge import data_of, judge
from ect.step import TrainStep
from tests import predictions
from tests.planted import plant, raises, sound
from tests.tiny import config

CALL = TrainStep.__call__
CPU = torch.device("cpu")


def exchanges(world: World) -> dict[str, Any]:
    total = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    world.sum_(total)
    found: dict[str, Any] = {
        "sum": total.tolist(),
        "mean": world.mean(float(world.rank)),
        "any": [world.any(world.rank == 1), world.any(False)],
        "gather": torch.cat(world.gather(torch.full([2], world.rank))).tolist(),
        "first": world.first(lambda: {"rank": world.rank}),
    }
    world.agree({"options": "same", "images": "same"})
    try:
        world.agree({"options": "same", "images": str(world.rank), "nimg": str(world.rank)})
    except UserError as error:
        found["refusal"] = str(error)
    return found


def in_step(number: int, act: Any) -> None:
    """Do something during that step from now on, on this rank."""
    count = 0

    def call(self: TrainStep, nimg: int, stage: int) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number:
            act()
        return CALL(self, nimg, stage)

    TrainStep.__call__ = call  # type: ignore[method-assign]


def crash() -> None:
    raise LookupError("a planted failure")


def searches(run: Path, world: World) -> dict[str, Any]:
    """The levels that a search finds for a run, and the combination of its raw weights."""
    blend = Blend(parts_of(listed(run)), CPU)
    data, folder = data_of(blend.net, blend.info, run, None)
    rater = judge(data, folder, None, 16, 4, CPU, world)
    found: dict[str, Any] = {"levels": sigmas.best(blend.net, rater, (0.821,), [2], Console(quiet=True))}
    if importlib.util.find_spec("cma") is not None:
        coefficients, told = search(blend, rater, [Consistency((80.0,))], 8, 0, Console(quiet=True))
        found |= {"coefficients": coefficients.tolist(), "finals": told["finals"]}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def work(folder: Path, world: World) -> int:
    memory.predict = predictions.shared
    seen: dict[str, Any] = exchanges(world)

    def run(cfg: Any) -> Job:
        job = Job(cfg, Console(quiet=True), world)
        seen[job.run_dir.name] = job.run()
        return job

    run(config(run_dir=folder / "accumulated", batch_per_device=2))
    run(parse(["--resume", str(folder / "resumed")]))
    branch = ["--cooldown", "--total-kimg", "0.096", "--eval.samples", "0", "--run-dir", str(folder / "cooled")]
    run(parse(["--resume", str(folder / "resumed"), *branch]))
    sample(Options(folder / "resumed", seeds="3,7,1-9", batch=4, out=folder / "samples.npz"), world)
    seen["searches"] = searches(folder / "resumed", world)
    with pytest.MonkeyPatch.context() as patch:  # a backend that works on one of two machines
        plant(patch, "radam_ema", raises if world.rank == 1 else sound)
        run(config(run_dir=folder / "checked", self_check=True, total_kimg=0.008))
        seen["refused"] = {"=".join(pair): why for pair, why in dispatch.refused(CPU).items()}
    dispatch.clear_refused()
    aimed = replace(config(), eval=EvalConfig(samples=16, batch=8), log=replace(config().log, eval_kimg=0.016))
    run(replace(aimed, run_dir=folder / "aimed", target="fdc@1=100000"))
    if world.rank == 1:
        in_step(3, lambda: signal.raise_signal(signal.SIGTERM))
    run(config(run_dir=folder / "stopped"))
    (folder / f"rank{world.rank}.json").write_text(json.dumps(seen))
    if world.rank == 1:
        in_step(2, crash)
    run(config(run_dir=folder / "crashed"))
    return 0


if __name__ == "__main__":
    sys.exit(launch(lambda: Path(sys.argv[1]), work))
