"""python -m ect.merge: plain means of kept weights, and the search for a combination (LCSC) with its separate seeds."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from ect import evaluate, sample
from ect.config import DataConfig, OptimConfig
from ect.data import load
from ect.errors import UserError
from ect.files import kept
from ect.files.checkpoint import load_model, read_model
from ect.files.model_file import save_model
from ect.merge import __main__ as cli
from ect.merge import lcsc, profiles
from ect.merge import search as of_merge
from ect.merge.blend import Blend, Part, parts_of
from ect.metrics import Column
from ect.metrics.evaluator import Evaluator
from ect.models import build
from ect.sampler import Consistency, draw
from ect.search.judge import Judge, judge, run_of, seeds
from tests.tiny import config, run

CPU = torch.device("cpu")
LOG = replace(config().log, sample_kimg=0.0, weights_kimg=0.008, checkpoint_kimg=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps, which all keep their weights; only to be read."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    run(config(log=LOG, optim=OptimConfig(lr=3e-2, emas=(".5", "0"))), folder)
    return folder


def merge(*args: Any) -> None:
    cli.main([*map(str, args), "--device", "cpu", "--threads", "1"])


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        merge(*args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    return err


class Pixels(Evaluator):
    """How far the mean pixel is from a value, and the pixels' spread."""

    columns, used = (Column("FDc"), Column("FDp"), Column("imbalance")), {}

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        pixels = torch.cat(list(images)).double()
        return {"FDc": float((pixels.mean() - 100).square()), "FDp": float(pixels.std()), "imbalance": 0.0}


@pytest.fixture
def by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ect.search.judge.make_evaluator", lambda *args, **kwargs: Pixels())


# ------------------------------------------------------------------------------------------------ plain means


@pytest.mark.slow
def test_a_uniform_average_is_the_mean_of_its_range_and_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean.safetensors"
    merge(trained, "--uniform", "0.032-0.056", "--out", out)
    assert f"wrote {out}, of 4 sets of weights" in capsys.readouterr().out
    names = [f"weights-000000.{nimg:03}.safetensors" for nimg in (32, 40, 48, 56)]
    files = [load_file(trained / "weights" / name) for name in names]
    got, raw = load_model(out), read_model(out).state
    for name, parameter in got[0].named_parameters():
        want = torch.stack([file[name].double() for file in files]).mean(0)
        torch.testing.assert_close(parameter.double(), want, rtol=1e-6, atol=1e-7)
        assert raw[name].dtype == torch.float32
    assert got[1]["nimg"] == 56 and "weights" not in got[1] and got[1]["preset"] == "digits"
    assert got[1]["merged"] == {"run": str(trained), "way": "uniform", "coefficients": dict.fromkeys(names, 0.25)}


@pytest.mark.slow
def test_sampling_and_evaluation_take_the_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    merge(trained, "--uniform", "0-1")
    for model in ("merged.safetensors", trained / "weights" / "weights-000000.040.safetensors"):
        sample.main([str(model), "--count", "2", "--device", "cpu", "--threads", "1"])
        evaluate.main([str(model), "--samples", "16", "--repeats", "1", "--device", "cpu", "--threads", "1"])
        assert "FDc" in capsys.readouterr().out
    report = json.loads(next(Path("runs").glob("*merged/metrics.json")).read_text())
    assert len(report["model"]["info"]["merged"]["coefficients"]) == 10


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "give --uniform FROM-TO, --posthoc WIDTH or --search, one of the three"),
        (["--uniform", "0-1", "--search"], "give --uniform FROM-TO, --posthoc WIDTH or --search, one of the three"),
        (["--uniform", "3"], "--uniform 3: expected FROM-TO in kimg, such as 640-1280"),
        (["--uniform", "3-2"], "--uniform 3-2: expected FROM-TO"),
        (["--uniform", "0-inf"], "--uniform 0-inf: expected FROM-TO"),
        (["--uniform", "nan-1"], "--uniform nan-1: expected FROM-TO"),
        (["--uniform", "5-6"], "--uniform 5-6: no weights were kept there; the run has some from 0.008 to 0.08 kimg"),
        (["--search", "--range", "5-6"], "--range 5-6: no weights were kept there"),
        (["--uniform", "0-1", "--range", "0-1"], "--range 0-1: it is of --search"),
        (["--uniform", "0-1", "--nfe", "1"], "--nfe 1: it is of --search"),
        (["--search", "--nfe", 3], "--nfe 3: also give its 2 later noise levels, --mid-t"),
        (["--search", "--nfe", 0], "--nfe 0: expected from 1 to 1,000"),
        (["--search", "--samples", 1], "--samples 1: expected at least 2"),
        (["--search", "--mid-t", 1, 2], "--mid-t 1 2: expected strictly decreasing"),
        (["--search", "--metric", "IS"], "--metric IS: expected one of FDc, FDp"),
        (["--search", "--out", "x.pkl"], "--out x.pkl: name a file NAME.safetensors"),
        (["--search", "--out", "no/x.safetensors"], "name a file NAME.safetensors in a folder that is there"),
    ],
)
def test_what_does_not_fit_is_refused(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    args: list[Any], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, trained, *args)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no raw weights" in refused(capsys, tmp_path, "--uniform", "0-1", "--out", tmp_path / "x.safetensors")


