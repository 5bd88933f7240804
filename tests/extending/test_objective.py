"""An objective of one's own trains, in whatever micro-batches, and resumes; a command line names it; its samples are rated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ect.assembly import build_objective, flat_state, network_spec
from ect.config import EvalConfig, LogConfig, ObjectiveConfig, OptimConfig
from ect.data import ImageStream, load
from ect.errors import UserError
from ect.job import Job
from ect.models import build
from ect.objective import OBJECTIVES, Objective, register
from ect.options import parse
from ect.step import TrainStep
from ect.train import main
from tests.extending.loaded import FOLDER, added
from tests.tiny import BATCH, STEPS, config, run


@pytest.fixture(autouse=True)
def own() -> Iterator[Any]:
    with added("objective") as names:
        yield names


def test_it_is_its_formula(own: Any) -> None:
    """Of a denoiser that answers 0, by hand."""
    normal, y, eps = torch.tensor([-1.0, 2.0]), torch.full([2, 1, 2, 2], 0.5), torch.ones(2, 1, 2, 2)
    loss = own.MinSNR(gamma=5.0, P_mean=0.0, P_std=1.0).train_loss(lambda x, t: 0 * x, y, normal, eps, 0)
    # sigma = 1 / e: 1 / sigma^2 = 7.4 is cut to 5; sigma = e^2: 1 / sigma^2 = e^-4
    torch.testing.assert_close(loss, torch.tensor([5.0, torch.tensor(-4.0).exp().item()]))


def trained(own: Any, micro_batch: int | None) -> tuple[torch.Tensor, list[float]]:
    """Weights and losses after four updates."""
    cfg, data = config(), load(config().data)
    torch.manual_seed(0)
    net = build(network_spec(cfg.net, own.MinSNR.precond, data, 0)).train()
    with closing(ImageStream(data, 0, torch.device("cpu"), BATCH)) as stream:
        state = flat_state(cfg, net)
        step = TrainStep(own.MinSNR(), state, stream, seed=0, batch=BATCH, micro_batch=micro_batch)
        losses = [float(step(BATCH * i, 0)) for i in range(4)]
    return state.params, losses


def test_micro_batches_equal_one_batch(own: Any) -> None:
    (whole, losses), (parts, again) = trained(own, None), trained(own, BATCH // 4)
    assert losses == pytest.approx(again, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=2e-6)


def test_a_command_line_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--objective.kind", "min_snr", "--objective.P-mean", "-0.5"]
    assert main([*args, "--dry-run"]) == 0 and "--objective.kind min_snr" in capsys.readouterr().out
    cfg = parse(args)
    assert build_objective(cfg.objective, 0.5).P_mean == -0.5  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"--objective.kind no: .*known: consistency, diffusion, min_snr"):
        build_objective(ObjectiveConfig(kind="no"), 0.5)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_trains_with_it_resumes_and_is_rated(tmp_path: Path) -> None:
    objective = ObjectiveConfig(kind="min_snr", P_mean=-1.2, P_std=1.2)  # type: ignore[arg-type]
    cfg = config(objective=objective, optim=OptimConfig(), eval=EvalConfig(samples=4))
    run(cfg, tmp_path / "whole")
    half = run(replace(cfg, total_kimg=cfg.total_kimg / 2, eval=EvalConfig(samples=0)), tmp_path / "half")
    assert Job(replace(cfg, resume=half.run_dir), Console(quiet=True)).run()
    whole, resumed = (
        {path.name: load_file(path) for path in (tmp_path / folder).glob("checkpoint-*.safetensors")}
        for folder in ("whole", "half")
    )
    last = f"checkpoint-{STEPS * BATCH / 1000:010.3f}"
    for name in (f"{last}.safetensors", f"{last}.state.safetensors"):
        assert whole[name].keys() == resumed[name].keys()
        assert all(torch.equal(value, resumed[name][key]) for key, value in whole[name].items())
    assert "diffusion, 18 Heun steps" in (tmp_path / "half" / "results.md").read_text()


def test_the_option_knows_every_objective_also_one_that_reads_no_option() -> None:
    class Zero(Objective):
        """An objective with nothing to configure."""

    assert register("zero")(Zero) is Zero
    assert get_args(get_type_hints(ObjectiveConfig)["kind"]) == tuple(OBJECTIVES)
    assert tuple(OBJECTIVES) == ("consistency", "diffusion", "min_snr", "zero")
    assert type(build_objective(ObjectiveConfig(kind="zero"), 0.5)) is Zero  # type: ignore[arg-type]


def test_it_is_short() -> None:
    assert len((FOLDER / "objective.py").read_text(encoding="utf-8").splitlines()) <= 30


def test_a_name_that_is_taken_is_refused() -> None:
    class Other(Objective):
        """An objective by the name of another one."""

    for kind in ("consistency", "min_snr"):
        before = OBJECTIVES[kind]
        with pytest.raises(
            ValueError, match=rf"objective '{kind}': .*\.?{before.__name__} has this name; choose another"
        ):
            register(kind)(Other)
        assert OBJECTIVES[kind] is before


def test_a_limit_on_pairs_is_for_objectives_that_have_some() -> None:
    tight = ["--objective.n-stages", "24"]
    assert parse(["--objective.kind", "min_snr", *tight]).objective.n_stages == 24
    for option in ("--objective.min-gap .1", "--objective.weighting adaptive", "--log.levels"):
        with pytest.raises(UserError, match=r"with --objective\.kind min_snr, which has no pairs"):
            parse(["--objective.kind", "min_snr", *option.split()])

    class Staged(Objective):
        """An objective whose pairs close up, and which counts none."""

        staged = True

    register("staged")(Staged)
    with pytest.raises(UserError, match="n-stages 24: expected"):
        parse(["--objective.kind", "staged", *tight])
    assert parse(["--objective.kind", "staged", "--objective.min-gap", ".1"]).objective.min_gap == 0.1


def test_levels_of_an_objective_that_counts_no_pairs_are_refused(tmp_path: Path) -> None:
    class Staged(Objective):
        """An objective whose pairs close up, and which counts none."""

        staged = True

    register("staged")(Staged)
    cfg = config(objective=ObjectiveConfig(kind="staged"), log=LogConfig(levels=True))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--log\.levels: the objective staged does not count its pairs; leave it out"):
        Job(replace(cfg, run_dir=tmp_path / "run"), Console(quiet=True)).run()
    assert not (tmp_path / "run").exists()
