"""The ledger: what it trains and what not, how it compares recipes, and what it says of recorded lines."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ledger
import pytest
from lib import claims, ledger_lines, ledger_report, paired, recipes
from lib.claims import Claim
from lib.ledger_lines import Line

from ect.config import ObjectiveConfig
from ect.options import MAX_TIGHTNESS, check
from tests.test_imports import ROOT


def line(recipe: str, seed: int, curve: Sequence[tuple[float, float, float]], **changes: Any) -> Line:
    """A line on digits; curve: (seconds, FDc at 1, FDc at 2 evaluations)."""
    data = changes.get("data", "digits")
    points = [[float(i), spent, {"nfe1/FDc": one, "nfe2/FDc": two}] for i, (spent, one, two) in enumerate(curve)]
    return {
        "data": data, "recipe": recipe, "length": 1.0, "seed": seed, "options": recipes.options_of(data, recipe),
        "unit": "core-seconds", "seconds": curve[-1][0], "pace": 0.01, "curve": points, "machine": "cpu X", "threads": 1,
        "torch": "2", **changes,
    }  # fmt: skip


BASES = [line("published", seed, [(50, 80, 40), (100, 40 + seed, 20 + seed)]) for seed in range(5)]
HALF = [line("q64", seed, [(40, 39, 30), (100, 20 + seed / 2, 19 + seed)]) for seed in range(5)]


def write(path: Path, lines: Sequence[Line]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_ratios_are_paired_by_seed() -> None:
    """The t quantile of 2 degrees of freedom is 4.3027 (any table); logarithms of 1/2, 1/4, 1/8 have a deviation of ln 2."""
    found = paired.compare({0: 1.0, 1: 1.0, 2: 1.0, 7: 9.0}, {0: 2.0, 1: 4.0, 2: 8.0, 8: 1.0})
    assert found is not None
    half = 4.3027 * math.log(2) / math.sqrt(3)
    assert (found.seeds, found.better, found.p) == (3, 3, 0.25) and found.ratio == pytest.approx(0.25)
    assert found.low == pytest.approx(0.25 * math.exp(-half), rel=1e-3)
    assert found.high == pytest.approx(0.25 * math.exp(half), rel=1e-3) and not found.wins
    assert paired.compare({0: 1.0}, {1: 1.0}) is None


def test_a_single_seed_and_a_figure_never_reached_win_nothing() -> None:
    alone = paired.compare({0: 1.0}, {0: 2.0})
    assert (
        alone is not None
        and (alone.low, alone.high, alone.wins) == (0.0, math.inf, False)
        and str(alone) == "0.50, 1/1"
    )
    never = paired.compare({0: math.inf, 1: 1.0}, {0: 1.0, 1: 2.0})
    assert never is not None and never.ratio == math.inf and not never.wins
    five = paired.compare(dict.fromkeys(range(5), 1.0), dict.fromkeys(range(5), 2.0))
    assert five is not None and five.wins and five.p == pytest.approx(1 / 16)
    equal = paired.compare({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert equal is not None and (equal.p, equal.better, equal.wins) == (1.0, 0, False)


def test_costs_are_compared_at_the_pace_of_their_own_run() -> None:
    """A run beside other work takes twice as long, and so does its forward pass: it costs the same."""
    slow = line("q64", 0, [(80, 39, 30), (200, 20, 19)], pace=0.02)
    quiet = ledger_lines.quiet_pace([slow, *BASES])
    assert ledger_lines.seconds(slow, quiet) == pytest.approx(100) and ledger_lines.seconds(BASES[0], quiet) == 100
    assert ledger_lines.as_dear({0: slow}, BASES, "published").keys() == set(range(5))
    assert ledger_lines.share_of_time([slow, *BASES], "q64", "published", 1.0, 1) == {0: pytest.approx(0.4)}


def test_a_run_is_compared_with_the_shortest_one_that_costs_as_much() -> None:
    short = [{**line("published", seed, [(50, 60, 50)]), "length": 0.5} for seed in range(5)]

    def rivals(*costs: float) -> set[float]:
        ours = {seed: line("q64", seed, [(cost, 20, 10)]) for seed, cost in enumerate(costs)}
        return {line["length"] for line in ledger_lines.as_dear(ours, [*BASES, *short], "published").values()}

    assert rivals(54, 54) == rivals(10) == rivals(54, 54, 90) == {0.5}
    assert rivals(56, 56) == rivals(109) == {1.0} and rivals(111) == rivals() == set()
    dear = [line("q16", seed, [(60, 50, 30), (140, 20, 10)]) for seed in range(5)]
    assert claims.quality([*BASES, *dear], "q16", "published", 1.0, 1) is None
    assert [row[5] for row in ledger_report.table([*BASES, *dear], "digits").rows] == ["", "dearer"]
    assert Claim("digits", "q16", 1, 1.0).verdict([*BASES, *dear])[1] == "not recorded: 0 of 5 seeds"


def test_a_target_is_reached_at_the_first_evaluation_at_or_below_it() -> None:
    found = line("q64", 0, [(10, 50, 9), (20, 30, 9), (30, 40, 9)])
    assert ledger_lines.reached(found, 30, 1) == 20 and ledger_lines.reached(found, 29, 1) is None
    assert ledger_lines.share_of_time([*BASES, line("q64", 1, [(10, 50, 9)])], "q64", "published", 1.0, 1) == {
        1: math.inf
    }


def test_lines_of_a_recipe_that_has_changed_and_torn_ones_do_not_count(tmp_path: Path) -> None:
    old, gone = (
        line("q64", 1, [(1, 1, 1)], options=["--objective.q", "8"]),
        line("q64", 2, [(1, 1, 1)]) | {"recipe": "x"},
    )
    path = write(tmp_path / "ledger.jsonl", [BASES[0], old, gone, HALF[0]])
    with path.open("a") as file:
        file.write('{"data": "dig')
    ledger_lines.append(path, line("q64", 0, [(5, 5, 5)]))
    found = ledger_lines.read(path)
    assert set(found) == {("digits", "published", 1.0, 0), ("digits", "q64", 1.0, 0)}
    assert ledger_lines.figure(found["digits", "q64", 1.0, 0], 1) == 5
    assert ledger_lines.read(tmp_path / "none") == {}


def test_claims_want_their_seeds_and_their_margin() -> None:
    both = [*BASES, *HALF]
    assert Claim("digits", "q64", 1, 0.55).verdict(both)[0] and not Claim("digits", "q64", 1, 0.45).verdict(both)[0]
    assert Claim("digits", "q64", 2, 1.0).verdict(both)[0]
    assert Claim("digits", "q64", 1, 0.45, by="time").verdict(both)[0]
    assert not Claim("digits", "q64", 1, 0.35, by="time").verdict(both)[0]
    assert not Claim("digits", "q64", 2, 0.6, by="time").verdict(both)[0]
    for claim in (Claim("digits", "q64", 1, 0.9), Claim("digits", "q64", 1, 0.9, by="time")):
        assert claim.verdict(both[:-1]) == (False, "not recorded: 4 of 5 seeds")
        assert claim.verdict([])[1] == "not recorded: 0 of 5 seeds"
    assert str(Claim("digits", "q64", 1, 0.5)) == "digits, 1 evaluation: q64's FDc is at most 0.5 of published's"


def test_a_win_wants_the_whole_interval_below_1() -> None:
    uneven = [line("q64", seed, [(100, 40 * factor, 20)]) for seed, factor in enumerate((0.2, 1.4, 1.4, 0.2, 1.4))]
    claim = Claim("digits", "q64", 1, 0.9)
    found = claims.quality([*BASES, *uneven], "q64", "published", 1.0, 1)
    assert found is not None and found.ratio < 0.9 and not claim.verdict([*BASES, *uneven])[0]


def test_the_table_says_what_the_rules_say() -> None:
    teacher = line("diffusion", 0, [(0, 1, 1)]) | {"curve": [[0.0, 0.0, {"nfe35/FDc": 11.0}]], "seconds": 0.0}
    rows = ledger_report.table([*BASES, *HALF, teacher], "digits").rows
    assert [row[0] for row in rows] == ["diffusion", "published", "q64"]
    assert rows[0][4] == "11 at 35" and rows[1][3:6] == ["100 +- 0", "42 +- 1.6", ""]
    assert "0.50 (0.50-0.50), 5/5, p 0.062, wins" in rows[2][5] and rows[2][-1] == "0.40 / 1.00"
    times = ledger_report.time_table([*BASES, *HALF, teacher], 39, 1).rows
    assert [row[2] for row in times] == ["never", "40"] and "4: never" in times[0][3]


@pytest.mark.slow
def test_quality_over_time_is_drawn(tmp_path: Path) -> None:
    ledger_report.plot([*BASES, *HALF, line("q16", 0, [(3, 4, 5)])], "digits", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("data", "recipe"), [*(("digits", name) for name in recipes.RECIPES), *((name, "q64") for name in recipes.SETS)]
)
def test_every_recipe_is_a_run_of_its_data_set(data: str, recipe: str) -> None:
    cfg, found = recipes.config(data, recipe, 0.5, seed=3, threads=1), recipes.SETS[data]
    check(cfg)
    assert (cfg.seed, cfg.threads) == (3, 1) and cfg.objective.kind == "consistency"
    assert cfg.log.eval_kimg * found.points == pytest.approx(cfg.total_kimg)
    if cfg.objective.n_stages > 1:
        assert cfg.objective.n_stages * cfg.objective.stage_kimg == pytest.approx(cfg.total_kimg)
    assert math.log2(cfg.objective.q) * cfg.objective.n_stages <= MAX_TIGHTNESS


@pytest.mark.parametrize("data", recipes.SETS)
def test_a_length_stretches_a_run_and_leaves_the_teacher(data: str) -> None:
    half, whole = (recipes.config(data, "published", length, 3, 1) for length in (0.5, 1.0))
    for cfg, factor in ((half, 0.5), (whole, 1.0)):
        assert cfg.total_kimg == whole.total_kimg * factor and cfg.optim.decay_kimg == whole.optim.decay_kimg * factor
        assert cfg.objective.stage_kimg == whole.objective.stage_kimg * factor
    teacher = recipes.teacher_config(data, 3, 1)
    check(teacher)
    assert teacher.objective.kind == "diffusion" and teacher.pretrain is None and teacher.log.eval_kimg == 0
    assert teacher.optim.decay_kimg < teacher.total_kimg


def test_the_command_offers_every_data_set() -> None:
    assert typing.get_args(typing.get_type_hints(ledger.Options)["data"]) == tuple(recipes.SETS)


def test_recipes_differ_and_share_their_teacher() -> None:
    options = [tuple(recipe.options.split()) for name, recipe in recipes.RECIPES.items() if name != recipes.TEACHER]
    assert len(set(options)) == len(options)
    assert recipes.RECIPES[recipes.BASE].options == ""


class Fake:
    """Makes lines without training; a recipe named in `failing` raises."""

    made: list[tuple[str, float, int, bool]]
    failing: tuple[str, ...] = ()
    figure = 20.0

    def __init__(self, data: str, folder: Path, threads: int) -> None:
        self.data = data

    def line(self, recipe: str, length: float, seed: int, again: bool = False) -> Line:
        if recipe in self.failing:
            raise RuntimeError("no")
        self.made.append((recipe, length, seed, again))
        return line(recipe, seed, [(5, 50, 40), (10, self.figure, self.figure)], length=length, data=self.data)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    class Mine(Fake):
        made = []  # noqa: RUF012

    monkeypatch.setattr(ledger, "Bench", Mine)
    return Mine


def test_what_is_recorded_is_not_trained_again(
    tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--results", str(tmp_path / "ledger.jsonl"), "--recipes", "published", "q64", "--seeds", "0", "1"]
    assert ledger.main(run) == 0
    assert [made[::2] for made in fake.made] == [("published", 0), ("q64", 0), ("published", 1), ("q64", 1)]
    fake.made.clear()
    assert ledger.main([*run, "--lengths", "1", "0.5"]) == 0
    assert fake.made == [(recipe, 0.5, seed, False) for seed in (0, 1) for recipe in ("published", "q64")]
    fake.made.clear()
    assert ledger.main([*run, "--until", "30", "--nfe", "1", "--markdown"]) == 0 and fake.made == []
    assert "| q64 | 1 | 10 | 0: 10, 1: 10 |" in capsys.readouterr().out
    assert ledger.main([*run, "--seeds", "1", "--again"]) == 0
    assert fake.made == [("published", 1.0, 1, True), ("q64", 1.0, 1, True)]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 10


def test_a_recipe_that_fails_takes_no_other_along(
    tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "failing", ("q64",))
    run = ["--results", str(tmp_path / "l.jsonl"), "--recipes", "q64", "published", "--seeds", "0"]
    assert ledger.main(run) == 1
    assert "seed 0, q64, length 1 failed: RuntimeError: no" in capsys.readouterr().out
    assert [made[0] for made in fake.made] == ["published"]


def test_a_signal_ends_the_command_with_a_sentence(
    tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Line:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "line", interrupted)
    assert ledger.main(["--results", str(tmp_path / "l.jsonl")]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err and not (tmp_path / "l.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "figure", "status", "said"),
    [
        ({}, 20.0, 0, "as recorded (20) on the same machine"),
        ({}, 20.1, 1, "NOT as recorded"),
        ({"machine": "cpu Y"}, 25.0, 0, "as recorded (20) on another machine (cpu Y, torch 2)"),
        ({"torch": "3"}, 31.0, 1, "NOT as recorded"),
    ],
)
def test_smoke_compares_two_short_lines_with_the_record(
    changes: dict[str, str], figure: float, status: int, said: str, tmp_path: Path, fake: type[Fake],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recorded = [line(name, 0, [(10, 20, 20)], data="smoke", **changes) for name in ledger.SMOKE]
    path = write(tmp_path / "ledger.jsonl", recorded)
    monkeypatch.setattr(fake, "figure", figure)
    assert ledger.main(["--smoke", "--results", str(path)]) == status
    assert said in capsys.readouterr().out and len(fake.made) == 2
    assert path.read_text().count("\n") == 2  # nothing is recorded


def test_check_asserts_each_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ledger.jsonl", [*BASES, *HALF])
    good, bad = Claim("digits", "q64", 1, 0.6), Claim("digits", "q64", 1, 0.3)
    monkeypatch.setattr(claims, "CLAIMS", (good,))
    assert (
        ledger.main(["--check", "--results", str(path)]) == 0 and "0.6 of published's: holds" in capsys.readouterr().out
    )
    monkeypatch.setattr(claims, "CLAIMS", (good, bad))
    assert (
        ledger.main(["--check", "--results", str(path)]) == 1 and "0.3 of published's: fails" in capsys.readouterr().out
    )


def test_the_recorded_claims_hold() -> None:
    """The committed lines carry the claims, and those that `make ledger-smoke` trains again are among them."""
    assert ledger.main(["--check"]) == 0
    recorded = ledger_lines.read(ledger.RESULTS)
    assert all(("smoke", name, 1.0, ledger.SMOKE_SEED) in recorded for name in ledger.SMOKE)
    assert "ledger.py --smoke" in (ROOT / "Makefile").read_text()


def test_seconds_of_a_processor_and_of_a_gpu_are_in_no_table_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "ledger.jsonl", [BASES[0], line("q64", 0, [(1, 20, 20)], unit="GPU-seconds")])
    assert ledger.main(["--report", "--results", str(path)]) == 2
    assert "has lines in GPU-seconds and in core-seconds, which do not compare" in capsys.readouterr().err


def test_a_teacher_alone_is_recorded_and_makes_no_table(
    tmp_path: Path, fake: type[Fake], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rated = line("diffusion", 0, [(0, 1, 1)]) | {"curve": [[0.0, 0.0, {"nfe35/FDc": 11.0}]], "seconds": 0.0}
    monkeypatch.setattr(fake, "line", lambda *args, **how: rated)
    run = ["--results", str(tmp_path / "l.jsonl"), "--recipes", "diffusion", "--seeds", "0"]
    assert ledger.main(run) == 0 and "there is no table" in capsys.readouterr().out
    assert ledger.main([*run, "--report"]) == 2 and "leave --report out" in capsys.readouterr().err


def test_each_way_to_train_has_a_recipe() -> None:
    """What ect.train can do with a pair or with the learning rate, the ledger tries."""
    configs = [recipes.config("digits", name, 1.0, 0, 1) for name in recipes.RECIPES]
    hints = typing.get_type_hints(ObjectiveConfig)
    assert {cfg.objective.target for cfg in configs} == set(typing.get_args(hints["target"]))
    assert {"inverse_gap", "adaptive"} <= {cfg.objective.weighting for cfg in configs}
    assert {cfg.objective.direction for cfg in configs} == set(typing.get_args(hints["direction"]))
    assert {"linear", "constant", "cooldown"} <= {cfg.optim.decay for cfg in configs}


def test_too_few_seeds_win_nothing_in_the_table() -> None:
    (*_, few) = ledger_report.table([*BASES, *HALF[:4]], "digits").rows
    assert "0.50 (0.50-0.50), 4/4" in few[5] and "wins" not in few[5]
