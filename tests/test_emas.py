"""Several weight averages in one run: trained, saved, resumed, sampled and rated; and what the option refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ect_kernels import radam_ema
from rich.console import Console
from safetensors.torch import load_file

from ect import evaluate, sample
from ect.config import EvalConfig, OptimConfig, emas
from ect.errors import UserError
from ect.files.checkpoint import load_model, read_model
from ect.job import Job
from ect.metrics import Column
from ect.metrics.evaluator import Evaluator
from ect.train import main
from tests.tiny import config, run

THREE = (".9", ".5", "0")
OPTIM = OptimConfig(lr=1e-3, betas=(0.9, 0.99), emas=THREE)
LAST = "checkpoint-000000.080"


class MeanPixel(Evaluator):
    columns, used = (Column("mean"),), {}

    def evaluate(self, images: Any) -> dict[str, float]:
        return {"mean": torch.cat(list(images)).double().mean().item()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three averages; only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ect.job.make_evaluator", lambda *args, **kwargs: MeanPixel())
        cfg = config(optim=OPTIM, eval=EvalConfig(samples=4, batch=4))
        cfg = replace(cfg, log=replace(cfg.log, sample_kimg=0.0, eval_kimg=0.048, keep=2))
        return run(cfg, tmp_path_factory.mktemp("emas") / "run").run_dir


@pytest.mark.slow
def test_each_average_has_its_model_file_which_goes_with_the_checkpoint(trained: Path) -> None:
    kinds = [".ema1.safetensors", ".ema2.safetensors", ".json", ".safetensors", ".state.safetensors"]
    stems = ["checkpoint-000000.064", LAST]  # two are kept, of four
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == [s + kind for s in stems for kind in kinds]
    listed = json.loads((trained / f"{LAST}.json").read_text())["files"]
    assert sorted(listed) == sorted(LAST + kind for kind in kinds if kind != ".json")
    state = load_file(trained / f"{LAST}.state.safetensors")
    for i, kind in enumerate([".safetensors", ".ema1.safetensors", ".ema2.safetensors"]):
        for source, ema in [(trained, i), (trained / f"{LAST}.json", i), (trained / f"{LAST}{kind}", None)]:
            found = read_model(source, ema)
            assert found.info["ema"] == THREE[i]
            assert all(torch.equal(found.state[n], state.get(f"ema{i}.{n}", found.state[n])) for n in found.state)
    name = "model.map_layer0.weight"
    first, second, weights = (state[f"{arena}.{name}"] for arena in ("ema0", "ema1", "params"))
    assert not torch.equal(first, second) and not torch.equal(second, weights)
    assert torch.equal(state[f"ema2.{name}"], weights)  # a decay of 0


@pytest.mark.slow
def test_a_second_average_changes_nothing_else(trained: Path, tmp_path: Path) -> None:
    cfg = config(optim=replace(OPTIM, emas=(".9",)))
    alone = load_file(run(cfg, tmp_path / "run").run_dir / f"{LAST}.state.safetensors")
    beside = load_file(trained / f"{LAST}.state.safetensors")
    assert beside.keys() - alone.keys() and not alone.keys() - beside.keys()
    assert all(torch.equal(tensor, beside[name]) for name, tensor in alone.items())
    assert "ema1" not in "".join(path.name for path in (tmp_path / "run").iterdir())


def test_statistics_and_report_have_a_figure_an_average(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "stats.jsonl").read_text().splitlines()]
    assert [rows[0][name] for name in ("ema_beta", "ema1_beta", "ema2_beta")] == [0.9, 0.5, 0.0]
    rated = [row for row in rows if "ema.9/nfe1/mean" in row]
    assert len(rated) == 1 and all(f"ema{entry}/nfe{n}/mean" in rated[0] for entry in THREE for n in (1, 2))
    assert len({rated[-1][f"ema{entry}/nfe1/mean"] for entry in THREE}) > 1
    report = (trained / "results.md").read_text()
    assert all(f"| consistency, {how}, EMA {entry} |" in report for entry in THREE for how in ("1 step", "2 steps"))
    assert [row["ema"] for row in json.loads((trained / "results.json").read_text())["rows"]] == [
        entry for entry in THREE for _ in (1, 2)
    ]


@pytest.mark.slow
def test_a_resume_goes_on_bit_by_bit_and_refuses_another_list(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "latest").write_text("checkpoint-000000.064\n")
    cfg = config(optim=OPTIM, resume=folder)
    for other in ((".9",), (".9", ".5", ".2"), (".5", ".9", "0"), (".9", ".5")):
        with pytest.raises(UserError, match=r'--optim\.emas: checkpoint has \["\.9", "\.5", "\.0"\], command line'):
            Job(replace(cfg, optim=replace(OPTIM, emas=other)), Console(quiet=True))
    run(replace(cfg, optim=replace(OPTIM, emas=("0.9", "0.50", ".0"))), folder)  # the same ones
    want, got = (load_file(path / f"{LAST}.state.safetensors") for path in (trained, folder))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)


def test_a_damaged_average_is_passed_over_and_a_missing_one_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    victim = folder / f"{LAST}.ema1.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.warns(UserWarning, match=r"ema1\.safetensors: damaged.*using the checkpoint before it"):
        assert read_model(folder, 1).info["nimg"] == 64
    assert read_model(folder).info["nimg"] == read_model(folder, 2).info["nimg"] == 80
    with pytest.raises(UserError, match=r"ema1\.safetensors: damaged"):
        read_model(victim)
    for ema in (3, -1):
        with pytest.raises(UserError, match=rf"--ema {ema}: .*{LAST} has weight averages 0 to 2"):
            read_model(folder, ema)
    copy = shutil.copy(trained / f"{LAST}.safetensors", tmp_path / "copy.safetensors")
    assert load_model(copy, ema=0)[1]["nimg"] == 80
    with pytest.raises(UserError, match=r"--ema 1: .*copy\.safetensors holds one network; give the folder of a run"):
        load_model(copy, ema=1)


@pytest.mark.slow
def test_the_commands_take_the_average_that_is_asked_for(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "make_evaluator", lambda *args, **kwargs: MeanPixel())
    images = []
    for ema in ([], ["--ema", "0"], ["--ema", "1"]):
        out = tmp_path / "images.npz"
        common = ["--device", "cpu", *ema]
        sample.main([str(trained), "--count", "4", "--threads", "1", "--out", str(out), *common])
        with np.load(out) as arrays:
            images.append(arrays["images"])
        evaluate.main([str(trained), "--samples", "4", "--repeats", "1", *common])
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
    runs = tmp_path / "runs"
    reports = [
        json.loads((runs / name / "metrics.json").read_text()) for name in ("evaluation-run", "evaluation-run-ema1")
    ]
    assert [report["model"]["info"]["ema"] for report in reports] == [".9", ".5"]
    assert reports[0]["rows"][0]["mean"] != reports[1]["rows"][0]["mean"]
    assert "EMA .5" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sample.main([str(trained), "--ema", "3", "--device", "cpu"])
    assert "--ema 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "expected 1 to 4 weight averages"),
        ([".9", ".99", ".999", ".9999", ".99999"], "expected 1 to 4 weight averages"),
        ([".9", "0.90"], "each once"),
        (["rel:.05", "rel:0.050"], "each once"),
        *(
            (["rel:" + width], "relative width from 0.001 to 0.28")
            for width in ("", "wide", "nan", "0", "-.1", ".3", "inf")
        ),
        ([".9", "1"], "from 0 to below 1"),
        (["-.1"], "from 0 to below 1"),
        (["nan"], "from 0 to below 1"),
        (["often"], "such as .9999"),
    ],
)
def test_what_is_no_average_is_refused_by_the_option(
    entries: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"--optim.emas={entries[0]}", *entries[1:]] if entries else ["--optim.emas"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --optim.emas") and said in error


def test_the_option_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--optim.emas", ".9999", ".999", "--dry-run"]) == 0
    assert "--optim.emas .9999 .999" in capsys.readouterr().out


def test_one_pass_updates_as_many_averages_as_a_run_may_have() -> None:
    assert emas.MAX_EMAS == radam_ema.MAX_EMAS


def test_a_decay_of_version_0_1_is_one_average_to_the_last_bit() -> None:
    for beta in (0.9993, 0.5 ** (512 / 500e3), 0.0, 1e-9):
        (entry,) = emas.emas_of(beta)
        assert emas.beta_of(entry) == beta