def test_weights_of_another_network_are_refused(trained: Path, tmp_path: Path) -> None:
    one = kept.listed(trained)[0]
    spec = json.loads(json.dumps(read_model(one.path).spec))
    spec["kwargs"]["model_channels"] = 16
    save_model(tmp_path / "other.safetensors", build(spec).state_dict(), spec, {})
    with pytest.raises(UserError, match=r"other\.safetensors: the weights do not fit the network"):
        Blend([Part("other", tmp_path / "other.safetensors"), *parts_of([one])], CPU)


def test_profiles_are_averages_of_which_the_last_counts_most() -> None:
    np.testing.assert_allclose(profiles.exponential(3, 0.5), [1 / 7, 2 / 7, 4 / 7])
    np.testing.assert_allclose(profiles.uniform(5, 2), [0, 0, 0, 0.5, 0.5])
    for count in (1, 2, 7, 32):
        made = profiles.averages(count)
        assert all(c.shape == (count,) and c.sum() == pytest.approx(1) and c.min() >= 0 for c in made.values())
        assert made["the last weights"][-1] == 1
        assert any(np.allclose(c, 1 / count) for c in made.values())


# ------------------------------------------------------------------------------------------------ the search


def toy(count: int = 8, seed: int = 0) -> Callable[[np.ndarray], float]:
    """The squared distance from a point to the combination of points on a noisy path that leads past it."""
    random = np.random.default_rng(seed)
    target, start = random.standard_normal((2, 20))
    paths = start + np.linspace(0, 0.8, count)[:, None] * (target - start)
    paths += 0.3 * random.standard_normal((count, 20))
    return lambda c: float(((c @ paths - target) ** 2).sum())


def test_the_search_beats_each_set_of_weights_and_each_average_of_them() -> None:
    pytest.importorskip("cma")
    for seed in range(3):
        rate, asked = toy(seed=seed), []

        def counted(c: np.ndarray, rate: Any = rate, asked: list = asked) -> float:
            asked.append(c)
            return rate(c)

        known = profiles.averages(8)
        singles = [rate(c) for c in [*np.eye(8), *known.values()]]
        start = min(known.values(), key=rate)
        mean, met = lcsc.search(counted, start, 300, seed=0)
        assert rate(met) < 0.7 * min(singles) and rate(mean) < 0.7 * min(singles)
        assert rate(met) == min(map(rate, asked))
        assert all(c.sum() == pytest.approx(1) for c in asked) and len(asked) <= 300
        assert min(met) < 0  # which no average has


