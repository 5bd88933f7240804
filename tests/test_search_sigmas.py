"""ect.sample --search-sigmas: noise levels found on some images and reported on others, as commands that use them."""

from __future__ import annotations

import itertools
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

from ect import sample as cli
from ect.sampler import SIGMA_MIN, Consistency
from ect.search import sigmas
from ect.search.judge import Judge
from tests.test_sample import write_model

MODEL = "ect/models/digits.safetensors"


def apart(levels: tuple[float, ...], best: tuple[float, ...]) -> float:
    """How far levels are from the best ones, in ln sigma; two neighbours act together."""
    gaps = [math.log(a / b) for a, b in zip(levels, best, strict=True)]
    return 1 + sum(gap**2 for gap in gaps) + 0.5 * sum(a * b for a, b in itertools.pairwise(gaps))


@pytest.mark.parametrize("best", [(0.3,), (12.0,), (5.0, 0.7), (9.0, 1.5, 0.2)])
def test_the_search_finds_the_best_levels_wherever_it_starts(best: tuple[float, ...]) -> None:
    for start in ((0.821,), (40.0,), (0.01,)):
        while len(start) < len(best):
            start = sigmas.one_more(start)
        asked = []

        def rate(levels: tuple[float, ...], asked: list[Any] = asked) -> float:
            asked.append(levels)
            return apart(levels, best)

        found = sigmas.search(rate, start)
        assert apart(found, best) < 1.02 and apart(found, best) == min(map(apart, asked, [best] * len(asked)))
        assert len(asked) == len(set(asked)) <= 50 * len(best)
        assert all(80 >= a > b > 0 for levels in asked for a, b in zip((80, *levels), levels, strict=False))
        assert found == sigmas.search(lambda levels: apart(levels, best), start)


def test_the_search_is_not_caught_beside_the_best_place() -> None:
    def two_valleys(levels: tuple[float, ...]) -> float:
        x = math.log(levels[0])
        return min((x - math.log(0.8)) ** 2 + 0.5, (x - math.log(12)) ** 2)

    assert sigmas.search(two_valleys, (0.821,))[0] == pytest.approx(12, rel=0.1)


def test_a_search_that_finds_nothing_returns_its_start() -> None:
    start = (0.821, 0.3)
    assert sigmas.search(lambda levels: 1.0 + (levels != start), start) == start


def test_one_more_level_always_falls() -> None:
    levels: tuple[float, ...] = ()
    for _ in range(9):
        levels = sigmas.one_more(levels)
    assert all(a > b > SIGMA_MIN for a, b in zip((80.0, *levels), levels, strict=False))


def main(*args: Any) -> None:
    cli.main([*map(str, args), "--search-sigmas", "--device", "cpu", "--threads", "1"])


@pytest.mark.slow
def test_the_command_prints_levels_that_it_takes_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, bool]] = []
    original = Judge.rate

    def rate(self: Judge, net: Any, sampler: Consistency, finals: bool = False) -> float:
        asked.append((sampler, finals))
        return original(self, net, sampler, finals)

    monkeypatch.setattr(Judge, "rate", rate)
    model = Path(MODEL).resolve()
    monkeypatch.chdir(tmp_path)
    main(model, "--nfe", "3,2", "--samples", "32", "--batch", "32")
    out = capsys.readouterr().out
    assert f"{len(asked)} ratings of 32 images each" in out
    assert all(f"{name} at {nfe} NFE: " in out for name in ("FDc", "FDp") for nfe in (2, 3))
    commands = [shlex.split(line)[3:] for line in out.splitlines() if line.startswith("python -m ect.sample ")]
    options = [tyro.cli(cli.Options, args=args) for args in commands]
    assert [len(found.mid_t) for found in options] == [1, 2] and all(found.checkpoint == model for found in options)
    for found in options:
        nfe = len(found.mid_t) + 1
        finals = [sampler for sampler, final in asked if final and sampler.nfe == nfe]
        assert Consistency((80.0, *found.mid_t)) in finals and len(finals) == 2
        assert finals[0].sigmas == (80.0, 0.821) or nfe > 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--nfe", "1,2"], "--nfe 1: a search is for levels after the first; expected numbers from 2 on"),
        (["--nfe", "2,x"], "--nfe 2,x: expected a number of network evaluations, or several such as 2,3,4"),
        (["--nfe", "99"], "--nfe 99: expected at most 10"),
        (["--seeds", "0-3"], "--seeds 0-3: --search-sigmas makes no images"),
        (["--heun", "3"], "--heun 3: --search-sigmas makes no images"),
        (["--count", "9"], "--count 9: --search-sigmas makes no images"),
        (["--out", "x.png"], "--out x.png: --search-sigmas makes no images"),
        (["--mid-t", "3"], "--mid-t 3.0: --search-sigmas makes no images"),
        (["--samples", "1"], "--samples 1: expected at least 2"),
        (["--data", "no/such"], "--data no/such: no such file or folder"),
        ([], "it does not say what it was trained on; give those images, --data PATH"),
    ],
)
def test_what_does_not_fit_is_refused(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(model, *args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and said in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("args", [["--nfe", "2,3"], ["--data", "digits"], ["--samples", "20"]])
def test_what_is_of_the_search_is_refused_without_it(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main([str(model), *args, "--device", "cpu"])
    assert f"error: {' '.join(args)}: " in (err := capsys.readouterr().err) and "--search-sigmas" in err
    assert list(tmp_path.iterdir()) == [model]
