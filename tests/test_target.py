"""--target: a run ends where quality has come so far, and images of other seeds say so, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ect import train
from ect.config import Config, EvalConfig
from ect.config.target import Wanted, wanted
from ect.doctor.__main__ import examine
from ect.errors import UserError
from ect.files.checkpoint import read_model
from ect.job import Job, pretrain_config
from ect.metrics import Column, Target
from ect.metrics.features import FeatureEvaluator
from ect.metrics.fidelity import FidelityEvaluator, FidelityOptions
from ect.options import parse
from ect.sampler import Consistency, Heun
from tests.tiny import config, run

COLUMNS = (Column("FDc"), Column("FID", missing="no weights; get some"), Column("IS", rises=True))
SAMPLERS = (Consistency((80.0,)), Consistency((80.0, 0.8)))
AIMED = config(
    eval=EvalConfig(samples=16, batch=16), log=replace(config().log, eval_kimg=0.016, sample_kimg=0.0), target="fdc=20"
)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("fid=2.73", Wanted("fid", 2.73, None)),
        ("FDc@2=20", Wanted("FDc", 20.0, 2)),
        ("FD-DINOv2@1=1e2", Wanted("FD-DINOv2", 100.0, 1)),
        ("two words=0", Wanted("two words", 0.0, None)),
    ],
)
def test_what_a_target_means(text: str, meant: Wanted) -> None:
    assert wanted(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", "fid", "=2", "fid=", "fid=x", "fid=nan", "fid=inf", "fid=-1", "fid=1e7", "fid@0=2", "fid@=2", "fid@2@1=3", "a=1=2"],
)  # fmt: skip
def test_what_means_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wanted(text) is None
    assert train.main([f"--target={text}", "--log.eval-kimg", "6.4", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "--target" in err and text in err and "COLUMN=FIGURE" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("option", [[], ["--log.eval-kimg", "6.4", "--eval.samples", "0"]])
def test_it_needs_evaluations_on_the_way(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--target", "fdc=20", "--dry-run", *option]) == 2
    assert "--target fdc=20: expected --log.eval-kimg with it" in capsys.readouterr().err


def test_it_is_found_among_the_columns_in_any_case_of_letters() -> None:
    assert Target.find("fdc@1=20", COLUMNS, SAMPLERS) == Target("fdc@1=20", "FDc", 20.0, 1)
    assert Target.find("FDC=20", COLUMNS, SAMPLERS).nfe == 2
    assert Target.find("fdc=20", COLUMNS, [Heun(18)]).nfe == 35
    assert str(Target.find("is=9", COLUMNS, SAMPLERS)) == "IS of at least 9 by 2 evaluations"
    for text, said in [
        ("kid=1", "samples of this run are not rated by kid; choose of FDc, FID, IS"),
        ("fid=2", "FID cannot be computed here: no weights; get some"),
        ("fdc@3=2", "samples are made by 1 or 2 evaluations, not by 3"),
    ]:
        with pytest.raises(UserError, match=f"^--target {text}: {said}"):
            Target.find(text, COLUMNS, SAMPLERS)


def test_the_columns_that_rise(tmp_path: Path) -> None:
    statistics = FidelityEvaluator.__new__(FidelityEvaluator)
    statistics._statistics, statistics._networks, statistics.used = None, [], {}
    missing = statistics._add(*_inception(tmp_path), ("FID", "KID", "IS", "precision", "recall"), False)
    assert [column.name for column in missing if column.rises] == ["IS", "precision", "recall"]
    rising, falling = Target("is=9", "IS", 9.0, 1, rises=True), Target("fdc=9", "FDc", 9.0, 1)
    assert rising.met(9.5) and not rising.met(8.5) and falling.met(9.0) and not falling.met(9.5)
    assert not rising.met(float("nan")) and not falling.met(float("nan"))


def _inception(folder: Path) -> tuple[Any, ...]:
    from ect.metrics.weights import INCEPTION

    cached = replace(INCEPTION, filename=f"no such file in {folder.name}")
    return cached, "inception-v3-compat", FidelityOptions().weights


def test_pretraining_has_no_target() -> None:
    cfg = parse(["--target", "fdc=20", "--log.eval-kimg", "6.4"])
    assert cfg.target == "fdc=20" and pretrain_config(cfg).target is None


@pytest.mark.parametrize("target", ["nothing=3", "fdc@7=3"])
def test_a_target_that_cannot_be_is_refused_at_the_start(target: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^--target {target}: "):
        Job(replace(AIMED, run_dir=tmp_path / "run", target=target), Console(quiet=True))
    assert not list(tmp_path.iterdir())


def rate(monkeypatch: pytest.MonkeyPatch, figures: list[float]) -> list[float]:
    """Let FDc by 2 evaluations be these figures, one an evaluation, and then 999. Returns the list, from which they go."""
    count = [0]

    def evaluate(self: FeatureEvaluator, images: Any) -> dict[str, float]:
        count[0] += 1
        second_seeds = count[0] == 3  # a row each for 1 and 2 evaluations, then perhaps the seeds that confirm
        is_two = count[0] == 2 or second_seeds
        fdc = figures.pop(0) if is_two and figures else 999.0
        if (count[0] == 2 and fdc > 20) or second_seeds:
            count[0] = 0
        return {"FDc": fdc, "FDp": 1.0, "imbalance": 0.5}

    monkeypatch.setattr(FeatureEvaluator, "evaluate", evaluate)
    return figures


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())  # type: ignore[no-any-return]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_crossing_that_other_seeds_confirm_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first crossing is not confirmed, the second one is."""
    rate(monkeypatch, [50.0, 19.0, 21.0, 18.0, 20.0])
    folder = tmp_path / "run"
    job = Job(replace(AIMED, run_dir=folder))
    assert job.run()
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "fdc=20: 19 after 0.032 kimg" in said and "have 21" in said and "does not confirm it: the run goes on" in said
    )
    assert "fdc=20: 18 after 0.048 kimg" in said and "which confirms it: the run ends here" in said
    found = results(folder)["target"]
    assert (found["column"], found["figure"], found["nfe"]) == ("FDc", 20.0, 2)
    first, second = found["crossings"]
    assert (first["nimg"], first["figure"], first["second_figure"], first["confirmed"]) == (32, 19.0, 21.0, False)
    assert (second["nimg"], second["figure"], second["second_figure"], second["confirmed"]) == (48, 18.0, 20.0, True)
    assert 0 < first["seconds"] < first["second_seconds"] < second["seconds"] < second["second_seconds"]
    assert (folder / "latest").read_text().strip() == "checkpoint-000000.048"
    assert read_model(folder).info["nimg"] == 48 and rows(folder)[-1]["second/nfe2/FDc"] == 20.0
    assert {"nfe1-000000.048.png", "nfe2-000000.048.png"} <= {path.name for path in folder.iterdir()}
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "target", "target", "end"]
    lines = [*examine(folder)]
    assert f"{'target:':<18}fdc=20 at 0.032 kimg, not confirmed, fdc=20 at 0.048 kimg, confirmed" in lines
    assert f"{'state:':<18}finished" in lines
    report = (folder / "report.md").read_text()
    assert "FDc of at most 20 by 2 evaluations: reached. First seen after 0.032 kimg" in report
    assert "confirmed by images of other seeds after 0.048 kimg" in report