def test_a_search_is_that_of_its_seed_whatever_numpy_draws_beside_it() -> None:
    pytest.importorskip("cma")
    found = []
    for seed, before in [(3, 1), (3, 2), (4, 1)]:
        np.random.seed(before)
        state = np.random.get_state()[1].copy()
        found.append(np.stack(lcsc.search(toy(), profiles.uniform(8), 60, seed)))
        assert np.array_equal(np.random.get_state()[1], state)
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_without_its_library_the_search_is_refused_by_the_name_of_the_extra(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    err = refused(capsys, trained, "--search", "--out", tmp_path / "x.safetensors")
    assert "--search: the library cma is not installed; pip install 'easy-consistency-tuning[search]'" in err
    assert list(tmp_path.iterdir()) == []


def test_no_image_of_the_report_was_seen_by_the_search_or_its_finals(trained: Path) -> None:
    for samples in (2, 2000, 10**7):
        sets = list(seeds(samples).values())
        assert [len(one) for one in sets] == [samples, samples, 3 * samples]
        ends = sorted((one[0], one[-1]) for one in sets)
        assert all(last < first for (_, last), (first, _) in itertools.pairwise(ends))
        assert ends[-1][1] < 2**32  # or torch's generator would take it for another one
    net = load_model(trained)[0]
    starts = [draw(net, seed)[0] for one in seeds(3).values() for seed in one]
    assert len({tuple(latents.flatten().tolist()) for latents in starts}) == 15


def test_the_judge_rates_on_the_seeds_that_it_names(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[range] = []
    original = cli.judge.__globals__["quality_rows"]

    def spy(*args: Any, **kwargs: Any) -> Any:
        used.extend(range(kwargs["seed"] + i * 4, kwargs["seed"] + i * 4 + 4) for i in range(kwargs.get("repeats", 1)))
        return original(*args, **kwargs)

    monkeypatch.setattr("ect.search.judge.quality_rows", spy)
    rater, net = Judge(Pixels(), "FDc", 4, batch=4), load_model(trained)[0]
    sampler, sets = Consistency((80.0,)), seeds(4)
    rated = [rater.rate(net, sampler), rater.rate(net, sampler, finals=True), rater.rate(net, sampler)]
    assert rated[0] == rated[2] != rated[1] and rater.ratings == 3
    (row,) = rater.report(net, [sampler])
    assert used == [sets["search"], sets["finals"], sets["search"], *(range(i, i + 4) for i in (0, 4, 8))]
    assert [seed for one in used[3:] for seed in one] == list(sets["report"]) and len(row.values) == 3


def test_the_judge_takes_the_data_and_the_metric_of_the_run(trained: Path) -> None:
    data = load(DataConfig())
    assert judge(data, trained, None, 4, 4, CPU, cli.World()).metric == "FDc"
    assert judge(data, trained, "FDp", 4, 4, CPU, cli.World()).metric == "FDp"
    one = kept.listed(trained)[0].path
    last = trained / "checkpoint-000000.080.safetensors"
    assert run_of(trained) == run_of(one) == run_of(last) == trained and run_of(Path("ect/models")) is None
    assert run_of(trained / "of-another.safetensors") is None  # whose config.json need not be ours


@pytest.mark.slow
def test_a_search_writes_what_it_reports_and_does_so_again(
    trained: Path, tmp_path: Path, by_pixels: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cma")
    infos = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        options = ["--samples", 16, "--ratings", 40, "--nfe", 1, "--batch", 16, "--range", "0.04-0.08"]
        merge(trained, "--search", *options, "--out", out)
        infos.append(load_model(out)[1]["merged"])
    told = infos[0]
    assert {**told, "minutes": 0, "report": 0} == {**infos[1], "minutes": 0, "report": 0}
    assert told["coefficients"] and sum(told["coefficients"].values()) == pytest.approx(1)
    assert set(told["coefficients"]) <= {
        "EMA .5",
        "EMA 0",
        *(f"weights-000000.{n:03}.safetensors" for n in range(40, 81)),
    }
    assert {"EMA .5", "EMA 0", "the last weights"} < told["single"].keys()
    assert told["best_single"] == min(told["single"], key=told["single"].get)
    assert told["finals"]["found"] < told["finals"]["best single"] and told["metric"] == "FDc"
    assert told["sampler"] == "1 NFE at sigma 80" and told["samples"] == 16
    out = capsys.readouterr().out
    assert "searched for 0.0 minutes: " in out and f"{told['ratings']} ratings of 16 images each" in out
    assert all(f"{name} at {nfe} NFE: " in out for name in ("FDc", "FDp") for nfe in (1, 2))
    rater, net = Judge(Pixels(), "FDc", 16), load_model(tmp_path / "a.safetensors")[0]
    rows = rater.report(net, [Consistency((80.0,)), Consistency((80.0, 0.821))])
    want = [row["mean"] for row in told["report"]["found by the search"]]
    assert [{name: row.mean(name) for name in row.values[0]} for row in rows] == want


def test_an_average_that_nothing_beats_stays(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finals decide by images of their own: what only seemed better in the search gives way."""
    pytest.importorskip("cma")
    blend = Blend(parts_of(kept.listed(trained)[-2:]), CPU)
    rater = Judge(Pixels(), "FDc", 2, batch=2)
    figures = iter([0.0, 1.0, 1.0, 1.0])
    rate = Judge.rate
    monkeypatch.setattr(Judge, "rate", lambda self, *a, finals=False: next(figures) if finals else rate(self, *a))
    found, told = of_merge.search(blend, rater, [Consistency((80.0,))], 4, 0, Console(quiet=True))
    assert np.array_equal(found, of_merge.single(blend)[told["best_single"]])


def test_many_weights_are_thinned_evenly_and_keep_the_last(trained: Path) -> None:
    many = [kept.Kept(i, Path(f"{i}")) for i in range(100)]
    parts = of_merge.parts(trained, config(), many)
    numbers = [int(part.name) for part in parts if part.ema is None]
    assert [part.name for part in parts if part.ema is not None] == ["EMA .995"]
    assert len(numbers) == of_merge.MOST and numbers[0] == 0 and numbers[-1] == 99
    assert set(np.diff(numbers)) == {2, 3}
