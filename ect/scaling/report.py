"""The report of a study: what is concluded, the fits, the cells, and what it all cost; report.md and scaling.svg."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console

from ect.errors import UserError
from ect.files.atomic import atomic
from ect.scaling import picture, points
from ect.scaling.cells import Cell
from ect.scaling.laws import LEVEL
from ect.scaling.picture import Panel
from ect.scaling.points import Points
from ect.scaling.verdict import PLACES, Verdict, judge
from ect.show import document
from ect.show.document import Block, Code, Heading, Picture
from ect.show.table import Table

REPORT, PICTURE = "report.md", "scaling.svg"
Subject = tuple[str, str, Points, Verdict]
"""(the compute, which cells are points, the points, the verdict)."""


class Report:
    """The report on some cells, by the figure `metric` of images by `nfe` network evaluations.

    Raises UserError where none of the cells has such a figure, or they are not of one study.
    """

    def __init__(self, cells: Sequence[Cell], metric: str, nfe: int) -> None:
        self.metric, self.nfe, self.name = metric, nfe, f"nfe{nfe}/{metric}"
        if len({(cell.preset, cell.samples) for cell in cells}) > 1:
            raise UserError(
                "the cells are of several presets, or of ratings by several numbers of images; give one study's"
            )
        self.cells = [cell for cell in cells if not math.isnan(cell.figure(self.name))]
        self.without = [cell for cell in cells if math.isnan(cell.figure(self.name))]
        if not self.cells:
            known = ", ".join(sorted({name for cell in cells for name in cell.figures})) or "none"
            raise UserError(f"--metric {metric} --nfe {nfe}: no cell has such a figure above 0; they have: {known}")
        one_seed = len({cell.seed for cell in self.cells}) == 1
        training, model = points.against_training(self.cells, self.name), points.against_model(self.cells, self.name)
        chosen = (
            "all cells" if one_seed else "for each seed, the cells that are best for their compute by the other seeds"
        )
        most = max(cell.kimg for cell in self.cells)
        self.subjects: list[Subject] = [
            ("training FLOPs", chosen, training, _judged(training)),
            ("model FLOPs", f"the cells of {most:g} kimg, the most images", model, _judged(model)),
        ]

    def verdicts(self) -> list[str]:
        """Return a sentence for each kind of compute."""
        return [f"{self.metric} against {compute}: {_lower(str(verdict))}" for compute, _, _, verdict in self.subjects]

    def show(self, console: Console) -> None:
        """Print the report, but for its picture."""
        for block in self.blocks():
            if isinstance(block, Heading):
                console.print(f"\n{block.text}", style="bold", highlight=False, markup=False)
            elif isinstance(block, str | Table):
                console.print(block) if isinstance(block, Table) else console.print(
                    block, highlight=False, markup=False
                )

    def write(self, folder: Path, command: str, spent: str) -> None:
        """Write report.md and its picture into a folder, each atomically. spent: says what the command took."""
        with atomic(folder / PICTURE) as temp:
            temp.write_text(self.picture(), encoding="utf-8")
        with atomic(folder / REPORT) as temp:
            temp.write_text(document.markdown(list(self.blocks(folder / PICTURE, command, spent))), encoding="utf-8")

    def picture(self) -> str:
        """Return the picture as SVG."""
        every = [(cell.training_flops, cell.figure(self.name), cell) for cell in self.cells]
        shown = {"training FLOPs": every, "model FLOPs": self.subjects[1][2]}
        return picture.draw(
            [
                Panel(f"{self.metric} against {compute}", f"{compute} (counted)", shown[compute], found, verdict)
                for compute, _, found, verdict in self.subjects
            ]
        )

    def blocks(self, drawn: Path | None = None, command: str = "", spent: str = "") -> Iterator[Block]:
        """Yield the parts of the report. drawn, command, spent: its picture, what made it and took how long, where known."""
        first = self.cells[0]
        yield Heading(f"Scaling study: {self.metric} at {self.nfe} network evaluation{'s' * (self.nfe > 1)}", 1)
        yield (
            f"Preset {first.preset}; {_several(len(self.cells), 'run')}, each rated by {first.samples:,} images. FLOPs are "
            "counted, 2 a multiply-add of convolutions, matrix products and attention."
        )
        yield from self.verdicts()
        if self.without:
            yield f"Left out, without such a figure above 0: {', '.join(map(_named, self.without))}."
        if drawn is not None:
            band = (
                f"Bands of {LEVEL:.0%}, of the curve (dark) and of one more point (light); "
                "rings that are not filled are held out; dashed: a power law with a floor"
            )
            yield [Picture(drawn, band)]
        for compute, chosen, found, verdict in self.subjects:
            yield Heading(f"Against {compute}")
            yield from _fits(chosen, found, verdict)
        yield Heading("Cells")
        yield self._table()
        yield Heading("Widths")
        yield self._widths()
        yield "The teachers are no part of the training FLOPs above. Seconds are wall clock, the mean of the runs."
        if command:
            yield Heading("Command")
            yield Code(command)
            yield spent
        yield Heading("Machine")
        tuning = sum(cell.seconds for cell in self.cells)
        teachers = sum({(cell.width, cell.seed): cell.teacher_seconds for cell in self.cells}.values())
        yield "; ".join(sorted({cell.machine for cell in self.cells})) + "."
        yield f"Tuning took {tuning / 60:.1f} minutes of all runs together, the teachers {teachers / 60:.1f} minutes."

    def _table(self) -> Table:
        """Return a row for each width and length, with the figure of each seed."""
        seeds = sorted({cell.seed for cell in self.cells})
        rows: list[list[object]] = []
        for width, kimg in sorted({(cell.width, cell.kimg) for cell in self.cells}):
            some = {cell.seed: cell for cell in self.cells if (cell.width, cell.kimg) == (width, kimg)}
            each = [f"{some[seed].figure(self.name):.4g}" if seed in some else "" for seed in seeds]
            mean = fmean(cell.figure(self.name) for cell in some.values())
            flops = f"{next(iter(some.values())).training_flops:.4g}"
            rows.append([width, f"{kimg:g}", flops, *each, f"{mean:.4g}"])
        heads = ["width", "kimg", "training FLOPs", *(f"{self.metric}, seed {seed}" for seed in seeds), "mean"]
        return Table(heads, rows)

    def _widths(self) -> Table:
        rows: list[list[object]] = []
        for width in sorted({cell.width for cell in self.cells}):
            some = [cell for cell in self.cells if cell.width == width]
            first = some[0]
            rows.append(
                [
                    width, f"{first.parameters:,}", f"{first.model_flops:.4g}", f"{first.training_flops / first.images:.4g}",
                    f"{fmean(1000 * cell.seconds / cell.images for cell in some):.3g}", f"{first.teacher_flops:.4g}",
                    f"{fmean({cell.seed: cell.teacher_seconds for cell in some}.values()):.1f}",
                ]
            )  # fmt: skip
        heads = [
            "width", "parameters", "model FLOPs", "FLOPs an image of tuning", "seconds a kimg", "teacher's FLOPs",
            "teacher's seconds",
        ]  # fmt: skip
        return Table(heads, rows)


def _judged(found: Points) -> Verdict:
    return judge([x for x, _, _ in found], [y for _, y, _ in found])


def _fits(chosen: str, found: Points, verdict: Verdict) -> Iterator[Block]:
    """Yield what the points are, the law, and how each form predicts the points that were held out."""
    places = len({x for x, _, _ in found})
    yield f"Points: {chosen}; {_several(len(found), 'point')} at {_several(places, 'different compute')}."
    if verdict.law is None or verdict.whole is None or verdict.held is None:
        yield f"There are fewer than {PLACES} different computes, and no law is fitted."
        return
    for law, what in ((verdict.whole, "all points"), (verdict.law, "the points that are not held out")):
        low, high = law.interval()
        yield (
            f"Power law of {what}: {law}; exponent {law.exponent:.3g}, with {LEVEL:.0%} from {low:.3g} to {high:.3g}; "
            f"residuals {law.residual:.2g} in the logarithm."
        )
    held = verdict.compute[verdict.held]
    yield (
        f"Held out: {_several(len(held), 'point')} from {held.min():.4g} FLOPs on. The forms are fitted to the others; the "
        "error is the root mean square in the logarithm."
    )
    rest = ~verdict.held
    rows = [
        [form.name, form.formula, f"{form.error(verdict.compute[rest], verdict.figure[rest]):.3g}", f"{error:.3g}"]
        for form, error in zip(verdict.forms, verdict.errors, strict=True)
    ]
    yield Table(["form", "fitted, C in FLOPs", "error", "error held out"], rows, left=("form", "fitted, C in FLOPs"))


def _named(cell: Cell) -> str:
    return f"width {cell.width}, {cell.kimg:g} kimg, seed {cell.seed}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
