"""Weight averages by power profiles: their decays, in a run, kept, and turned into other widths afterwards."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from ect import evaluate, sample
from ect.config import EvalConfig, OptimConfig
from ect.config.emas import power_exponent
from ect.doctor import __main__ as doctor
from ect.errors import UserError
from ect.files import kept
from ect.files.checkpoint import load_model, read_model
from ect.job import Job
from ect.merge import __main__ as merge
from ect.merge import posthoc_coefficients
from ect.merge.posthoc import distance
from ect.optim import FlatState
from ect.schedule import ema_betas_at, power_ema_beta
from ect.train import main
from tests.golden_data import MANIFEST, load, rel_l2
from tests.test_job import interrupt_after
from tests.tiny import BATCH, STEPS, config, run

GOLDEN, POSTHOC = load("power_ema"), MANIFEST["power_ema"]["posthoc"]
FOUR = (".9", "rel:.05", "rel:.10", "rel:.2")
LAST = STEPS * BATCH


# ------------------------------------------------------------------------------------------------ decays


@pytest.mark.parametrize("sigma_rel", MANIFEST["power_ema"]["stds"])
def test_averages_are_those_of_the_public_code(sigma_rel: float) -> None:
    """Through the optimizer's own averages, and a step's decays."""
    net = nn.Linear(4, 4)
    net.load_state_dict({"weight": GOLDEN["init.weight"], "bias": GOLDEN["init.bias"]})
    state, batch = FlatState(net, ema_betas=[0.5]), MANIFEST["power_ema"]["batch_size"]
    cfg = OptimConfig(emas=(f"rel:{sigma_rel}",), ema_rampup=0.05)
    for i, weight in enumerate(GOLDEN["weights"]):
        net.weight.data.copy_(weight)
        state.ema_betas = ema_betas_at(i * batch, batch, cfg)
        assert state.ema_betas == (power_ema_beta((i + 1) * batch, batch, sigma_rel),)
        state.follow(state.rule.device_ema_betas)
    assert rel_l2(state.ema_state_dict()["weight"], GOLDEN[f"ema.{sigma_rel:.3f}"]) < 1e-6


def test_an_average_weighs_each_step_by_its_profile() -> None:
    """t^gamma, summed over the images of a step; the standard deviation of that is the width."""
    batch, steps, sigma_rel = 10, 2000, 0.1
    weights = np.zeros(steps)
    for i in range(steps):
        weights *= (beta := power_ema_beta((i + 1) * batch, batch, sigma_rel))
        weights[i] = 1 - beta
    ends = np.arange(steps + 1) / steps
    np.testing.assert_allclose(weights, np.diff(ends ** (power_exponent(sigma_rel) + 1)), atol=1e-12)
    mean = weights @ ends[1:]
    assert math.sqrt(weights @ (ends[1:] - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


def test_exponents_are_the_published_ones() -> None:
    for sigma_rel, gamma in {0.01: 96.995, 0.05: 16.972, 0.075: 10.289, 0.1: 6.937}.items():
        assert power_exponent(sigma_rel) == pytest.approx(gamma, abs=5e-4)
    assert power_exponent(12**-0.5) == pytest.approx(0, abs=1e-12)
    for sigma_rel in np.geomspace(1e-3, 0.28, 50):
        g = power_exponent(float(sigma_rel))
        assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(sigma_rel**2, rel=1e-12) and g > 0
    for wrong in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="sigma_rel is"):
            power_exponent(wrong)


def test_the_first_update_forgets_all_before_it_and_later_ones_forget_less() -> None:
    decays = [power_ema_beta(n * 8, 8, 0.05) for n in range(20)]
    assert decays[:2] == [0, 0] and decays[2] == 0.5 ** (power_exponent(0.05) + 1)
    assert decays[2:] == sorted(decays[2:]) and decays[-1] < 1


def test_a_ramp_up_is_for_constant_decays_alone() -> None:
    cfg = OptimConfig(emas=(".9999", "rel:.05"))
    ramped = replace(cfg, ema_rampup=0.05)
    assert ema_betas_at(800, 8, ramped)[0] < ema_betas_at(800, 8, cfg)[0]
    assert ema_betas_at(800, 8, ramped)[1] == ema_betas_at(800, 8, cfg)[1] == power_ema_beta(808, 8, 0.05)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with a constant and three power-profile averages, kept after 3, 6 and 9 of them and at the end."""
    return run(configured(), tmp_path_factory.mktemp("power") / "run").run_dir


def configured(**changes: Any) -> Any:
    log = replace(config().log, sample_kimg=0.0, averages_kimg=0.024, kept_precision="fp32", keep=11)
    optim = OptimConfig(lr=1e-2, betas=(0.9, 0.99), emas=FOUR, ema_rampup=0.05)
    return replace(config(log=replace(log, checkpoint_kimg=0.008), optim=optim, total_kimg=LAST / 1000), **changes)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(folder.glob("checkpoint-*.state.safetensors"))]


