"""The laws of a scaling study, on points whose truth is known: fits, bands, the points of a grid, and when a law is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from ect.errors import UserError
from ect.scaling import laws, points
from ect.scaling.cells import Cell
from ect.scaling.laws import Array, PowerLaw, allows, alternatives, with_floor
from ect.scaling.verdict import Verdict, held_out, judge

stats = pytest.importorskip("scipy.stats")

COMPUTE = 1e9 * 10.0 ** np.linspace(0, 3, 12)
TRUTHS: dict[str, Callable[[Array], Array]] = {
    "power law": lambda x: 100 * (x / 1e9) ** -0.35,
    "constant": lambda x: np.full(x.shape, 100.0),
    "logarithm": lambda x: 100 - 13 * np.log(x / 1e9),
    "exponential": lambda x: 100 * np.exp(-2.4 * x / 1e12),
    "power law with floor": lambda x: 100 * (0.9 * (x / 1e9) ** -0.6 + 0.1),
}
DRAWS, NOISE = 200, 0.05


def noisy(truth: Callable[[Array], Array], random: np.random.Generator, noise: float = NOISE) -> tuple[Array, Array]:
    """Two seeds at each compute."""
    x = np.repeat(COMPUTE, 2)
    return x, truth(x) * np.exp(noise * random.standard_normal(len(x)))


def judged(x: Array, y: Array) -> Verdict:
    return judge(x.tolist(), y.tolist())


def test_the_power_law_is_the_line_of_linear_regression() -> None:
    x, y = noisy(TRUTHS["power law"], np.random.default_rng(0))
    law, line = PowerLaw.fit(x, y), stats.linregress(np.log(x), np.log(y))
    assert law.exponent == pytest.approx(-line.slope) and math.log(law.factor) == pytest.approx(line.intercept)
    reach = stats.t.ppf(0.975, len(x) - 2) * line.stderr
    assert law.interval() == pytest.approx((-line.slope - reach, -line.slope + reach))
    assert str(law) == f"{law.factor:.4g} C^-{law.exponent:.4g}"
    low, high = law.band(np.array([1.0]))  # of ln F at ln C = 0, where the line has its intercept
    reach = stats.t.ppf(0.975, len(x) - 2) * line.intercept_stderr
    assert np.log([low[0], high[0]]) == pytest.approx([line.intercept - reach, line.intercept + reach])


def test_intervals_and_bands_hold_what_they_say() -> None:
    """Of 400 draws 95 % hold the truth: 380, within three standard deviations."""
    random, place, held = np.random.default_rng(1), np.array([1e13]), np.zeros(3)
    true = TRUTHS["power law"](place)
    for _ in range(400):
        law = PowerLaw.fit(*noisy(TRUTHS["power law"], random))
        ends = law.interval(), law.band(place), law.band(place, of_a_point=True)
        once_more = true * math.exp(NOISE * random.standard_normal())
        held += [bool(low <= value <= high) for (low, high), value in zip(ends, (0.35, true, once_more), strict=True)]
    assert all(abs(held - 380) < 13)


@pytest.mark.parametrize("name", [name for name in TRUTHS if name != "power law"])
def test_each_form_finds_its_own_curve(name: str) -> None:
    curve, beyond = TRUTHS[name], np.array([1.5e12])
    found = {form.name: form for form in alternatives(COMPUTE, curve(COMPUTE))}
    assert found.keys() | {"power law"} == TRUTHS.keys()
    assert found[name].error(COMPUTE, curve(COMPUTE)) < 1e-5
    assert found[name].curve(beyond) == pytest.approx(curve(beyond), rel=1e-3)
    others = [form.error(COMPUTE, curve(COMPUTE)) for form in found.values() if form.name != name]
    assert name == "constant" or min(others) > 0.01


def test_formulas_are_those_of_the_truth() -> None:
    found = {
        name: {f.name: f.formula for f in alternatives(COMPUTE, TRUTHS[name](COMPUTE))}[name]
        for name in TRUTHS
        if name != "power law"
    }
    assert found["constant"] == "100" and found["exponential"] == "100 exp(-2.4e-12 C)"
    assert found["logarithm"] == f"{100 + 13 * math.log(1e9):.4g} - 13 ln C"
    assert found["power law with floor"] == f"{90 * 1e9**0.6:.4g} C^-0.6 + 10"


def test_a_form_that_falls_below_0_predicts_nothing() -> None:
    curve = TRUTHS["logarithm"]
    form = next(form for form in alternatives(COMPUTE, curve(COMPUTE)) if form.name == "logarithm")
    assert form.error(np.array([1e9, 1e15]), np.array([100.0, 1.0])) == math.inf


def test_a_floor_that_is_there_is_allowed_and_others_are_not() -> None:
    x, y = noisy(TRUTHS["power law with floor"], np.random.default_rng(2), 0.02)
    assert allows(x, y, 10.0) and not allows(x, y, 1.0) and not allows(x, y, 0.95 * y.min())
    assert with_floor(x, y, 5.0).formula.endswith(" + 5")


def test_the_largest_fourth_of_the_computes_is_held_out() -> None:
    for places, held in ((5, 1), (7, 1), (8, 2), (11, 2), (12, 3)):
        x = np.repeat(np.arange(1.0, places + 1), 2)
        assert sorted(set(x[held_out(x)])) == list(range(places - held + 1, places + 1))


def test_points_that_are_too_few_support_nothing() -> None:
    verdict = judge([1.0, 2.0, 3.0, 4.0] * 2, [4.0, 3.0, 2.0, 1.0] * 2)
    assert not verdict.supported and verdict.law is None
    assert (
        str(verdict) == "A power law is not supported: too few points: it takes 5 different computes, and these have 4."
    )


def test_a_verdict_names_each_reason() -> None:
    random = np.random.default_rng(3)
    assert "the exponent may be 0 or of the other sign (" in str(judged(*noisy(TRUTHS["constant"], random)))
    bent = str(judged(*noisy(TRUTHS["power law with floor"], random)))
    assert "lie above its band, as where a floor is near" in bent
    assert "another form, power law with floor, predicts the held-out points better (error 0." in bent
    assert "lie below its band;" in str(judged(*noisy(TRUTHS["exponential"], random)))
    narrow = judge([1e9, 1.2e9, 1.5e9, 1.8e9, 2.1e9], [100, 93, 86.5, 81, 77])
    assert "the points allow a floor at 0.5 of the least figure: too narrow a range" in str(narrow)
    good = judged(*noisy(TRUTHS["power law"], np.random.default_rng(7)))
    assert str(good) == (
        "A power law is supported: it predicts the 6 held-out points within its band, and no other form predicts better."
    )
    assert good.law is not None and good.whole is not None and good.whole.count == good.law.count + 6 == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUTHS)
def test_a_power_law_is_claimed_where_there_is_one(name: str) -> None:
    """Over three decades, with residuals of 5 %: in most draws of a power law, in hardly any of another curve."""
    random = np.random.default_rng(4)
    share = sum(judged(*noisy(TRUTHS[name], random)).supported for _ in range(DRAWS)) / DRAWS
    print(f"{name}: supported in {share:.1%} of {DRAWS} draws")
    assert share > 0.75 if name == "power law" else share <= 0.01


@pytest.mark.slow
def test_where_the_range_is_too_narrow_nothing_is_claimed() -> None:
    """Over one decade, with residuals of 10 %, a curve that ends at a floor looks like a power law."""
    random, share = np.random.default_rng(5), 0.0
    for _ in range(DRAWS):
        x = np.repeat(1e9 * 10.0 ** np.linspace(0, 1.2, 6), 2)
        y = TRUTHS["power law with floor"](x) * np.exp(0.1 * random.standard_normal(len(x)))
        share += judged(x, y).supported / DRAWS
    print(f"a floor over a narrow range: a power law is claimed in {share:.1%} of {DRAWS} draws")
    assert share <= 0.08  # a test at 5 %, and two standard deviations of its count


def cell(width: int, kimg: float, seed: int, figure: float) -> Cell:
    """A cell whose network costs its width squared."""
    cost, images = 1e3 * width**2, round(1000 * kimg)
    return Cell(
        "digits", width, kimg, seed, images, 100 * width, cost, 4 * cost * images, 3 * cost * 1000, 2.0, 1.0, 64,
        {"nfe2/FDc": figure}, "a CPU",
    )  # fmt: skip


WIDTHS, KIMG = (8, 16, 32), (1.0, 4.0, 16.0, 64.0)


def test_the_points_of_a_seed_are_chosen_by_the_others() -> None:
    best = {(8, 1.0): 90.0, (8, 4.0): 60.0, (16, 4.0): 50.0, (32, 16.0): 20.0}
    grid = {(width, kimg): best.get((width, kimg), 95.0) for width in WIDTHS for kimg in KIMG}
    cells = [cell(*place, 0, figure) for place, figure in grid.items()] + [cell(*place, 1, 7.0) for place in grid]
    found = points.against_training(cells, "nfe2/FDc")
    of_1 = [(one.width, one.kimg) for _, _, one in found if one.seed == 1]
    assert sorted(of_1) == sorted(best) and all(y == 7.0 for _, y, one in found if one.seed == 1)
    assert [(one.width, one.kimg) for _, _, one in found if one.seed == 0] == [(8, 1.0)]  # all others cost more
    alone = points.against_training([one for one in cells if one.seed == 0], "nfe2/FDc")
    assert len(alone) == len(grid)


def test_a_cell_that_costs_as_much_and_is_worse_is_no_point() -> None:
    cells = [cell(8, 4.0, seed, 20.0) for seed in (0, 1)] + [cell(16, 1.0, seed, 10.0) for seed in (0, 1)]
    assert len({one.training_flops for one in cells}) == 1
    assert {one.width for _, _, one in points.against_training(cells, "nfe2/FDc")} == {16}


def test_against_the_model_the_cells_of_the_most_images_count() -> None:
    cells = [cell(width, kimg, 0, 10.0) for width in WIDTHS for kimg in KIMG]
    found = points.against_model(cells, "nfe2/FDc")
    assert [(x, one.kimg) for x, _, one in found] == [(1e3 * width**2, 64.0) for width in WIDTHS]


@pytest.mark.slow
def test_a_grid_of_chance_alone_has_no_law() -> None:
    """The best cells by their own figures fall with compute; those chosen by the other seed do not."""
    random, lucky, several, claimed = np.random.default_rng(6), 0, 0, 0
    for _ in range(DRAWS):
        cells = [
            cell(width, kimg, seed, 50 * math.exp(0.2 * random.standard_normal()))
            for width in (8, 12, 16, 24, 32)
            for kimg in (*KIMG, 256.0)
            for seed in (0, 1)
        ]
        found = points.against_training(cells, "nfe2/FDc")
        claimed += judge([x for x, _, _ in found], [y for _, y, _ in found]).supported
        own = points.against_training([*cells[::2], *(replace(one, seed=1) for one in cells[::2])], "nfe2/FDc")
        if len({x for x, _, _ in own}) > 2:
            law = PowerLaw.fit(np.array([x for x, _, _ in own]), np.array([y for _, y, _ in own]))
            several, lucky = several + 1, lucky + (law.interval()[0] > 0)
    print(
        f"chance alone: a power law is claimed in {claimed} of {DRAWS} grids; by own figures {lucky} of {several} fall"
    )
    assert claimed <= 0.02 * DRAWS and lucky > 0.8 * several > 0.3 * DRAWS


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(
        UserError, match=r"scipy, .* is not installed; pip install 'easy-consistency-tuning\[scaling\]'"
    ):
        laws.library()