@pytest.mark.slow
def test_a_resume_keeps_the_target_and_another_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    rate(monkeypatch, [19.0, 18.0])
    run(AIMED, folder)
    assert parse(["--resume", str(folder)]).target == "fdc=20"
    run(parse(["--resume", str(folder)]), folder)  # which is at its end, and makes the report anew
    found = results(folder)["target"]
    assert [crossing["nimg"] for crossing in found["crossings"]] == [16] and rows(folder)[-1]["nimg"] == 16
    rate(monkeypatch, [])
    run(parse(["--resume", str(folder), "--target", "fdc=10"]), folder)
    assert results(folder)["target"]["crossings"] == [] and read_model(folder).info["nimg"] == 80
    assert "fdc=10, FDc of at most 10 by 2 evaluations: not reached." in (folder / "report.md").read_text()


@pytest.mark.slow
def test_what_the_end_comes_to_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a target the end is rated by the report alone."""
    rate(monkeypatch, [99.0, 98.0, 97.0, 96.0, 5.0, 6.0])
    run(AIMED, tmp_path / "run")
    (crossing,) = results(tmp_path / "run")["target"]["crossings"]
    assert crossing["nimg"] == 80 and crossing["confirmed"]


@pytest.mark.slow
def test_a_pretraining_phase_is_not_ended_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureEvaluator, "evaluate", lambda self, images: {"FDc": 1.0, "FDp": 1.0, "imbalance": 0.5})
    cfg: Config = replace(AIMED, pretrain="digits-diffusion", pretrain_kimg=0.032)
    run(cfg, tmp_path / "run")
    assert read_model(tmp_path / "run" / "pretrain").info["nimg"] == 32
    assert read_model(tmp_path / "run").info["nimg"] == 16


@pytest.mark.slow
def test_a_branch_has_its_way_to_the_target_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cools down from a trunk that has reached the target, and does not end where it begins."""
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    rate(monkeypatch, [19.0, 18.0])
    run(replace(AIMED, optim=replace(AIMED.optim, decay="constant")), trunk)
    rate(monkeypatch, [])
    run(parse(["--resume", str(trunk), "--cooldown", "--run-dir", str(branch)]), branch)
    assert read_model(branch).info["nimg"] == 24 and results(branch)["target"]["crossings"] == []