@pytest.mark.slow  # the run that it needs is
def test_a_run_averages_its_weights_by_the_profiles(trained: Path) -> None:
    """In the op's one pass, from decays that the device holds; at the first step the average is the weights."""
    saved, name = states(trained), "model.map_layer0.weight"
    assert len(saved) == STEPS + 1
    for i, entry in enumerate(FOUR[1:], 1):
        average = saved[1][f"params.{name}"].double()
        assert torch.equal(saved[1][f"ema{i}.{name}"], saved[1][f"params.{name}"])
        for step, state in enumerate(saved[2:], 2):
            beta = power_ema_beta(step * BATCH, BATCH, float(entry.removeprefix("rel:")))
            average.lerp_(state[f"params.{name}"].double(), 1 - beta)
            assert rel_l2(state[f"ema{i}.{name}"], average) < 1e-6
    assert len({tuple(saved[-1][f"ema{i}.{name}"].flatten().tolist()) for i in range(4)}) == 4
    rows = [json.loads(line) for line in (trained / "stats.jsonl").read_text().splitlines()]
    assert [row["ema1_beta"] for row in rows if "loss" in row] == [
        power_ema_beta(n, BATCH, 0.05) for n in range(16, 81, 16)
    ]


def test_averages_are_kept_at_the_interval_and_at_the_end(trained: Path) -> None:
    found = kept.averages(trained)
    assert [(one.nimg, one.sigma_rel) for one in found] == [
        (n, width) for n in (24, 48, 72, 80) for width in (0.05, 0.1, 0.2)
    ]
    assert found[0].path.name == "average-000000.024-rel.05.safetensors"
    state, model = states(trained)[3], read_model(found[1].path)
    assert model.info["ema"] == "rel:.10" and model.info["nimg"] == 24 and model.info["weights"] == "average, fp32"
    assert all(
        torch.equal(model.state.get(key[5:], value), value) for key, value in state.items() if key[:5] == "ema2."
    )
    assert not (trained / "weights").exists()


@pytest.mark.slow
def test_without_the_option_or_without_a_profile_nothing_is_kept(tmp_path: Path) -> None:
    for i, (log, emas) in enumerate([({"averages_kimg": 0.0}, FOUR), ({"averages_kimg": 0.008}, (".9",))]):
        cfg = configured(total_kimg=0.008)
        cfg = replace(cfg, log=replace(cfg.log, **log), optim=replace(cfg.optim, emas=emas))
        folder = run(cfg, tmp_path / str(i)).run_dir
        assert not (folder / "averages").exists()
    with pytest.raises(UserError, match=r"no averages in its folder 'averages'.*--log\.averages-kimg"):
        kept.averages(folder)


@pytest.mark.slow
def test_a_stop_and_a_resume_end_with_the_same_averages(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        assert not Job(replace(configured(), run_dir=folder), Console(quiet=True)).run()
    other = replace(
        configured(resume=folder), optim=replace(configured().optim, emas=(".9", "rel:.05", "rel:.1", "rel:.3"))
    )
    with pytest.raises(UserError, match=r'checkpoint has \["\.9", "rel:\.05", "rel:\.1", "rel:\.2"\]'):
        Job(other, Console(quiet=True))
    again = replace(configured().optim, emas=("0.9", "rel:0.05", "rel:.1", "rel:0.20"))  # the same ones
    run(configured(resume=folder, optim=again), folder)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(states(trained), states(folder), strict=True) for key in a)
    assert [one.path.name for one in kept.averages(folder)] == [one.path.name for one in kept.averages(trained)]
    for mine, theirs in zip(kept.averages(folder), kept.averages(trained), strict=True):
        a, b = read_model(mine.path), read_model(theirs.path)
        assert all(torch.equal(a.state[key], b.state[key]) for key in a.state)


@pytest.mark.slow
def test_accumulation_averages_once_an_update(trained: Path, tmp_path: Path) -> None:
    folder = run(configured(batch_per_device=2), tmp_path / "run").run_dir
    for mine, theirs in zip(kept.averages(folder), kept.averages(trained), strict=True):
        a, b = read_model(mine.path).state, read_model(theirs.path).state
        assert max(rel_l2(a[key], b[key]) for key in a if b[key].any()) < 1e-2


@pytest.mark.slow
def test_a_branch_that_cools_down_goes_on_with_the_trunks_averages(trained: Path, tmp_path: Path) -> None:
    """Its profiles reach back to the trunk's first step, and nimg counts on."""
    trunk = trained / "checkpoint-000000.064.safetensors"
    cfg = replace(configured(resume=trunk, cooldown=True, run_dir=tmp_path / "branch"), total_kimg=0.096)
    job = Job(cfg, Console(quiet=True))
    assert job.run()
    first = states(job.run_dir)[0]
    assert all(torch.equal(first[key], value) for key, value in states(trained)[8].items() if key.startswith("ema"))
    assert sorted({one.nimg for one in kept.averages(job.run_dir)}) == [72, 96]


def test_a_dry_run_and_the_options_say_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--optim.emas", ".9999", "rel:.05", "--log.averages-kimg", "64", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "--optim.emas .9999 rel:.05" in said and "--log.averages-kimg 64" in said
    assert main(["--log.averages-kimg", "64", "--dry-run"]) == 2
    assert "--log.averages-kimg 64.0: expected 0 without a power profile" in capsys.readouterr().err
    assert main(["--log.kept-precision", "fp32", "--dry-run"]) == 2
    assert "--log.kept-precision fp32: expected fp16, its default, without" in capsys.readouterr().err


def test_raw_weights_are_kept_in_fp32_where_that_is_asked_for(tmp_path: Path) -> None:
    cfg = configured(total_kimg=0.008)
    cfg = replace(cfg, log=replace(cfg.log, averages_kimg=0.0, weights_kimg=0.008))
    folder = run(cfg, tmp_path / "run").run_dir
    model, state = read_model(kept.listed(folder)[0].path), states(folder)[-1]
    assert model.info["weights"] == "raw, fp32"
    assert all(torch.equal(model.state.get(k[7:], v), v) for k, v in state.items() if k.startswith("params."))


def test_the_doctor_reads_such_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([str(trained)])
    said = capsys.readouterr().out
    assert "averages:         .9, rel:.05, rel:.10, rel:.2; 12 kept by power profiles, up to 0.08 kimg" in said


# ------------------------------------------------------------------------------------------------ other widths


def test_coefficients_are_those_of_the_public_code() -> None:
    found = posthoc_coefficients(POSTHOC["in_ofs"], POSTHOC["in_std"], POSTHOC["out_ofs"], POSTHOC["out_std"])
    np.testing.assert_allclose(found, GOLDEN["posthoc_coefficients"][:, 0], rtol=0, atol=1e-12)
    as_tensors = (torch.tensor(POSTHOC[key]) for key in ("in_ofs", "in_std", "out_ofs", "out_std"))
    np.testing.assert_allclose(posthoc_coefficients(*as_tensors), found, atol=1e-6)  # fp32 widths


def test_a_stored_profile_comes_out_as_itself() -> None:
    nimg, widths = [64, 64, 128, 128], [0.05, 0.1, 0.05, 0.1]
    for i in range(4):
        np.testing.assert_allclose(posthoc_coefficients(nimg, widths, nimg[i], widths[i]), np.eye(4)[i], atol=1e-9)
    twice = posthoc_coefficients([64, 64], [0.05, 0.05], 64, 0.05)  # two alike are no fault
    np.testing.assert_allclose(twice, [0.5, 0.5], atol=1e-12)


def test_more_averages_meet_a_profile_better_and_it_says_how_well() -> None:
    found = []
    for count in (2, 8, 32, 128):
        nimg, widths = np.repeat(np.arange(1, count + 1) / count * 1e6, 2), np.tile([0.05, 0.1], count)
        c = posthoc_coefficients(nimg, widths, 1e6, 0.075)
        assert c.sum() == pytest.approx(1, abs=1e-9) and np.abs(c).sum() < 2
        found.append(distance(c, nimg, widths, 1e6, 0.075))
        grid = (np.arange(100_000) + 0.5) / 1e5  # the same by integration
        profiles = [  # densities over [0, 1]
            np.where(grid <= t / 1e6, (g + 1) * 1e6 / t * np.minimum(grid * 1e6 / t, 1) ** g, 0)
            for t, g in zip(nimg, map(power_exponent, widths.tolist()), strict=True)
        ]
        wanted = (power_exponent(0.075) + 1) * grid ** power_exponent(0.075)
        off = np.linalg.norm(c @ np.array(profiles) - wanted) / np.linalg.norm(wanted)
        assert found[-1] == pytest.approx(off, rel=0.02)
    assert found == sorted(found, reverse=True) and found[0] < 0.1 and found[-1] < 1e-4


def test_what_is_no_set_of_averages_is_refused() -> None:
    for args, said in [
        (([], [], 1, 0.05), "expected one number each"),
        (([1, 2], [0.05], 1, 0.05), "expected one number each"),
        (([0], [0.05], 1, 0.05), "nimg is 0"),
        (([1], [0.4], 1, 0.05), "sigma_rel is 0.4"),
        (([1], [0.05], [1, 2], [0.05, 0.05]), "2 averages are wanted"),
    ]:
        with pytest.raises(ValueError, match=said):
            posthoc_coefficients(*args)  # type: ignore[arg-type]


def merged(run: Path, *args: Any) -> None:
    merge.main([str(run), *map(str, args), "--device", "cpu", "--threads", "1"])


def true_average(run: Path, sigma_rel: float, steps: int, name: str) -> torch.Tensor:
    """The average of the run's raw weights after so many steps, by its own recursion."""
    average = torch.zeros(())
    for step, state in enumerate(states(run)[1 : steps + 1], 1):
        beta = power_ema_beta(step * BATCH, BATCH, sigma_rel)
        average = beta * average + (1 - beta) * state[f"params.{name}"].double()
    return average


@pytest.mark.parametrize(("kimg", "steps"), [(None, 10), ("0.072", 9)])
def test_the_command_makes_the_average_that_the_run_would_have_made(
    trained: Path, tmp_path: Path, kimg: str | None, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, name = tmp_path / "x.safetensors", "model.map_layer0.weight"
    merged(trained, "--posthoc", "0.15", "--out", out, *([] if kimg is None else ["--at", kimg]))
    said = capsys.readouterr().out
    assert f"the profile of width 0.15 at {steps * BATCH / 1000:g} kimg is met to" in said and "wrote" in said
    net, info = load_model(out)
    about = info["merged"]
    assert info["nimg"] == steps * BATCH and about["way"] == "posthoc" and about["sigma_rel"] == 0.15
    assert sum(about["coefficients"].values()) == pytest.approx(1) and 0 < about["distance"] < 0.1
    assert not {"ema", "weights"} & info.keys()
    want = true_average(trained, 0.15, steps, name)
    others = [true_average(trained, width, steps, name) for width in (0.1, 0.2)]
    found = dict(net.named_parameters())[name].detach()
    assert rel_l2(found, want) < 0.3 * min(rel_l2(other, want) for other in others)


def test_a_kept_width_is_what_was_kept(trained: Path, tmp_path: Path) -> None:
    merged(trained, "--posthoc", ".1", "--out", tmp_path / "x.safetensors")
    want, found = read_model(kept.averages(trained)[-2].path).state, read_model(tmp_path / "x.safetensors").state
    assert max(rel_l2(found[key], want[key]) for key in want if want[key].any()) < 1e-6


@pytest.mark.slow
def test_sampling_and_evaluation_take_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    merged(trained, "--posthoc", "0.15")
    sample.main(["merged.safetensors", "--count", "4", "--device", "cpu", "--out", "x.png", "--threads", "1"])
    evaluate.main(["merged.safetensors", "--samples", "8", "--repeats", "1", "--device", "cpu", "--threads", "1"])
    sample.main([str(trained), "--ema", "3", "--count", "4", "--device", "cpu", "--out", "y.png", "--threads", "1"])
    assert Path("x.png").read_bytes() != Path("y.png").read_bytes()
    assert "consistency, 1 step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--posthoc", ".4"], "--posthoc 0.4: expected a relative width from 0.001 to 0.28"),
        (["--posthoc", ".1", "--at", ".03"], "--at 0.03: no averages were kept there; the nearest are of 0.024 kimg"),
        (["--posthoc", ".1", "--search"], "give --uniform FROM-TO, --posthoc WIDTH or --search"),
        (["--posthoc", ".1", "--nfe", "1"], "--nfe 1: it is of --search"),
        (["--uniform", "0-1", "--at", "1"], "--at 1.0: it is of --posthoc"),
        (["--uniform", "0-1"], "no raw weights in its folder 'weights'"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    trained: Path, tmp_path: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        merged(trained, *args, "--out", tmp_path / "x.safetensors")
    assert stop.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_files_of_other_names_in_the_folder_are_passed_over(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained / "averages", folder / "averages")
    for name in (
        "average-000000.024-rel9.safetensors",
        "average-000000.024-rel.-e.safetensors",
        "average-x.safetensors",
    ):
        (folder / "averages" / name).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(kept.averages(folder)) == 12


@pytest.mark.slow
def test_the_quality_table_names_the_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_emas import MeanPixel

    monkeypatch.setattr("ect.job.make_evaluator", lambda *args, **kwargs: MeanPixel())
    cfg = configured(eval=EvalConfig(samples=4, batch=4), total_kimg=0.016)
    cfg = replace(cfg, log=replace(cfg.log, eval_kimg=0.008, averages_kimg=0.0, kept_precision="fp16"))
    folder = run(cfg, tmp_path / "run").run_dir
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert any("emarel:.05/nfe1/mean" in row for row in rows)
    assert "| consistency, 1 step, EMA rel:.05 |" in (folder / "results.md").read_text()
    assert "ema.9/nfe1/mean" in (folder / "curves.csv").read_text()
